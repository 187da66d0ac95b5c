# Every target sets up .venv on its own. PYTHON picks the interpreter (3.11 or newer), JOBS the number of test processes.
PYTHON ?= python3
JOBS ?= 2
VENV := .venv
PY := $(VENV)/bin/python
# A folder of its own for every demo: the trainer refuses one that holds a run.
NOW := $(shell date +%Y%m%d-%H%M%S)
RUN ?= runs/demo-$(NOW)
UPSTREAM := build/upstream
EXAMPLES := build/examples
OLDEST_TORCH := build/torch-2.11.0
OLDEST_TRITON := build/triton-3.6.0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.inl csrc/*/*.cu)
KERNELS := setup.py pyproject.toml $(SOURCES)

.PHONY: demo docs wheel test test-compat test-examples test-oldest test-upstream nightly mutants bench gpu lint tidy format install clean release-check
.DEFAULT_GOAL := install

install: $(VENV)/.installed

$(VENV)/.locked: requirements.lock
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("requirements.lock needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 picks another (on 3.10: pip install -e .[dev])")'
	@test -x $(PY) || { echo "Creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing what requirements.lock pins (torch is large: the first time takes minutes)"
	@$(PY) -m pip install --quiet --requirement requirements.lock
	@touch $@

$(VENV)/.installed: $(VENV)/.locked $(KERNELS)
	@echo "Building the C++ kernels and installing fused_nce into $(VENV)"
	@$(PY) -m pip install --quiet --no-build-isolation --no-deps --editable .
	@$(PY) -c 'from fused_nce._extension import status; print(status()[1] or "The C++ kernels are built and load")'
	@touch $@

demo: install  ## train AMDIM on scikit-learn's digits, evaluate it, write a report
	@$(PY) -m fused_nce.cli train amdim --data digits --preset digits --out $(RUN)
	@$(PY) -m fused_nce.cli eval $(RUN)

test: install  ## the default suite
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist worksteal

$(UPSTREAM)/.installed: tests/compat/upstream.txt tests/compat/examples.txt | install
	@echo "Installing the packages that the adapters stand in for into $(UPSTREAM)"
	@$(PY) -m pip install --quiet --no-deps --upgrade --target $(UPSTREAM) --requirement $<
	@touch $@

test-compat: install $(UPSTREAM)/.installed  ## the adapters against the packages themselves
	@OMP_NUM_THREADS=1 PYTHONPATH=$(UPSTREAM) $(PY) -m pytest -q -n $(JOBS) --dist worksteal -m "not demo" tests/compat tests/test_build.py

$(EXAMPLES)/.installed: tests/compat/examples.txt | install
	@echo "Installing what the examples import into $(EXAMPLES) (85 MB)"
	@$(PY) -m pip install --quiet --no-deps --no-compile --upgrade --target $(EXAMPLES) --requirement $<
	@touch $@

test-examples: install $(EXAMPLES)/.installed  ## Lightning Fabric, Hugging Face's Trainer, accelerate and submitit
	@OMP_NUM_THREADS=1 PYTHONPATH=$(EXAMPLES) $(PY) -m pytest -q -n $(JOBS) --dist worksteal -m nightly tests/compat/test_examples.py

test-upstream: install $(UPSTREAM)/.installed  ## upstream's own suites, fetched at pinned commits, with the adapters in place
	@$(PY) -m tests.compat.suites $(UPSTREAM) build/suites

nightly: install  ## the long fuzz too
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist worksteal -m "not demo"

mutants: install  ## plant faults; the suite must catch every one
	@OMP_NUM_THREADS=1 $(PY) -m tests.mutants

bench: install  ## time and peak memory against the rivals, into bench/results/
	@$(PY) -m bench
	@$(PY) -m bench.family

gpu: install  ## build, test and measure on the GPU at hand; OPTIONS="--quick" and the others of bench/gpu.sh
	@PYTHON=$(PY) bash bench/gpu.sh $(OPTIONS)

docs: install  ## the site, into build/site; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "build/site/index.html"

# The oldest torch that is supported and its Triton, beside the newest that requirements.lock pins; they share its dependencies, but
# for NumPy: since 2.4 an array of one number is no index, which that Triton's interpreter takes it for.
$(OLDEST_TORCH)/.installed $(OLDEST_TRITON)/.installed: build/%/.installed: | $(VENV)/.locked
	@echo "Installing $* into build/$* (530 MB of torch, 190 of Triton)"
	@rm -rf build/$*
	@$(PY) -m pip install --quiet --no-deps --no-compile --target build/$* $(subst -,==,$*) $(if $(filter triton%,$*),'numpy<2.4')
	@touch $@

test-oldest: install $(OLDEST_TORCH)/.installed $(OLDEST_TRITON)/.installed  ## Triton's kernels, compiled and interpreted, with the oldest torch and Triton
	@OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/$(OLDEST_TORCH):$(CURDIR)/$(OLDEST_TRITON) $(PY) -m pytest -q -n $(JOBS) --dist worksteal \
		-m "" tests/ptx tests/triton

wheel: install $(OLDEST_TORCH)/.installed  ## dist/: source archive, pure wheel, manylinux wheels for the oldest and the newest torch
	@PYTHON=$(PY) bash release/wheel.sh $(OLDEST_TORCH)

release-check: wheel  ## what must hold before a tag
	@$(PY) release/release_check.py

lint: install
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(VENV)/bin/clang-format --dry-run -Werror $(SOURCES)
	@$(MAKE) --no-print-directory tidy
	@$(PY) -m mypy
	@$(PY) -m mypy --strict --follow-imports silent tests/typing/user.py
	@$(PY) -m bench.lines

INCLUDES = $(shell $(PY) -c 'import sysconfig, torch.utils.cpp_extension as of; print(*of.include_paths(), sysconfig.get_path("include"))')
# What nvcc alone compiles is left out. A file at a time: only then does a finding fail the run, and JOBS run side by side.
tidy: install  ## clang-tidy, 50 s of processor time
	@printf '%s\n' $(filter-out %/device.cpp, $(filter %.cpp, $(SOURCES))) | xargs -P $(JOBS) -I FILE $(VENV)/bin/clang-tidy \
		--quiet FILE -- -std=c++20 -Wno-unknown-pragmas -DTORCH_EXTENSION_NAME=_C -Icsrc $(INCLUDES:%=-isystem %)

format: install
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .
	@$(VENV)/bin/clang-format -i $(SOURCES)

clean:  ## what was built or cached; .venv and runs/ stay
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks $(VENV)/.installed
	@rm -f fused_nce/_C*.so fused_nce/_C.stamp.json
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	@echo "Clean; the next make builds the kernels again"
