"""`fused-nce eval RUN` of a run on recordings: every label probed, beside log-mel spectra and untrained encoders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_nce.train.data import log_mel, recordings
from fused_nce.train.data.labels import refuse_unseen
from fused_nce.train.data.recordings import Recordings
from fused_nce.train.data.shards import MIN_IDS
from fused_nce.train.evaluation import features, figures, scoring
from fused_nce.train.evaluation.protocols import FROZEN, LEFT_OUT, PROTOCOLS, Plan, described
from fused_nce.train.evaluation.scoring import Asked
from fused_nce.train.machine.host import progress_bar

LOG_MEL = "log-mel mean"


class Target(NamedTuple):
    """A label that every recording of both splits has."""

    name: str
    classes: list[str]
    rows: Tensor  # (m,) of the test recordings that it is judged on
    plan: Plan


def evaluate(model: nn.Module, config: Any, asked: Asked) -> tuple[dict[str, Any], figures.Figures]:
    """Every protocol asked for, on the mean over time of each tap, for each label.

    Returns:
        What `eval.json` holds of the accuracies, and the pictures. A tap has the label's name: "c_t, digit".

    Raises:
        ValueError: for recordings without a label of 2 or more classes, or a class that is too small.
    """
    taps, protocols = asked.taps, asked.protocols
    for name in protocols:
        if PROTOCOLS[name].of_encoder:
            raise ValueError(f"protocols: {name} needs images; recordings have {', '.join(FROZEN)}")
    limit = config.run.memory_limit_mb << 20
    probe, test = (recordings.load(config.data, split, limit_bytes=limit) for split in ("probe", "test"))
    if probe.rate != test.rate:
        raise ValueError(f"data: training recordings have {probe.rate} Hz, test recordings {test.rate}; need one rate")
    asked.look(probe, test)
    targets, said = find_targets(probe, test, config.data, asked)
    rows: list[dict[str, Any]] = []
    first: dict[str, Any] = {}
    for encoder, tap, bank, queries in _feature_sets(model, config, probe, test, asked):
        for target in targets:
            # The log-mel mean is no tap: it stands beside each.
            for shown in [tap] if tap is not None else taps:
                found = scoring.score(bank, queries[target.rows], target.plan, protocols)
                rows += [{"encoder": encoder, "tap": f"{shown}, {target.name}"} | row for row in found.rows]
            if not first:
                first = {"queries": queries[targets[0].rows], "shown": found.shown}
        asked.keep(rows)
    main = targets[0]
    names = [f"{tap}, {target.name}" for tap in taps for target in targets]
    result = {
        "things": "recordings",
        "classes": main.classes,
        "taps": names,
        "splits": {"probe": len(probe.waves), "test": len(test.waves)},
        "read": [probe.account, test.account, *said],
        "probes": sorted(rows, key=lambda row: names.index(row["tap"])),
        "confusion": scoring.confusion(first["shown"], names[0], main.plan.truth, len(main.classes)),
        "protocol": _protocol(asked),
    }
    return result, figures.Figures(figures.embed(first["queries"], asked.seed), main.plan.truth.tolist())


def find_targets(probe: Recordings, test: Recordings, data: str, asked: Asked) -> tuple[list[Target], list[str]]:
    """The labels asked for, or every one that can be judged; and a line for each that is not, or not whole.

    Raises:
        ValueError: for no label to judge, or one of those asked for that cannot be.
    """
    targets: list[Target] = []
    said: list[str] = []
    refused: list[ValueError] = []
    for name in asked.labels or probe.tags:
        if name not in probe.tags:
            raise ValueError(f"labels: must be of {', '.join(probe.tags) or 'none, as there are none'}; got {name!r}")
        try:
            found = _target(name, probe, test, asked)
        except ValueError as error:
            refused.append(error)
            found = str(error).removeprefix("data: ")
        if isinstance(found, Target):
            targets.append(found)
            if left := len(test.waves) - len(found.rows):
                said.append(f"{name!r}: {left} test recordings of classes that training lacks left out")
        elif asked.labels:
            raise ValueError(f"labels: {name!r} cannot be evaluated: {found}")
        else:
            said.append(f"label {name!r} is not evaluated: {found}")
    if not targets and refused:
        raise refused[0]
    if not targets:
        why = f" ({'; '.join(said)})" if said else ""
        raise ValueError(
            f"data: {data} has no label of 2 or more classes on every recording{why}; need one to evaluate"
        )
    return targets, said


def _target(name: str, probe: Recordings, test: Recordings, asked: Asked) -> Target | str:
    """A label that every recording of both splits has, or why it is none of 2 classes or more.

    Nor is what names recordings, not classes: most of many training recordings have one of their own, as of
    transcripts, or no test recording shares one with them.

    Raises:
        ValueError: some test classes that no training recording has, unless those are left out, or a class that is too
            small for the protocols.
    """
    known, tags = probe.tags[name], test.tags.get(name, [""] * len(test.waves))
    classes, missing = recordings.classes(known), (known.count(""), tags.count(""))
    if len(classes) < 2 or any(missing) or not tags:
        return f"{len(classes)} classes; {missing[0]} training and {missing[1]} test recordings lack it"
    alone = sum(count == 1 for count in Counter(known).values())
    if len(known) > MIN_IDS and 2 * alone > len(known):
        return f"{alone} training recordings have one of their own"
    truth = test.labels(name, classes)
    rows, unseen = (truth >= 0).nonzero().flatten(), recordings.classes([t for t in tags if t not in set(classes)])
    if not len(rows):
        return "no test recording is of a class that training has"
    if unseen and not asked.leave_out_unseen:
        refuse_unseen("recordings", name, unseen, len(tags) - len(rows), test.names[tags.index(unseen[0])])
    called = [f"{text!r} of {name}" for text in classes]
    return Target(name, classes, rows, asked.plan(probe.labels(name, classes), truth[rows], called))


def _feature_sets(
    model: nn.Module, config: Any, probe: Recordings, test: Recordings, asked: Asked
) -> Iterator[tuple[str, str | None, Tensor, Tensor]]:
    """(encoder, tap, features of the probe split, features of the test split), the trained encoder first."""
    level = config.augment.level
    for name, encoder in asked.encoders(model, config):
        parts = [extract(encoder, split.waves, level, asked.taps, name=name) for split in (probe, test)]
        for tap in asked.taps:
            yield name, tap, parts[0][tap], parts[1][tap]
    if asked.baselines:
        bank, queries = (
            torch.stack([log_mel.log_mel(recordings.scaled(x, level), split.rate).mean(0) for x in split.waves])
            for split in (probe, test)
        )
        yield LOG_MEL, None, bank, queries


def extract(
    model: Any, waves: Sequence[Tensor], level: float | None, taps: Sequence[str], *, name: str = "features"
) -> dict[str, Tensor]:  # {tap: (n, D)}
    """Each tap's mean over the frames of a recording. Recordings are encoded one at a time, whole, without padding.

    Args:
        model: has `encode(x) -> {tap: tensor}` and `encoder.frames(samples)`.
        waves: (samples,) int16 each; one that is too short for a frame is filled with zeros.
        level: see `recordings.scaled`.
        taps: to keep.
        name: shown beside the progress bar.

    Raises:
        ValueError: for a feature that is not finite.
    """
    model.eval()
    shortest = next(n for n in range(1, 1 << 30) if model.encoder.frames(n) >= 1)
    found: dict[str, list[Tensor]] = {tap: [] for tap in taps}
    with torch.inference_mode():
        for wave in progress_bar(waves, desc=name, unit="rec", leave=False, total=len(waves)):
            x = recordings.scaled(wave, level)
            known = model.encode(nn.functional.pad(x, (0, max(0, shortest - len(x))))[None])
            for tap in taps:
                found[tap].append(features.as_vectors(known[tap])[0])
    stacked = {tap: torch.stack(parts).clone() for tap, parts in found.items()}
    for tap, values in stacked.items():
        if not bool(values.isfinite().all()):
            raise ValueError(f"features {tap}: not all are finite; need a usable checkpoint")
    return stacked


def _protocol(asked: Asked) -> list[str]:
    """What a reader must know to judge the accuracies, one sentence a line."""
    return [
        "Probes are fitted on the labelled training recordings and judged on the test recordings, which nothing else "
        "sees; the speakers are the same in both where the data set's own split has it so.",
        "A recording is encoded whole and by itself, in eval mode; a tap is averaged over its frames. The paper probes "
        "every frame of c_t, Greedy InfoMax the average for speakers, as here.",
        *described(asked.protocols, asked.draws, asked.tasks, things="recordings"),
        "Log-mel mean: 40 bands, windows of 25 ms every 10 ms, the logarithm averaged over the recording; at the level "
        "that the encoder is given.",
        *asked.leave_out_unseen * [LEFT_OUT.format("recordings")],
    ]
