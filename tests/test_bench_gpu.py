"""The GPU benchmark, whole, on a CPU's tiny sizes, and its arithmetic on made-up records; no time is judged here."""

from __future__ import annotations

import itertools
import json
import re
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import measure, tables
from bench.gpu import machine, problems, rivals, verdict
from bench.gpu import tables as gpu_tables
from bench.gpu.__main__ import main
from bench.gpu.collect import collect
from bench.gpu.problems import Problem
from bench.text import number
from fused_nce.bench import formulas, timers
from fused_nce.core.cost import Call, Measured
from tests.marks import nightly_but
from tests.test_bench import numbers

UNIT = re.compile(r"_(ms|us|s|bytes|kib|mib|gib|mb|mhz|w|c|share)(_|$)|flop_per_s|tb_per_s|^flop$")
UNITLESS = {
    "schema", "n", "m", "d", "n_c", "steps", "rounds", "input_sets", "cores", "threads", "dirty", "virtual", "quick",
}  # fmt: skip


@pytest.fixture(scope="module", params=nightly_but(["quick"], ["quick", "whole"]))
def trial(tmp_path_factory, request):
    """A run on a CPU: (record, folder)."""
    folder = tmp_path_factory.mktemp("bench")
    quick = ["--quick"] if request.param == "quick" else []
    assert main(["--device", "cpu", "--rounds", "2", "--out", str(folder), *quick]) == 0
    (path,) = folder.glob("trial-*.json")
    return json.loads(path.read_text(encoding="utf-8")), folder


def test_every_problem_is_measured_or_named(trial):
    record, _ = trial
    whole = problems.ALL
    quick = (*problems.QUICK_TABLE, *problems.QUICK_CROSSOVER)
    wanted = {p.tiny().label for p in (quick if record["settings"]["quick"] else whole)}
    assert {row["label"] for row in record["cases"]} | set(record["left_out"]) == wanted
    assert record["left_out"] == {}
    for row in record["cases"]:
        assert {"naive", "compile", "ours"} <= set(row["rivals"])
        assert row["ours_backend"] in ("cpu", "chunked")
        assert row["fastest_backend"] in verdict.backends_ms(row, "wall")
        for found in [row["bound"], *row["rivals"].values()]:
            assert 0 < found["wall_ms_min"] <= found["wall_ms_median"]


def test_every_number_has_a_unit_in_its_key(trial):
    keys = {key for key, _ in numbers(trial[0])}
    # Below a key with a unit the names are those of GEMM result dtypes.
    assert {key for key in keys if not UNIT.search(key)} <= UNITLESS | {"float32", "bfloat16"}


def test_a_record_names_its_code_and_card(trial):
    record, _ = trial
    assert re.fullmatch(r"[0-9a-f]{64}", record["code"]["sources_sha256"])
    assert re.fullmatch(r"[0-9a-f]{40}|unknown", record["code"]["commit"])
    assert record["card"]["name"]
    assert record["card"]["gemm_tflop_per_s"] > 0
    assert record["versions"]["torch"] == str(torch.__version__)


def test_the_report_is_written(trial):
    record, folder = trial
    (text,) = (path.read_text(encoding="utf-8") for path in folder.glob("trial-*.md"))
    assert text.strip() == gpu_tables.report(record)
    for row in record["cases"]:
        assert row["label"] in text


# ---- what is measured -------------------------------------------------------------------------------------------

CPU = machine.Machine()


@pytest.mark.parametrize("p", {p.loss: p for p in problems.TABLE}.values(), ids=lambda p: p.loss)
def test_a_formula_gives_a_loss_and_gradients_and_ours_is_the_same(p):
    formula = formulas.FORMULAS[p.loss]
    inputs = formula.inputs(p.tiny(), CPU.draw(0, torch.float32))
    value, *gradients = rivals.step(formula.naive, inputs)
    assert torch.isfinite(value)
    assert gradients
    assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in gradients)
    ours = rivals.step(rivals.with_backend(formula.ours, None), inputs)
    torch.testing.assert_close(ours, (value, *gradients), rtol=1e-4, atol=1e-5)


