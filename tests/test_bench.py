"""The benchmark's arithmetic, its JSON and the documents that quote it; no time is judged here."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import pytest
import torch

from bench import (
    cases,
    embedders,
    family,
    family_tables,
    host,
    losses,
    measure,
    pictures,
    rivals,
    roofline,
    tables,
    verdict,
)
from bench.__main__ import main
from bench.cases import Case
from bench.negatives import ROWS
from fused_nce import info_nce
from fused_nce.bench import memory
from fused_nce.bench.rivals import Subject, make, step

UNIT = re.compile(r"_(ms|s|bytes|kib|mib|gib|share)(_|$)|gflop_per_s|^flop$")
UNITLESS = {
    "schema", "n_a", "n_c", "d", "rounds", "cores", "threads", "dirty", "virtual", "judged", "mm", "onednn", "openblas",
    "zendnn",
}  # fmt: skip
SHAPES = [(8, 4, 16), (16, 4, 16), (24, 4, 16), (32, 4, 16)]


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """A run on tiny shapes, and the record that it wrote; a process of its own tells each rival's peak once."""
    out = tmp_path_factory.mktemp("bench")
    shapes = ["x".join(map(str, shape)) for shape in SHAPES]
    chosen = ["--rivals", "naive", "chunked", "ours"]
    peak = functools.cache(lambda rival, threads: real(Subject(rival, Case(*SHAPES[0]).problem), threads))
    real = memory.peak
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "peak", lambda subject, threads: peak(subject.rival, threads))
        path = main(
            ["--quick", "--force", "--threads", "1", "--rounds", "2", "--out", str(out), "--shapes", *shapes, *chosen]
        )
    assert path == out / f"cpu-{host.slug()}.json"
    assert path.with_suffix(".md").stat().st_size > 0
    for picture in ("time", "memory", "overview"):
        assert path.with_name(f"{path.stem}-{picture}.png").read_bytes().startswith(b"\x89PNG")
    return json.loads(path.read_text(encoding="utf-8"))


def numbers(node, key=""):
    """(key, number) of every number in a JSON tree; a list's items have its key."""
    if isinstance(node, dict):
        for name, value in node.items():
            # Below a key with a unit, the names are those of libraries.
            yield from numbers(value, key if UNIT.search(key) else name)
    elif isinstance(node, list):
        for value in node:
            yield from numbers(value, key)
    elif isinstance(node, int | float):
        yield key, node


def test_every_number_of_the_json_has_a_unit_in_its_key(record):
    found = list(numbers(record))
    assert len(found) > 100
    assert {key for key, _ in found if not UNIT.search(key)} <= UNITLESS


def test_json_says_what_ran_where(record):
    assert record["schema"] == 1
    assert re.fullmatch(r"[0-9a-f]{40}|unknown", record["code"]["commit"])
    assert record["host"]["threads"] == 1
    assert record["versions"]["torch"] == str(torch.__version__)
    shapes = [(row["n_a"], row["n_c"], row["d"], row["dtype"]) for row in record["cases"]]
    assert shapes == [(*s, t) for t in ("float32", "bfloat16")[: 1 if host.narrowed() else 2] for s in SHAPES]
    for row in record["cases"]:
        assert row["ours_backend"] in ("cpu", "chunked")
        names = ["naive", "chunked", "ours"] if row["dtype"] == "float32" else ["ours"]
        assert list(row["rivals"]) == names
        assert set(row["bound"]["gemms"]) == {"scores", "grad_antecedents", "grad_consequents"}
        for found in [row["bound"], *row["rivals"].values()]:
            assert 0 < found["time_ms_min"] <= found["time_ms_median"]


def test_counted_flop_and_bytes_are_those_of_the_shape():
    case = Case(128, 49, 1024)
    a, c = case.inputs()
    assert case.flop == 3 * 2 * 128 * (128 * 49) * 1024
    assert case.inputs_bytes == sum(x.numel() * x.element_size() for x in (a, c))
    assert Case(8, 4, 16, "bfloat16").inputs_bytes == Case(8, 4, 16).inputs_bytes // 2


