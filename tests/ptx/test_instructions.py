"""The interpreter against numpy and the C library: each instruction, on random bits and on numbers that go wrong."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch

from tests.ptx.machine import launch
from tests.ptx.memory import Array
from tests.ptx.parse import BYTES, Fault, Module

RNG = np.random.default_rng(20261128)
THREADS = 256
REGISTERS = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}
EXTREME = {
    "f32": np.array(
        [0, -0.0, 1, -1, 0.5, 1.5, 2.5, -2.5, 3e38, -3e38, 1e-40, -1e-45, 1.2e-38, np.inf, -np.inf, np.nan], "f4"
    ),
    "f64": np.array([0, -0.0, 1, -1, 1e300, 1e-310, np.inf, -np.inf, np.nan, 1 / 3], "f8"),
    "u32": np.array([0, 1, 2, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFE, 255, 65535], "u4"),
    "u64": np.array([0, 1, 63, 64, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1], "u8"),
    "u16": np.array([0, 1, 15, 16, 0x7FFF, 0x8000, 0xFFFF, 0x7C00, 0x3C01, 0x7F80], "u2"),
}


def values(type: str) -> Array:
    """THREADS of them: every extreme against every other where there are two operands, and random bits."""
    key = type if type in EXTREME else f"u{8 * BYTES[type]}"
    extreme = EXTREME[key]
    bits = RNG.integers(0, 256, (THREADS, BYTES[type]), np.uint8).view(f"u{BYTES[type]}")[:, 0].copy()
    if type[0] == "f":
        bits[::2] = RNG.normal(size=THREADS // 2 + THREADS % 2).astype(extreme.dtype).view(bits.dtype) * np.uint8(1)
    bits[: 3 * len(extreme)] = RNG.permutation(np.tile(extreme, 3)).view(bits.dtype)
    return bits


def assembled(body: str, inputs: list[str], out: str) -> Module:
    """A kernel that loads %a, %b, …, does the body, and stores %y."""
    names = "abcd"[: len(inputs)]
    lines = [f".param .u64 p{n}" for n in range(len(inputs) + 1)]
    text = f".visible .entry k({', '.join(lines)})\n{{\n.reg .pred %p<9>;\n.reg .b32 %t<9>;\n.reg .b64 %w<9>;\n"
    text += "".join(f".reg .{REGISTERS[BYTES[t]]} %{n};\n" for n, t in zip([*names, "y"], [*inputs, out], strict=True))
    text += "mov.u32 %t0, %tid.x;\n"
    for number, type in enumerate([*inputs, out]):
        text += f"ld.param.u64 %w0, [p{number}];\nmul.wide.u32 %w1, %t0, {BYTES[type]};\nadd.s64 %w2, %w0, %w1;\n"
        if number < len(inputs):
            text += f"ld.global.b{8 * BYTES[type]} %{names[number]}, [%w2];\n"
    return Module(text + f"{body}\nst.global.b{8 * BYTES[out]} [%w2], %y;\nret;\n}}\n")


def start(module: Module, arrays: list[Array], threads: int = THREADS) -> None:
    """One CTA whose arguments are these arrays."""
    ranges = [(x.ctypes.data, x.nbytes) for x in arrays]
    launch(module["k"], (1, 1, 1), threads, b"".join(at.to_bytes(8, "little") for at, _ in ranges), 0, ranges)


def result(body: str, inputs: list[str], out: str) -> tuple[list[Array], Array]:
    """Inputs as their types have it, and what %y became, as bits."""
    arrays = [values(type) for type in inputs]
    y = np.zeros(THREADS, f"u{BYTES[out]}")
    start(assembled(body, inputs, out), [*arrays, y])
    kinds = {"f": "f", "s": "i"}
    return [x.view(f"{kinds.get(t[0], 'u')}{BYTES[t]}") for x, t in zip(arrays, inputs, strict=True)], y


def same(found: Array, wanted: Any, kind: str) -> bool:
    """Equal bits; any NaN is every NaN."""
    wanted = np.asarray(wanted).astype(f"{kind}{found.dtype.itemsize}")
    if kind == "f":
        both = np.isnan(found.view(wanted.dtype)) & np.isnan(wanted)
        return bool((both | (found == wanted.view(found.dtype))).all())
    return bool((found == wanted.view(found.dtype)).all())


C = ctypes.CDLL(None)
C.fmaf.restype, C.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3


def fmaf(a: Array, b: Array, c: Array) -> Array:
    """The C library's."""
    return np.array([C.fmaf(*map(float, three)) for three in zip(a, b, c, strict=True)], np.float32)