def test_the_naive_formulas_are_those_of_the_papers():
    """On three vectors each, by hand from dense float64 scores."""
    draw = CPU.draw(3, torch.float64)
    q, k = draw(3, 4), draw(3, 4)
    unit_q, unit_k = (x / x.norm(dim=1, keepdim=True) for x in (q, k))
    s = unit_q @ unit_k.T / 0.1
    expected = -(s.diag() - s.exp().sum(1).log()).mean()
    torch.testing.assert_close(formulas._naive_info_nce(q, k).double(), expected, rtol=1e-5, atol=0)
    queue = draw(5, 4)
    pos, neg = (unit_q * unit_k).sum(1) / 0.07, unit_q @ queue.T / 0.07
    expected = ((pos.exp() + neg.exp().sum(1)).log() - pos).mean()
    torch.testing.assert_close(formulas._naive_moco(q, k, queue).double(), expected, rtol=1e-5, atol=0)
    z = torch.cat([unit_q, unit_k])
    e = (z @ z.T / 0.5).exp().fill_diagonal_(0)
    expected = -torch.stack([(e[i, (i + 3) % 6] / e[i].sum()).log() for i in range(6)]).mean()
    torch.testing.assert_close(formulas._naive_nt_xent(q, k).double(), expected, rtol=1e-5, atol=0)
    s = 7.0 * unit_q @ unit_k.T
    expected = -(s.diag() - s.logsumexp(1) + s.diag() - s.logsumexp(0)).mean() / 2
    found = formulas._naive_clip(unit_q, unit_k, torch.tensor(7.0, dtype=torch.float64))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    s = q @ k.T
    expected = -(s.diag() - s.logsumexp(1)).mean()
    torch.testing.assert_close(formulas._naive_cpc(q[None], k[None]).double(), expected, rtol=1e-5, atol=0)


def test_flop_counts_the_least_gemms():
    by_loss = {p.loss: p for p in problems.TABLE}
    one = {loss: 2 * p.n * p.m * p.d * p.steps for loss, p in by_loss.items()}
    units = {loss: by_loss[loss].flop / one[loss] for loss in by_loss}
    assert units == {"amdim_nce": 3, "moco_nce": 2, "nt_xent": 2, "clip_loss": 4, "cpc_nce": 3, "info_nce": 3}


def test_the_bound_multiplies_what_it_says():
    p = Problem("amdim_nce", "x", 6, 12, 5, gemms=problems.TWO_SIDED)
    calls = rivals.gemm_calls(p, CPU, sets=2)
    assert [gemm for gemm, _ in calls] == [*problems.TWO_SIDED]
    shapes = {gemm: tuple(call().shape) for (gemm, _), call in calls.items()}
    assert shapes == {"scores": (6, 12), "scores_again": (6, 12), "grad_q": (6, 5), "grad_k": (12, 5)}
    huge = Problem("nt_xent", "x", 1 << 20, 1 << 20, 1)
    assert rivals.gemm_calls(huge, CPU, sets=1) == {}


@pytest.mark.parametrize(("m", "tensors"), [(400, 3), (40_000, 1)])
def test_weights_beyond_the_cache_are_held_once(m, tensors):
    p = Problem("amdim_nce", "x", 512, m, 1)
    found = rivals.gemm_operands(p, CPU, sets=3)
    assert len({w.data_ptr() for _, _, w in found}) == tensors
    assert len({q.data_ptr() for q, _, _ in found}) == 3


