"""The build, the stamp and the loader: every install gives kernels, or one line that says what to do."""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

import fused_nce
from fused_nce import _extension, _nvcc
from tests.marks import nightly_but

ROOT = Path(__file__).resolve().parent.parent


def write_stamp(folder, **changes):
    path = folder / _extension.STAMP_NAME
    path.write_text(json.dumps(_extension.running() | changes), encoding="utf-8")
    return path


def one_line_with(reason, *parts):
    assert "\n" not in reason
    for part in (*parts, _extension.rebuild_command()):
        assert part in reason


def run_setup(*arguments, cwd=ROOT, **environment):
    cleared = {name: value for name, value in os.environ.items() if name not in ("CXX", "FUSED_NCE_BUILD")}
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=cwd, env=cleared | environment, capture_output=True, text=True, check=False)


# --- the loader ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.environ.get("FUSED_NCE_BUILD") == "none", reason="the kernels were declined (FUSED_NCE_BUILD)")
def test_the_kernels_are_loaded_where_they_can_be_built():
    if _extension.find_compiler() is None:
        pytest.skip("no C++ compiler on this machine")
    module, reason = _extension.status()
    assert module is not None, reason
    assert reason == ""
    assert module.build_info()["cuda_emulation"]


@pytest.mark.parametrize("name", sorted(_extension.running()))
def test_a_build_for_something_else_is_refused_before_it_is_loaded(name, tmp_path, monkeypatch):
    def fail(module):
        raise AssertionError(f"{module} was loaded in spite of its stamp")

    monkeypatch.setattr(importlib, "import_module", fail)
    module, reason = _extension.load(write_stamp(tmp_path, **{name: "another"}))
    assert module is None
    one_line_with(reason, f"built for {name} another", f"{name} {_extension.running()[name]} is running")


def test_a_cpu_build_of_the_same_torch_release_is_another_torch(tmp_path):
    release, _, local = str(torch.__version__).partition("+")
    other = f"{release}+{'cu999' if local == 'cpu' else 'cpu'}"
    assert _extension.mismatch(_extension.running() | {"torch": other}, _extension.running()) is not None


def test_a_stamp_that_fits_goes_on_to_the_library(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib, "import_module", lambda name: {"fused_nce._C": os}[name])
    assert _extension.load(write_stamp(tmp_path)) == (os, "")


@pytest.mark.parametrize("text", ["", "{", "[]", '"2.14"'])
def test_a_damaged_stamp_is_one_line(text, tmp_path):
    path = tmp_path / _extension.STAMP_NAME
    path.write_text(text, encoding="utf-8")
    module, reason = _extension.load(path)
    assert module is None
    one_line_with(reason, "cannot be read", str(path))


def test_no_library_and_no_stamp_is_a_pure_install(tmp_path):
    module, reason = _extension.load(tmp_path / _extension.STAMP_NAME)
    assert module is None
    one_line_with(reason, "without C++ kernels")


def test_a_library_without_a_stamp_is_an_interrupted_build(tmp_path):
    (tmp_path / "_C.abi3.so").write_bytes(b"")
    module, reason = _extension.load(tmp_path / _extension.STAMP_NAME)
    assert module is None
    one_line_with(reason, "interrupted", "_C.abi3.so")


