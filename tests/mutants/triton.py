"""Faults in the Triton kernels, as Triton's interpreter runs them: they are found without a GPU."""

from __future__ import annotations

from tests.mutants.faults import Fault

KERNELS, ATOMS, GATHER, MEMORY, LAUNCH = (
    f"fused_nce/backends/triton/{name}.py" for name in ("kernels", "atoms", "gather", "memory", "launch")
)
RUNS = "tests/triton/test_interpret.py"
OWN, LOSSES = (f"{RUNS}::test_its_own_tests",), (f"{RUNS}::test_a_loss_of_every_layout",)
BAD_INPUT = (f"{RUNS}::test_what_every_backend_is_held_to[test_nonfinite.py]",)

TRITON = (
    # ---- the walk
    Fault(
        "triton: clip's slope missing in dq",
        KERNELS,
        "acc = add_product(acc, w * slope, walked",
        "acc = add_product(acc, w, walked",
        OWN,
    ),
    Fault(
        "triton: sums keep the shift of an old maximum",
        KERNELS,
        "acc, tally = acc * fade[:, None], tally * fade",
        "pass",
        OWN,
    ),
    Fault("triton: float16 weights in float16", KERNELS, "if y.dtype == tl.float16:", "if False:", OWN),
    Fault(
        "triton: last chunk of D left out",
        KERNELS,
        "for d in range(0, D, CHUNK):",
        "for d in range(0, D - CHUNK, CHUNK):",
        OWN,
    ),
    Fault(
        "triton: every slice of D stored as the first",
        KERNELS,
        "    d = part * SLICE + tl.arange(0, SLICE)\n    place",
        "    d = tl.arange(0, SLICE)\n    place",
        OWN,
    ),
    Fault("triton: column statistics weigh nothing", KERNELS, "if FORM.two_way:", "if False:", LOSSES),
    Fault(
        "triton: one of two roles forgotten",
        KERNELS,
        "w = w + back if AS_ROW else back",
        "w = w if AS_ROW else back",
        LOSSES,
    ),
    Fault(
        "triton: a target's column gets nothing of it",
        KERNELS,
        "back += tl.where(of[0], d_target[None, :] * slope, 0.0)",
        "pass",
        LOSSES,
    ),
    Fault(
        "triton: the bias's sum without its last step",
        KERNELS,
        "tally += tl.sum(w, 1)\n            acc =",
        "tally = tl.sum(w, 1)\n            acc =",
        LOSSES,
    ),
    # ---- formulas
    Fault("triton: padding counted", ATOMS, "kept = y_inside[None, :]", "kept = y_inside[None, :] | True", OWN),
    Fault(
        "triton: offset ignored",
        ATOMS,
        "return rows // FORM.rows_per_image + first",
        "return rows // FORM.rows_per_image",
        OWN,
    ),
    Fault(
        "triton: the row itself a negative",
        ATOMS,
        "kept = kept & (x_itself[:, None] != y_itself[None, :])",
        "pass",
        LOSSES,
    ),
    Fault("triton: tanh cancels near 0", ATOMS, "tl.where(x < 0.6, near, 1.0 - 2.0 * a)", "(1.0 - 2.0 * a)", OWN),
    Fault("triton: softplus rounds what is small", ATOMS, "2.0 * (z * (y * p) + z)", "tl.log(1.0 + e)", OWN),
    Fault(
        "triton: equal terms all rounded one way",
        ATOMS,
        "return following, (following - total) - y",
        "return following, 0.0 * y",
        OWN,
    ),
    Fault("triton: NaN hidden by clip or max", ATOMS, "tl.sum(e + 0.0 * s, 1)", "tl.sum(e, 1)", BAD_INPUT),
    Fault(
        "triton: splits joined without their shifts",
        ATOMS,
        "return total * exp(top - shift) + part * exp(peak - shift), seen",
        "return total + part, seen",
        OWN,
    ),
    Fault(
        "triton: clip's slope missing in the negatives' weights",
        ATOMS,
        "- tl.expand_dims(neg_lse, AXIS)) * slope)",
        "- tl.expand_dims(neg_lse, AXIS)))",
        OWN,
    ),
    Fault("triton: a positive's gap without its share", ATOMS, "(e - tl.expand_dims(share, AXIS))", "e", LOSSES),
    # ---- what joins them
    Fault(
        "triton: only the first split's statistics",
        GATHER,
        "for _ in range(splits):\n        part = load_line",
        "for _ in range(1):\n        part = load_line",
        OWN,
    ),
    Fault(
        "triton: only the first split's sums",
        GATHER,
        "for _ in range(splits):\n        term = tl.load",
        "for _ in range(1):\n        term = tl.load",
        OWN,
    ),
    Fault(
        "triton: half of the penalty's slope",
        GATHER,
        "2.0 * load_line(d, length, inside, WANTED.square, 0.0)",
        "load_line(d, length, inside, WANTED.square, 0.0)",
        OWN,
    ),
    Fault(
        "triton: siblings share the first one's gradient",
        GATHER,
        "slot = (columns % FORM.n_c)[:, None]",
        "slot = (columns * 0)[:, None]",
        OWN,
    ),
    Fault("triton: offsets in 32 bits", MEMORY, "return rows.to(tl.int64) * stride", "return rows * stride", OWN),
    Fault(
        "triton: one tensor's scale counted in both roles",
        LAUNCH,
        "share = 0.5 if side.as_row and side.as_column else 1.0",
        "share = 1.0",
        LOSSES,
    ),
)
