"""The rule that chooses a backend on a GPU: one, fitted to counts now and to a card's record later."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import calls, counted, fit
from bench.gpu import problems, verdict
from fused_nce.core import cost, dispatch
from fused_nce.core.cost import Call, Cost
from fused_nce.core.spec import Block, Spec
from tests.test_bench_gpu import made_up, record_of

TRUTH = {
    ("cuda", 2): Cost(28.0, {64: 1.0, 128: 1.2, 192: 1.4, 256: 1.6, 384: 1.9, 512: 2.2, 1024: 3.9, 2560: 9.0}),
    ("triton", 2): Cost(60.0, {64: 0.3, 128: 0.5, 192: 0.7, 256: 1.3, 384: 2.9, 512: 4.9, 1024: 20.0, 2560: 50.0}),
}


def made_by(truth):
    """A record of AMDIM's problems with the times that these costs give."""
    rows = []
    for p in problems.ALL:
        if p.loss == "amdim_nce":
            ms = {name: 1e-3 * one.time_us(p.call().gemms(name), p.n, p.m, p.d) for (name, _), one in truth.items()}
            rows.append(made_up(p.label, ms["cuda"], 1.0, 1.0, 0.01, backends={"triton": ms["triton"]}))
    return record_of(*rows)


def times_of(record):
    return verdict.cost_times(record["cases"], record["clock"])


def test_a_fit_finds_the_costs_of_a_record():
    costs = cost.fit(times_of(made_by(TRUTH)))
    assert costs.keys() == TRUTH.keys() | {("triton" + cost.STORED, 2)}
    for (name, size), one in costs.items():
        truth = TRUTH[name.partition(",")[0], size]
        assert one.launch_us == pytest.approx(truth.launch_us, abs=0.1)
        assert one.gemm_ps == pytest.approx({d: truth.gemm_ps[d] for d in one.gemm_ps}, rel=0.01)
    found = [d for (name, _), one in costs.items() if name.startswith("triton") for d in one.gemm_ps]
    assert sorted(found) == sorted(TRUTH["triton", 2].gemm_ps)


def test_the_shipped_table_is_what_the_counts_say():
    """Until a record of a card takes their place; and it takes the faster one at every shape that is fitted to."""
    text = json.loads(cost.PATH.read_text(encoding="utf-8"))["source"]
    assert text == f"fitted to counts, no measurement: {counted.assumptions()}"
    found = cost.fit(filter(counted.has_rate, counted.cost_times()))
    assert found.keys() == cost.table().keys()
    for key, one in found.items():
        shipped = cost.table()[key]
        assert shipped.launch_us == pytest.approx(one.launch_us, abs=0.01)
        assert shipped.score_ps == pytest.approx(one.score_ps, abs=1e-4)
        assert shipped.gemm_ps == pytest.approx(one.gemm_ps, abs=1e-4)
    assert fit.wrong_choices(counted.cost_times(), cost.table()) == []


@pytest.mark.parametrize("name", fit.CALLS)
def test_the_shipped_choice_changes_once(name):
    """From `triton` to `cuda` as rows get wider, at any size but one: a width of 192 costs `triton` what 256 does."""
    for n in (8192, 16384, 32768, 65536):
        again = (name, n) == ("both gradients, penalty", 65536)
        assert len(fit.crossovers(fit.CALLS[name], cost.table(), n)) == 1 + 2 * again, n


def test_the_shipped_table_chooses_well_beyond_what_it_is_fitted_to():
    """By the counts of shapes held out. It does not know how few rows more than 65,536 columns leave a block."""
    rows = counted.cost_times(held_out=True)
    assert {problem.label for problem in problems.HELD} <= {label for label, _ in calls.committed()}
    assert {(row.call.penalised, row.call.columns, row.call.k) for row in rows} == {
        (penalised, columns, k)
        for penalised in (False, True)
        for columns in (False, not penalised)
        for k in (False, True)
    }
    assert fit.wrong_choices(rows, cost.table()) == ["2048 × 100352, D 256: cuda takes 1.15× as long as triton"]


def test_a_tie_is_no_crossover():
    flat = {("triton", 2): Cost(0.0, {64: 1.0}), ("cuda", 2): Cost(0.0, {64: 1.0})}
    assert fit.crossovers(Call(penalised=True), flat) == [fit.WIDTHS[0]]  # of five products and three
    for ps, found in ((5.05 / 3, []), (4.8 / 3, [fit.WIDTHS[0]])):
        close = flat | {("cuda", 2): Cost(0.0, {64: ps}), ("triton, stored", 2): Cost(0.0, {64: 1.25})}
        assert fit.crossovers(Call(penalised=True), close) == found


def test_one_rule_chooses(monkeypatch):
    """The dispatcher, the documents and the fit's report all follow `cost.fastest_first`."""
    x: Any = SimpleNamespace(device=SimpleNamespace(type="cuda"), shape=(8, 4), dtype=torch.bfloat16)
    monkeypatch.setattr(dispatch, "why_not", lambda *_: None)
    rows = times_of(made_by(TRUTH))
    for order in (["cuda", "triton"], ["triton", "cuda"]):
        monkeypatch.setattr(cost, "fastest_first", lambda *_, order=order: order)
        assert dispatch.choose(Spec(Block(1)), x, None, "")[0] == order[0]
        assert {counted.choice(p) for p in problems.TABLE} == {order[0]}
        assert all(f": {order[0]} takes" in line for line in fit.wrong_choices(rows, TRUTH))


def test_a_record_moves_the_choice(tmp_path, monkeypatch, capsys):
    """Written, the table decides; an element size that the record has no times of keeps its costs."""
    path, shipped = tmp_path / "gpu-card.json", cost.PATH
    faster = {name: Cost(one.launch_us, {d: ps / 100 for d, ps in one.gemm_ps.items()}) for name, one in TRUTH.items()}
    for winner in ("cuda", "triton"):
        record = made_by(TRUTH | {(winner, 2): faster[winner, 2]})
        path.write_text(json.dumps(record), encoding="utf-8")
        monkeypatch.setattr(cost, "PATH", tmp_path / f"{winner}.json")
        cost.PATH.write_bytes(shipped.read_bytes())
        wide = cost.table()["cuda", 4]
        assert fit.main([str(path), "--write"]) == 0
        assert cost.fastest_first(Call(), 32768, 32768, 192, torch.bfloat16)[0] == winner
        assert cost.table()["cuda", 4] == wide
        out = capsys.readouterr().out
        assert "| both gradients |" in out
        assert "The fastest everywhere." in out
        assert "fitted to gpu-card.json: a card, commit 0000000" in cost.PATH.read_text()


def test_a_fit_names_what_it_gets_wrong(tmp_path):
    rows = times_of(made_by(TRUTH))
    assert fit.wrong_choices(rows, TRUTH) == []
    lying = {("cuda", 2): TRUTH["triton", 2], ("triton", 2): TRUTH["cuda", 2]}
    assert any("takes" in line for line in fit.wrong_choices(rows, lying))
    (tmp_path / "none.json").write_text(json.dumps(record_of()))
    with pytest.raises(SystemExit):
        fit.main([str(tmp_path / "none.json")])
