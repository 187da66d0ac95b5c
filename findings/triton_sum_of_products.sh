#!/usr/bin/env bash
# triton 3.8.0, tl.sum(a * b, axis) where the axis lies across lanes: the last exchange between lanes is fused with the product,
# fma(a0, b0, round(a1*b1)) on one lane and fma(a1, b1, round(a0*b0)) on the other. Lanes that should hold the same sum hold two
# float32 numbers, and both store theirs to one shared address: which of them is read is not defined. num_warps = 4, sm_90; no GPU
# is needed, the machine code says it. Seen: 32 of 64 exchanges are fused; a pair of lanes differs for about a third of inputs.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet triton==3.8.0 numpy==2.2.6 2>/dev/null
cd "$work"
cat > kernel.py <<'P'
import re

import numpy
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def rows(w, y, out, M: tl.constexpr, P: tl.constexpr, D: tl.constexpr):
    m, p, d = tl.arange(0, M)[:, None, None], tl.arange(0, P)[None, :, None], tl.arange(0, D)[None, None, :]
    product = tl.load(w + m * P + p) * tl.load(y + (m * P + p) * D + d)
    tl.store(out + tl.arange(0, M)[:, None] * D + tl.arange(0, D)[None, :], tl.sum(product, 1))


signature = {"w": "*fp32", "y": "*fp32", "out": "*fp32", "M": "constexpr", "P": "constexpr", "D": "constexpr"}
source = ASTSource(rows, signature, {"M": 64, "P": 4, "D": 16})
ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
product = {m[1]: m.groups()[1:] for m in re.finditer(r"mul\.f32\s+(%r\d+), (%r\d+), (%r\d+);", ptx)}
moved = dict(re.findall(r"shfl\.sync\.bfly\.b32\s+(%r\d+), (%r\d+),", ptx))
fused = re.findall(r"fma\.rn\.f32\s+(%r\d+), (%r\d+), (%r\d+), (%r\d+);", ptx)
uneven = {f[0] for f in fused if product.get(moved.get(f[3])) == f[1:3]}
stored = {r for regs in re.findall(r"st\.shared::cta[^{]*\{([^}]*)\}", ptx) for r in regs.replace(" ", "").split(",")}
a, b = numpy.random.default_rng(0).normal(size=(2, 2, 10000)).astype("f4")
lanes = [(a[i].astype("f8") * b[i] + (a[1 - i] * b[1 - i]).astype("f8")).astype("f4") for i in (0, 1)]
print("triton", triton.__version__, "fuses", len(uneven), "of", len(moved), "exchanges;", len(uneven & stored), "are stored;")
print("the two lanes differ for", (lanes[0] != lanes[1]).mean(), "of random inputs")
assert uneven & stored and (lanes[0] != lanes[1]).any(), "the behaviour has changed"
P
TRITON_CACHE_DIR="$work/cache" env/bin/python kernel.py
