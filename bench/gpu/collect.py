"""One problem's record: every contender on every clock, in one interleaved run, its memory, and the bound."""

from __future__ import annotations

from functools import partial
from typing import Any

from bench import measure
from bench.gpu import rivals
from bench.gpu.machine import Machine
from bench.gpu.problems import Problem
from bench.gpu.rivals import DTYPE, Inputs, Loss, rotation
from fused_nce.bench.formulas import FORMULAS
from fused_nce.bench.timers import Call, Timer

WARMUPS = 5
# Beyond, a call's launches are nothing beside its work: a graph would only hold memory, and ten wall times say enough.
LAUNCHES_COUNT_SCORES = 1 << 25
FEW_ROUNDS = 10
SIZES = ("loss", "label", "role", "n", "m", "d", "n_c", "steps")


def collect(problem: Problem, machine: Machine, rounds: int, compiled: bool) -> dict[str, Any]:
    """The problem's row of the JSON, units in the keys.

    Args:
        problem: what to run, within its own workspace limit.
        machine: where.
        rounds: timed rounds.
        compiled: whether torch.compile takes part.
    """
    with rivals.workspace(problem.workspace_mb):
        formula = FORMULAS[problem.loss]
        inputs = formula.inputs(problem, machine.draw(0, DTYPE))
        inputs_bytes = sum(x.numel() * x.element_size() for x in inputs)
        leaves_bytes = sum(x.numel() * x.element_size() for x in inputs if x.requires_grad)
        able, refused, chosen = rivals.agreeing(problem, rivals.losses(problem, machine, compiled), inputs)
        count = machine.input_sets(inputs_bytes)
        sets = [inputs, *(formula.inputs(problem, machine.draw(seed, DTYPE)) for seed in range(1, count))]
        found, floor = _times(problem, machine, able, sets, rounds)
        for name, loss in able.items():
            peak = machine.peak_bytes(partial(rivals.step, loss, inputs))
            found[name]["peak_memory_mb"] = None if peak is None else round((peak - leaves_bytes) / 1e6, 3)
    backends = {chosen if name == "ours" else name: row for name, row in found.items() if name not in rivals.THEIRS}
    key = f"{machine.clock}_ms_median"
    return {
        **{name: getattr(problem, name) for name in SIZES},
        "dtype": str(DTYPE).removeprefix("torch."),
        "flop": problem.flop,
        "gemms": list(problem.gemms),
        "inputs_bytes": inputs_bytes,
        "gradients_bytes": leaves_bytes,
        "input_sets": count,
        "rounds": rounds,
        "workspace_limit_mib": problem.workspace_mb,
        "ours_backend": chosen,
        "fastest_backend": min(backends, key=lambda name: backends[name][key]) if backends else None,
        "rivals": found,
        "refused": refused,
        "bound": floor,
    }


def _times(
    problem: Problem, machine: Machine, able: dict[str, Loss], sets: list[Inputs], rounds: int
) -> tuple[dict[str, dict[str, Any]], dict[str, Any] | None]:
    """Each contender's medians and spreads on each clock, and the bound's.

    Small ones as replays of CUDA graphs too, one graph a set of inputs: `graph_ms_…`, or why there is none.
    """
    each: dict[str, list[Call]] = {name: [partial(rivals.step, loss, x) for x in sets] for name, loss in able.items()}
    calls: dict[Any, Call] = {name: rotation(steps) for name, steps in each.items()}
    gemms = rivals.gemm_calls(problem, machine, len(sets))
    found: dict[str, dict[str, Any]] = {name: {} for name in able}
    small = problem.scores <= LAUNCHES_COUNT_SCORES
    with measure.without_gc():
        main = _rounds({**calls, **gemms}, rounds, machine.timers[machine.clock])
        for name in able:
            found[name] |= measure.summary(main[name], problem.flop, machine.clock)
        for clock in machine.timers.keys() - {machine.clock}:
            times = _rounds(calls, rounds if small else min(rounds, FEW_ROUNDS), machine.timers[clock])
            for name in able:
                found[name] |= measure.spread(times[name], clock)
        replays: dict[Any, Call] = {}
        for name, steps in each.items() if small else ():
            graphs, reason = rivals.failure(lambda steps=steps: [machine.capture(step) for step in steps])  # type: ignore[misc]
            if reason:
                found[name]["graph_refused"] = reason
            elif graphs[0] is not None:
                replays[name] = rotation(graphs)
        for name, ms in _rounds(replays, rounds, machine.timers[machine.clock]).items():
            found[name] |= measure.spread(ms, "graph")
    scaled = {key: [problem.steps * ms for ms in main[key]] for key in gemms}
    return found, measure.bound_summary(scaled, problem.flop, machine.clock) if gemms else None


def _rounds(calls: dict[Any, Call], rounds: int, timer: Timer) -> dict[Any, list[float]]:
    """Warm, then timed."""
    measure.interleave(calls, WARMUPS, timer)
    return measure.interleave(calls, rounds, timer)
