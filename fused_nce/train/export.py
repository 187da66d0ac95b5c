"""`fused-nce export RUN --out FOLDER`: the encoder alone, for use without this package where it is someone else's.

The folder gets `model.safetensors` (keys of torchvision or timm where the encoder is one), `model.onnx`, `config.json`
(all that is needed to build the encoder again, and timm's keys where it is timm's) and `README.md`, the model card.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fused_nce import measure
from fused_nce.models.encoders.backbones import TIMM
from fused_nce.models.frozen import FrozenEncoder, Tensors
from fused_nce.train import config
from fused_nce.train.data import images as data
from fused_nce.train.files import aside, named, one_line, printable, read_json, reading
from fused_nce.train.method import Method
from fused_nce.train.report import model_card
from fused_nce.train.saving import checkpoint

WEIGHTS, ONNX, CONFIG, CARD = "model.safetensors", "model.onnx", "config.json", "README.md"
ONNX_NEEDS = ("onnx", "onnxscript")
ONNX_ADD = "pip install onnx onnxscript onnxruntime"  # the last checks what the others write
PROTOBUF_LIMIT_BYTES = 1900 << 20  # a file above 2 GiB cannot be read: the weights go beside it
# Two float32 runtimes differ by rounding, some 1e-6 of the largest feature; a layer that is wrong, by more than this.
ONNX_TOLERANCE = 1e-3


def export(run: str, out: str, *, onnx: bool | None = None) -> dict[str, Any]:
    """Writes the encoder of a run, checked: what is read back gives the same features.

    Args:
        run: folder of a training run.
        out: folder to write to, new or empty.
        onnx: write `model.onnx` too, which needs the packages onnx and onnxscript; if left out, where they are and it
            succeeds.

    Returns:
        What `config.json` holds, and `onnx`: how far its features are from torch's, or why that is unknown.

    Raises:
        ValueError: no run, no usable checkpoint, or a folder that holds something.
        ImportError: `onnx=True` without its packages.
        RuntimeError: the features of what was written differ.
        Exception: whatever torch's exporter raises under `onnx=True`.
    """
    missing = [name for name in ONNX_NEEDS if importlib.util.find_spec(name) is None]
    if onnx and missing:
        raise ImportError(f"onnx: needs {' and '.join(missing)}: {ONNX_ADD}")
    target = named(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"out: {out} holds something already; need a new or an empty folder")
    state = checkpoint.load_state(checkpoint.newest(run))
    encoder, settings = frozen(run)
    # Seeded noise of unit deviation is what normalised images look like to a layer; zeros would hide an error.
    sample = settings.sample()
    batch = torch.randn((2, *sample.shape[1:]), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        taps = encoder(batch)
    facts = describe(settings, taps, state.get("data", {}).get("rate"))

    temporary = aside(target)
    try:
        temporary.mkdir(parents=True)
        checkpoint.write_tensors(encoder.encoder_state(), temporary / WEIGHTS, {"format": "pt"})
        _write_json(temporary / CONFIG, facts)
        _check_weights(temporary, batch, taps)
        note = f"not written: needs {' and '.join(missing)}: {ONNX_ADD}" if missing else "not asked"
        if onnx or (onnx is None and not missing):
            try:
                note = write_onnx(encoder, batch, taps, temporary / ONNX)
            except Exception as error:  # of an exporter and a runtime that are not ours: the weights are good
                if onnx:
                    raise
                for path in temporary.glob(f"{ONNX}*"):
                    path.unlink()
                note = f"not written: {one_line(f'{type(error).__name__}: {error}')[:200]}"
        card = model_card.text(Path(run), settings, facts, state, sum(p.numel() for p in encoder.parameters()), note)
        (temporary / CARD).write_text(card, encoding="utf-8")
        if target.exists():  # its place is kept: it may be the folder that the command was given in
            for path in sorted(temporary.iterdir()):
                path.replace(target / path.name)
            temporary.rmdir()
        else:
            temporary.replace(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return facts | {"onnx": note}


def run_and_print(run: str, *, out: str, onnx: bool | None = None) -> int:
    """Write the encoder of a run alone: weights, ONNX, and a model card.

    Args:
        run: folder of a training run.
        out: folder to write to, new or empty.
        onnx: write `model.onnx` too; where its packages are installed, if left out.

    Returns:
        The exit status, 0.
    """
    facts = export(run, out, onnx=onnx)
    for path in sorted(Path(out).iterdir()):
        print(f"{printable(path)}  {path.stat().st_size / 2**20:.1f} MiB")
    print(f"taps: {', '.join(f'{name} {tuple(shape)}' for name, shape in facts['taps'].items())}")
    print(f"onnx: {facts['onnx']}")
    return 0


def frozen(run: str | Path) -> tuple[FrozenEncoder, Method]:
    """The newest encoder of a run, and the run's configuration."""
    model, settings = checkpoint.load_model(run)
    return FrozenEncoder(model), settings


