#!/usr/bin/env bash
# torch 2.14.1, torch.compile on a CPU: the graph cache on the disk does not tell instruction sets apart. Code that was generated for
# AVX-512 (16 floats a step) is found by a process that uses AVX2 (ATEN_CPU_CAPABILITY=avx2 here; a node without AVX-512 that
# shares TORCHINDUCTOR_CACHE_DIR in the field), compiled again for 8 floats a vector, and leaves half of each result unwritten:
# other numbers, no warning. The other way round, results are right. Needs a CPU with AVX-512 and g++. Seen: a row-wise
# cross-entropy and its gradient are right to 1e-6 with a cache of their own, and off by 100 % or NaN with the shared one.
set -euo pipefail
grep -q -w avx512f /proc/cpuinfo || { echo "not run: this CPU has no AVX-512"; exit 0; }
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.14.1 numpy==2.2.6 2>/dev/null
cat > "$work/loss.py" <<'P'
import torch


def loss(q, k):
    q, k = (torch.nn.functional.normalize(x, dim=1) for x in (q, k))
    return torch.nn.functional.cross_entropy(q @ k.T / 0.1, torch.arange(q.shape[0]))


def gradient(call, dtype):
    q, k = torch.randn(2, 1024, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    return torch.autograd.grad(call(q.requires_grad_(), k), q)[0].double()


exact = gradient(loss, torch.float64)
error = (gradient(torch.compile(loss), torch.float32) - exact).abs().max() / exact.abs().max()
print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability(), "relative error of the gradient:", f"{error:.1e}")
raise SystemExit(not error < 1e-4)
P
run() { env TORCHINDUCTOR_CACHE_DIR="$work/$1" ATEN_CPU_CAPABILITY="$2" "$work/env/bin/python" "$work/loss.py" 2>/dev/null; }
run own avx2 && run shared avx512 || { echo "wrong without a shared cache: another fault"; exit 1; }
! run shared avx2 || { echo "the behaviour has changed"; exit 1; }
