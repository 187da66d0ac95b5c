"""The model card of an exported encoder: what it is, how to load it, what it was trained on and what it is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fused_nce.models.encoders.backbones import OWN, TIMM, classifier
from fused_nce.train.method import Method
from fused_nce.train.report import evaluated, runlog, terminal

EVALUATION = "eval.json"


def text(run: Path, settings: Method, facts: dict[str, Any], state: dict[str, Any], parameters: int, onnx: str) -> str:
    """The card, in Markdown below the YAML that model hubs read.

    Args:
        run: folder of the run.
        settings: the run's.
        facts: what `config.json` holds.
        state: of the checkpoint that was exported.
        parameters: of the encoder.
        onnx: what became of the ONNX file.
    """
    file = run / EVALUATION
    found = (
        runlog.read_evaluation(file, ("data_name", "taps", "probes", "training", "protocol"))
        if file.is_file()
        else None
    )
    title = f"{settings.title} encoder, {runlog.data_name(settings.data)}"
    parts = [
        f"---\n{_front(settings, facts, found)}---\n\n# {title}\n",
        f"{facts['encoder']}, {parameters:,} parameters, pre-trained by {settings.title} "
        f"{'with' if 'labels' in settings.extras else 'without'} labels. What only the loss needed is left out.\n",
        f"## Use\n\n{_use(settings, facts)}",
        f"## Training\n\n{_training(run, settings, state)}",
        f"## Evaluation\n\n{_evaluation(found, int(state['step']))}",
        f"## Files\n\n- `model.safetensors`: the weights; read back, they gave the run's features to the bit.\n"
        f"- `model.onnx`: {onnx}.\n- `config.json`: what builds the encoder again.\n",
        f"## Configuration\n\n```yaml\n{_yaml(facts['run'], default_flow_style=None, width=110)}```\n",
    ]
    return "\n".join(parts)


def _yaml(values: Any, **style: Any) -> str:
    import yaml

    dumped: str = yaml.safe_dump(values, sort_keys=False, **style)
    return dumped


def _front(settings: Method, facts: dict[str, Any], found: dict[str, Any] | None) -> str:
    backbone = getattr(settings.model, "backbone", "")
    values: dict[str, Any] = {
        "library_name": "timm" if backbone.startswith(TIMM) else "fused_nce",
        "pipeline_tag": ("image-" if "mean" in facts["input"] else "") + "feature-extraction",
        "tags": ["self-supervised", "contrastive", settings.method],
    }
    row = evaluated.find(found, evaluated.TRAINED, found["taps"][0], "linear", "all") if found is not None else None
    if found is not None and row is not None:
        data = {"name": found["data_name"], "type": found["data_name"]}
        metric = {"type": "accuracy", "name": f"linear probe, {row['tap']}, %", "value": round(row["accuracy_pct"], 2)}
        result = {"task": {"type": "image-classification"}, "dataset": data, "metrics": [metric]}
        values["model-index"] = [{"name": f"{settings.method}-{settings.preset}", "results": [result]}]
    return _yaml(values)


def _use(settings: Method, facts: dict[str, Any]) -> str:
    inputs = facts["input"]
    lines = ["Input `x`: float32, any batch size, each of shape " + " × ".join(map(str, inputs["shape"])) + "."]
    if "mean" in inputs:
        lines.append(
            f"Short side resized to {inputs['resize']} px, centre crop, scaled to [0, 1], less mean "
            f"{_numbers(inputs['mean'])}, divided by {_numbers(inputs['std'])}."
        )
    else:
        rate = "a rate that the run does not know" if inputs["rate_hz"] is None else f"{inputs['rate_hz']:,} Hz"
        level = "its own root mean square" if inputs["level"] is None else f"{inputs['level']:g}"
        lines.append(f"Mono at {rate}; samples as shares of full scale, each recording divided by {level}.")
    lines += ["", "| output | shape |", "|---|---|"]
    lines += [f"| `{tap}` | {' × '.join(map(str, shape))} |" for tap, shape in facts["taps"].items()]
    return "\n".join([*lines, "", "```python", *_code(settings), "```", ""])


def _code(settings: Method) -> list[str]:
    name, stem = getattr(settings.model, "backbone", ""), getattr(settings.model, "stem", "imagenet")
    ours = ["from fused_nce.train.export import load_encoder", "", 'taps = load_encoder("FOLDER")(x)']
    if not name or name in OWN or stem != "imagenet":
        return ours
    if name.startswith(TIMM):
        return ["import timm", "", 'features = timm.create_model("local-dir:FOLDER", pretrained=True).eval()(x)']
    place = "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in classifier(name).split("."))
    return [
        "import torch",
        "from safetensors.torch import load_file",
        "from torchvision.models import get_model",
        "",
        f'model = get_model("{name}")',
        'model.load_state_dict(load_file("FOLDER/model.safetensors"), strict=False)  # all but the classifier',
        f"model{place} = torch.nn.Identity()",
        "features = model.eval()(x)",
    ]


def _numbers(values: list[float]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"


def _training(run: Path, settings: Method, state: dict[str, Any]) -> str:
    optim = settings.optim
    environment = state.get("environment", {})
    processes = int(environment.get("processes", 1))
    # The settings keep the batch of the processes that began the run; older checkpoints do not say what others shared.
    images = state.get("batch", {}).get("all") or settings.local_batch(processes) * processes
    rows = {
        "data": f"{runlog.data_name(settings.data)}, {int(state.get('images', 0)):,} images",
        "preset": settings.preset,
        "updates": f"{int(state['step']):,} of {images * optim.accumulate:,} images",
        "time": f"{float(state.get('time_s', 0)) / 60:.1f} min",
        "run": run.resolve().name,
    }
    try:
        speed = terminal.training(runlog.read_log(run))["images_per_s"]
        rows |= {"speed": f"{speed:,.0f} images/s, median"} if speed is not None else {}
    except ValueError:  # the log was deleted: the card does without
        pass
    if not environment:
        rows["hardware"] = "not recorded: the run is older than this record"
    return _table({**rows, **environment})


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""])


def _evaluation(found: dict[str, Any] | None, step: int) -> str:
    if found is None:
        return "None yet: `fused-nce eval RUN`, then export again.\n"
    lines = []
    if found["training"]["steps"] != step:
        lines.append(f"Of the run after {found['training']['steps']:,} updates; these weights are of {step:,}.\n")
    rows = [
        f"| {row['encoder']} | {row['tap']} | {row['probe']} | {row['labels']} | {evaluated.shown(row)} |"
        for row in found["probes"]
    ]
    if rows:
        lines += ["| encoder | tap | probe | labels | accuracy, % |", "|---|---|---|---|---|", *rows, ""]
    head, others = evaluated.measures(found)
    if others:
        cells = (head, ["---"] * len(head), *(row.cells for row in others))
        lines += [*(f"|{'|'.join(row)}|" for row in cells), ""]
    return "\n".join([*lines, *(f"- {line}" for line in found["protocol"]), ""])
