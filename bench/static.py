"""`python -m bench.static`: compile the shipped Triton tiles ahead of time, and read what the compiler made of them.

No GPU is needed. For every kernel, architecture, dtype and width: no spill, no stack, shared memory within the
architecture's limit, matrix instructions where the inputs have 16 bits. And no regression against the committed table:
with the Triton that wrote it, registers may grow by 8 (they are handed out eight at a time), all else by nothing. A row
of another source or tile is a fault too; `--all --stale --write` builds those that are.
By default the two kernels that carry a training step, for bfloat16; `--all` for everything, `--write` for a new table.
PRECISION is "ieee" alone: what q and k of two dtypes, or torch's own setting of TF32, would compile is not seen here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from fused_nce.backends.triton import configs, plan
from fused_nce.backends.triton.form import Form, Partials
from fused_nce.core.problem import Problem
from fused_nce.core.spec import Bias, Block, Identity, Index, Labels, Separate, Spec, TanhClip
from fused_nce.core.tails import LogOut, Nce, Sigmoid

from . import sass
from .host import ROOT
from .text import markdown

TABLE = ROOT / "bench/results/static-triton.json"
WIDTHS = (*configs.WIDTHS, 1024)
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
SHARED_LIMIT_BYTES = {
    "sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536, "gfx90a": 65536,
    **dict.fromkeys(configs.CONSUMER, 101376),
}  # fmt: skip
WARPS_A_MULTIPROCESSOR = {**dict.fromkeys(("sm_80", "sm_90", "sm_100"), 64), **dict.fromkeys(configs.CONSUMER, 48)}
MATRIX = {  # what 16-bit products compile to
    **dict.fromkeys(configs.ARCHITECTURES, "HMMA"),
    "sm_90": "HGMMA", "sm_100": "UTC[A-Z]*MMA", **dict.fromkeys(("gfx942", "gfx90a"), r"v_mfma\w+"),
}  # fmt: skip
REGISTERS_MAY_GROW_BY = 8
PER_SCORE = ("issued_per_score", "special_per_score", "alu_per_score")  # of a main loop's cheapest turn, `sass.Turn`


@dataclass(frozen=True)
class Variant:
    """A kernel, and what is compiled into it."""

    kernel: str
    spec: Spec
    flags: dict[str, bool]
    penalised: bool = True

    @property
    def form(self) -> Form:
        """Its spec's."""
        x = torch.empty(0, 16)
        form = Form.of(Problem(x, x, 1.0, self.spec, 0, shared=self.spec.drop_self))  # here nothing else drops it
        return form if self.penalised else form.without_square()

    def tile(self, architecture: str, dtype: torch.dtype, width: int) -> configs.Tile | None:
        """What a launch takes; None where there is none."""
        square = configs.square(architecture, dtype, width)
        if self.flags.get("MIRRORED"):
            return configs.mirrored_tile(architecture, dtype, width)
        if self.kernel in STORED:
            tile = square and (square.both if self.kernel == "both_kernel" and self.spec.columns else square.strip)
            return tile if self.spec.columns or width > plan.WIDE else None
        found = configs.tile(architecture, dtype, width)
        if self.kernel == "fold_kernel":
            return configs.fold_tile(found, square, width, Partials.of(self.form.rows), self.flags["GRADIENT"])
        return configs.weights_tile(found, all(self.flags.values()))

    def constants(self, width: int, tile: configs.Tile) -> dict[str, Any]:
        """The constants of a launch at width D."""
        names = {"FORM": self.form, "PARTIALS": Partials.of(self.form.rows), "BACK": Partials.of(self.form.columns)}
        sizes = {"D": width, "X": tile.x, "Y": tile.y, "CHUNK": tile.chunk, "SLICE": tile.slice}
        return {"PRECISION": "ieee", **names, **sizes, **self.flags}


