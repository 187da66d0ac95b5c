"""The cost model's table, fitted to a record of a made-up card."""

from __future__ import annotations

import json

import pytest
import torch

from bench.gpu import fit, problems, verdict
from fused_nce.core import cost
from fused_nce.core.cost import Call, Cost
from tests.test_bench_gpu import made_up, record_of

TRUTH = {
    ("cuda", 2): Cost(28.0, {64: 1.0, 128: 1.2, 192: 1.4, 256: 1.6, 384: 1.9, 512: 2.2, 1024: 3.9, 2560: 9.0}),
    ("triton", 2): Cost(60.0, {64: 0.3, 128: 0.5, 192: 0.7, 256: 1.3, 384: 2.9, 512: 4.9, 1024: 20.0, 2560: 50.0}),
}


def made_by(truth):
    """A record of AMDIM's problems with the times that these costs give."""
    rows = []
    for p in (*problems.TABLE, *problems.CROSSOVER, *problems.LARGER):
        if p.loss == problems.SWEPT_LOSS:
            ms = {name: 1e-3 * one.time_us(p.call.gemms(name), p.n, p.m, p.d) for (name, _), one in truth.items()}
            rows.append(made_up(p.label, ms["cuda"], 1.0, 1.0, 0.01, backends={"triton": ms["triton"]}))
    record = record_of(*rows)
    return record | {"cost_times": verdict.cost_times(record)}


def test_refit_finds_the_costs_of_a_record_and_keeps_the_others():
    costs = fit.refit(made_by(TRUTH))
    for key, one in TRUTH.items():
        assert costs[key].launch_us == pytest.approx(one.launch_us, abs=0.1)
        assert costs[key].gemm_ps == pytest.approx(one.gemm_ps, rel=0.01)
    assert {key: costs[key] for key in costs if key not in TRUTH} == {
        key: one for key, one in cost.table().items() if key not in TRUTH
    }


def test_refit_moves_the_choice(tmp_path, monkeypatch, capsys):
    """Written, the table decides: at D = 192 the shipped one takes `cuda`, the made-up card is faster on `triton`."""
    path, shipped = tmp_path / "gpu-card.json", cost.PATH
    path.write_text(json.dumps(made_by(TRUTH)), encoding="utf-8")
    monkeypatch.setattr(cost, "PATH", tmp_path / "cost.json")
    (tmp_path / "cost.json").write_bytes(shipped.read_bytes())
    before = cost.fastest_first(Call(), 32768, 32768, 192, torch.bfloat16)
    assert fit.main([str(path), "--write"]) == 0
    after = cost.fastest_first(Call(), 32768, 32768, 192, torch.bfloat16)
    assert (before[0], after[0]) == ("cuda", "triton")
    out = capsys.readouterr().out
    assert "| both gradients |" in out
    assert "The fastest everywhere." in out
    assert "fitted to gpu-card.json: a card, commit 0000000" in (tmp_path / "cost.json").read_text()


def test_a_fit_names_what_it_gets_wrong():
    record = made_by(TRUTH)
    rows = fit.measured_in(record)
    assert fit.wrong_choices(rows, TRUTH) == []
    lying = {("cuda", 2): TRUTH["triton", 2], ("triton", 2): TRUTH["cuda", 2]}
    assert any("takes" in line for line in fit.wrong_choices(rows, lying))
    with pytest.raises(ValueError, match=r"^record: got one without cost_times"):
        fit.measured_in(record | {"cost_times": []})
