"""CPC on images in the loop: settings and learning; what all methods share is in `test_methods`."""

import pytest
from torch import nn

from fused_nce.train import command, methods
from fused_nce.train.loop import Trainer
from tests.marks import nightly_but
from tests.train.runs import log

TINY = ["--preset=digits", "--model.width=2", "--batch-size=16", "--run.log_every=4", "--precision=fp32"]


WAYS = [["--loss.negatives=sampled"], [], ["--model.context=gru", "--loss.negatives=sequence"]]


@pytest.mark.parametrize("argv", nightly_but(WAYS[:1], WAYS))
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