@pytest.mark.parametrize("content", nightly_but([b""], [b"", b"not a library", b"\x7fELF" + bytes(4096)]))
def test_a_damaged_library_is_one_line_and_the_fallback(content, tmp_path):
    package = tmp_path / "fused_nce"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in ("_extension.py", "_version.py"):
        shutil.copy(ROOT / "fused_nce" / name, package)
    write_stamp(package)
    (package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(content)
    code = "from fused_nce._extension import status; print(*status(), sep='|')"
    # -I keeps the checkout off the path: only the damaged copy can be found.
    isolated = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import torch; {code}"
    done = subprocess.run([sys.executable, "-I", "-c", isolated], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    module, _, reason = done.stdout.strip().partition("|")
    assert module == "None"
    assert "do not load" in reason
    assert "pip install" in reason
    assert "\n" not in reason


def test_the_kernels_bring_no_second_openmp_runtime():
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc/self/maps")
    code = (
        "import pathlib, torch\n"
        "def runtimes():\n"
        "    paths = {line.split()[-1] for line in open('/proc/self/maps') if '/' in line}\n"
        "    return sorted(p for p in paths if pathlib.Path(p).name.startswith(('libgomp', 'libomp', 'libiomp')))\n"
        "before = runtimes()\n"
        "from fused_nce import _extension\n"
        "_extension.status()\n"
        "assert before, 'torch has loaded no OpenMP runtime'\n"
        "assert runtimes() == before, (before, runtimes())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- setup.py -----------------------------------------------------------------------------------------------------

# Without build isolation the environment's own setuptools is used, and torch before 2.12 does not ask for a recent one.
OLD = int(importlib.metadata.version("setuptools").partition(".")[0]) < 77
needs_build_tools = pytest.mark.skipif(OLD, reason="the setuptools here is older than build-system.requires asks for")


def test_an_unknown_part_is_refused():
    done = run_setup("--version", FUSED_NCE_BUILD="gpu")
    assert done.returncode != 0
    assert done.stderr.strip() == "fused_nce: FUSED_NCE_BUILD must be none, cpu or cpu,cuda, not 'gpu'"


@needs_build_tools
def test_declining_the_kernels_installs_without_and_says_how_to_add_them():
    done = run_setup("--version", FUSED_NCE_BUILD="none")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == fused_nce.__version__
    assert "pure Python, because FUSED_NCE_BUILD=none" in done.stderr
    assert _extension.rebuild_command() in done.stderr


@needs_build_tools
@pytest.mark.parametrize(("asked", "code"), [("", 0), ("cpu", 1)])
def test_without_a_compiler_the_kernels_are_left_out_or_refused_if_asked_for(asked, code):
    done = run_setup("--version", FUSED_NCE_BUILD=asked, CXX="no-such-compiler")
    assert done.returncode == code, done.stderr
    assert "no C++ compiler works (tried no-such-compiler)" in done.stderr


@needs_build_tools
@pytest.mark.parametrize(("asked", "code"), [("", 0), ("cpu", 1)])
def test_without_torch_the_kernels_are_left_out_or_refused_if_asked_for(asked, code, tmp_path):
    if _extension.find_compiler() is None:
        pytest.skip("no C++ compiler on this machine: that is said first")
    (tmp_path / "torch.py").write_text("raise ImportError('hidden')", encoding="utf-8")
    done = run_setup("--version", FUSED_NCE_BUILD=asked, PYTHONPATH=str(tmp_path))
    assert done.returncode == code, done.stderr
    assert "torch cannot be imported by the build" in done.stderr


def copy_of_the_project(folder):
    target = folder / "project"
    ignore = shutil.ignore_patterns("__pycache__", "*.so", _extension.STAMP_NAME)
    for name in ("fused_nce", "csrc"):
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    return target


def wheel_of(project, **environment):
    done = run_setup("-q", "bdist_wheel", "--dist-dir", "out", cwd=project, **environment)
    assert done.returncode == 0, done.stderr
    (wheel,) = (project / "out").iterdir()
    return wheel


@needs_build_tools
def test_a_pure_wheel_holds_the_package_and_no_library(tmp_path):
    wheel = wheel_of(copy_of_the_project(tmp_path), FUSED_NCE_BUILD="none")
    assert wheel.name == f"fused_nce-{fused_nce.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "fused_nce").rglob("*.py")}
    assert expected <= set(names)
    assert "fused_nce/py.typed" in names
    assert not [name for name in names if name.endswith((".so", ".pyd", _extension.STAMP_NAME))]


@needs_build_tools
def test_a_pure_wheel_computes_a_loss_outside_the_checkout(tmp_path):
    wheel = wheel_of(copy_of_the_project(tmp_path), FUSED_NCE_BUILD="none")
    version, release, backend, reason = release_file("release_check").computed(wheel)
    assert (version, release, backend) == (fused_nce.__version__, torch.__version__, "chunked")
    assert "installed without C++ kernels" in reason


def test_the_form_for_the_kernel_hub_can_be_loaded(tmp_path):
    """By `kernels` itself where it is installed (`make test-compat`), else as `kernels` imports it, by its id."""
    folder = release_file("kernel_hub").main(tmp_path)
    code = """if True:
        import importlib.util, json, pathlib, sys, torch
        folder = pathlib.Path(sys.argv[1])
        if importlib.util.find_spec("kernels"):
            import kernels
            from kernels._rust import Build
            assert sorted(map(str, Build.open(folder).general.backends)) == ["cpu", "cuda"]
            kernel = kernels.get_local_kernel(folder, backend="cpu")
        else:
            name = json.loads((folder / "build/torch-cpu/metadata.json").read_text())["id"]
            spec = importlib.util.spec_from_file_location(name, folder / "build/torch-cpu/fused_nce/__init__.py")
            kernel = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(kernel)
        from fused_nce.backends.triton import form
        print(kernel.__file__, kernel.nt_xent(torch.randn(8, 4), torch.randn(8, 4)).loss.isfinite().item())"""
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(folder / "build/torch-cpu/fused_nce/__init__.py"), "True"]


def test_a_release_that_is_not_ready_says_what_is_missing(tmp_path, monkeypatch):
    check = release_file("release_check")
    monkeypatch.setattr(check.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0))
    found = list(check.faults(tmp_path))
    assert [line for line in found if "missing; make wheel" in line]
    assert [line for line in found if "needs a pure and a binary wheel" in line]
    assert not [line for line in found if line.startswith("CHANGELOG.md")]  # the version is there, with its date


def release_file(name):
    """A script of `release/`, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "release" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_build_tools
@pytest.mark.nightly
def test_a_wheel_with_kernels_holds_the_library_and_a_stamp_that_fits(tmp_path):
    wheel = wheel_of(copy_of_the_project(tmp_path), FUSED_NCE_BUILD="cpu")
    archive = zipfile.ZipFile(wheel)
    assert f"fused_nce/_C{sysconfig.get_config_var('EXT_SUFFIX')}" in archive.namelist()
    stamp = json.loads(archive.read(f"fused_nce/{_extension.STAMP_NAME}"))
    assert _extension.mismatch(stamp, _extension.running()) is None
    assert stamp["compiler"]
    assert "generic" in stamp["isa"]
    archive.extractall(tmp_path / "installed")
    code = (
        "import torch; from fused_nce import _extension; print(_extension.status()[0].build_info()['cuda_emulation'])"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"  # a checkout's has it: the tests run it


@needs_build_tools
def test_gpu_kernels_that_are_asked_for_and_cannot_be_built_are_refused():
    done = run_setup("--version", FUSED_NCE_BUILD="cpu,cuda", CUDA_HOME="/nowhere")
    assert done.returncode == 1
    reason = "there is no nvcc" if torch.version.cuda else "this torch was built without CUDA"
    assert f"FUSED_NCE_BUILD=cpu,cuda, but {reason}" in done.stderr


def test_nvcc_is_asked_where_its_toolkit_is(tmp_path, monkeypatch):
    """The one on the path may be a script that calls another."""
    script = tmp_path / "bin" / "nvcc"
    script.parent.mkdir()
    script.write_text(
        "#!/bin/sh\n"
        f'case "$1" in --version) echo "Cuda compilation tools, release 12.9, V12.9.1";;\n'
        f'*) echo "#\\$ _HERE_=/x" >&2; echo "#\\$ TOP={tmp_path}/kit/bin/.." >&2;; esac\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (tmp_path / "kit" / "bin").mkdir(parents=True)
    assert _nvcc.find() == (str(script), tmp_path / "kit", (12, 9))
    script.write_text("#!/bin/sh\nexit 1\n")
    assert _nvcc.find() is None
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert _nvcc.find() is None


@needs_build_tools
@pytest.mark.nightly
def test_the_gpu_kernels_compile_link_and_load_without_a_gpu(tmp_path):
    if _nvcc.find() is None or torch.version.cuda is None:
        pytest.skip(f"needs nvcc ({_nvcc.find()}) and a torch with CUDA ({torch.version.cuda})")
    project = copy_of_the_project(tmp_path)
    done = run_setup("-q", "build_ext", "--inplace", cwd=project, FUSED_NCE_BUILD="cpu,cuda")
    assert done.returncode == 0, done.stderr
    code = """if True:
        from fused_nce import _extension, doctor
        built = _extension.status()[0].build_info()
        print(built["cuda"], built["cuda_architectures"])
        print(doctor())"""
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, check=True)
    assert re.match(r"True ((sm|compute)_\d+,)*sm_\d+\n", done.stdout)
    if not torch.cuda.is_available():
        assert "torch finds no GPU here" in done.stdout


@needs_build_tools
def test_a_source_archive_holds_the_kernels_even_where_they_cannot_be_built(tmp_path):
    project = copy_of_the_project(tmp_path)
    done = run_setup("-q", "sdist", "--formats", "zip", "--dist-dir", "out", cwd=project, FUSED_NCE_BUILD="none")
    assert done.returncode == 0, done.stderr
    (archive,) = (project / "out").iterdir()
    held = {name.partition("/")[2] for name in zipfile.ZipFile(archive).namelist()}
    sources = {str(path.relative_to(project)) for path in (project / "csrc").rglob("*") if path.is_file()}
    assert sources
    assert sources <= held


# --- metadata -----------------------------------------------------------------------------------------------------


def test_the_core_needs_torch_alone():
    required = importlib.metadata.requires("fused-nce") or []
    assert [line for line in required if "extra ==" not in line] == ["torch>=2.11"]


def test_the_installed_version_is_the_written_one():
    assert importlib.metadata.version("fused-nce") == fused_nce.__version__
