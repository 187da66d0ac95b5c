#!/usr/bin/env bash
# Everything that an hour on a GPU is for, in one command: builds csrc/ for the card at hand, runs the GPU tests, measures
# against the rivals, and watches small problems with compute-sanitizer.
#
#   bash bench/gpu.sh              8 minutes at most, results into bench/results
#   bash bench/gpu.sh --quick      3 minutes at most, into runs/bench
#
# The minutes are limits: what they leave no time for is stopped or left out, and the summary says so. That all of it
# fits is an estimate made without a card.
#
# Needs no network and no root: a Python (PYTHON, default python3) with a CUDA torch, setuptools and pytest; nvcc and a C++
# compiler for the CUDA kernels (Triton's need neither). ninja and pytest-xdist make it faster. torch
# ships pybind11's headers. It works on a copy in a temporary folder and writes to the output folder alone.
#
# A phase that fails does not stop the next; the exit status is the number of failed phases.
set -uo pipefail

usage() {
  sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'
  cat <<'TEXT'
  --quick          the tests without the long ones, the main shapes, memcheck alone
  --out FOLDER     where results and gpu.log go
  --device cpu     try the whole script without a GPU, on tiny shapes: its figures mean nothing
  --commit HASH    the commit that this is, where the checkout has no .git
  --dry-run        run and write nothing: print what would run, how long at most, and what this machine lacks for it
  --keep           leave the temporary folder for a look
TEXT
}

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3} DEVICE=cuda OUT='' COMMIT='' QUICK='' KEEP='' DRY=''
while (($#)); do
  case $1 in
    --quick) QUICK=1 ;;
    --keep) KEEP=1 ;;
    --dry-run) DRY=1 ;;
    --out | --device | --commit)
      (($# > 1)) || { echo "gpu.sh: $1 needs a value" >&2; exit 2; }
      case $1 in --out) OUT=$2 ;; --device) DEVICE=$2 ;; --commit) COMMIT=$2 ;; esac
      shift ;;
    -h | --help) usage; exit 0 ;;
    *) echo "gpu.sh: got $1, need an option of --help" >&2; exit 2 ;;
  esac
  shift