def test_inputs_rotate_through_twice_the_cache():
    assert CPU.input_sets(100 << 20) == 1
    assert CPU.input_sets(20 << 20) == 5  # four others lie between two uses of one: 80 MiB
    assert CPU.input_sets(1) == 16
    calls = rivals.rotation([partial(int, i) for i in range(3)])
    assert [calls() for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_who_computes_something_else_or_fails_is_not_timed():
    p = problems.amdim(128, 1024).tiny()
    inputs = formulas.FORMULAS[p.loss].inputs(p, CPU.draw(0, torch.bfloat16))
    contenders = rivals.losses(p, CPU, compiled=False)
    right = contenders["ours"]

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    contenders = {
        "naive": out_of_memory,
        "ours": right,
        "off": lambda *x: 1.2 * right(*x),
        "broken": lambda *x: right(x[0]),
        "chunked": contenders["chunked"],
    }
    able, refused, chosen = rivals.agreeing(p, contenders, inputs)
    assert set(able) == {"ours", "chunked"} - {chosen}
    assert refused["naive"] == "out of memory"
    assert "off on tiny AMDIM" in refused["off"]
    assert refused["broken"].startswith("TypeError: ")


def test_others_fused_losses_take_part_where_they_are_installed(monkeypatch):
    """Played by plain torch under their names, with their arguments as their sources have them."""

    class MemoryEfficientCLIPLoss:
        def __init__(self, temperature, normalized_inputs, stable):
            assert normalized_inputs
            assert not stable  # or its gradients would have another factor
            self.temperature = temperature

        def __call__(self, image, text):
            return formulas.FORMULAS["clip_loss"].naive(image, text, 1 / self.temperature)

    def siglip(image, text, log_temperature, bias):
        return formulas.FORMULAS["siglip_loss"].naive(image, text, log_temperature.exp(), bias)

    def head(rows, weight, target):
        return torch.nn.functional.cross_entropy((rows @ weight.T).float(), target)

    modules: dict[str, dict[str, Any]] = {
        "memeff": {"MemoryEfficientCLIPLoss": MemoryEfficientCLIPLoss},
        "liger_kernel.transformers.functional": {"liger_fused_linear_cross_entropy": head},
        "quack.linear_cross_entropy": {"chunked_linear_cross_entropy": head},
        "siglip_kernel": {"fused_siglip_loss": siglip},
    }
    for name, inside in modules.items():
        for package in itertools.accumulate(name.split("."), "{}.{}".format):
            monkeypatch.setitem(sys.modules, package, SimpleNamespace())
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**inside))
    asked = {"memeff": "CLIP 65,536", "liger": "InfoNCE 8,192", "quack": "InfoNCE 8,192", "siglip_kernel": "SigLIP"}
    for name, label in asked.items():
        p = next(p for p in problems.ALL if p.label.startswith(label))
        row = collect(p.tiny(), CPU, 2, compiled=False)
        assert name in row["rivals"], row["refused"]
        assert name not in verdict.backends_ms(row, "wall")
        row["rivals"] = {kept: row["rivals"][kept] for kept in (name, "naive", "ours")}
        table = gpu_tables.main_table({**record_of(row), "clock": "wall"})
        assert re.search(rf"\| {rivals.LIBRARIES[name].label} [\d.]+ \|", table)
    monkeypatch.setitem(sys.modules, "memeff", SimpleNamespace())  # another version, without the name
    clip = next(p for p in problems.ALL if p.loss == "clip_loss")
    assert "memeff" not in rivals.losses(clip.tiny(), CPU, compiled=False)
    others = rivals.losses(problems.TABLE[0].tiny(), CPU, compiled=False)
    assert not others.keys() & rivals.LIBRARIES.keys()


def test_a_clock_is_an_argument():
    ticks = iter(range(100))
    times = measure.interleave({"a": int, "b": int}, 3, lambda call: float(next(ticks)))
    assert sorted(times["a"] + times["b"]) == [0, 1, 2, 3, 4, 5]
    assert timers.wall_ms(partial(sum, range(1000))) > 0


# ---- the verdict --------------------------------------------------------------------------------------------------


def made_up(label, ours, naive, compiled, bound, **more):
    """A row as a GPU run writes it, times in ms."""
    p = next(p for p in problems.ALL if p.label == label)
    named = {"ours": ours, "naive": naive, "compile": compiled} | more.pop("backends", {})
    refused = {name: "out of memory" for name, ms in named.items() if ms is None}
    found = {
        name: {f"{clock}_ms_{key}": ms for clock in ("device", "graph") for key in ("median", "iqr")}
        | {"peak_memory_mb": 4.0}
        for name, ms in named.items()
        if ms is not None
    }
    return {
        "loss": p.loss, "label": label, "role": p.role, "n": p.n, "m": p.m, "d": p.d, "n_c": p.n_c, "steps": p.steps,
        "flop": p.flop, "rivals": found, "refused": refused, "bound": {"device_ms_median": bound},
        "ours_backend": "cuda", "fastest_backend": "cuda", "workspace_limit_mib": p.workspace_mb,
    } | more  # fmt: skip