def test_the_table_has_its_eight_shapes_and_the_fits_four_batches():
    assert [(c.n_a, c.n_c, c.d) for c in cases.TABLE] == [
        (128, 49, 1024), (256, 49, 1024), (126, 49, 2560), (128, 49, 512),
        (256, 49, 256), (512, 49, 256), (256, 49, 128), (512, 49, 128),
    ]  # fmt: skip
    assert all(sum(case.d == d for case in cases.SWEEP) >= 4 for d in cases.SWEEP_WIDTHS)


def test_rivals_compute_the_same_loss_in_float64():
    problem = Case(7, 5, 12).problem
    a, c = problem.inputs(torch.float64, seed=1)
    inputs = (4 * a).detach().requires_grad_(), c
    found = {name: step(make(shared, problem), inputs) for name, shared in rivals.SHARED.items() if name != "compile"}
    for name in found:
        # The naive one casts its scores to float32, as the code that it stands for does.
        torch.testing.assert_close(found[name], found["naive"], rtol=2e-5, atol=1e-6, check_dtype=False)


def test_a_rival_that_computes_something_else_is_refused(monkeypatch):
    case = Case(8, 4, 16)
    wrong = rivals.Rival("wrong", lambda p: lambda a, c: make("eager", p)(a, c) + 1e-2 * c.square().mean())
    monkeypatch.setitem(rivals.RIVALS, "wrong", wrong)
    with pytest.raises(ValueError, match=r"wrong on 8×4, 16 float32: .* differs by"):
        rivals.check_agreement(case, {"wrong": rivals.prepare("wrong", case)})


def test_bound_multiplies_what_it_says():
    a, c = Case(8, 4, 16).inputs()
    calls = rivals.bound.gemms(a, c)
    torch.testing.assert_close(calls["scores", "mm"](), a.detach() @ c.detach().flatten(0, 1).T)
    for gemm in rivals.bound.GEMMS:
        for library in rivals.bound.LIBRARIES:
            if (gemm, library) in calls:
                torch.testing.assert_close(calls[gemm, library](), calls[gemm, "mm"]())


