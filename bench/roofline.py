"""When the loss matters: a MODEL of its share of a training step's time and memory. Nothing here is measured.

`python -m bench.roofline` prints the table. The constants are below, each with its origin. The shares are the same on
one device and with rows split over many, because the encoder's work and the loss's rows split alike.
"""

from __future__ import annotations

from typing import NamedTuple

from bench.text import markdown

GEMM_FLOP_PER_S = 790e12  # bf16 GEMM that one H200 sustains
HBM_BYTES_PER_S = 4.3e12
ENCODER_RATE = 0.4  # of the GEMM rate, what well-tuned training code reaches
EAGER_KERNEL_S = 5e-6  # launch to launch; below this an eager op cannot go
FUSED_CALL_S = 30e-6  # one fused call's launches
FUSED_WORKSPACE_BYTES = 256 * 2**20
OPTIMIZER_BYTES = 16  # a parameter: bf16 weight and gradient, fp32 master weight, two Adam moments
BATCHES = (128, 1024, 8192, 65536)
GIB = 2**30


class Method(NamedTuple):
    """A pre-training method's step, per image (pair, for CLIP)."""

    label: str
    encoder_gflop: float  # forward passes that get a backward, all views; counted on the meta device
    frozen_gflop: float  # forward alone: MoCo's key encoder
    activations_mb: float  # saved for the backward in bf16: half of what the fp32 graph saves on the meta device
    parameters: float
    width: int
    calls: int  # loss calls a step
    naive_gemms: float  # in units of one score GEMM, forward and backward
    fused_gemms: float
    naive_kernels: int  # a call
    naive_traffic_bytes: float  # a score: read and written, forward and backward, from traces of eager torch
    naive_saved_bytes: float  # a score, alive between forward and backward
    fused_rate: float  # of the GEMM rate; at width 128 the exponentials show

    def scores(self, batch: int) -> float:
        """Entries of all score matrices of a step."""
        return {
            "AMDIM": 198 * batch**2,  # 2 · (25 + 49 + 25) locations, both directions
            "MoCo": 65536 * batch,  # the queue
            "SimCLR": (2 * batch) ** 2,
            "CLIP": batch**2,
        }[self.label.split()[0]]


METHODS = (
    # Forward GFLOP and float32 activations: AMDIM (128 px, ndf 192, n_rkhs 1536, depth 8) 23.0 and 47 MB a view;
    # ResNet-50 at 224 px 8.18 and 86 MB; ViT-B/16 35.1 and 155 MB, its text transformer (12 × 512) 6.0 and 29 MB.
    Method("AMDIM 128 px", 2 * 23.0, 0.0, 47.2, 208e6, 1536, 6, 3, 3, 66, 300, 18, 0.8),
    Method("MoCo ResNet-50", 8.18, 8.18, 43.1, 25.6e6, 128, 1, 2, 2, 20, 65, 14, 0.5),
    Method("SimCLR ResNet-50", 2 * 8.18, 0.0, 86.1, 25.6e6, 128, 1, 3, 3, 20, 63, 14, 0.5),
    Method("CLIP ViT-B/16", 35.1 + 6.0, 0.0, 91.9, 124e6, 512, 1, 6, 4, 20, 112, 20, 0.8),
)


class Step(NamedTuple):
    """Seconds and bytes of one training step, modelled."""

    encoder_s: float
    naive_s: float
    fused_s: float
    encoder_bytes: float
    naive_bytes: float
    fused_bytes: float


def step(method: Method, batch: int) -> Step:
    """Encoder forward and backward (three forwards' work) beside the loss, written naively and fused."""
    scores = method.scores(batch)
    gemm_s = 2 * scores * method.width / GEMM_FLOP_PER_S
    work = (3 * method.encoder_gflop + method.frozen_gflop) * 1e9 * batch
    traffic_s = scores * method.naive_traffic_bytes / HBM_BYTES_PER_S
    return Step(
        encoder_s=work / (ENCODER_RATE * GEMM_FLOP_PER_S),
        naive_s=max(method.naive_gemms * gemm_s + traffic_s, method.calls * method.naive_kernels * EAGER_KERNEL_S),
        fused_s=method.fused_gemms * gemm_s / method.fused_rate + method.calls * FUSED_CALL_S,
        encoder_bytes=method.activations_mb * 1e6 * batch + OPTIMIZER_BYTES * method.parameters,
        naive_bytes=scores * method.naive_saved_bytes,
        fused_bytes=min(2 * scores / method.calls, FUSED_WORKSPACE_BYTES),
    )


def table(batches: tuple[int, ...] = BATCHES) -> str:
    """The Markdown table, with its label."""
    rows = []
    for method in METHODS:
        for batch in batches:
            s = step(method, batch)
            time = f"{_share(s.naive_s, s.encoder_s)} → {_share(s.fused_s, s.encoder_s)}"
            memory = f"{_share(s.naive_bytes, s.encoder_bytes)} → {_share(s.fused_bytes, s.encoder_bytes)}"
            rows.append([method.label, str(batch), time, memory, _number(s.naive_bytes / GIB)])
    shares = [f"loss, share of step {of}: naive → fused" for of in ("time", "memory")]
    return (
        f"{markdown(['method (modelled)', 'batch', *shares, 'naive loss, GiB'], rows)}\n\n"
        f"**Modelled, not measured**: {GEMM_FLOP_PER_S / 1e12:.0f} TFLOP/s of bf16 GEMM and "
        f"{HBM_BYTES_PER_S / 1e12:.1f} TB/s (one H200), encoders at {ENCODER_RATE:.0%} of that rate with all their "
        f"activations kept; naive is eager torch, fused is a kernel at {METHODS[1].fused_rate:.0%} (width 128) to "
        f"{METHODS[0].fused_rate:.0%} of the GEMM rate within {FUSED_WORKSPACE_BYTES >> 20} MiB. Rows split over many "
        "devices leave the shares as they are. Where a share is under 2 %, plain torch is fine."
    )


def _share(loss: float, rest: float) -> str:
    percent = 100 * loss / (loss + rest)
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.1f} %" if percent >= 0.1 else "< 0.1 %"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 0.1 else "< 0.1"


if __name__ == "__main__":
    print(table())
