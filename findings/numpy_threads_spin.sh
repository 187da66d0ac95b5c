#!/usr/bin/env bash
# numpy 2.4.6 and torch 2.14.1 from their x86-64 wheels, one process, both with a thread a core: after a product of numpy's, the
# threads of its OpenBLAS spin for 2^26 cycles (some 20 ms) before they sleep, on the cores that torch's OpenMP threads need, and
# those spin too while they wait for each other: a torch product of 0.16 ms that followed took 3.1 ms on two quiet cores, and
# 0.17 ms with OPENBLAS_THREAD_TIMEOUT=4 (2^4 cycles; read as numpy loads). What does not depend on other work is the CPU time that
# passes while the program sleeps for 20 ms after a product: 20 ms and 0.1. Exits 0 while this holds; one core shows nothing.
set -euo pipefail
[ "$(nproc)" -gt 1 ] || { echo "not run: one core"; exit 0; }
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6 2>/dev/null
cat > "$work/both.py" <<'P'
import os
import statistics
import time

import numpy
import torch

a, b = torch.randn(128, 1024), torch.randn(1024, 128)
x = numpy.random.rand(512, 512).astype("f4")


def median(measure):
    return statistics.median(measure() for _ in range(50))


def torch_ms():
    start = time.perf_counter()
    torch.mm(a, b)
    return 1e3 * (time.perf_counter() - start)


def torch_ms_after_numpy():
    x @ x
    return torch_ms()


def spun_ms():
    x @ x
    start = time.process_time()
    time.sleep(0.02)
    return 1e3 * (time.process_time() - start)


median(torch_ms_after_numpy)
alone, after, spun = median(torch_ms), median(torch_ms_after_numpy), median(spun_ms)
cycles = os.environ.get("OPENBLAS_THREAD_TIMEOUT", "26")
print(f"numpy {numpy.__version__}, torch {torch.__version__}, 2^{cycles} cycles: {spun:.1f} ms of CPU time in 20 ms of sleep;")
print(f"a torch product takes {alone:.2f} ms, after one of numpy's {after:.2f} ms")
raise SystemExit(spun > 2)
P
! "$work/env/bin/python" "$work/both.py" || { echo "the behaviour has changed"; exit 1; }
OPENBLAS_THREAD_TIMEOUT=4 "$work/env/bin/python" "$work/both.py" || { echo "another cause"; exit 1; }
