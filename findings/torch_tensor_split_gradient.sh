#!/usr/bin/env bash
# torch 2.14.1: `x.tensor_split(n)`, which also splits what n does not divide, gives slices to autograd, where `chunk`, `split` and
# `unbind` give one node. In the backward each of its parts fills a map of x's whole size with zeros, copies its share there and adds
# the map to the last one's: n times the memory traffic, 170 of 810 ms in a training step with eight parts. The maps are
# plain contiguous, too: the gradient of a channels-last x arrives in the other layout, and the convolution before it copies that back.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --no-cache-dir torch==2.14.1 numpy==2.2.6 2>/dev/null
cat > "$work/split.py" <<'P'
import torch
from torch.profiler import profile

LAST = torch.channels_last
for name in ("tensor_split", "chunk"):
    x = torch.randn(16, 8, 4, 4).to(memory_format=LAST).requires_grad_()
    x.register_hook(lambda grad: print("  gradient is channels last:", grad.is_contiguous(memory_format=LAST)))
    parts = getattr(x, name)(8)
    loss = torch.cat([2 * part for part in parts]).square().sum()
    print(f"{name}: {type(parts[0].grad_fn).__name__}")
    with profile() as profiled:
        loss.backward()
    print("  maps of zeros:", sum(event.name == "aten::zeros" for event in profiled.events()))
P
"$work/env/bin/python" "$work/split.py" 2>/dev/null | tee "$work/said"
diff "$work/said" - <<'S'
tensor_split: SliceBackward0
  gradient is channels last: False
  maps of zeros: 8
chunk: SplitBackward0
  gradient is channels last: True
  maps of zeros: 0
S