done
case $DEVICE in cuda | cpu) ;; *) echo "gpu.sh: --device: got $DEVICE, need cuda or cpu" >&2; exit 2 ;; esac
if [[ $DEVICE == cuda && -z $QUICK ]]; then OUT=${OUT:-$ROOT/bench/results}; else OUT=${OUT:-$ROOT/runs/bench}; fi
if [[ ! $DRY ]]; then mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 2; fi
[[ $PYTHON == */* ]] && PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON")
TOTAL_S=$((QUICK ? 180 : 480))
DEVICE_IS_CPU=0
[[ $DEVICE == cuda ]] || DEVICE_IS_CPU=1 TOTAL_S=900  # a trial on a small machine, where one core compiles
LOG=$([[ $DRY ]] && echo /dev/null || echo "$OUT/gpu.log")
STAGE=$(mktemp -d)
trap '[[ $KEEP ]] && echo "left: $STAGE" || rm -rf "$STAGE"' EXIT
: >"$LOG"

# ---- phases ---------------------------------------------------------------------------------------------------------

SUMMARY=() FAILED=0
note() {  # OUTCOME NAME SECONDS [REASON]; FAILED counts, advisory does not
  SUMMARY+=("$(printf '%-8s %-24s %4s s  %s' "$1" "$2" "$3" "${4:-}")")
  [[ $1 != FAILED ]] || FAILED=$((FAILED + 1))
}
phase() {  # NAME LIMIT_S LINES COMMAND…: runs it within its own limit and what is left of the whole; shows its last lines
  local name=$1 limit=$2 lines=$3 begin=$SECONDS code=0 left=$((TOTAL_S - SECONDS)); shift 3
  if [[ $DRY ]]; then printf '%-24s %4s s at most   %s\n' "$name" "$limit" "$*" | cut -c 1-160; return 0; fi
  printf '\n== %s\n' "$name" | tee -a "$LOG"
  ((limit <= left)) || limit=$left
  if ((limit < 10)); then echo "   no time left"; note 'left out' "$name" 0 "no time left of $TOTAL_S s"; return 1; fi
  timeout --kill-after=10 "$limit" "$@" >"$STAGE/phase.log" 2>&1 || code=$?
  cat "$STAGE/phase.log" >>"$LOG"
  tail -n "$lines" "$STAGE/phase.log" | sed 's/^/   /' | if ((lines < 10)); then cut -c 1-160; else cat; fi
  case $code in
    0) note passed "$name" $((SECONDS - begin)) ;;
    124 | 137) note "${ON_FAILURE:-FAILED}" "$name" $((SECONDS - begin)) "stopped after $limit s" ;;
    *) note "${ON_FAILURE:-FAILED}" "$name" $((SECONDS - begin)) "exit status $code" ;;
  esac
  return "$code"
}
skip() {  # NAME REASON
  if [[ $DRY ]]; then printf '%-24s left out        %s\n' "$1" "$2"; return 0; fi
  printf '\n== %s\n   left out: %s\n' "$1" "$2" | tee -a "$LOG"
  note 'left out' "$1" 0 "$2"
}
has() { "$PYTHON" -c "import $1" 2>/dev/null; }
find_tool() {  # a CUDA tool, on the PATH or in the toolkit
  command -v "$1" || ls "${CUDA_HOME:-/usr/local/cuda}/bin/$1" 2>/dev/null
}

# ---- the machine ----------------------------------------------------------------------------------------------------

# A user's own settings must not steer what is measured, and no cache outlives the run.
for name in "${!FUSED_NCE_@}"; do unset "$name"; done
export XDG_CACHE_HOME=$STAGE/cache PYTHONUNBUFFERED=1  # verdicts of first contact
export TRITON_CACHE_DIR=$STAGE/cache/triton TORCHINDUCTOR_CACHE_DIR=$STAGE/cache/inductor
export MAX_JOBS=${MAX_JOBS:-$(nproc)}

# What the phases before the memory checker may take is what a quick run has in all: the checker has what they leave.
if ! phase machine $((QUICK ? 20 : 60)) 8 "$PYTHON" - "$DEVICE" <<'CODE'
import platform, shutil, sys
import torch
print(f"Python {platform.python_version()}, torch {torch.__version__} (CUDA {torch.version.cuda})")
try:
    import triton
    print(f"Triton {triton.__version__}")
except ImportError:
    print("no Triton")
if sys.argv[1] == "cuda":
    if not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device; --device cpu tries the script without one")
    card = torch.cuda.get_device_properties(0)
    print(f"{card.name}, {card.total_memory / 2**30:.0f} GiB, compute capability {card.major}.{card.minor}")
    print(f"nvcc {shutil.which('nvcc') or 'not on the PATH'}")
CODE
then
  exit 1
fi
PARTS=cpu
[[ $DEVICE == cpu ]] || PARTS=cpu,cuda
if [[ $DEVICE == cuda && ! $DRY ]]; then
  TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability(0))')
  export TORCH_CUDA_ARCH_LIST
fi
if [[ -z $COMMIT ]] && COMMIT=$(git -C "$ROOT" rev-parse HEAD 2>/dev/null); then
  [[ -z $(git -C "$ROOT" status --porcelain -- . ':!bench/results' ':!docs' ':!*.md') ]] || DIRTY=1
fi

# ---- build, in a copy -----------------------------------------------------------------------------------------------

if [[ ! $DRY ]]; then
  tar -C "$ROOT" --exclude='*.so' --exclude=_C.stamp.json --exclude=__pycache__ --exclude=bench/results \
    -cf - fused_nce csrc tests bench setup.py | tar -C "$STAGE" -xf - || exit 2
fi
cd "$([[ $DRY ]] && echo "$ROOT" || echo "$STAGE")" || exit 2
# Before pyproject.toml is there: an old setuptools, as some torch images have, cannot read it, and need not.
phase build $((DEVICE_IS_CPU ? 600 : QUICK ? 80 : 200)) 3 env FUSED_NCE_BUILD=$PARTS "$PYTHON" setup.py build_ext --inplace ||
  echo "   going on without the C++ and CUDA kernels"
[[ $DRY ]] || cp "$ROOT/pyproject.toml" .
"$PYTHON" -c 'import fused_nce; print(fused_nce.doctor())' 2>&1 | tee -a "$LOG" | sed 's/^/   /'

# ---- tests ----------------------------------------------------------------------------------------------------------

if has pytest; then
  MARKS=$([[ $DEVICE == cuda ]] && echo gpu || echo 'not gpu')
  [[ -z $QUICK ]] || MARKS="$MARKS and not nightly"
  WORKERS=()
  if [[ $DEVICE == cuda ]] && has xdist; then WORKERS=(-n 6 --dist worksteal); fi
  phase tests $((DEVICE_IS_CPU ? 600 : QUICK ? 35 : 240)) 25 "$PYTHON" -m pytest -q tests/gpu -m "$MARKS" "${WORKERS[@]}"
else
  printf '\n== tests\n   pytest is not installed for %s\n' "$PYTHON"
  note FAILED tests 0 "pytest is not installed"
fi

# ---- benchmark ------------------------------------------------------------------------------------------------------

ARGUMENTS=(--device "$DEVICE" --out "$OUT")
[[ -z $QUICK ]] || ARGUMENTS+=(--quick)
[[ $DEVICE == cuda ]] || ARGUMENTS+=(--rounds 5)
[[ -z $COMMIT ]] || ARGUMENTS+=(--commit "$COMMIT" ${DIRTY:+--dirty})
phase benchmark $((QUICK ? 45 : 220)) 80 "$PYTHON" -m bench.gpu "${ARGUMENTS[@]}" --budget-s $((QUICK ? 30 : 150))

# ---- memory checker -------------------------------------------------------------------------------------------------

# memcheck sees a stray access only where each tensor is an allocation of its own. racecheck looks at our CUDA kernels alone,
# cuBLAS being none of ours; the Triton backend calls no other library.
watch_with() {  # TOOL BACKEND [OPTION…]
  local tool=$1 backend=$2 name="$1, $2"; shift 2
  [[ $DRY ]] || env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$PYTHON" -c \
    "import torch; from fused_nce.core import dispatch as d, spec as s; x = torch.empty(1, 1, device='$DEVICE')
raise SystemExit('$backend' not in d.BACKENDS or d.why_not('$backend', s.Spec(s.Block(1), s.TanhClip(20.0)), x, x) is not None)" ||
    { skip "$name" "the $backend backend cannot run here"; return; }
  phase "$name" 70 4 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$SANITIZER" --tool "$tool" --error-exitcode 99 "$@" \
    "$PYTHON" -m tests.gpu.probe --device "$DEVICE" --backend "$backend"
}
if [[ $DEVICE != cuda ]]; then
  phase 'problems for memcheck' 60 2 "$PYTHON" -m tests.gpu.probe --device cpu --backend chunked
elif SANITIZER=$(find_tool compute-sanitizer); then
  watch_with memcheck cuda
  # Its kernels are compiled before the checker looks on: a hundred of them would take its time.
  phase 'kernels for memcheck' 90 2 "$PYTHON" -m tests.gpu.probe --device cuda --backend triton &&
    watch_with memcheck triton
  if [[ -z $QUICK ]]; then
    watch_with racecheck cuda --kernel-name kns=fused_nce
    # It knows little of what orders wgmma's and cp.async's accesses: what it finds there is to be looked at.
    ON_FAILURE=advisory watch_with racecheck triton
  fi
else
  skip 'memcheck and racecheck' 'compute-sanitizer is not here'
fi

if [[ $DRY ]]; then
  printf '\nthe benchmark, in this order, and what a model expects of one H200:\n\n'
  "$PYTHON" -m bench.gpu "${ARGUMENTS[@]}" --plan || exit 2
  printf '\ndry run: nothing was run or written\n'
  exit 0
fi
printf '%s\n' '' "phases, $SECONDS s in all; the whole log: $LOG" "${SUMMARY[@]}" | tee -a "$LOG"
exit "$FAILED"
