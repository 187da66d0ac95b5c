"""CPC on images in the loop: settings and learning; what all methods share is in `test_methods`."""

import re

import pytest
from torch import nn

from fused_nce.train import command, config, methods
from fused_nce.train.loop import Trainer
from tests.train.runs import log, own_rules

TINY = ["--preset=digits", "--model.width=2", "--batch-size=16", "--run.log_every=4", "--precision=fp32"]
BAD = [
    ("loss.sampled", 0, "at least 1"),
    ("loss.backend", "fast", "null or one of"),
    ("model.image_size", 0, "at least 1"),
    ("model.patch_size", 0, "at least 1"),
    ("model.width", 0, "at least 1"),
    ("model.stages", (1, 1), "three numbers"),
    ("model.jitter", -1, "at least 0"),
    ("model.hidden", 0, "null or at least 1"),
    ("model.layers", 0, "at least 1"),
    ("model.steps", 0, "at least 1"),
    ("model.skip", -1, "at least 0"),
]


def test_every_rule_is_tried():
    assert own_rules("cpc-vision") <= {key for key, _, _ in BAD}


@pytest.mark.parametrize(("key", "value", "need"), BAD)
def test_a_bad_setting_is_named(key, value, need):
    settings = methods.get("cpc-vision")()
    part, _, field = key.partition(".")
    setattr(getattr(settings, part), field, value)
    with pytest.raises(ValueError, match=f"^{re.escape(key)}: must be {re.escape(need)}"):
        settings.check()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model.patch_size=6"], "patch_size: must be"),
        (["--model.steps=6"], "steps: must be below the grid's 7 rows less skip = 1, got 6"),
        (["--model.jitter=4"], r"jitter: must be in \[0, 4 px\), got 4"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused_before_any_work(tmp_path, argv, message):
    with pytest.raises(ValueError, match=message):
        command.parse("cpc-vision", [*TINY, *argv, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_the_published_settings():
    """Spelled out once more, so that a slip in a table is seen."""

    def read(preset, *keys):
        method = methods.get("cpc-vision")
        settings = config.flatten(config.to_dict(method())) | config.flatten(method.presets[preset])
        return tuple(settings[key] for key in keys)

    model = ("model.image_size", "model.patch_size", "model.stages", "model.jitter", "model.steps", "model.skip")
    assert read("imagenet", *model) == (256, 64, [3, 4, 23], 4, 5, 1)
    assert read("stl10", *model) == (64, 16, [3, 4, 6], 0, 5, 1)
    assert read("cifar10", *model) == (32, 8, [3, 4, 6], 0, 5, 1)
    optim = ("optim.lr", "optim.batch_size", "optim.schedule")
    assert read("imagenet", *optim) == (2e-4, 512, "constant")
    assert read("stl10", *optim) == (2e-4, 32, "constant")
    assert read("cifar10", *optim) == (1e-4, 64, "constant")
    views = ("augment.flip_p", "augment.geometry", "augment.jitter_p", "augment.gray_p")
    assert read("imagenet", *views) == (0.5, "crop", 0.0, 1.0)
    assert [300 * a**0.5 for a in read("imagenet", "augment.crop_area")[0]] == pytest.approx([256, 256])
    assert [96 * a**0.5 for a in read("stl10", "augment.crop_area")[0]] == pytest.approx([64, 64])


@pytest.mark.parametrize(
    "argv", [[], ["--model.context=gru", "--loss.negatives=sequence"], ["--loss.negatives=sampled"]]
)
def test_it_learns_the_digits(tmp_path, argv):
    Trainer(*command.parse("cpc-vision", [*TINY, *argv, "--max-steps=24", "--out", str(tmp_path / "a")])[:2]).run()
    first, *_, last = log(tmp_path / "a")
    assert last["loss"] < first["loss"] - 0.1


@pytest.mark.parametrize("name", ["cpc", "cpc-vision", "dim"])
def test_both_inits_are_compared_with(name):
    made = {label: other.build() for label, other in methods.get(name)().untrained().items()}
    assert list(made) == ["random, torch's init", "random, Kaiming init"]
    for model, gain in zip(made.values(), (1 / 3, 2), strict=True):
        for layer in model.get_submodule("encoder").modules():
            if isinstance(layer, nn.Conv1d | nn.Conv2d) and layer.weight.numel() > 10_000:
                assert layer.weight.var().item() * layer.weight[0].numel() == pytest.approx(gain, rel=0.1)
