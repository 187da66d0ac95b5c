#!/usr/bin/env bash
# torch 2.14.1: the meta device has no autocast, and does not say so. Under torch.autocast("cpu", torch.bfloat16) a matrix product of
# CPU tensors is bfloat16, of fake CPU tensors too, but of meta tensors float32: a model's dry run on meta, for its sizes, counts
# activations of twice the bytes. Code that asks is stopped instead: torch.is_autocast_enabled("meta") and torch.autocast("meta") raise
# RuntimeErrors, of which the second speaks of a scalar type.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.14.1 numpy==2.2.6 2>/dev/null
cat > "$work/meta.py" <<'P'
import torch
from torch._subclasses import FakeTensorMode


def product(device):
    x = torch.ones(2, 2, device=device)
    return x @ x


with torch.autocast("cpu", torch.bfloat16):
    found = {"cpu": product("cpu").dtype, "meta": product("meta").dtype}
    with FakeTensorMode():
        found["fake cpu"] = product("cpu").dtype
print("torch", torch.__version__, found)
said = []
for ask in (lambda: torch.is_autocast_enabled("meta"), lambda: torch.autocast("meta")):
    try:
        said.append(str(ask()))
    except RuntimeError as error:
        said.append(f"RuntimeError: {error}".splitlines()[0])
print(*said, sep="\n")
assert found == {"cpu": torch.bfloat16, "meta": torch.float32, "fake cpu": torch.bfloat16}, "the behaviour has changed"
assert said[0].startswith("RuntimeError: unknown device type for autocast"), "the behaviour has changed"
assert said[1] == "RuntimeError: unsupported scalarType", "the behaviour has changed"
P
"$work/env/bin/python" "$work/meta.py"
