"""Losses and gradients that are not finite: what is skipped, what is kept, and when a run gives up."""

import json

import pytest
import torch

from fused_nce.train import command
from fused_nce.train.loop import Diverged, Trainer
from fused_nce.train.saving import checkpoint
from fused_nce.train.step import Kept
from tests.train.runs import TINY, differing, log, tensors, trainer


class Poison:
    """The views of some updates are NaN."""

    def __init__(self, views, bad):
        self.views, self.bad, self.calls = views, bad, 0

    def __call__(self, images):
        self.calls += 1
        one, two = self.views(images)
        return (one * float("nan"), two) if self.calls in self.bad else (one, two)


def test_updates_that_are_not_finite_are_skipped_without_a_trace(tmp_path):
    run = trainer(tmp_path / "a", "--max-steps=8")
    run.views = Poison(run.views, {3, 4, 5})
    run.run()
    assert run.skipped == 3
    assert log(tmp_path / "a")[-1]["skipped"] == 3
    saved = tensors(tmp_path / "a", 8)
    assert all(bool(v.isfinite().all()) for v in saved.values())
    assert int(saved["model/encoder.head5.out_norm.num_batches_tracked"]) == 2 * 5


def test_buffers_are_put_back_by_name_into_copies_that_are_made_once():
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(2))
    kept = Kept(module, without=["1.running_var"])
    for width, late in ((3, {}), (3, {}), (4, {}), (4, {"late": torch.ones(2)}), (4, {})):
        module._buffers = {**late}  # one comes and goes
        module[0].running_mean = torch.randn(width)  # another object
        before = {name: buffer.clone() for name, buffer in module.named_buffers()}
        kept.keep()
        for buffer in module.buffers():
            buffer.add_(1)
        kept.restore("1.")
        moved = {n for n, b in module.named_buffers() if not torch.equal(b, before[n])}
        assert moved == {n for n in before if n[0] != "1"} | {"1.running_var"}
        kept.restore()
        assert {n for n, b in module.named_buffers() if not torch.equal(b, before[n])} == {"1.running_var"}
    module[0].running_mean.data = torch.tensor([1e300] * 4, dtype=torch.float64)  # the same object, of another dtype
    kept.keep()
    kept.restore()
    assert dict(module.named_buffers())["0.running_mean"].isfinite().all()
    copies = dict(kept._copies)
    kept.keep()
    assert all(kept._copies[name] is copy for name, copy in copies.items())


def test_a_run_without_a_single_update_is_no_success(tmp_path, capsys, monkeypatch):
    run = trainer(tmp_path / "a", "--max-steps=3")
    run.views = Poison(run.views, {1, 2, 3})
    with pytest.raises(Diverged, match="all 3 updates were skipped"):
        run.run()
    assert checkpoint.steps(tmp_path / "a") == []
    whole = Trainer.__init__

    def poisoned(self, *args, **options):
        whole(self, *args, **options)
        self.views = Poison(self.views, bad)

    monkeypatch.setattr(Trainer, "__init__", poisoned)
    bad = {1, 2, 3}
    assert command.main(["amdim", *TINY, "--max-steps=3", "--out", str(tmp_path / "b")]) == 1
    assert "all 3 updates were skipped" in capsys.readouterr().err
    bad = {2}
    assert command.main(["amdim", *TINY, "--max-steps=3", "--out", str(tmp_path / "c")]) == 0
    assert "1 of 3 updates skipped (loss or gradient not finite)" in capsys.readouterr().out


def test_a_broken_probe_does_not_hold_up_the_encoder(tmp_path):
    """With every gradient of the probes infinite, the encoder goes through the very weights of a healthy run."""
    healthy = trainer(tmp_path / "a", "--max-steps=5")
    healthy.run()
    run = trainer(tmp_path / "b", "--max-steps=5")
    before = {name: p.clone() for name, p in run.probes.state_dict().items()}
    run.probes.linear.weight.register_hook(lambda grad: grad * float("inf"))
    run.run()
    assert (run.skipped, run.probes_skipped) == (0, 5)
    assert log(tmp_path / "b")[-1]["probes_skipped"] == 5
    assert differing(run.model.state_dict(), healthy.model.state_dict()) == []
    assert differing(run.probes.state_dict(), before) == []
    assert command.lost(run) == ", the online probes skipped 5"


def test_the_fourth_in_a_row_stops_with_a_dump_and_without_a_checkpoint(tmp_path):
    run = trainer(tmp_path / "a", "--max-steps=20")
    run._save()
    run.views = Poison(run.views, {3, 4, 5, 6})
    with pytest.raises(Diverged, match=r"not finite for 4 updates in a row \(step 6"):
        run.run()
    assert [p.name for p in checkpoint.steps(tmp_path / "a")] == ["step_00000000"]
    dump = json.loads((tmp_path / "a" / "nan_dump" / "step_00000006_rank_0.json").read_text())
    assert len(dump["images"]) == 8
    checkpoint.restore_rng(dump["rng"])
