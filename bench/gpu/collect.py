"""One problem's record: every contender on every clock, in one interleaved run, its memory, and the bound."""

from __future__ import annotations

from functools import partial
from typing import Any

from bench import measure
from bench.gpu import rivals
from bench.gpu.machine import Machine
from bench.gpu.problems import Problem
from bench.gpu.rivals import DTYPE, Inputs, Loss, Rotation
from fused_nce.bench.formulas import FORMULAS
from fused_nce.bench.timers import Call, Timer

WARMUPS = 5
# Beyond, a call's launches are nothing beside its work: a graph would only hold memory, and ten wall times say enough.
LAUNCHES_COUNT_SCORES = 1 << 25
FEW_ROUNDS = 10


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
    backends = {chosen if name == "ours" else name: row for name, row in found.items() if name not in rivals.NAIVE}
    key = f"{machine.clock}_ms_median"
    return {
        "loss": problem.loss,
        "label": problem.label,
        "role": problem.role,
        "n": problem.n,
        "m": problem.m,
        "d": problem.d,
        "n_c": problem.n_c,
        "steps": problem.steps,
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
    """Each contender's medians and spreads on each clock, and the bound's."""
    each: dict[str, list[Call]] = {
        name: [partial(rivals.step, loss, inputs) for inputs in sets] for name, loss in able.items()
    }
    calls: dict[Any, Call] = {name: Rotation(steps) for name, steps in each.items()}
    gemms = rivals.gemm_calls(problem, machine, len(sets))
    found: dict[str, dict[str, Any]] = {name: {} for name in able}
    floor = None
    with measure.without_gc():
        for clock, timer in machine.timers.items():
            main = clock == machine.clock
            enough = rounds if main or problem.scores <= LAUNCHES_COUNT_SCORES else min(rounds, FEW_ROUNDS)
            times = _rounds({**calls, **(gemms if main else {})}, enough, timer)
            for name in able:
                parts = times[name], problem.flop, clock
                found[name] |= measure.summary(*parts) if main else measure.spread(times[name], clock)
            if gemms and main:
                scaled = {key: [problem.steps * ms for ms in times[key]] for key in gemms}
                floor = measure.bound_summary(scaled, problem.flop, clock)
        if problem.scores <= LAUNCHES_COUNT_SCORES:
            _graph_times(machine, each, rounds, found)
    return found, floor


def _graph_times(machine: Machine, each: dict[str, list[Call]], rounds: int, found: dict[str, dict[str, Any]]) -> None:
    """The same calls as replays of CUDA graphs, one graph a set of inputs; adds `graph_ms_…`, or why there is none."""
    replays: dict[Any, Call] = {}
    for name, steps in each.items():
        graphs, reason = rivals.failure(lambda steps=steps: [machine.capture(step) for step in steps])  # type: ignore[misc]
        if reason:
            found[name]["graph_refused"] = reason
        elif graphs[0] is not None:
            replays[name] = Rotation(graphs)
    if replays:
        for name, times in _rounds(replays, rounds, machine.timers[machine.clock]).items():
            found[name] |= measure.spread(times, "graph")


def _rounds(calls: dict[Any, Call], rounds: int, timer: Timer) -> dict[Any, list[float]]:
    measure.interleave(calls, WARMUPS, _nothing, timer)
    return measure.interleave(calls, rounds, _nothing, timer)


def _nothing() -> None:
    """Gradients are results here, so there is none to drop between two calls."""
