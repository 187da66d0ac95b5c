"""The device that is measured: its clocks, its inputs, its peak memory, its graphs, and what it is.

`--device cpu` gives the same interface over the CPU, so that the whole runner can be tried where there is no GPU.
"""

from __future__ import annotations

import gc
import math
import re
import statistics
import subprocess
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_nce.bench.timers import Call, DeviceTimer, Timer, synchronized_wall_ms, wall_ms

SMI_FIELDS = {
    "driver": "driver_version",
    "sm_clock_mhz": "clocks.sm",
    "sm_clock_max_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}


class Machine:
    """A CPU. Times are wall times; there is nothing to capture, and peak memory is `memory.py`'s business."""

    clock = "wall"  # the clock of targets and ratios; its name is in the JSON's keys
    cache_bytes = 32 << 20
    compiler = "aot_eager"  # the runner is being tried, not inductor
    gemm_size = 256  # of the GEMM whose rate no kernel beats

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.timers: dict[str, Timer] = {"wall": wall_ms}

    def draw(self, seed: int, dtype: torch.dtype) -> Callable[..., Tensor]:
        """Sizes → standard normal numbers on the device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return lambda *sizes: torch.randn(sizes, generator=generator, device=self.device, dtype=dtype)

    def input_sets(self, set_bytes: int) -> int:
        """How many sets of inputs it takes to find none of them in the cache: twice its size, at most 16 sets."""
        return min(16, 1 + math.ceil(2 * self.cache_bytes / set_bytes)) if set_bytes < 2 * self.cache_bytes else 1

    def peak_bytes(self, call: Call) -> int | None:
        """The high-water mark of one call above what was allocated before, results included."""
        return None

    def capture(self, call: Call) -> Call | None:
        """The call as a replay of a CUDA graph; None where there are none."""
        return None

    def fits(self, size_bytes: int) -> bool:
        """Whether this much can be had beside what is held."""
        return size_bytes < 1 << 30

    def rates(self) -> dict[str, float]:
        """The rates that no kernel beats. Random data: on zeros a GEMM runs faster than it ever will."""
        size = self.gemm_size
        a, b = (self.draw(seed, torch.bfloat16)(size, size) for seed in (0, 1))
        return {"gemm_tflop_per_s": round(2 * size**3 / self._median_ms(lambda: a @ b) / 1e9, 4)}

    def facts(self) -> dict[str, Any]:
        """What a figure belongs to, units in the keys."""
        from bench import host

        return {"name": host.facts()["cpu_model"], "slug": host.slug()}

    def clocks(self) -> dict[str, Any]:
        """What of the facts moves while the machine works."""
        return {}

    def clean(self) -> None:
        """Between two problems: nothing of the last one stays."""
        torch._dynamo.reset()
        gc.collect()

    def _median_ms(self, call: Call) -> float:
        for _ in range(3):
            self.timers[self.clock](call)
        return statistics.median(self.timers[self.clock](call) for _ in range(30))


class Gpu(Machine):
    """An NVIDIA GPU."""

    clock = "device"
    compiler = "inductor"
    gemm_size = 8192

    def __init__(self, device: str = "cuda") -> None:
        super().__init__(device)
        torch.cuda.set_device(self.device.index or 0)
        self.properties = torch.cuda.get_device_properties(self.device)
        self.cache_bytes = self.properties.L2_cache_size
        self.timers = {"device": DeviceTimer(), "wall": synchronized_wall_ms}

    def peak_bytes(self, call: Call) -> int | None:
        """Bytes asked of the caching allocator at once, which also gives cuBLAS its workspace (before, in the warm-up).

        Not those that it hands out: its blocks may be much larger than what they are for.
        """
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        result = call()
        torch.cuda.synchronize()
        del result
        return int(torch.cuda.memory_stats()["requested_bytes.all.peak"] - before)

    def capture(self, call: Call) -> Call | None:
        """Warm-up on a side stream, as capture wants it; the results stay alive with the graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()

        def replay() -> Any:
            graph.replay()
            return result

        return replay

    def fits(self, size_bytes: int) -> bool:
        """In half of what is free, what the allocator holds unused included."""
        free, _ = torch.cuda.mem_get_info()
        return size_bytes < (free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()) // 2

    def rates(self) -> dict[str, float]:
        """Those of a GEMM and of a copy."""
        source = torch.empty(1 << 30, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        copied = 2 * source.numel() / self._median_ms(lambda: target.copy_(source)) / 1e9
        return super().rates() | {"copy_tb_per_s": round(copied, 3)}

    def facts(self) -> dict[str, Any]:
        """Card, driver and clocks as `nvidia-smi` tells them."""
        return {
            "name": self.properties.name,
            "slug": "-".join(re.findall(r"[a-z0-9]+", self.properties.name.lower())),
            "compute_capability": f"{self.properties.major}.{self.properties.minor}",
            "multiprocessors": self.properties.multi_processor_count,
            "l2_mib": round(self.cache_bytes / 2**20, 1),
            "memory_gib": round(self.properties.total_memory / 2**30, 1),
            **self.clocks(),
        }

    def clocks(self) -> dict[str, Any]:
        """Now; empty where `nvidia-smi` is not there."""
        fields = f"--query-gpu={','.join(SMI_FIELDS.values())}"
        command = ["nvidia-smi", f"--id=GPU-{self.properties.uuid}", fields, "--format=csv,noheader,nounits"]
        try:
            text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
        except (OSError, subprocess.SubprocessError):
            return {}
        return parse_smi(text)

    def clean(self) -> None:
        """The allocator gives back what it holds too."""
        super().clean()
        torch.cuda.empty_cache()


def machine(device: str) -> Machine:
    """The machine of a device's name.

    Raises:
        SystemExit: where torch sees no such device.
    """
    if torch.device(device).type == "cpu":
        return Machine(device)
    if not torch.cuda.is_available():
        raise SystemExit(f"bench.gpu: torch {torch.__version__} sees no CUDA device; --device cpu tries the runner")
    return Gpu(device)


def parse_smi(text: str) -> dict[str, float | str]:
    """`nvidia-smi`'s CSV line under our keys; as text what is no number: "[N/A]", and the driver's version."""
    values = [value.strip() for value in text.split(",")]
    pairs = zip(SMI_FIELDS, values, strict=False)
    return {key: float(x) if re.fullmatch(r"[\d.]+", x) and x.count(".") < 2 else x for key, x in pairs if x}
