"""`make release-check`: what must hold before a tag; exits 1 with a line for each thing that does not.

The version is in the changelog with a date, documents and pictures are up to date, archives hold what they must, and
every wheel computes a loss outside the checkout with each torch that is here: with its kernels where they were built
for that torch, and elsewhere without them and with a line that names both torches.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "import torch, fused_nce; from fused_nce import _extension; "
    "q = torch.randn(8, 4, requires_grad=True); fused_nce.nt_xent(q, torch.randn(8, 4)).loss.backward(); "
    "path = fused_nce.last_path().backend; why = _extension.status()[1] or 'kernels'; "
    "print(fused_nce.__version__, torch.__version__, path, why, sep='|')"
)
PURE = "py3-none-any"


def computed(wheel: Path, torch: str = "") -> list[str]:
    """Version, torch, backend, and why there are no kernels, as the wheel says them; with the torch of a folder."""
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(wheel).extractall(folder)
        environment = os.environ | {"PYTHONPATH": torch}
        code = f"import sys; sys.path.insert(0, {folder!r}); {SMALL}"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{wheel.name} with torch of {torch or sys.prefix}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.strip().splitlines()[-1].split("|")


def matrix(wheels: list[Path], torches: list[str], version: str) -> Iterator[str]:
    """Each wheel with each torch; a binary one lies in a folder named after the torch that it was built for."""
    for wheel in wheels:
        for folder in torches:
            said, torch, backend, reason = computed(wheel, folder)
            built_for = wheel.parent.name.removeprefix("torch-")
            fits = built_for == torch
            print(f"{wheel.parent.name}/{wheel.name} with torch {torch}: {reason}")
            if said != version:
                yield f"{wheel}: says that it is {said}"
            if fits and (backend, reason) != ("cpu", "kernels"):
                yield f"{wheel}: with its own torch, {backend}: {reason}"
            # Of another torch nothing is loaded, and the line says so; without a library there is nothing to refuse.
            line = f"built for torch {built_for}, but torch {torch} is running"
            if not fits and (backend != "chunked" or (PURE not in wheel.name and line not in reason)):
                yield f"{wheel}: with torch {torch}, {backend}: {reason}"


def faults(dist: Path) -> Iterator[str]:
    """One line for each."""
    version = re.findall(r'"(.+)"', (ROOT / "fused_nce/_version.py").read_text(encoding="utf-8"))[-1]
    log = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", log, re.M):
        yield f"CHANGELOG.md: has no '## [{version}] - DATE'"
    for module in ("bench.tables", "bench.pictures"):
        if subprocess.run([sys.executable, "-m", module, "--check"], cwd=ROOT, check=False).returncode:
            yield f"python -m {module}: the documents are out of date"
    source = dist / f"fused_nce-{version}.tar.gz"
    pure = sorted(dist.glob(f"fused_nce-{version}-{PURE}.whl"))
    binary = sorted(dist.glob(f"torch-*/fused_nce-{version}-*.whl"))
    if not source.exists():
        yield f"{source}: missing; make wheel"
    else:
        with tarfile.open(source) as archive:
            held = {name.partition("/")[2] for name in archive.getnames()}
        needed = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
        yield from (f"{source.name}: lacks {name}" for name in sorted(needed - held))
    if not pure or not binary:
        yield f"{dist}: needs a pure and a binary wheel of {version}; make wheel"
    for wheel in [*pure, *binary]:
        names = zipfile.ZipFile(wheel).namelist()
        extra = [name for name in names if name.endswith(".so") and "fused_nce/_C" not in name]
        yield from (f"{wheel}: holds {name}, a library that is not ours" for name in extra)
    yield from (f"{wheel}: is not manylinux" for wheel in binary if "manylinux" not in wheel.name)
    older = [str(path.parent.resolve()) for path in sorted((ROOT / "build").glob("torch-*/torch"))]
    if binary and len(binary) != 1 + len(older):
        yield f"{dist}: a wheel for {len(binary)} torch releases, and {1 + len(older)} are here; make wheel"
    yield from matrix([*pure, *binary], ["", *older], version)


def main() -> int:
    """Print; 1 where something is wrong."""
    found = list(faults(ROOT / "dist"))
    print("\n".join(found) or "ready to tag")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
