"""DIM in the loop: the published settings, two optimizers, every estimator, and the command line end to end."""

import json
import re
from typing import Any

import pytest
import torch

from fused_nce import cli
from fused_nce.train import command, config, methods
from fused_nce.train.loop import Trainer
from tests.train.runs import log, own_rules, tensors

TINY = ["--preset=digits", "--model.width=0.1", "--batch-size=32", "--run.log_every=4", "--precision=fp32"]


def trainer(out, *argv):
    return Trainer(*command.parse("dim", [*TINY, "--out", str(out), *argv])[:2])


BAD = [
    ("model.architecture", "dcgan", "one of dcgan32"),
    ("model.width", 0.0, "above 0"),
    ("model.code", 0, "at least 1"),
    ("loss.mi_units", 0, "at least 1"),
    ("loss.critic_negatives", 0, "null or at least 1"),
    ("loss.alpha", -1.0, "at least 0"),
    ("loss.beta", -1.0, "at least 0"),
    ("loss.gamma", -1.0, "at least 0"),
    ("loss.gradient_penalty", -1.0, "at least 0"),
    ("loss.absolute", -1.0, "at least 0"),
    ("loss.relative", -1.0, "at least 0"),
    ("loss.occlusion", 1.0, "in [0, 1)"),
    ("loss.estimator", "mine", "one of jsd, dv, nce"),
]


def test_every_rule_is_tried():
    assert own_rules("dim") <= {key for key, _, _ in BAD}