def test_rounds_interleave_every_call():
    log = []
    calls = {name: (lambda name=name: log.append(name)) for name in "abc"}
    times = measure.interleave(calls, 6)
    assert {name: len(found) for name, found in times.items()} == dict.fromkeys("abc", 6)
    rounds = ["".join(log[i : i + 3]) for i in range(0, 18, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 1


def test_summary_is_median_and_quartiles():
    found = measure.summary([5.0, 1.0, 2.0, 3.0, 4.0], Case(10, 1, 100).flop)
    assert (found["time_ms_median"], found["time_ms_iqr"], found["time_ms_min"]) == (3.0, 2.0, 1.0)
    assert found["useful_gflop_per_s"] == pytest.approx(3 * 2 * 100 * 100 / 3e-3 / 1e9, abs=0.05)


def test_peak_memory_counts_what_a_loss_holds(monkeypatch):
    case = Case(128, 16, 64)
    mib = memory.peak(rivals.subject("naive", case), threads=1)
    scores = 4 * case.scores / memory.MIB
    # Autograd keeps the mask, its complement and the steps' results: more than eight score tensors, fewer than forty.
    assert 8 * scores < mib["peak_memory_mib"] < 40 * scores
    parts = mib["high_water_mib"] - mib["file_backed_mib"] - mib["anonymous_before_mib"] - mib["gradients_mib"]
    assert mib["peak_memory_mib"] == pytest.approx(parts, abs=0.05)
    assert mib["gradients_mib"] == pytest.approx(case.inputs_bytes / memory.MIB, abs=0.01)


def made_up_row(ours, naive, bound, case):
    times = {"time_ms_iqr": 0.1, "peak_memory_mib": 20.0}
    return {
        "judged": True, "n_a": case.n_a, "n_c": case.n_c, "d": case.d, "dtype": case.dtype, "rounds": 20,
        "others_cpu_share": 0.0, "scores_bytes_float32": 4 * case.scores,
        "rivals": {"naive": {"time_ms_median": naive, **times}, "ours": {"time_ms_median": ours, **times}},
        "bound": {"time_ms_median": bound, "gemms": {}, **times},
    }  # fmt: skip


def test_verdict_passes_misses_and_explains():
    case = Case(128, 49, 1024)
    row = made_up_row(ours=12.0, naive=18.0, bound=10.0, case=case)
    found = {
        cell.name: cell
        for cell in verdict.cells({"cases": [row], "host": {"isa_flags": [], "torch_cpu_capability": "AVX512"}}, row)
    }
    assert found["ours / bound"].passed
    assert not found["naive / ours"].passed
    assert "naive itself runs at 1.80× the bound" in found["naive / ours"].why
    assert not found["peak MiB"].passed
    assert found["peak MiB"].text == "**20.00** ✗ (≤ 16)"
    slow = verdict.cells(
        {"cases": [row], "host": {"isa_flags": [], "torch_cpu_capability": "AVX512"}},
        made_up_row(13.0, 40.0, 10.0, case),
    )
    assert [cell.passed for cell in slow] == [False, True, False]
    avx2 = {"cases": [row], "host": {"isa_flags": [], "torch_cpu_capability": "AVX2"}}
    for width, ours, passes in ((512, 12.1, False), (512, 11.9, True), (128, 13.4, True), (128, 13.6, False)):
        cells = verdict.cells(avx2, made_up_row(ours, 20.0, 10.0, Case(256 if width == 128 else 128, 49, width)))
        assert [cell.passed for cell in cells[:2]] == [passes, True]


def test_a_cpu_stands_in_for_one_with_avx2(monkeypatch):
    """The program starts anew with what torch, oneDNN and ours read as they load; once is enough."""
    started = []
    monkeypatch.setattr(host.os, "execve", lambda *arguments: started.append(arguments))
    for capability, times in (("AVX512", 1), ("AVX2", 0)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        started.clear()
        host.restart_with("avx2", "bench.family", ["--quick"])
        host.restart_with(None, "bench.family", ["--quick"])
        assert len(started) == times
        for _, command, environment in started:
            assert command[1:] == ["-m", "bench.family", "--quick"]
            assert environment.items() >= host.AVX2_ALONE.items()


def test_linear_fit_recovers_a_line():
    intercept, slope, residual = verdict.linear_fit([1.0, 2.0, 3.0, 4.0], [3.0, 5.0, 7.0, 9.4])
    assert [intercept, slope] == pytest.approx([0.8, 2.12])
    assert residual == pytest.approx(0.16)


def test_model_grows_with_the_batch_and_says_that_it_is_one():
    text = roofline.table()
    assert "Modelled, not measured" in text
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == 2 + 4 * len(roofline.BATCHES)
    for method in roofline.METHODS:
        small, large = (roofline.step(method, batch) for batch in (1024, 65536))
        assert large.naive_bytes > 60 * small.naive_bytes
        assert large.fused_bytes <= roofline.FUSED_WORKSPACE_BYTES
        assert large.fused_s < large.naive_s


def test_blocks_are_filled_from_the_record(record):
    text = "before\n<!-- bench:cpu-host -->\nold\n<!-- /bench -->\nafter\n"
    filled = tables.render(text, record, "x.md")
    assert filled == f"before\n<!-- bench:cpu-host -->\n{tables.host_line(record)}\n<!-- /bench -->\nafter\n"
    assert tables.render(filled, record, "x.md") == filled
    with pytest.raises(ValueError, match=r"x\.md: got block bench:nothing"):
        tables.render("<!-- bench:nothing -->\n<!-- /bench -->", record, "x.md")
    for name, block in tables.BLOCKS.items():
        if name != "cpu-table":
            assert block(record)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_every_registered_loss_can_be_measured(name):
    assert losses.step(name, losses.Size(n=8, m=20, d=6, p=2), "reference")().isfinite()


def test_the_page_of_losses_lists_every_registered_loss():
    text = (host.ROOT / "docs/losses.md").read_text(encoding="utf-8")
    for entry in losses.LOSSES.values():
        assert f"| [`{entry.name}`](" in text, entry.name
        assert f"| `{entry.module.__name__}` |" in text, entry.name


def test_the_documents_show_the_published_numbers():
    """After a change of a number, a signature or a docstring: `python -m bench.tables`."""
    assert tables.main(["--check"]) == 0


def test_the_pictures_are_what_the_losses_do():
    """After a change of a loss or its example: `python -m bench.pictures`."""
    assert pictures.main(["--check"]) == 0
    (found,) = pictures.signs(losses.LOSSES["nt_xent"])
    n = len(found) // 2
    twin, itself = torch.eye(2 * n).roll(n, 1), torch.eye(2 * n)
    torch.testing.assert_close(found.float(), 2 * twin + itself - 1)
    assert (pictures.signs(losses.LOSSES["sup_con"])[0].diagonal() == 0).all()


def test_a_loss_costs_the_gemms_that_are_counted():
    costs = {name: losses.cost(losses.LOSSES[name]) for name in ("info_nce", "moco_nce", "clip_loss", "club")}
    assert [text.split()[1] for text in costs.values()] == ["3", "2", "4", "scores"]


@pytest.fixture(scope="module")
def family_row():
    problem = family.Problem("clip_loss", "CLIP 24², D 16", 24, 24, 16)
    return family.measured(problem, ["eager", "chunked", "ours", "linear_cross_entropy"], 1, rounds=2, budget_s=0.0)


def test_a_rival_that_is_too_slow_for_one_size_is_not_asked_for_the_larger_ones(monkeypatch, tmp_path):
    """Nor is it said of smaller ones, by any number of threads."""
    sizes = [family.Problem("clip_loss", f"CLIP {n}²", n, n, 16) for n in (8, 12, 16)]
    asked = []
    measured = family.measured

    def slow(problem, names, threads, *rest, **options):
        asked.append((threads, problem.n, *names))
        monkeypatch.setattr(family, "CALL_S", 0.0 if problem.n == 12 else 60.0)
        return measured(problem, names, threads, *rest, **options)

    monkeypatch.setattr(family, "measured", slow)
    monkeypatch.setattr(family, "PROBLEMS", sizes)
    monkeypatch.setattr(family.memory, "peak", lambda *of: {"peak_memory_mib": 1.0})
    options = ["--rivals", "eager", "ours", "--threads", "1", "2", "--rounds=2", "--budget-s=0", f"--out={tmp_path}"]
    rows = json.loads(family.main(options).read_text())["problems"]
    both = ("eager", "ours")
    assert asked == [(t, n, *(both if n < 16 else ("ours",))) for t in (1, 2) for n in (8, 12, 16)]
    assert [sorted(row["left_out"]) for row in rows] == [[], ["eager"], ["eager"]] * 2
    assert re.fullmatch(r"one call takes 0\.\d s at CLIP 12²", rows[2]["left_out"]["eager"])


def test_the_family_is_measured_with_its_errors(family_row):
    assert list(family_row["rivals"]) == ["eager", "chunked", "ours"]  # the other computes one direction alone
    for found in family_row["rivals"].values():
        assert found["value_error"] < 1e-6
        assert 0 < found["gradient_error"] < 1e-5
        assert found["time_ms_min"] > 0


@pytest.mark.parametrize("loss", sorted({p.loss for p in family.PROBLEMS}))
def test_every_problem_of_the_family_has_the_eager_value(loss):
    problem = next(p for p in family.PROBLEMS if p.loss == loss)
    tiny = family.Problem(loss, "tiny", 8, 8 * problem.n_c, 16, problem.n_c, problem.steps)
    exact = family.step(family.FORMULAS[loss].naive, tiny.inputs(torch.float64))
    for rival in ("eager", "chunked", "ours"):
        found = family.errors(family.step(make(rival, tiny), tiny.inputs()), exact)
        assert found["value_error"] < 1e-5
        assert found["gradient_error"] < 1e-5


def test_a_rival_that_wins_is_listed_with_its_reason(family_row):
    times = {"eager": 1.0, "ours": 2.0}
    rivals_ = {name: family_row["rivals"][name] | {"time_ms_median": ms} for name, ms in times.items()}
    row = family_row | {"rivals": rivals_, "bound_ms": 0.5}
    record = {
        "date_utc": "2026-01-01", "code": {"commit": "0123456789", "dirty": False}, "versions": {"torch": "2"},
        "host": {"cpu_model": "A", "cores": 2, "torch_cpu_capability": "AVX2", "isa_flags": ["avx512f"]},
        "problems": [row, row | {"n": 4096, "m": 4096}],
    }  # fmt: skip
    text = family_tables.slower([record])
    assert "| CLIP 24², D 16 | A, AVX2 (AVX-512 turned off), 1 threads | eager torch | 1.00 | 2.00 | 2.00× |" in text
    assert "the call, not the scores: 1.50 ms of 2.00" in text
    assert "ours takes 4.00× the least GEMMs, the rival 2.00×" in text
    assert "`clip_loss` none of the sizes measured" in family_tables.faster_from(record)
    rivals_["ours"]["time_ms_median"] = 0.9
    assert family_tables.slower([record]) == "None of the measured problems."


@pytest.mark.parametrize("row", range(4))
def test_the_picture_of_negatives_tells_the_truth(row):
    """What is a negative of the first row has a gradient of its loss, and nothing else beside the pair itself."""
    direction, _, letters = ROWS[row]
    k, h, q = (torch.randn(3, *more, 4, dtype=torch.float64, requires_grad=True) for more in ((), (1,), ()))
    options: dict[str, Any] = {"hard_negatives": h, "share_hard_negatives": True} if "s" in letters else {}
    loss = info_nce(q, k, directions=(direction,), row_weights=torch.tensor([1.0, 0, 0]).double(), **options).loss
    found = torch.autograd.grad(loss, (k, h, q), materialize_grads=True)
    seen = [bool(x.any()) for each in found for x in each]
    assert all(seen[i] == (letters[i] in "pnos") for i in range(9) if i not in (0, 6))  # the pair's own
    assert all(seen[i] for i in (0, 6))


def test_embedders_write_a_table_of_what_was_measured():
    """A loss that was not run leaves a dash; what was left out is named; a larger problem is predicted by N²·D."""
    row = {"time_ms_median": 2.0, "peak_memory_mib": 4.0, "value_error": 1e-7, "gradient_error": 2e-6}
    slow = row | {"time_ms_median": 6.0, "peak_memory_mib": 200.0}
    done = [{"loss": "pairs", "n": 256, "d": 384, "rivals": {embedders.OURS: row, embedders.EAGER: slow}}]
    record = {"problems": done, "left_out": [["gist", 4096, 384]], "host": {"cpu_model": "some"}, "threads": 2}
    record |= {"sentence_transformers": "6.2.0", "versions": {"torch": "2"}, "code": {"commit": "0" * 40}}
    text = embedders.table(record | {"date_utc": "2026-01-01T"})
    assert "| pairs | 256 | 384 | 2 | 3.00× | – | 4.0 | 200.0 | – | 50× | 1e-07 / 1e-07 | 2e-06 / 2e-06 / – |" in text
    assert "Left out, for want of time: gist 4,096 × 384." in text
    steps = embedders.steps_s(done, "pairs", 512, 768)
    assert sum(steps.values()) == pytest.approx(8 * 0.008)
    assert set(steps) == set(embedders.NAMES)
    assert embedders.EAGER not in embedders.steps_s(done, "pairs", 100_000, 384)  # too slow
    assert set(embedders.steps_s(done, "gist", 256, 384).values()) == {0.0}