def zeroed(x: Array) -> Array:
    """Subnormals are zeros of their sign."""
    return np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x).astype(np.float32)


def wrapped(function: Any, bits: int) -> Any:
    """Of Python's own integers."""

    def of(*arrays: Array) -> Array:
        found = [function(*map(int, x)) & (1 << bits) - 1 for x in zip(*arrays, strict=True)]
        return np.array(found, f"u{bits // 8}")

    return of


def torch_cast(x: Array, dtype: torch.dtype) -> Array:
    """float32 to a 16-bit type, as torch rounds it."""
    return torch.from_numpy(x.copy()).to(dtype).view(torch.uint16).numpy()


def towards_zero(a: int, b: int) -> int:
    """Integer division in C; all bits where there is none."""
    return -1 if b == 0 else (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)


LANE, FIRST = np.arange(THREADS) % 32, np.arange(THREADS) // 32 * 32
BELOW = FIRST + np.where(LANE < 29, LANE + 3, LANE)
CHOICE = "setp.gt.u32 %p1, %a, 99; @%p1 bra L; mov.u32 %y, 7; bra.uni M; L: mov.u32 %y, 9; M:"


def two_bf16(upper: Array, lower: Array) -> Array:
    """Both in one register."""
    return torch_cast(upper, torch.bfloat16).astype("u4") << 16 | torch_cast(lower, torch.bfloat16)


def odd_bytes(a: int, b: int) -> int:
    """The second and the fourth of each."""
    return a >> 8 & 255 | a >> 24 << 8 | (b >> 8 & 255) << 16 | b >> 24 << 24


