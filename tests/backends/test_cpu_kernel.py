"""What is the C++ kernels' own: instruction sets, tilings, the memory plan, and which gradients are computed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from fused_nce.core.statistics import KERNEL_STATISTICS
from tests.conftest import MODULE, needs_kernels
from tests.marks import nightly_but

pytestmark = needs_kernels

MIB = 1 << 20
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The weights of bfloat16 inputs are rounded to bfloat16 for the two gradient GEMMs.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 2.0**-8}


def arguments(n, n_c, d, dtype=torch.float32, clip=20.0, extra_images=0, offset=0, rows_per_image=1):
    """The leading arguments of all three ops."""
    torch.manual_seed(n * n_c + d)
    images = -(-n // rows_per_image) + offset + extra_images
    q, k = torch.randn(n, d).to(dtype), torch.randn(images * n_c, d).to(dtype)
    layout = n_c, rows_per_image, offset, clip, None, -1, None, None
    return q, k, 1 / math.sqrt(d), *layout, 0.0, *[None] * 5, [0, 1, 2], []


def loss(args, needs=(True, True, True), workspace=16 * MIB):
    """`cpu_loss` at a mean reduction with penalty 0.04: pos, rows, dq, dk, dscale."""
    n, m = args[0].shape[0], args[1].shape[0]
    return torch.ops.fused_nce.cpu_loss(*args, "nce", 1 / (n * args[3]), 0.04 / (n * m), *needs, workspace)[:5]


def assert_same(found, wanted, tolerance):
    """Each output within a tolerance relative to its largest element."""
    for x, y in zip(found, wanted, strict=True):
        assert x.shape == y.shape
        assert (x - y).abs().max() <= tolerance * y.abs().max()


def elsewhere(code, **environment):
    """What `code`, of this file as `t`, gives as `out` in a process with other variables."""
    code = f"import json, torch; from tests.backends import test_cpu_kernel as t\n{code}\nprint(json.dumps(out))"
    command, environment = [sys.executable, "-c", code], os.environ | environment
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("isa", nightly_but(["AVX2"], ["AVX2", "SSE41"]))
def test_bfloat16_where_onednn_may_not_multiply_it(isa):
    """oneDNN obeys ONEDNN_MAX_CPU_ISA whatever the CPU has; its bfloat16 GEMM then raises, so inputs are widened."""
    code = "out = [x.tolist() for x in t.loss(t.arguments(37, 5, 34, torch.bfloat16))]"
    found = [torch.tensor(x) for x in elsewhere(code, ONEDNN_MAX_CPU_ISA=isa)]
    wanted = loss(arguments(37, 5, 34, torch.bfloat16))
    assert_same(found, [x.float() for x in wanted], 2 * TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip", [0.0, 20.0, 60.0])
def test_any_workspace_gives_the_same(dtype, clip):
    args = arguments(150, 7, 66, dtype, clip, extra_images=2, offset=1)
    wanted = loss(args)
    smallest = MODULE.plan(150, args[1].shape[0], 66, dtype, 1, image=7)["total_bytes"]
    strips = set()
    for workspace in (4 * MIB, MIB, MIB // 2, smallest):
        plan = MODULE.plan(150, args[1].shape[0], 66, dtype, workspace, image=7)
        assert plan["fits"]
        assert plan["total_bytes"] <= workspace
        strips.add((plan["strips"], plan["scores_stored"]))
        assert_same(loss(args, workspace=workspace), wanted, TOLERANCE[dtype])
    assert {stored for _, stored in strips} == {True, False}
    assert len(strips) > 2
    with pytest.raises(ValueError, match=f"workspace_bytes is {smallest // 2}, needed: at least {smallest}"):
        loss(args, workspace=smallest // 2)


def test_a_million_columns_fit():
    plan = MODULE.plan(256, 1_280_000, 128, torch.float32, 16 * MIB)
    assert plan["fits"]
    assert not plan["scores_stored"]
    assert plan["total_bytes"] <= 16 * MIB


def test_few_scores_are_one_tile_whatever_the_width():
    """As many as 256 × 128: beyond them there is work for several threads, also where a score is one product."""
    for n, d, tiles in ((256, 64, 1), (256, 1, 1), (257, 1, 4), (16_384, 1, 4), (128, 128, 1), (256, 128, 4)):
        plan = MODULE.plan(n, 128, d, torch.float32, 16 * MIB)
        assert (plan["tiles"], plan["groups"]) == (tiles, tiles), (n, d)


def test_negatives_are_counted_beyond_the_integers_of_float32():
    """Of one task: 2**24 + 1 is no float32."""
    m, names = (1 << 24) + 1001, [KERNEL_STATISTICS.index("neg_count")]
    plan = {"need_q": False, "need_k": False, "row_stats": names}
    smallest = MODULE.plan(1, m, 1, torch.float32, 1, **plan)["total_bytes"]
    assert MODULE.plan(1, m, 1, torch.float32, smallest, **plan)["groups"] == 1
    q, k = torch.ones(1, 1), torch.zeros(m, 1)
    given = q, k, 1.0, 1, 1, 0, 0.0, None, -1, None, None, 0.0, *[None] * 5, names, []
    _, rows, _ = torch.ops.fused_nce.cpu_stats(*given, smallest)
    assert int(rows[0, 0]) == m - 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_grads_repeat_what_loss_found(dtype):
    args = arguments(75, 4, 40, dtype, extra_images=1, rows_per_image=3)
    n, m = args[0].shape[0], args[1].shape[0]
    pos, rows, *wanted = loss(args)
    *statistics, columns = torch.ops.fused_nce.cpu_stats(*args, 16 * MIB)
    assert_same(statistics, (pos, rows), 1e-6)
    q = torch.sigmoid(rows[0][:, None] - pos) / (n * 4)
    d_rows = torch.stack([q.sum(dim=1), torch.zeros(n), torch.full((n,), 0.04 / (n * m))])
    given = (pos, rows, columns, -q, d_rows, columns)
    *found, _ = torch.ops.fused_nce.cpu_grads(*args, *given, True, True, True, 16 * MIB)
    assert_same(found, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workspace", [16 * MIB, 2 * MIB])
def test_rows_a_multiple_of_4_kib_apart_are_copied(dtype, workspace):
    """Against the same features between zeros, whose rows are used where they are."""
    args = arguments(75, 3, 1024, dtype, extra_images=1)
    wider = [torch.nn.functional.pad(x, (0, 6)) for x in args[:2]]
    *wanted, dq, dk, dscale = loss((*wider, *args[2:]), workspace=workspace)
    for needs in ((True, True, True), (True, False, False), (False, True, False)):
        found = loss(args, needs, workspace)
        gradients = [x[..., :1024] if need else x[:0] for x, need in zip((dq, dk), needs, strict=False)]
        pairs = [(x, y) for x, y in zip(found[2:4], gradients, strict=True) if y.numel()]
        assert_same([*found[:2], *(x for x, _ in pairs)], [*wanted, *(y for _, y in pairs)], 2 * TOLERANCE[dtype])
        if needs[2]:
            assert_same([found[4]], [dscale], 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("needs", [(a, b, c) for a in (False, True) for b in (False, True) for c in (False, True)])
def test_an_unwanted_gradient_is_empty(dtype, needs):
    args = arguments(21, 3, 18, dtype)
    wanted = loss(args)
    found = loss(args, needs)
    for need, x, y in zip(needs, found[2:], wanted[2:], strict=True):
        if need:
            assert_same([x], [y], 10 * TOLERANCE[dtype])
        else:
            assert x.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_do_not_depend_on_threads(dtype):
    args = arguments(70, 49, 50, dtype)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(loss(args))
    for other in found[1:]:
        for x, y in zip(found[0], other, strict=True):
            assert torch.equal(x, y)


BAD_ARGUMENTS = [
    ({"n_c": 4}, "n_c is 4, needed: a divisor of the 15 columns"),
    ({"rows_per_image": 0}, "rows_per_image is 0, needed: at least 1"),
    ({"offset": 1}, "offset is 1, so the rows are of images 1 to 5, needed: within the 5 images of k"),
    ({"clip": -1.0}, "clip is -1, needed: 0"),
    ({"k": torch.randn(15, 7)}, "k has width 7, needed: the width of q, 8"),
    ({"k": torch.randn(15, 8).half()}, "k is Half, needed: the dtype of q, Float"),
    ({"q": torch.randn(5)}, "q has shape"),
    ({"row_ids": torch.zeros(4, dtype=torch.int64)}, r"row_ids has shape \[4\], needed: 5"),
    ({"row_ids": torch.zeros(5)}, "row_ids is Float, needed: int64"),
    ({"itself": 11}, "itself is 11, needed: -1, or 0 to 10"),
    ({"positives": torch.zeros(4, 1)}, r"positives has shape \[4, 1\], needed: 5 rows"),
    ({"column_ids": torch.zeros(15, dtype=torch.int64)}, "row_ids is None, needed: the rows' labels"),
    ({"bias": 1.0}, "bias is 1, needed: 0 beside a clip"),
    ({"ceiling": torch.zeros(1, 4)}, r"ceiling has shape \[1, 4\], needed: \[1, 5\]"),
    ({"guide_ceiling": torch.zeros(1, 5)}, r"guide_q is None, needed: \(N, G\) and \(M, G\)"),
    ({"several": torch.zeros(5, 2)}, r"several is Float of \[5, 2\], needed: int64 of 5 rows"),
    ({"ceiling": torch.zeros(1, 5), "columns": [0]}, "columns are 0, needed: none beside filters"),
    ({"stats": [0, 11]}, "stats has 11, needed: each of 0 to 10 at most once"),
    ({"columns": [3, 3]}, "columns has 3, needed: each of 0 to 10 at most once"),
    ({"workspace_bytes": 0}, "workspace_bytes is 0, needed: a positive number"),
]


@pytest.mark.parametrize(("change", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_named(change, message):
    names = ["q", "k", "scale", "n_c", "rows_per_image", "offset", "clip", "row_ids", "itself", "positives"]
    names += ["column_ids", "bias", "ceiling", "guide_ceiling", "guide_q", "guide_k", "several", "stats", "columns"]
    values = dict(zip(names, arguments(5, 3, 8), strict=True)) | {"workspace_bytes": MIB}
    with pytest.raises((ValueError, TypeError), match=message):
        torch.ops.fused_nce.cpu_stats(**(values | change))