@pytest.mark.parametrize(("key", "value", "need"), BAD)
def test_a_bad_setting_is_named(key, value, need):
    settings = methods.get("dim")()
    part, _, field = key.partition(".")
    setattr(getattr(settings, part), field, value)
    with pytest.raises(ValueError, match=f"^{re.escape(key)}: must be .*{re.escape(need)}"):
        settings.check()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--loss.alpha=0", "--loss.beta=0"], "no information to maximise"),
        (["--loss.estimator=jsd", "--loss.anchor=local"], "anchor: got 'local' with estimator='jsd'"),
        (["--loss.critic=concat", "--model.architecture=crops-resnet19-32-several"], "need 'dot' for several globals"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused_before_any_work(tmp_path, argv, message):
    with pytest.raises(ValueError, match=message):
        command.parse("dim", [*argv, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_the_published_settings():
    """Spelled out once more, so that a slip in a table is seen."""

    def read(preset, *keys):
        method = methods.get("dim")
        settings = config.flatten(config.to_dict(method())) | config.flatten(method.presets[preset])
        return tuple(settings[key] for key in keys)

    optim = ("optim.name", "optim.lr", "optim.betas", "optim.weight_decay", "optim.batch_size", "optim.schedule")
    loss = ("loss.estimator", "loss.critic", "loss.mi_units", "loss.alpha", "loss.beta", "loss.gamma")
    model = ("model.architecture", "model.code", "optim.epochs")
    for preset in ("cifar10", "cifar100"):
        assert read(preset, *model) == ("dcgan32", 64, 1000)
        assert read(preset, *loss) == ("nce", "dot", 2048, 0.0, 1.0, 0.1)
    for preset in ("cifar10", "stl10", "tinyimagenet", "celeba"):
        assert read(preset, *optim) == ("adam", 1e-4, [0.9, 0.999], 0.0, 64, "constant")
    assert read("stl10", *model) == read("tinyimagenet", *model) == ("alexnet64", 64, 200)
    assert read("celeba", *model) == ("dcgan64", 64, 200)
    assert read("cifar10-jsd", *loss) == ("jsd", "dot", 2048, 0.0, 1.0, 0.1)
    assert read("cifar10-dv", *loss) == ("dv", "dot", 2048, 0.0, 1.0, 0.1)
    assert read("cifar10-global", *loss[3:]) == (1.0, 0.0, 1.0)
    assert read("cifar10-global-local", *loss[3:5]) == (0.5, 0.1)
    assert read("cifar10-crops", "loss.mi_units", "loss.gamma") == (1024, 0.0)
    assert read("cifar10-occlude-coord", "loss.absolute", "loss.relative") == (1.0, 1.0)
    views = ("augment.flip_p", "augment.geometry", "augment.jitter_p", "augment.gray_p", "augment.blur_p")
    assert read("cifar10", *views) == (0.0, "none", 0.0, 0.0, 0.0)
    assert read("stl10", *views) == (0.5, "crop", 0.0, 0.0, 0.0)
    area, ratio = read("stl10", "augment.crop_area", "augment.crop_ratio")
    assert [96 * share**0.5 for share in area] == pytest.approx([64, 64])
    assert ratio == [1.0, 1.0]


def test_the_tiny_encoder_has_the_others_convolutions(tmp_path):
    from fused_nce.models.encoders.tiny import TinyResNet

    model: Any = command.parse("dim", ["--preset=cifar10-tiny", "--out", str(tmp_path / "run")])[0].build()
    encoder = model.encoder
    ours = [tuple(p.shape) for part in (encoder.bottom, encoder.top.convs) for p in part.parameters()]
    assert ours == [tuple(p.shape) for p in TinyResNet(32).parameters()]
    taps = model.encode(torch.zeros(2, 3, 32, 32))
    assert {name: tuple(x.shape[1:]) for name, x in taps.items()} == {
        "local": (128, 8, 8), "conv": (256, 4, 4), "fc": (256,), "Y": (64,)
    }  # fmt: skip


def test_encoder_and_discriminator_have_an_optimizer_each(tmp_path):
    run = trainer(tmp_path / "a", "--max-steps=3")
    rival = {id(p) for p in run.model.prior.parameters()}
    held = {name: {id(p) for group in o.param_groups for p in group["params"]} for name, o in run.optimizers.items()}
    assert held["discriminator"] == rival
    assert held["optimizer"] == {id(p) for p in run.step_module.parameters()} - rival
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    run.run()
    moved = {k.partition(".")[0] for k, v in run.model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"encoder", "local", "prior"}
    kept = tensors(tmp_path / "a", 3)
    moments = [k for k in kept if k.startswith("discriminator/") and k.endswith("exp_avg_sq")]
    assert len(moments) == len(rival)
    assert all(kept[k].any() for k in moments)


def test_without_a_prior_there_is_one_optimizer(tmp_path):
    run = trainer(tmp_path / "a", "--loss.gamma=0", "--max-steps=1")
    assert list(run.optimizers) == ["optimizer"]


WAYS = {
    "nce": [],
    "nce-both": ["--loss.anchor=both"],
    "jsd": ["--loss.estimator=jsd"],
    "dv": ["--loss.estimator=dv"],
    "concat": ["--loss.estimator=jsd", "--loss.critic=concat", "--batch-size=16"],
    "global": ["--loss.estimator=jsd", "--loss.alpha=1", "--loss.beta=0", "--loss.gamma=1"],
    "global-local": ["--loss.estimator=jsd", "--loss.alpha=0.5", "--loss.beta=0.1"],
}


@pytest.mark.parametrize("way", WAYS)
def test_it_learns_the_digits(tmp_path, way):
    run = trainer(tmp_path / "a", "--max-steps=24", *WAYS[way])
    run.run()
    first, *_, last = log(tmp_path / "a")
    assert last["nce"] < first["nce"] - 0.02
    assert 0 <= last["discriminator_acc"] <= 1
    assert (last["local"] is None) == (way == "global")
    assert (last["global"] is None) == (not way.startswith("global"))


def test_infonce_falls_below_chance(tmp_path):
    """It starts far above: scores without scale have a deviation of sqrt(mi_units)."""
    trainer(tmp_path / "a", "--max-steps=120", "--batch-size=16").run()
    first, *_, last = log(tmp_path / "a")
    assert first["nce_minus_chance"] > 1
    assert last["nce_minus_chance"] < 0


def test_train_and_evaluate_from_the_command_line(tmp_path, capsys):
    out = str(tmp_path / "run")
    assert cli.main(["train", "dim", *TINY, "--max-steps=20", "--out", out]) == 0
    assert "DIM on digits (digits): architecture dcgan32, width 0.1, code 64" in capsys.readouterr().out
    assert cli.main(["eval", out, "--draws=2", "--baselines=false"]) == 0
    result = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert result["taps"] == ["fc", "conv", "Y"]
    widths = {row["tap"]: row["width"] for row in result["probes"]}
    assert widths == {"fc": 102, "conv": 26 * 4, "Y": 64}