NCE = Nce().stats
CLIPPED, WIDELY, FREE = (Spec(Block(49), transform) for transform in (TanhClip(20.0), TanhClip(300.0), Identity()))
STORED = ("both_kernel", "strip_kernel")  # of both sides, and of wide rows
BOTH_WAYS = Spec(Block(1), stats=NCE, columns=("neg_lse",))
VIEWS = Spec(Block(2, 2), stats=NCE, drop_self=True)
MARGIN = Spec(Labels(), stats=("neg_lse", "neg_sum", "neg_count"), filters=("ceiling",))
ROWS = {"BY_COLUMN": False, "GRADIENT": False, "MIRRORED": False}
ROWS_DQ = ROWS | {"GRADIENT": True}
DQ, DK, SELF = ({"AS_ROW": row, "AS_COLUMN": column} for row, column in ((True, False), (False, True), (True, True)))
VARIANTS = {
    "rows, dq, clip": Variant("fold_kernel", CLIPPED, ROWS_DQ),
    "dk, clip, penalty": Variant("weights_kernel", CLIPPED, DK),
    "rows, dq": Variant("fold_kernel", FREE, ROWS_DQ),
    "rows, dq, wide clip": Variant("fold_kernel", WIDELY, ROWS_DQ),
    "rows, clip": Variant("fold_kernel", CLIPPED, ROWS),
    "dk": Variant("weights_kernel", FREE, DK, penalised=False),
    "dq, clip, penalty": Variant("weights_kernel", CLIPPED, DQ),
    "queue: rows, dq": Variant("fold_kernel", Spec(Separate(1), stats=NCE), ROWS_DQ),
    "targets: dk": Variant("weights_kernel", Spec(Index(), stats=NCE), DK),
    "views: rows": Variant("fold_kernel", VIEWS, ROWS),
    "views: rows, once": Variant("fold_kernel", replace(VIEWS, unit_norm=True), ROWS | {"MIRRORED": True}),
    "views: both roles": Variant("weights_kernel", VIEWS, SELF),
    "two ways: dq": Variant("weights_kernel", BOTH_WAYS, DQ),
    "two ways: rows and columns": Variant("both_kernel", BOTH_WAYS, {}),
    "two ways: strip": Variant("strip_kernel", BOTH_WAYS, {}),
    "wide: rows, clip": Variant("both_kernel", CLIPPED, {}),
    "wide: rows": Variant("both_kernel", FREE, {}, penalised=False),
    "wide: strip, clip, penalty": Variant("strip_kernel", CLIPPED, {}),
    "wide: strip, margin": Variant("strip_kernel", MARGIN, {}),
    "pairs: rows, dq": Variant("fold_kernel", Spec(Block(1), Bias(), stats=Sigmoid().stats), ROWS_DQ),
    "pairs: dk": Variant("weights_kernel", Spec(Block(1), Bias(), stats=Sigmoid().stats), DK),
    "labels: rows": Variant("fold_kernel", Spec(Labels(), stats=LogOut.READS, drop_self=True), ROWS),
    "labels: both roles": Variant("weights_kernel", Spec(Labels(), stats=LogOut.READS, drop_self=True), SELF),
    "margin: rows, dq": Variant("fold_kernel", Spec(Index(), stats=NCE, filters=("ceiling",)), ROWS_DQ),
    "margin, smoothing: dk": Variant("weights_kernel", MARGIN, DK),
}
DEFAULT = ("rows, dq, clip", "dk, clip, penalty")


