"""Build the C++ kernels of ``csrc/`` where torch and a compiler are at hand; install pure Python where not.

``FUSED_NCE_BUILD=none|cpu|cpu,cuda`` decides; unset, it is ``cpu`` where possible, and ``cuda`` too where torch sees a
GPU. What is asked for by name and cannot be built is an error; what is merely possible and cannot be built is a line
that says what to do. No GPU is needed to build. ``FUSED_NCE_CXXFLAGS`` come last.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import setup

ROOT = Path(__file__).resolve().parent


def load_by_path(path: Path) -> ModuleType:
    """Import one file of the package without the package, which needs torch."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


extension = load_by_path(ROOT / "fused_nce" / "_extension.py")
nvcc_finder = load_by_path(ROOT / "fused_nce" / "_nvcc.py")


def say(line: str) -> None:
    """One line for the person who installs (pip shows it under ``-v``, or when the build fails)."""
    print(f"fused_nce: {line}", file=sys.stderr)


def requested() -> set[str] | None:
    """The parts that ``FUSED_NCE_BUILD`` names, or None where it is unset."""
    text = os.environ.get("FUSED_NCE_BUILD", "").strip()
    if not text:
        return None
    parts = {part.strip() for part in text.split(",")}
    if parts not in ({"none"}, {"cpu"}, {"cpu", "cuda"}):
        sys.exit(f"fused_nce: FUSED_NCE_BUILD must be none, cpu or cpu,cuda, not {text!r}")
    return parts - {"none"}


def find_torch() -> bool:
    """Whether torch can be imported, if need be from the environment that is being installed into.

    pip isolates a build by hiding the site-packages of the very interpreter it runs, so that interpreter still names
    the right folder, and the torch in it is the one that the library will meet. Other installers build in an
    environment of their own, whose folder holds no torch. Appended, so the isolated build tools keep their precedence.
    """
    if importlib.util.find_spec("torch") is None:
        folders = {sysconfig.get_path("platlib"), sysconfig.get_path("purelib")}
        sys.path += [folder for folder in folders if Path(folder, "torch").is_dir()]
    try:
        import torch  # noqa: F401
    except (ImportError, OSError):  # OSError: one of torch's own libraries is missing
        return False
    return True


def obstacle(parts: set[str]) -> str | None:
    """Why these parts cannot be built here, or None where they can. Chooses the compiler (``CXX``) on the way."""
    if not sorted((ROOT / "csrc").glob("*.cpp")):
        return "there are no sources in csrc/"
    compiler = extension.find_compiler()
    if compiler is None:
        return f"no C++ compiler works (tried {os.environ.get('CXX', 'c++, g++, clang++')})"
    if not find_torch():
        return "torch cannot be imported by the build"
    os.environ["CXX"] = compiler
    return cuda_obstacle() if "cuda" in parts else None


def cuda_obstacle() -> str | None:
    """Why nvcc cannot build here, or None where it can. Tells torch where the toolkit is on the way."""
    import torch

    nvcc = nvcc_finder.find()
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if nvcc is None:
        return "there is no nvcc (on the path, in CUDA_HOME or in /usr/local/cuda)"
    if nvcc.release[0] != int(torch.version.cuda.partition(".")[0]):
        release = ".".join(map(str, nvcc.release))
        return f"nvcc is of CUDA {release} and torch of CUDA {torch.version.cuda}: their first numbers must agree"
    os.environ["CUDA_HOME"] = str(nvcc.home)
    if not torch.cuda.is_available():  # else the card at hand
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(nvcc.architectures) + "+PTX")
    return None


def sees_gpu() -> bool:
    """Whether torch, which can be imported, finds an NVIDIA GPU."""
    import torch

    return torch.version.cuda is not None and torch.cuda.is_available()


def version_line(compiler: str) -> str:
    """The first line of what a compiler says of itself."""
    answer = subprocess.run([*shlex.split(compiler), "--version"], capture_output=True, text=True, check=True)
    return answer.stdout.partition("\n")[0]


def stamp_of(parts: set[str], compiler: str) -> dict[str, Any]:
    """What the stamp says: the facts that are compared before loading, and those that only a report shows."""
    import torch

    facts: dict[str, Any] = extension.running()
    # One translation unit an instruction set, rows_<isa>.cpp; on another CPU only the generic one has content.
    isa = sorted(path.stem.partition("_")[2] for path in (ROOT / "csrc" / "cpu").glob("rows_*.cpp"))
    return facts | {
        "compiler": version_line(compiler),
        "isa": isa if facts["machine"] in ("x86_64", "AMD64") else ["generic"],
        "cuda": torch.version.cuda if "cuda" in parts else None,
    }


