"""`--profile`: a few updates, their parts, and a trace; what the log says of their time."""

import gzip
import json
import re
import time

import torch

from fused_nce import cli
from fused_nce.models.encoders import backbones
from fused_nce.train import command
from fused_nce.train.loop import Trainer
from fused_nce.train.monitor.profile import Profile
from fused_nce.train.rehearsal import Products
from tests.train.runs import TINY, log, tensors, trainer


def test_profile_says_where_an_update_went(tmp_path, capsys):
    """Parts add up to the update, the trace has each of them, and the weights are the run's own; it ends with them."""
    assert cli.main(["train", "amdim", *TINY, "--out", str(tmp_path / "a"), "--profile"]) == 0
    said = capsys.readouterr().out
    assert log(tmp_path / "a")[-1]["step"] == Profile.count
    rows = {m[1]: (float(m[2]), float(m[3])) for m in re.finditer(r"^(\S+) +([\d.]+) +([\d.]+)%$", said, re.M)}
    parts = ("data", "views", "encoder", "probes", "loss", "backward", "checks", "optimizer", "rest")
    assert all(rows[name][0] > 0 for name in parts), said
    assert abs(sum(rows[name][1] for name in parts) - 100) < 1
    assert rows["backward"][1] > 10
    assert re.search(r"\b(convolution_backward|addmm|mm)\b", said), said
    with gzip.open(tmp_path / "a" / "trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert names >= {f"update: {name}" for name in parts}

    plain = trainer(tmp_path / "b", f"--max-steps={Profile.count}")
    plain.run()
    ours, theirs = (tensors(tmp_path / run, Profile.count) for run in "ab")
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_profile_of_a_run_that_ends_before(tmp_path, capsys):
    assert cli.main(["train", "amdim", *TINY, "--out", str(tmp_path), "--max-steps=3", "--profile"]) == 0
    assert "profile: no table, it takes 16 updates, got 3" in capsys.readouterr().out


def test_the_log_has_the_rate_of_the_products_and_the_wait_for_data(tmp_path, monkeypatch):
    """Of layers counted by hand: y = x·W, dW, and dx where the input has a gradient; the loss's products are few."""
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 16))
    monkeypatch.setattr(backbones, "_torchvision", lambda name: (net, 16))
    options = ["--preset=digits", "--model.image_size=32", "--model.backbone=odd", "--probes=false", "--batch-size=4"]
    options += ["--optim.accumulate=2", "--max-steps=8", "--run.log_every=4", f"--out={tmp_path / 'run'}"]
    run = Trainer(*command.parse("simclr", options)[:2])
    assert all(p.grad is None for p in run.step_module.parameters())
    batches = run.loader.batches

    def slow(position):
        for i, batch in enumerate(batches(position)):
            time.sleep(0.15 * (i >= 8))  # of the second line, in both of an update's passes
            yield batch

    monkeypatch.setattr(run.loader, "batches", slow)
    run.run()
    first, second = log(tmp_path / "run")
    layers = [layer for layer in run.model.modules() if isinstance(layer, torch.nn.Linear)]
    rows, sizes = 8, [layer.in_features * layer.out_features for layer in layers]  # two views of four images
    by_hand = 2 * rows * (3 * sum(sizes) - sizes[0])
    most = by_hand + 3 * 2 * rows * rows * layers[-1].out_features
    counted = sum(filter(None, run.window._flop_of.values()))
    assert by_hand < counted <= most  # scores among them
    for line in (first, second):
        flop = 4 * 1e9 * line["matrix_gflop_per_s"] / line["images_per_s"]
        assert 0.98 * counted < flop < 1.02 * counted
    assert 0 < first["data_wait_share"] < 0.5 < second["data_wait_share"] < 1
    with Products() as products:
        q = torch.randn(2, 3, 64, 32, requires_grad=True)
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    assert products.flop == 7 * 2 * (2 * 3 * 64 * 64 * 32)  # two products, and five of a backward without its weights
    with Products() as products:
        torch.nn.LSTM(8, 8)(torch.randn(3, 2, 8))
    assert products.flop is None  # whole in one operator, which nobody counts
    run.window.passed((4, 1, 7, 7))  # views of a size that was not counted
    assert run.window.facts(1)["matrix_gflop_per_s"] is None
