"""The machine a figure belongs to, the code that made it, and who else was using the cores meanwhile."""

from __future__ import annotations

import argparse
import getpass
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fused_nce.measure import core_ticks, cores, cpuinfo, processor, torch_threads

ROOT = Path(__file__).resolve().parent.parent
ISA_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16")
BUSY_SHARE = 0.1  # of all cores, in use by others: above this a median of 20 rounds moved by more than its own spread
CODE_ENDINGS = (".cpp", ".cu", ".cuh", ".h", ".inl")
# Numbers come from the code, not from the documents that quote them.
NOT_CODE = (":!bench/results", ":!docs", ":!*.md")


def _caches_kib() -> dict[str, int]:
    sizes = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind = ((index / name).read_text().strip() for name in ("level", "type"))
        if kind != "Instruction":
            sizes[f"l{level}_kib"] = int((index / "size").read_text().strip().rstrip("K"))
    return sizes


def facts() -> dict[str, Any]:
    """CPU, instruction sets, cores, threads, caches, memory."""
    flags = set(cpuinfo("flags").split())
    return {
        "cpu_model": processor(),
        "isa_flags": [flag for flag in ISA_FLAGS if flag in flags],
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "cache": _caches_kib(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "virtual": "hypervisor" in flags,
        "kernel": platform.release(),
    }


def narrowed() -> bool:
    """Whether torch was told to leave this CPU's AVX-512 alone: a stand-in for a CPU that has AVX2."""
    found = facts()
    return found["torch_cpu_capability"] == "AVX2" and "avx512f" in found["isa_flags"]


# A CPU with AVX-512 stands in for one without: torch, oneDNN and ours read these as they load, and the compiler's
# vectors follow torch's. torch 2.14 takes code made for the other vectors from its cache, and gets other numbers.
AVX2_ALONE = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "FUSED_NCE_ISA": "avx2"}


def add_isa(parser: argparse.ArgumentParser) -> None:
    """The option `--isa` of a benchmark."""
    parser.add_argument("--isa", choices=["avx2"], help="leave AVX-512 alone; the results have a file of their own")


def restart_with(isa: str | None, module: str, argv: Sequence[str] | None) -> None:
    """The same program from the start with AVX2 alone, where that was asked for and the CPU has more."""
    if isa == "avx2" and torch.backends.cpu.get_cpu_capability() != "AVX2":
        arguments = sys.argv[1:] if argv is None else argv
        cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}")
        own = AVX2_ALONE | {"TORCHINDUCTOR_CACHE_DIR": f"{cache}-avx2"}
        os.execve(sys.executable, [sys.executable, "-m", module, *arguments], {**os.environ, **own})


def slug() -> str:
    """A stable name for the host: maker and family, cores, best instruction set."""
    found = facts()
    words = re.sub(r"\((r|tm)\)|\b(processor|cpu|core)\b|@.*|\d+-core", " ", found["cpu_model"].lower())
    name = "-".join(re.findall(r"[a-z0-9]+", words)) or platform.machine()
    best = "amx" if "amx_bf16" in found["isa_flags"] else found["torch_cpu_capability"].lower()
    return f"{name}-{found['cores']}c-{best}"


def versions() -> dict[str, str]:
    """Of what computes: Python, torch, this package, and the C++ kernels' build."""
    import fused_nce
    from fused_nce._extension import status

    module, reason = status()
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "fused_nce": fused_nce.__version__,
        "numpy": metadata.version("numpy"),
        "triton": _version("triton"),
        "kernels": ", ".join(f"{k} {v}" for k, v in module.build_info().items()) if module else f"none: {reason}",
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def sources_sha256() -> str:
    """A fingerprint of the code that a figure depends on: it names the code where there is no repository to ask."""
    digest = hashlib.sha256()
    for folder, endings in {"fused_nce": (".py",), "csrc": CODE_ENDINGS, "bench": (".py",)}.items():
        for path in sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in endings):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def commit() -> dict[str, Any]:
    """The commit that ran and whether its code had been changed; unknown outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", ".", *NOT_CODE))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown", "dirty": True}


def provenance() -> dict[str, Any]:
    """What a record says of when, by which code and where it was made."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"date_utc": now, "code": commit(), "host": {"slug": slug(), **facts()}, "versions": versions()}


