#!/usr/bin/env bash
# torch 2.14.1, x86-64, CPU: torch.dot(a, b) of two long float32 vectors is the BLAS dot, a few running sums, while (a * b).sum() is
# a cascade. Of a million products of one sign the first loses 25 roundings (2^-24), the second 1.6, and the first gives other bits
# with two threads than with one. torch.linalg.vecdot of two vectors is the first, and of the same vectors as a batch the second.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.14.1 numpy==2.2.6 2>/dev/null
cat > "$work/dot.py" <<'P'
import torch


def roundings(threads, product):
    torch.set_num_threads(threads)
    worst = 0.0
    for seed in range(10):
        a, b = torch.rand(2, 1 << 20, generator=torch.Generator().manual_seed(seed))
        exact = (a.double() * b.double()).sum()
        worst = max(worst, float((product(a, b).double() - exact).abs() / exact) * 2**24)
    return worst


ways = {
    "torch.dot": torch.dot,
    "vecdot of one row": lambda a, b: torch.linalg.vecdot(a, b),
    "vecdot of a batch": lambda a, b: torch.linalg.vecdot(torch.stack([a, a]), torch.stack([b, b]))[0],
    "(a * b).sum()": lambda a, b: (a * b).sum(),
}
found = {name: roundings(1, way) for name, way in ways.items()}
print("torch", torch.__version__, {name: round(value, 1) for name, value in found.items()})
a, b = torch.rand(2, 1 << 20, generator=torch.Generator().manual_seed(0))
bits = []
for threads in (1, 2):
    torch.set_num_threads(threads)
    bits.append(torch.dot(a, b).item())
print("dot with one thread and with two:", *bits)
assert found["torch.dot"] > 8 > 4 > found["(a * b).sum()"], "the behaviour has changed"
P
"$work/env/bin/python" "$work/dot.py"
