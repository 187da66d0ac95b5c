#!/usr/bin/env bash
# torch 2.14.1, CPU: FlopCounterMode counts no FLOP for scaled_dot_product_attention, nor for an LSTM, and says nothing of it. Its
# table has formulas for CUDA's attention kernels alone, not for the one that the same call runs on a CPU; and an LSTM's products lie
# in one oneDNN operator that is not in it either. A GRU, or the same attention by the math backend, is counted. A model's share of
# the peak, taken with it on a CPU, is then too low by its attention.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --no-cache-dir torch==2.14.1 numpy==2.2.6 2>/dev/null
cat > "$work/count.py" <<'P'
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode


def counted(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


q, x = torch.randn(2, 3, 64, 32), torch.randn(10, 4, 32)
print("attention:", counted(lambda: scaled_dot_product_attention(q, q, q)))
with sdpa_kernel(SDPBackend.MATH):
    print("attention by the math backend:", counted(lambda: scaled_dot_product_attention(q, q, q)))
print("LSTM:", counted(lambda: torch.nn.LSTM(32, 64)(x)))
print("GRU:", counted(lambda: torch.nn.GRU(32, 64)(x)))
P
"$work/env/bin/python" "$work/count.py" 2>/dev/null | tee "$work/said"
diff "$work/said" - <<'S'
attention: 0
attention by the math backend: 3145728
LSTM: 0
GRU: 1474560
S