def write(path: Path, record: dict[str, Any]) -> None:
    """Whole or not at all: a run cut short keeps what it had."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def records(folder: Path, pattern: str) -> list[dict[str, Any]]:
    """Those of a folder's files, newest first."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob(pattern)]
    return sorted(found, key=lambda record: str(record["date_utc"]), reverse=True)


def newest(folder: Path, pattern: str) -> dict[str, Any] | None:
    """The first of `records`; None without any."""
    return next(iter(records(folder, pattern)), None)


def shown(folder: Path, pattern: str, table: Callable[[dict[str, Any]], str], command: str) -> str:
    """The newest record as its table has it; before there is one, what makes it."""
    found = newest(folder, pattern)
    return f"No record is committed yet: `{command}` makes one." if found is None else table(found)


class BusyMeter:
    """The share of this process's cores that others used between `start` and `share`, by the kernel's clock ticks."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin an interval."""
        self._begin = self._now()

    def share(self) -> float:
        """0 when this process had its cores to itself, 1 when others filled them all. Stolen time counts."""
        total, used, mine = (now - then for now, then in zip(self._now(), self._begin, strict=True))
        return max(0.0, (used - mine) / total) if total > 0 else 0.0

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds: of the cores that it may use, used by anyone, used by this process and its finished children."""
        used, idle = (ticks / os.sysconf("SC_CLK_TCK") for ticks in core_ticks())
        return used + idle, used, sum(os.times()[:4])


def busy_now(seconds: float = 1.0) -> float:
    """The share of the cores in use while this process sleeps."""
    meter = BusyMeter()
    time.sleep(seconds)
    return meter.share()


class Energy:
    """Joules of the CPU's packages, where Linux tells them: its folder is `intel-rapl` on AMD too."""

    def __init__(self, folder: Path = Path("/sys/class/powercap")) -> None:
        self.joules = 0.0
        self.why: str | None = None
        try:
            zones = sorted(zone for zone in folder.glob("intel-rapl:*") if zone.name.count(":") == 1)
            self.zones = [zone for zone in zones if (zone / "name").read_text().startswith("package")]
            self.range = {zone: int((zone / "max_energy_range_uj").read_text()) for zone in self.zones}
            self.last = self._now()
        except OSError as error:
            self._lost(error)
        if not self.zones and self.why is None:
            self.why = f"the host shows no {folder}/intel-rapl:*"

    def _lost(self, error: OSError) -> None:
        self.zones, self.why = [], f"{error.filename} cannot be read: {error.strerror}"

    def _now(self) -> dict[Path, int]:
        return {zone: int((zone / "energy_uj").read_text()) for zone in self.zones}

    def look(self) -> None:
        """Add what was used since the last look; a counter that is smaller has wrapped round.

        Where one cannot be read any more, the energy is unknown, and says why.
        """
        try:
            now = self._now()
        except OSError as error:
            return self._lost(error)
        for zone, value in now.items():
            used = value - self.last[zone]
            self.joules += (used if used >= 0 else used + self.range[zone]) / 1e6
        if self.zones:
            self.last = now

    def found(self) -> dict[str, Any]:
        """Of an entry."""
        return {"energy_j": None, "energy_why": self.why} if self.why else {"energy_j": round(self.joules, 1)}


def matrix_rates(side: int = 1024, seconds: float = 1.0) -> dict[str, float | None]:
    """GFLOP/s of `torch.mm` on all cores by the fastest call, and what share of them others used meanwhile.

    None of bf16 where the CPU has no instructions for it, and of both where others used so much that they are too low.
    """
    meter, found = BusyMeter(), dict[str, float | None]()
    has_bf16 = {"avx512_bf16", "amx_bf16"} & set(facts()["isa_flags"])
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        x, times = torch.ones(side, side, dtype=dtype), list[float]()
        end = time.perf_counter() + seconds
        with torch_threads(cores()):
            while (has_bf16 or name == "fp32") and (not times or time.perf_counter() < end):
                start = time.perf_counter()
                torch.mm(x, x)
                times.append(time.perf_counter() - start)
        found[name] = round(2 * side**3 / min(times) / 1e9, 1) if times else None
    share = meter.share()
    return (found if share <= BUSY_SHARE else dict.fromkeys(found)) | {"others_cpu_share": round(share, 4)}