PRED = "setp.{0} %p0, %a, %b; selp.u32 %y, 1, 0, %p0;"
CASES: dict[str, tuple[list[str], str, Any]] = {
    "add.f32 %y, %a, %b;": (["f32"] * 2, "f", np.add),
    "sub.rn.ftz.f32 %y, %a, %b;": (["f32"] * 2, "f", lambda a, b: zeroed(zeroed(a) - zeroed(b))),
    "mul.f32 %y, %a, %b;": (["f32"] * 2, "f", np.multiply),
    "div.rn.f32 %y, %a, %b;": (["f32"] * 2, "f", np.divide),
    "fma.rn.f32 %y, %a, %b, %c;": (["f32"] * 3, "f", fmaf),
    "fma.rn.ftz.f32 %y, %a, %b, %c;": (["f32"] * 3, "f", lambda *x: zeroed(fmaf(*map(zeroed, x)))),
    "max.f32 %y, %a, %b;": (["f32"] * 2, "f", np.fmax),
    "min.f32 %y, %a, %b;": (["f32"] * 2, "f", np.fmin),
    "neg.f32 %y, %a;": (["f32"], "f", np.negative),
    "abs.f32 %y, %a;": (["f32"], "f", np.abs),
    "rcp.rn.f32 %y, %a;": (["f32"], "f", lambda a: np.float32(1) / a),
    "add.f64 %y, %a, %b;": (["f64"] * 2, "f", np.add),
    "mul.f64 %y, %a, %b;": (["f64"] * 2, "f", np.multiply),
    "add.s32 %y, %a, %b;": (["s32"] * 2, "u", wrapped(lambda a, b: a + b, 32)),
    "sub.s64 %y, %a, %b;": (["s64"] * 2, "u", wrapped(lambda a, b: a - b, 64)),
    "mul.lo.s64 %y, %a, %b;": (["s64"] * 2, "u", wrapped(lambda a, b: a * b, 64)),
    "mul.hi.s32 %y, %a, %b;": (["s32"] * 2, "u", wrapped(lambda a, b: a * b >> 32, 32)),
    "mul.hi.u32 %y, %a, %b;": (["u32"] * 2, "u", wrapped(lambda a, b: a * b >> 32, 32)),
    "mul.hi.s64 %y, %a, %b;": (["s64"] * 2, "u", wrapped(lambda a, b: a * b >> 64, 64)),
    "mul.hi.u64 %y, %a, %b;": (["u64"] * 2, "u", wrapped(lambda a, b: a * b >> 64, 64)),
    "mul.wide.s32 %y, %a, %b;": (["s32"] * 2, "u", wrapped(lambda a, b: a * b, 64)),
    "mad.lo.s32 %y, %a, %b, %c;": (["s32"] * 3, "u", wrapped(lambda a, b, c: a * b + c, 32)),
    "mad.wide.u32 %y, %a, %b, %c;": (["u32", "u32", "u64"], "u", wrapped(lambda a, b, c: a * b + c, 64)),
    "div.s32 %y, %a, %b;": (["s32"] * 2, "u", wrapped(towards_zero, 32)),
    "div.u64 %y, %a, %b;": (["u64"] * 2, "u", wrapped(lambda a, b: a // b if b else -1, 64)),
    "rem.s32 %y, %a, %b;": (["s32"] * 2, "u", wrapped(lambda a, b: a - towards_zero(a, b) * b, 32)),
    "min.s64 %y, %a, %b;": (["s64"] * 2, "u", wrapped(min, 64)),
    "neg.s64 %y, %a;": (["s64"], "u", wrapped(lambda a: -a, 64)),
    "not.b32 %y, %a;": (["u32"], "u", wrapped(lambda a: ~a, 32)),
    "xor.b64 %y, %a, %b;": (["u64"] * 2, "u", wrapped(lambda a, b: a ^ b, 64)),
    "shl.b32 %y, %a, %b;": (["u32"] * 2, "u", wrapped(lambda a, b: a << min(b, 32), 32)),
    "shr.u64 %y, %a, %b;": (["u64", "u32"], "u", wrapped(lambda a, b: a >> min(b, 64), 64)),
    "shr.s32 %y, %a, %b;": (["s32", "u32"], "u", wrapped(lambda a, b: a >> min(b, 32), 32)),
    "bfe.u32 %y, %a, 5, 7;": (["u32"], "u", wrapped(lambda a: a >> 5 & 127, 32)),
    "bfe.s32 %y, %a, 28, 4;": (["s32"], "u", wrapped(lambda a: a >> 28, 32)),
    "lop3.b32 %y, %a, %b, %c, 0xd8;": (["u32"] * 3, "u", wrapped(lambda a, b, c: a & b | a & ~b & ~c | ~a & b & c, 32)),
    "prmt.b32 %y, %a, %b, 0x7531;": (["u32"] * 2, "u", wrapped(odd_bytes, 32)),
    PRED.format("lt.f32"): (["f32"] * 2, "u", np.less),
    PRED.format("leu.f32"): (["f32"] * 2, "u", lambda a, b: ~(a > b)),
    PRED.format("neu.f32"): (["f32"] * 2, "u", lambda a, b: ~(a == b)),
    PRED.format("ne.f32"): (["f32"] * 2, "u", lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)),
    PRED.format("nan.f32"): (["f32"] * 2, "u", lambda a, b: np.isnan(a) | np.isnan(b)),
    PRED.format("ge.s32"): (["s32"] * 2, "u", np.greater_equal),
    PRED.format("lt.u64"): (["u64"] * 2, "u", np.less),
    "cvt.rn.bf16.f32 %y, %a;": (["f32"], "bf16", lambda a: torch_cast(a, torch.bfloat16)),
    "cvt.rn.f16.f32 %y, %a;": (["f32"], "f16", lambda a: torch_cast(a, torch.float16)),
    "cvt.f32.f16 %y, %a;": (["u16"], "f", lambda a: a.view("f2").astype("f4")),
    "cvt.f32.bf16 %y, %a;": (["u16"], "f", lambda a: torch.from_numpy(a.copy()).view(torch.bfloat16).float().numpy()),
    "cvt.rn.bf16x2.f32 %y, %a, %b;": (["f32"] * 2, "bf16x2", two_bf16),
    "cvt.s64.s32 %y, %a;": (["s32"], "u", wrapped(int, 64)),
    "cvt.u64.u32 %y, %a;": (["u32"], "u", wrapped(int, 64)),
    "cvt.u32.u64 %y, %a;": (["u64"], "u", wrapped(int, 32)),
    "cvt.rn.f32.s64 %y, %a;": (["s64"], "f", lambda a: a.astype("f4")),
    "cvt.f64.f32 %y, %a;": (["f32"], "f", lambda a: a.astype("f8")),
    "cvt.rzi.s32.f32 %y, %a;": (["f32"], "u", wrapped(int, 32)),
    "mov.b64 {%t1, %t2}, %a; mov.b64 %y, {%t2, %t1};": (["u64"], "u", wrapped(lambda a: a >> 32 | a << 32, 64)),
    CHOICE: (["u32"], "u", lambda a: np.where(a > 99, 9, 7)),
    "shfl.sync.bfly.b32 %y, %a, 5, 31, -1;": (["u32"], "u", lambda a: a[FIRST + (LANE ^ 5)]),
    "shfl.sync.down.b32 %y|%p1, %a, 3, 31, -1;": (["u32"], "u", lambda a: a[BELOW]),
    "shfl.sync.idx.b32 %y, %a, 4, 31, -1;": (["u32"], "u", lambda a: a[FIRST + 4]),
}  # fmt: skip


@pytest.mark.parametrize("body", CASES)
def test_an_instruction(body):
    inputs, kind, function = CASES[body]
    wide = {"mul.wide": 8, "mad.wide": 8, "cvt.s64": 8, "cvt.u64": 8, "cvt.f64": 8, "cvt.rn.bf16.": 2, "cvt.rn.f16.": 2}
    size = next((size for start, size in wide.items() if body.startswith(start)), None)
    size = size or (4 if body.startswith(("cvt", "setp")) else BYTES[inputs[0]])
    with np.errstate(all="ignore"):
        if body.startswith("cvt.rzi"):
            kind, function = "i", lambda a: np.nan_to_num(np.clip(np.trunc(a.astype("f8")), -(2**31), 2**31 - 1), nan=0)
        arrays, y = result(body, inputs, f"b{8 * size}")
        wanted = function(*arrays)
    if kind in ("bf16", "f16", "bf16x2"):  # of NaNs, torch keeps some bits
        nans = np.isnan(arrays[0]) | np.isnan(arrays[-1])
        y, wanted, kind = y[~nans], wanted[~nans], "u"
    assert same(y, wanted, kind), body


APPROXIMATE: dict[str, tuple[int, float, Any]] = {
    "ex2.approx.ftz.f32 %y, %a;": (1, 2**-22.5, lambda a: zeroed(np.exp2(zeroed(a).astype("f8")).astype("f4"))),
    "lg2.approx.f32 %y, %a;": (1, 2**-22.6, lambda a: np.log2(a.astype("f8"))),
    "rcp.approx.ftz.f32 %y, %a;": (1, 2**-23, lambda a: zeroed(1 / zeroed(a))),
    "div.full.f32 %y, %a, %b;": (2, 2**-22, np.divide),
}


@pytest.mark.parametrize("body", APPROXIMATE)
def test_an_approximation_errs_as_much_as_the_manual_allows(body):
    """By that and two roundings, and never less on all values; what is no number stays so."""
    count, error, function = APPROXIMATE[body]
    with np.errstate(all="ignore"):
        arrays, bits = result(body, ["f32"] * count, "f32")
        y, wanted = bits.view("f4").astype("f8"), function(*arrays).astype("f8")
        off = np.abs(y / wanted - 1)
    usual = np.isfinite(wanted) & (np.abs(wanted) > 2.0**-120) & (np.abs(wanted) < 2.0**127)
    assert ((y == wanted) | (np.isnan(y) & np.isnan(wanted)))[~np.isfinite(wanted)].all()
    assert (off[usual] <= error + 2.0**-23).all()
    assert off[usual].max() > 0.9 * error


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("sin.approx.f32 %y, %a;", "unknown instruction: sin.approx.f32"),
        ("add.sat.f32 %y, %a, %a;", "unknown instruction: add.sat.f32"),
        ("fma.rn.bf16x2 %y, %a, %a, %a;", "unknown instruction: fma.bf16x2"),
        ("bar.sync 1, 64;", "unknown instruction: bar.sync"),
        ("add.f32 %y, %a, %t7;", "nothing wrote"),
        ("ld.global.b32 %y, [%w0+4096];", "outside every tensor"),
        ("ld.global.b32 %y, [%w0+2];", "is no multiple of"),
        ("setp.eq.u32 %p1, %t0, 3; @%p1 bra L; bar.sync 0; L: bar.sync 0; mov.u32 %y, 0;", "different barriers"),
        ("setp.lt.u32 %p1, %t0, 8; @%p1 shfl.sync.idx.b32 %y, %a, 0, 31, -1; mov.u32 %y, 0;", "32 threads must"),
    ],
)  # fmt: skip
def test_what_it_does_not_know_or_must_not_be_is_told(body, what):
    with pytest.raises(Fault, match=what):
        result(body, ["f32"], "f32")