@dataclass(frozen=True)
class Build:
    """One compiled kernel."""

    variant: str
    architecture: str
    dtype: str
    width: int
    tile: tuple[int | None, ...]  # as `configs.Tile`
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_instructions: int
    matrix_instructions: int  # of the architecture's own kind
    mufu_per_score: float  # special functions a score and thread, all copies of the loop counted
    source: str  # `digest` of what was compiled
    issued_per_score: float | None = None  # of sm_90 and AMD's: instructions of the main loop's cheapest turn
    # Of the sm_90 code alone, whose matrix instructions are asynchronous:
    special_per_score: float | None = None  # of that turn
    alu_per_score: float | None = None
    matrix_clocks_per_score: float | None = None  # of a multiprocessor's tensor cores
    shapes: dict[str, int] = field(default_factory=dict)  # matrix instructions of each, `sass.shapes`
    serialised: int = 0  # ptxas' warnings C75xx: matrix instructions that wait for each other

    @property
    def key(self) -> tuple[Any, ...]:
        """What it is, without what became of it."""
        return self.variant, self.architecture, self.dtype, self.width

    @property
    def resident(self) -> int | None:
        """Programs that a multiprocessor holds at once; None where nobody knows how many registers it has."""
        warps = self.tile[4] or 1
        if self.architecture not in WARPS_A_MULTIPROCESSOR:
            return None
        by_registers = 65536 // (-(-32 * self.registers // 256) * 256 * warps)
        by_shared = (SHARED_LIMIT_BYTES[self.architecture] + 1024) // (self.shared_bytes + 1024)
        return min(by_registers, by_shared, WARPS_A_MULTIPROCESSOR[self.architecture] // warps)

    @property
    def place(self) -> tuple[int, ...]:
        """Where it stands in the table."""
        return (
            configs.ARCHITECTURES.index(self.architecture),
            list(DTYPES.values()).index(self.dtype),
            self.width,
            list(VARIANTS).index(self.variant),
        )

    def faults(self) -> Iterator[str]:
        """What must not be, whatever was before."""
        if self.stack_bytes or self.spill_instructions:
            yield f"spills: {self.spill_instructions} instructions, {self.stack_bytes} bytes of stack"
        if self.shared_bytes > SHARED_LIMIT_BYTES[self.architecture]:
            yield f"shared memory: {self.shared_bytes} of {SHARED_LIMIT_BYTES[self.architecture]} bytes"
        if self.dtype != "fp32" and not self.matrix_instructions:
            yield f"no {MATRIX[self.architecture]} instruction"
        if self.serialised:
            yield f"{self.serialised} warnings of serialised matrix instructions (C75xx)"

    def regressions(self, before: Build) -> Iterator[str]:
        """What became worse, or was of something else."""
        for name in ("source", "tile"):
            if getattr(before, name) != getattr(self, name):
                yield f"{name}: the table has {getattr(before, name)}, this is {getattr(self, name)}: --write"
        for name in ("registers", "shared_bytes", "mufu_per_score", *PER_SCORE, "matrix_clocks_per_score"):
            old, new = getattr(before, name), getattr(self, name)
            if old is not None and (new is None or new > old + REGISTERS_MAY_GROW_BY * (name == "registers")):
                yield f"{name}: {old} became {new}"
        if before.resident and (self.resident or 0) < before.resident:
            yield f"resident: {before.resident} became {self.resident}"
        if self.tile == before.tile and self.matrix_instructions < before.matrix_instructions:
            yield f"matrix_instructions: {before.matrix_instructions} became {self.matrix_instructions}"


def asked(variant: str, architecture: str, dtype: torch.dtype, width: int) -> tuple[Any, configs.Tile]:
    """What Triton compiles for a launch, and the launch's tile."""
    from triton.compiler import ASTSource

    from fused_nce.backends.triton import kernels, memory, stored

    chosen = VARIANTS[variant]
    tile = chosen.tile(architecture, dtype, width)
    assert tile is not None, "asked for a pass that the architecture has not"
    kernel = getattr(stored if chosen.kernel in STORED else kernels, chosen.kernel)
    constants = {name: x for name, x in chosen.constants(width, tile).items() if name in kernel.arg_names}
    signature, attributes = {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("x", "y", "stored"):
            signature[name] = f"*{DTYPES[dtype]}"
        elif name in ("row_ids", "column_ids"):
            signature[name] = "*i64"
        elif name in ("scale", "clip", "inverse_clip"):
            signature[name] = "fp32"
        elif name in memory.SIZES or name.startswith("stride"):
            signature[name] = "i32"
        else:
            signature[name] = "*fp32"
        # What a call of aligned tensors specialises; sizes never are.
        if signature[name].startswith("*") or name.startswith("stride"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), tile


def build(variant: str, architecture: str, dtype: torch.dtype, width: int) -> Build:
    """Compile one kernel for an architecture that need not be here, and take its binary apart."""
    import triton

    source, tile = asked(variant, architecture, dtype, width)
    compiled = triton.compile(source, target=target_of(architecture), options=tile.options)
    return read(compiled, variant, architecture, dtype, width, tile)


def digest(text: str) -> str:
    """Of Triton's first form of a kernel, without the places in files that its lines come from."""
    lines = (re.sub(r" loc\((?:[^()]|\([^()]*\))*\)", "", line) for line in text.splitlines())
    return hashlib.sha256("\n".join(line for line in lines if not line.startswith("#loc")).encode()).hexdigest()[:8]


def source_of(variant: str, architecture: str, dtype: torch.dtype, width: int) -> str:
    """The `Build.source` that a compilation would have, without it: a tenth of its time."""
    from triton._C.libtriton import ir
    from triton.compiler.compiler import make_backend

    source, tile = asked(variant, architecture, dtype, width)
    target = target_of(architecture)
    backend, context, stages = make_backend(target), ir.context(), dict[str, Any]()
    options = backend.parse_options(tile.options)
    backend.add_stages(stages, options, source.language)
    ir.load_dialects(context)
    backend.load_dialects(context)
    implemented = backend.get_codegen_implementation(options)
    module = source.make_ir(target, options, implemented, backend.get_module_map(), context)
    return digest(str(stages["ttir"](module, {})))


def read(compiled: Any, variant: str, architecture: str, dtype: torch.dtype, width: int, tile: configs.Tile) -> Build:
    """What a compiled kernel is."""
    code = (_of_amd if amd(architecture) else _of_nvidia)(compiled.asm)
    scores = tile.x * tile.y / (target_of(architecture).warp_size * tile.warps)
    found = Build(
        variant,
        architecture,
        DTYPES[dtype],
        width,
        tuple(tile),
        code.registers,
        int(compiled.metadata.shared),
        code.stack_bytes,
        code.spills,
        len(re.findall(rf"\b{MATRIX[architecture]}\b", code.text)),
        round(code.special / scores, 2),
        digest(compiled.asm["ttir"]),
    )
    if architecture == "sm_90":
        return replace(found, **main_loop(compiled.asm, code, tile, width))
    issued = round(turn_of(code, tile, width, 64, sass.AMD).issued, 2) if amd(architecture) else None
    return replace(found, issued_per_score=issued)


def amd(architecture: str) -> bool:
    """Whether it is one of AMD's."""
    return architecture.startswith("gfx")


def turn_of(code: Code, tile: configs.Tile, width: int, warp: int, by: sass.Dialect) -> sass.Turn:
    """Of the one loop over scores, for a score and thread.

    LLVM may have written it twice, for a condition that no turn changes: of AMD's the dearer one counts.

    Raises:
        ValueError: for none or several.
    """
    threads, scores = warp * tile.warps, tile.x * tile.y
    found = sass.turns(code.text, scores // threads, inner=-(-width // tile.chunk), by=by)
    if not found or (len(found) > 1 and by is sass.SASS):
        raise ValueError(f"machine code: got {len(found)} loops over scores, need one")
    return sass.Turn(*(count * threads / scores for count in max(found, key=lambda turn: turn.issued)))


def main_loop(asm: Any, code: Code, tile: configs.Tile, width: int) -> dict[str, Any]:
    """What `Build` says of sm_90 code."""
    turn = turn_of(code, tile, width, 32, sass.SASS)
    return {
        **{name: round(count, 2) for name, count in zip(PER_SCORE, turn, strict=False)},
        "matrix_clocks_per_score": round(turn.matrix_clocks / 128, 4),
        "shapes": sass.shapes(code.text),
        "serialised": serialised(asm["ptx"]),
    }


def serialised(ptx: str) -> int:
    """ptxas' warnings that it serialises matrix instructions, of the code that Triton hands it."""
    import triton

    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx, encoding="utf-8")
        command: list[str | Path] = [ptxas, "-v", "--gpu-name=sm_90a", source, "-o", Path(folder, "kernel.cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return len(re.findall(r"\(C75\d\d\)", done.stdout + done.stderr))


class Card:
    """A GPU, as far as Triton's compiler asks its driver."""

    def __init__(self, architecture: str) -> None:
        self.target = target_of(architecture)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0

    def get_current_target(self) -> Any:
        """What the kernels are compiled for."""
        return self.target


class Code(NamedTuple):
    """A kernel's machine code and what its tools say of it."""

    registers: int
    stack_bytes: int
    spills: int  # instructions
    text: str
    special: int  # instructions of special functions


def target_of(architecture: str) -> Any:
    """What Triton compiles for: `sm_90` is CUDA's 90, all else AMD's."""
    from triton.backends.compiler import GPUTarget

    brand, _, number = architecture.partition("_")
    return GPUTarget("cuda", int(number), 32) if brand == "sm" else GPUTarget("hip", architecture, 64)


def _of_nvidia(asm: Any) -> Code:
    """Of a cubin."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        code = _output(tools / "nvdisasm", "-c", file.name)
    registers, stack = (int(re.findall(rf"{field}:(\d+)", usage)[0]) for field in ("REG", "STACK"))
    spills, special = (len(re.findall(rf"\b(?:{names})\b", code)) for names in ("LDL|STL", "MUFU"))
    return Code(registers, stack, spills, code, special)


def _of_amd(asm: Any) -> Code:
    """Of AMD's assembly, whose metadata counts them; scalars that spill lie in vector registers."""
    code = asm["amdgcn"]
    fields = (".vgpr_count", ".private_segment_fixed_size", ".vgpr_spill_count")
    registers, stack, spills = (int(re.findall(rf"{re.escape(field)}:\s*(\d+)", code)[0]) for field in fields)
    return Code(registers, stack, spills, code, len(re.findall(r"\bv_(?:exp|log|rcp|rsq|sqrt)_f32", code)))


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def committed(version: str) -> list[Build]:
    """The table's builds; none where another Triton wrote it, whose registers are no standard for this one."""
    record: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {"triton": None}
    if record["triton"] != version:
        return []
    return [Build(**{"source": "", **row, "tile": tuple(row["tile"])}) for row in record["builds"]]


def _row(one: Build) -> dict[str, Any]:
    """Without what is only known of sm_90, elsewhere, or of it and AMD's."""
    row = asdict(one)
    known = len(row) if one.architecture == "sm_90" else 12 + amd(one.architecture)
    return {name: row[name] for name in list(row)[:known]}


Planned = tuple[str, str, torch.dtype, int]  # variant, architecture, dtype and width


def planned(every: bool, architecture: str | None = None, width: int | None = None) -> list[Planned]:
    """What is compiled: every kernel and dtype, or a step's two in bfloat16."""
    return [
        (variant, name, dtype, d)
        for name in ([architecture] if architecture else configs.ARCHITECTURES)
        for dtype in (DTYPES if every else [torch.bfloat16])
        if (name, dtype) in configs.TABLE
        for d in ([width] if width else WIDTHS)
        for variant in (VARIANTS if every else DEFAULT)
        if VARIANTS[variant].tile(name, dtype, d)
    ]


def stale(plan: Sequence[Planned]) -> list[Planned]:
    """Those that the table has of another source or tile, or not at all: what it says of them is of something else."""
    import triton

    known = {one.key: one for one in committed(triton.__version__)}

    def fresh(variant: str, architecture: str, dtype: torch.dtype, width: int) -> bool:
        found = known.get((variant, architecture, DTYPES[dtype], width))
        if found is None or found.tile != VARIANTS[variant].tile(architecture, dtype, width):
            return False
        return found.source == source_of(variant, architecture, dtype, width)

    return [one for one in plan if not fresh(*one)]


def judge(found: Sequence[Build]) -> list[str]:
    """One line for each thing that is wrong, or worse than in the committed table."""
    import triton

    lines = [f"{' '.join(map(str, one.key))}: {fault}" for one in found for fault in one.faults()]
    before = {one.key: one for one in committed(triton.__version__)}
    if not before:
        return lines
    missing = [f"{' '.join(map(str, one.key))}: not in {TABLE.name}" for one in found if one.key not in before]
    worse = [(one, fault) for one in found if one.key in before for fault in one.regressions(before[one.key])]
    return lines + missing + [f"{' '.join(map(str, one.key))}: {fault}" for one, fault in worse]


def report(found: Sequence[Build]) -> str:
    """A Markdown table."""
    header = ["kernel", "for", "dtype", "D", "tile", "registers", "shared KiB", "spills", "matrix", "resident"]
    header += ["MUFU/score", "issued/score", "ALU/score", "tensor clocks/score", "HGMMA"]
    return markdown(header, [
        [one.variant, one.architecture, one.dtype, f"{one.width}", "×".join(map(str, filter(None, one.tile))),
         *map(str, (one.registers, round(one.shared_bytes / 1024), one.spill_instructions, one.matrix_instructions)),
         f"{one.resident or '–'}", f"{one.mufu_per_score:.2f}", f"{one.issued_per_score or '–'}",
         f"{one.alu_per_score or '–'}", f"{one.matrix_clocks_per_score or '–'}", ", ".join(one.shapes)]
        for one in found
    ])  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print, judge; the number of faults."""
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=__doc__)
    parser.add_argument("--all", action="store_true", help="every kernel and dtype")
    parser.add_argument("--stale", action="store_true", help="what the table has of another source or tile alone")
    parser.add_argument("--architecture", choices=configs.ARCHITECTURES, help="one alone")
    parser.add_argument("--width", type=int, choices=WIDTHS, help="one alone")
    parser.add_argument("--write", action="store_true", help=f"what was built into {TABLE.relative_to(ROOT)}")
    options = parser.parse_args(argv)
    every = planned(options.all, options.architecture, options.width)
    plan = stale(every) if options.stale else every
    found = [build(*one) for one in tqdm(plan, unit="kernel", disable=None, dynamic_ncols=True)]
    print(report(found))
    if options.write:
        import triton

        built = {one.key for one in found}
        others = [one for one in committed(triton.__version__) if one.key not in built and one.variant in VARIANTS]
        rows = [_row(one) for one in sorted(others + found, key=lambda one: one.place)]
        record = {"schema": 1, "triton": triton.__version__, "builds": rows}
        text = json.dumps(record, indent=None, separators=(",", ":")).replace("},{", "},\n{")
        TABLE.write_text(text + "\n", encoding="utf-8")
    faults = judge(found)
    print("\n".join(faults) or f"{len(found)} kernels: no spill, no stack, nothing worse than before", file=sys.stderr)
    return len(faults)


if __name__ == "__main__":
    sys.exit(min(main(), 100))
