"""`python -m bench.compiled [--write]`: what torch.compile's code of a loss launches and moves on a GPU, without one.

Inductor partitions, fuses and lowers the loss that a user writes down, and its backward, at full size for an H200 whose
properties it is told; tensors are fake, and the code that it generates is read, not run. A kernel of it counts each
tensor that it reads or writes once, however often it does: less than it moves where a row does not fit its registers. A
product is cuBLAS'. What is counted is committed, `bench/results/static-compile.json`, and `bench/counted.py` makes
times of it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.gpu.problems import ALL, Problem
from bench.host import ROOT
from bench.static import Card
from bench.text import markdown, number
from fused_nce.bench.formulas import FORMULAS

TABLE = ROOT / "bench/results/static-compile.json"
H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, warp_size=32, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, shared_memory_per_block_optin=232448,
    total_memory=150754820096, L2_cache_size=62914560, gcnArchName="",
)  # fmt: skip
PROBLEMS = {p.label: p for p in ALL if p.workspace_mb is None}
PRODUCTS = ("extern_kernels.mm", "extern_kernels.addmm", "extern_kernels.bmm")
Call = dict[str, Any]  # of the JSON


class _Enough(Exception):
    """The code is there, and nothing has run."""


@contextmanager
def posing() -> Iterator[None]:
    """Inductor sees an H200."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor
    from torch._inductor import scheduler
    from triton.runtime.driver import driver

    answers: dict[str, Callable[..., Any]] = {
        "get_device_properties": lambda *device: H200,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "is_bf16_supported": lambda *device, **emulated: True,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
            stack.enter_context(mock.patch.object(CudaInterface, name, staticmethod(answer)))
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)))
        stack.enter_context(mock.patch.object(CudaInterface, "is_available", staticmethod(lambda: True)))
        for name in ("get_device_properties", "current_device"):
            stack.enter_context(mock.patch.object(CudaInterface.Worker, name, staticmethod(answers[name])))
        stack.enter_context(mock.patch.object(scheduler, "has_triton", return_value=True))
        stack.enter_context(mock.patch.object(driver, "_active", Card("sm_90")))
        stack.enter_context(functorch.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False))
        # Products are padded by what a card measures: here they are taken for aligned.
        stack.enter_context(inductor.patch(fx_graph_cache=False, shape_padding=False, compile_threads=1))
        yield


def kernels_of(graph: Any) -> list[dict[str, Any]]:
    """Each launch of a lowered graph, inductor's `GraphLowering`."""
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode, SchedulerNode

    found = []
    for node in graph.scheduler.nodes:
        if isinstance(node, NopKernelSchedulerNode):
            continue
        moved = node.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
        if not isinstance(node, SchedulerNode):  # there inductor stops at 10^9 numbers
            moved = {name: graph.get_numel(name) * graph.get_dtype(name).itemsize for name in moved}
        kernel: dict[str, Any] = {"name": "fused", "bytes": int(sum(moved.values()))}
        if isinstance(node, ExternKernelSchedulerNode):
            operator: Any = node.node
            kernel["name"] = str(operator.python_kernel_name)
            if kernel["name"] not in PRODUCTS:
                raise ValueError(f"{kernel['name']}: got a call that is no product, need its count")
            x, y = (part.get_size() for part in operator.inputs[-2:])
            kernel["flop"] = int(2 * math.prod(x) * y[-1])
        found.append(kernel)
    return found


def lowered(loss: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[dict[str, Any]]:
    """The launches of a loss and its backward.

    Autograd's engine looks for the devices of its tensors: it meets the CPU's, and what is lowered has the GPU's.
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.graph import GraphLowering

    found: list[dict[str, Any]] = []

    def take(graph: Any) -> Any:
        graph.codegen()
        found.extend(kernels_of(graph))
        graph.cache_key, graph.cache_path, graph.cache_linemap = "", "", []
        return SimpleNamespace(call=refuse, runner=None, __file__="")

    def refuse(arguments: Any) -> Any:
        raise _Enough

    def inner(graph: Any, examples: Sequence[Any], **options: Any) -> Any:
        return compile_fx_inner(graph, on_gpu(graph, examples), **options)

    torch._dynamo.reset()
    backend = partial(compile_fx, inner_compile=inner)
    with posing(), mock.patch.object(GraphLowering, "compile_to_module", take), suppress(_Enough):
        torch.compile(loss, backend=backend, fullgraph=True, dynamic=False)(*inputs)
    return found


def on_gpu(graph: Any, examples: Sequence[Any]) -> list[Any]:
    """Moves a graph's tensors to the GPU; the inputs there."""
    from torch._guards import detect_fake_mode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    gpu, mode = torch.device("cuda", 0), detect_fake_mode(examples)
    assert mode is not None
    for node in graph.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": gpu}
    with mode:
        moved = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=gpu) if isinstance(x, Tensor) else x
            for x in examples
        ]
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*moved)
    return moved


def count(problem: Problem) -> Call:
    """One problem's row of the JSON."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    formula = FORMULAS[problem.loss]
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs = formula.inputs(problem, partial(torch.empty, dtype=torch.bfloat16))
    return {"label": problem.label, "kernels": lowered(formula.naive, inputs)}


# ---- the table ---------------------------------------------------------------------------------------------------


@cache
def committed() -> dict[str, Call]:
    """The table, by label."""
    return {row["label"]: row for row in json.loads(TABLE.read_text(encoding="utf-8"))["calls"]}


def version() -> str:
    """The torch that the table is of."""
    return str(json.loads(TABLE.read_text(encoding="utf-8"))["torch"])


def counted(problem: Problem) -> Call:
    """The committed count of a problem's loss as its user writes it down, which knows no limit of a workspace."""
    return committed()[problem.label.partition(", in ")[0]]


def moved_bytes(call: Call) -> int:
    """Read and written."""
    return sum(kernel["bytes"] for kernel in call["kernels"])


def main(argv: Sequence[str] | None = None) -> int:
    """Count, print, write; the number of calls that the table has otherwise."""
    parser = argparse.ArgumentParser(prog="python -m bench.compiled", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="problems whose label has this text")
    parser.add_argument("--write", action="store_true", help=f"into {TABLE.relative_to(ROOT)}")
    options = parser.parse_args(argv)
    found = {label: count(p) for label, p in PROBLEMS.items() if options.only in label}
    rows = [[label, f"{len(x['kernels'])}", number(moved_bytes(x) / 1e6)] for label, x in found.items()]
    print(markdown(["torch.compile", "launches", "MB moved"], rows))
    if options.write:
        kept = (committed() if TABLE.exists() else {}) | found
        lines = ",\n".join(json.dumps(kept[label], separators=(",", ":")) for label in PROBLEMS if label in kept)
        text = f'{{"schema":1,"torch":"{torch.__version__}","calls":[\n{lines}\n]}}\n'
        TABLE.write_text(text, encoding="utf-8")
        committed.cache_clear()
    other = [label for label, x in found.items() if committed().get(label) != x]
    print(
        "\n".join(f"{label}: not as {TABLE.name} has it" for label in other), end="\n" if other else "", file=sys.stderr
    )
    return len(other)


if __name__ == "__main__":
    sys.exit(min(main(), 100))