def record_of(*rows):
    code = {"commit": "0" * 40, "dirty": False}
    return {
        "clock": "device", "card": {"name": "a card", "slug": "card", "gemm_tflop_per_s": 800.0}, "cases": list(rows),
        "left_out": {}, "code": code, "host": {"slug": "host"}, "date_utc": "2026-11-24T00:00:00+00:00",
        "versions": {"torch": "2", "triton": "3", "kernels": "none"},
    }  # fmt: skip


SMALL = problems.TABLE[0].label


def test_targets_pass_and_miss():
    row = made_up(SMALL, ours=0.030, naive=0.300, compiled=0.050, bound=0.020)
    found = {cell.name: cell for cell in verdict.cells(record_of(row), row)}
    passed = {name: cell.passed for name, cell in found.items()}
    assert passed == {
        "time, ms": True, "in a graph, ms": False, "naive / ours": True, "compile / ours": False, "extra MB": True,
    }  # fmt: skip
    assert found["naive / ours"].value == pytest.approx(10)
    assert "compile runs at 2.50× the bound" in found["compile / ours"].why
    slow = made_up(SMALL, ours=0.040, naive=0.300, compiled=0.090, bound=0.020)
    cell = verdict.cells(record_of(slow), slow)[0]
    assert not cell.passed
    assert "2.00× them at these shapes" in cell.why


def test_a_rival_without_memory_is_beaten_and_one_that_broke_is_not():
    row = made_up(SMALL, ours=0.030, naive=None, compiled=0.090, bound=0.020)
    cell = {cell.name: cell for cell in verdict.cells(record_of(row), row)}["naive / ours"]
    assert cell.passed
    row["refused"]["naive"] = "ValueError: differs"
    cell = {cell.name: cell for cell in verdict.cells(record_of(row), row)}["naive / ours"]
    assert not cell.passed


def test_ours_that_did_not_run_is_a_miss():
    row = made_up(SMALL, ours=None, naive=0.3, compiled=0.1, bound=0.02)
    (cell,) = verdict.cells(record_of(row), row)
    assert not cell.passed
    assert cell.why == "out of memory"


@pytest.mark.parametrize(("slowdown", "passed"), [(1.29, True), (1.31, False)])
def test_bounded_means_bounded(slowdown, passed):
    whole = made_up(problems.GLOBAL.label, 1.0, 5.0, 1.3, 0.9)
    less = made_up(problems.BOUNDED.label, slowdown, 5.0, 1.3, 0.9)
    (cell,) = verdict.cells(record_of(whole, less), less)
    assert cell.value == pytest.approx(slowdown)
    assert cell.passed is passed


def test_the_times_of_both_backends_are_there_to_fit_a_cost_to():
    rows = []
    for p in problems.CROSSOVER:  # cuda 0.030 + 1e-5·D under its own name `ours`, triton 0.010 + 1.5e-4·D
        cuda, triton = 0.030 + 1e-5 * p.d, 0.010 + 1.5e-4 * p.d
        rows.append(made_up(p.label, cuda, 1.0, 1.0, 0.01, backends={"triton": triton}))
    assert rows[0]["label"] in gpu_tables.backends_table(record_of(*rows))
    times = verdict.cost_times(rows, "device")
    assert len(times) == 2 * len(rows)
    assert Measured("cuda", 2, Call(penalised=True, stored=True), 256, 12544, 512, 35.12) in times


def test_documents_say_when_there_are_no_gpu_figures():
    assert "No GPU figures are committed yet" in gpu_tables.block(None)
    row = made_up(SMALL, 0.030, 0.3, 0.05, 0.02)
    assert SMALL in gpu_tables.block(record_of(row))
    assert tables.BLOCKS["gpu"]({}) == gpu_tables.block(tables.newest_gpu_record())


NUMBERS = {0: "0.00", 0.03512: "0.0351", 9.996: "10.00", 1234.5: "1234", 8.9e-5: "0.0000890", None: "–"}


@pytest.mark.parametrize(("value", "text"), NUMBERS.items())
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


def test_nvidia_smi_is_read():
    found = machine.parse_smi("580.1.02, 1755, 1980, 3201, [N/A], 700.0, 44\n")
    assert (found["driver"], found["sm_clock_mhz"], found["power_w"]) == ("580.1.02", 1755.0, "[N/A]")
    assert machine.parse_smi("") == {}
