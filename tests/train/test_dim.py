"""DIM in the loop: the published settings, two optimizers, every estimator, and the command line end to end."""

import json
from typing import Any

import pytest
import torch

from fused_nce import cli
from fused_nce.train import command
from fused_nce.train.loop import Trainer
from tests.marks import nightly_but
from tests.train.runs import log, moved, tensors

TINY = ["--preset=digits", "--model.width=0.1", "--batch-size=32", "--run.log_every=4", "--precision=fp32"]


def trainer(out, *argv):
    return Trainer(*command.parse("dim", [*TINY, "--out", str(out), *argv])[:2])


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
    assert moved(run.model, before) == {"encoder", "local", "prior"}
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


@pytest.mark.parametrize("way", nightly_but(("nce", "global-local"), WAYS))
def test_it_learns_the_digits(tmp_path, way):
    run = trainer(tmp_path / "a", "--max-steps=24", *WAYS[way])
    run.run()
    first, *_, last = log(tmp_path / "a")
    assert last["nce"] < first["nce"] - 0.02
    assert 0 <= last["discriminator_acc"] <= 1
    assert (last["local"] is None) == (way == "global")
    assert (last["global"] is None) == (not way.startswith("global"))


@pytest.mark.nightly
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