def architectures() -> str:
    """What torch will ask nvcc for, as `sm_80,sm_90,compute_90`: machine code, and PTX for later GPUs."""
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    return ",".join(re.findall(r",code=(\w+)", " ".join(_get_cuda_arch_flags())))


def extension_arguments(parts: set[str]) -> dict[str, Any]:
    """The arguments of ``setup`` that build ``fused_nce._C`` and leave its stamp beside it."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class Build(BuildExtension):
        """Writes the stamp last, and takes the old one away first: an interrupted build has none."""

        def run(self) -> None:
            stamp = Path(self.get_ext_fullpath("fused_nce._C")).with_name(extension.STAMP_NAME)
            stamp.unlink(missing_ok=True)
            if cuda or self.inplace or getattr(self, "editable_mode", False):
                library.define_macros.append(("FUSED_NCE_EMULATION", None))
            else:
                library.sources = self.together()
            try:
                super().run()
            except Exception:
                less = "=cpu leaves out CUDA's, =none all" if cuda else "=none installs without them"
                say(f"the kernels do not compile here (errors above); FUSED_NCE_BUILD{less}")
                raise
            stamp.write_text(json.dumps(stamp_of(parts, compiler), indent=2) + "\n", encoding="utf-8")

        def together(self) -> list[str]:
            """What an install on a CPU compiles: each instruction set's rows, and all else as one file.

            torch's headers are then read once, which halves the time of a core. The GPU's driver and its emulation,
            which the tests run, are for a checkout that one works in, where files that did not change stay compiled.
            """
            rows: list[Path] = []
            others: list[Path] = []
            for path in map(Path, library.sources):
                if path.parent.name != "cuda":
                    (rows if path.stem.startswith("rows_") else others).append(path)
            one = Path(self.build_temp, "fused_nce.cpp")
            one.parent.mkdir(parents=True, exist_ok=True)
            lines = [f'#include "{path.relative_to("csrc").as_posix()}"\n' for path in others]
            one.write_text("".join(lines), encoding="utf-8")
            return [*map(str, rows), str(one)]

    cuda = "cuda" in parts
    compiler = os.environ["CXX"]
    sources = [*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc" / "cpu").glob("*.cpp")]
    # The driver and the row text of the GPU's kernels are plain C++ and are tested on the CPU; the rest needs nvcc.
    needs_nvcc = ("rows.cu", "device.cpp")
    sources += [path for path in (ROOT / "csrc" / "cuda").glob("*.c[pu]*") if cuda or path.name not in needs_nvcc]
    # After all others: what the toolkit has comes from the toolkit.
    headers = [f"-idirafter{folder}" for folder in nvcc_finder.wheel_includes(nvcc_finder.find())] if cuda else []
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    library = (CUDAExtension if cuda else CppExtension)(
        "fused_nce._C",
        sorted(str(path.relative_to(ROOT)) for path in sources),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("FUSED_NCE_CUDA", None), ("FUSED_NCE_ARCHITECTURES", architectures())] if cuda else [],
        extra_compile_args={
            "cxx": [
                *("-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", *openmp, *headers),
                *shlex.split(os.environ.get("FUSED_NCE_CXXFLAGS", "")),  # conda sets CXXFLAGS, to -O2
            ],
            "nvcc": list(nvcc_finder.FLAGS),
        },
        # g++ code is linked without -fopenmp on purpose: its OpenMP calls then resolve to the runtime that torch has
        # loaded. A second runtime would have threads of its own, deaf to torch.set_num_threads.
        extra_link_args=openmp if "clang" in version_line(compiler) else [],
    )
    return {"ext_modules": [library], "cmdclass": {"build_ext": Build.with_options(use_ninja=True)}}


def main() -> None:
    """Decide what to build, say so where it is less than hoped for, and hand over to setuptools."""
    asked = requested()
    parts = {"cpu"} if asked is None else asked
    reason = obstacle(parts) if parts else "FUSED_NCE_BUILD=none"
    if asked is None and reason is None and sees_gpu():
        without = cuda_obstacle()
        if without is None:
            parts = {"cpu", "cuda"}
        else:
            say(f"no CUDA kernels, because {without}")
    if reason is None:
        setup(**extension_arguments(parts))
        return
    if asked:
        sys.exit(f"fused_nce: FUSED_NCE_BUILD={','.join(sorted(asked))}, but {reason}")
    say(f"pure Python, because {reason}; the command that adds the kernels: {extension.rebuild_command()}")
    setup()


main()
