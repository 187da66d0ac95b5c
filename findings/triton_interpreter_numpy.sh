#!/usr/bin/env bash
# Triton 3.6.0 (what torch 2.11 brings) under TRITON_INTERPRET=1 with NumPy 2.4: a kernel whose loop's bound is computed in the
# kernel raises TypeError, "only 0-dimensional arrays can be converted to Python scalars". The interpreter keeps every scalar as an
# array of one element, and NumPy 2.4 ended the conversion of such arrays that it had warned of since 1.25. torch 2.11's own
# requirements allow it; with NumPy 2.3.5 the same kernel runs, and so does a kernel without such a loop with either.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --no-cache-dir torch==2.11.0 triton==3.6.0 2>/dev/null
cat > "$work/loop.py" <<'P'
import numpy
import torch
import triton
import triton.language as tl


@triton.jit
def double(x, y, n, block: tl.constexpr):
    i = tl.arange(0, block)
    tl.store(y + i, 2 * tl.load(x + i, mask=i < n), mask=i < n)


@triton.jit
def total(x, y, n, block: tl.constexpr):
    found = 0.0
    for j in range(tl.cdiv(n, block)):
        i = j * block + tl.arange(0, block)
        found += tl.sum(tl.load(x + i, mask=i < n, other=0.0))
    tl.store(y, found)


said = []
for kernel, size in (double, 16), (total, 4):
    x, y = torch.arange(10.0), torch.zeros(16)
    try:
        kernel[(1,)](x, y, 10, block=size)
        said.append(f"{y.max():.0f}")
    except Exception as error:
        said.append(f"{type(error.__cause__ or error).__name__}: {error.__cause__ or error}")
print(f"triton {triton.__version__}, numpy {numpy.__version__} | no loop: {said[0]} | loop: {said[1]}")
P
for numpy in 2.3.5 2.4.0; do
  "$work/env/bin/pip" install --quiet --no-cache-dir "numpy==$numpy" 2>/dev/null
  TRITON_INTERPRET=1 "$work/env/bin/python" "$work/loop.py" | tee -a "$work/said"
done
diff "$work/said" - <<'S'
triton 3.6.0, numpy 2.3.5 | no loop: 18 | loop: 45
triton 3.6.0, numpy 2.4.0 | no loop: 18 | loop: TypeError: only 0-dimensional arrays can be converted to Python scalars
S