def load_encoder(folder: str | Path) -> FrozenEncoder:
    """The encoder of an exported folder: `load_encoder("out")(images) -> {tap: tensor}`.

    Raises:
        ValueError: if the folder holds no export.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise ValueError(f"folder: {folder} holds no {CONFIG}; it must be one that `fused-nce export` wrote")
    with reading(path):
        settings = config.from_dict(read_json(path)["run"])
    encoder = FrozenEncoder(settings.build())
    with reading(Path(folder) / WEIGHTS):
        encoder.load_encoder_state(load_file(Path(folder) / WEIGHTS))
    return encoder


def describe(settings: Method, taps: Tensors, rate: int | None = None) -> dict[str, Any]:
    """What `config.json` holds; `rate` is of the recordings that a run was trained on, in Hz."""
    name, shape = getattr(settings.model, "backbone", None), list(settings.sample().shape[1:])
    inputs: dict[str, Any] = {"shape": shape}
    run = config.to_dict(settings) | {"data": Path(settings.data).name}  # a path is nobody else's business
    if run["model"].get("teacher"):
        run["model"]["teacher"] = Path(run["model"]["teacher"]).resolve().name
    if len(shape) == 1:  # sound
        windows: Any = settings.augment
        inputs |= {"rate_hz": rate, "level": windows.level}
    else:
        mean, std = settings.augment.mean, settings.augment.std
        inputs |= {"mean": list(mean), "std": list(std), "resize": data.resize_for(settings.augment, shape[1])}
    facts: dict[str, Any] = {
        "method": settings.method,
        "encoder": name or settings.method,
        "taps": {tap: list(value.shape[1:]) for tap, value in taps.items()},
        "input": inputs,
        "fused_nce": measure.environment()["fused_nce"],
        "run": run,
    }
    if name is not None and name.startswith(TIMM):  # timm.create_model("local-dir:FOLDER", pretrained=True)
        known = {"input_size": shape, "mean": inputs["mean"], "std": inputs["std"], "num_classes": 0}
        known |= {"crop_pct": crop_share(shape[1], inputs["resize"]), "interpolation": "bicubic"}
        known |= timm_layers(name.removeprefix(TIMM))
        facts |= {"architecture": name.removeprefix(TIMM), "num_classes": 0, "pretrained_cfg": known}
    return facts


def crop_share(side: int, resize: int) -> float:
    """timm's `crop_pct`: the side over the short side before the crop, which timm finds as ⌊side / crop_pct⌋."""
    share = side / resize
    return share if math.floor(side / share) == resize else math.nextafter(share, 0)


def timm_layers(name: str) -> dict[str, Any]:
    """The names that timm has for the layers which another number of classes or of channels replaces."""
    import timm

    found = timm.get_pretrained_cfg(name)
    values = found.to_dict() if found is not None else timm.create_model(name, pretrained=False).pretrained_cfg
    return {key: values[key] for key in ("classifier", "first_conv") if values.get(key) is not None}


class _Tuple(nn.Module):
    """The taps as a tuple: ONNX names its outputs by position."""

    def __init__(self, encoder: FrozenEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.encoder(x).values())


def write_onnx(encoder: FrozenEncoder, batch: Tensor, taps: Tensors, path: Path) -> str:
    """Writes the graph, input `x` and outputs by the taps' names, for any batch size.

    Returns:
        How far onnxruntime's features are from torch's, or that it is not installed.

    Raises:
        RuntimeError: they are not the same.
    """
    size_bytes = sum(value.numel() * value.element_size() for value in encoder.encoder_state().values())
    torch.onnx.export(
        _Tuple(encoder).eval(), (batch,), path, input_names=["x"], output_names=list(taps), dynamo=True, verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},), external_data=size_bytes > PROTOBUF_LIMIT_BYTES,
    )  # fmt: skip
    if importlib.util.find_spec("onnxruntime") is None:
        return "written, not checked: onnxruntime is not installed"
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(list(taps), {"x": torch.cat([batch, batch[:1]]).numpy()})  # another batch size
    worst = 0.0
    for (name, tap), values in zip(taps.items(), found, strict=True):
        wanted, got = torch.cat([tap, tap[:1]]), torch.from_numpy(values)
        same_shape = wanted.shape == got.shape
        largest = wanted.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        error = float((wanted - got).abs().max() / largest) if same_shape else float("inf")
        if not error <= ONNX_TOLERANCE:
            raise RuntimeError(f"onnx: {name} differs from torch's by {error:.1e} of its largest value")
        worst = max(worst, error)
    return (
        f"differs from torch by at most {worst:.0e} of a tap's largest value, in onnxruntime {onnxruntime.__version__}"
    )


def _check_weights(folder: Path, batch: Tensor, taps: Tensors) -> None:
    with torch.inference_mode():
        again = load_encoder(folder)(batch)
    for name, tap in taps.items():
        if not torch.equal(tap, again[name]):
            raise RuntimeError(f"{WEIGHTS}: {name} of the weights read back differs")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
