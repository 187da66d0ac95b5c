"""Images that have or lack each of several attributes (CelebA's 40): one linear probe for all, judged one by one."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_nce.train.data.images import ImageSet, load_attributes
from fused_nce.train.evaluation.figures import Figures, draw_figures
from fused_nce.train.evaluation.images import feature_sets
from fused_nce.train.evaluation.logistic import fit, principal_axes
from fused_nce.train.evaluation.probes import C_GRID, HELD_OUT, standardise
from fused_nce.train.evaluation.scoring import Asked
from fused_nce.train.machine.host import progress_bar

PLAIN, BALANCED = "attributes", "attributes, balanced"


class Judged(NamedTuple):
    """Of one feature set, in percent, by attribute."""

    accuracy: Tensor  # (A,) of the more likely answer
    balanced: Tensor  # (A,) mean of the shares of those with and of those without that are told right
    c: float
    converged: bool


def balanced(
    logits: Tensor,  # (m, A)
    truth: Tensor,  # (m, A) bool, both answers in each column
    share: Tensor,  # (A,) of the images that have it, among those that the probe was fitted on
) -> Tensor:  # (A,) percent
    """The mean of the two classes' accuracies, the answer being what is likelier than the share alone would make it."""
    said = logits > torch.logit(share)  # fault: balanced-at-one-half
    right = (said == truth).double()
    with_it, without = (right * truth).sum(0) / truth.sum(0), (right * ~truth).sum(0) / (~truth).sum(0)
    return 50 * (with_it + without)


def probe(bank: Tensor, known: Tensor, queries: Tensor, truth: Tensor, seed: int) -> Judged:
    """Logistic regressions of all attributes, of one penalty: that of the least mean cross-entropy on a held-out
    quarter of the probe split. Both accuracies are read from them, so neither of them chooses.

    Args:
        bank: (n, D) features of the probe split.
        known: (n, A) bool, both answers in each column.
        queries: (m, D) features of the test split.
        truth: (m, A) bool, both answers in each column.
        seed: of the quarter.
    """
    x, q = (torch.from_numpy(part) for part in standardise(bank.numpy(), queries.numpy()))
    y, axes = known.float(), principal_axes(x)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    held, rest = order.split([cut := round(HELD_OUT * len(x)), len(x) - cut])
    usable = known[held].any(0) & ~known[held].all(0) & known[rest].any(0) & ~known[rest].all(0)
    scores = []
    for c in C_GRID if bool(usable.any()) else (1.0,):
        logits = fit(x[rest], y[rest], c, axes, "attributes").logits(x[held])
        found = F.binary_cross_entropy_with_logits(logits[:, usable], y[held][:, usable])
        scores.append((float(found) if bool(usable.any()) else 0.0, c))
    c = min(scores)[1]
    model = fit(x, y, c, axes, "attributes")
    logits = model.logits(q)
    accuracy = 100 * ((logits > 0) == truth).double().mean(0)
    return Judged(accuracy, balanced(logits, truth, y.mean(0)), c, model.converged)


def evaluate(model: nn.Module, config: Any, asked: Asked) -> tuple[dict[str, Any], Figures]:
    """The linear probe of every attribute on each tap of the frozen encoder, beside the baselines.

    Returns:
        What `eval.json` holds of the accuracies, means over the attributes in the table and each under `attributes`,
        and the pictures.

    Raises:
        ValueError: a protocol that needs one class an image, or no attribute that some images have and some lack.
    """
    if "linear" not in asked.protocols:
        raise ValueError(f"protocols: images with attributes have linear alone, got {', '.join(asked.protocols)}")
    probe_set, test_set = load_attributes(
        config.data, config.model.image_size, config.augment, seed=asked.seed, limit_mb=config.run.memory_limit_mb
    )
    asked.look(probe_set, test_set)
    names, known, truth, said = usable(probe_set, test_set, config.data)
    said += [f"not run, for want of one class an image: {name}" for name in asked.protocols if name != "linear"]
    rows: list[dict[str, Any]] = []
    each: list[dict[str, Any]] = []
    kept: dict[str, Any] = {}
    sets = feature_sets(model, config, probe_set, test_set, asked)
    for encoder, tap, bank, queries, _ in progress_bar(sets, desc="probes", unit="set", leave=False):
        found = probe(bank, known, queries, truth, asked.seed)
        for labels, values in ((BALANCED, found.balanced), (PLAIN, found.accuracy)):
            rows.append({
                "encoder": encoder, "tap": tap, "probe": "linear", "labels": labels, "width": bank.shape[1],
                "accuracy_pct": float(values.mean()), "sd_pct": None, "ci95_pct": None,
                "values_pct": values.tolist(), "setting": {"C": found.c, "converged": found.converged},
            })  # fmt: skip
        each += [
            {"encoder": encoder, "tap": tap, "probe": "linear", "labels": f"{name}{of}", "accuracy_pct": float(value)}
            for of, values in ((", balanced", found.balanced), ("", found.accuracy))
            for name, value in zip(names, values, strict=True)
        ]
        asked.keep(rows)
        kept = kept or {"bank": bank, "queries": queries}
    shown = int((truth.double().mean(0) - 0.5).abs().argmin())  # the pictures tell the most even attribute
    figures = draw_figures(
        bank=kept["bank"], bank_images=probe_set.images, bank_labels=known[:, shown].long(),
        queries=kept["queries"], query_images=test_set.images, query_labels=truth[:, shown].long(), seed=asked.seed,
        neighbours=asked.neighbours,
    )  # fmt: skip
    commoner = 100 * torch.where(known.double().mean(0) > 0.5, truth, ~truth).double().mean()
    judged = {
        "classes": [f"not {names[shown]}", names[shown]],
        "taps": asked.taps,
        "splits": {"probe": len(known), "test": len(truth)},
        "read": [probe_set.account, test_set.account, *said],
        "probes": rows,
        "attributes": each,
        "measures": [],
        "confusion": None,
        "protocol": [
            f"Attributes: a logistic regression of each of {len(names)}, on standardised features, all of one penalty, "
            "chosen by the least mean cross-entropy on a held-out quarter of the probe split; means over all.",
            "Balanced: the mean of the accuracies among images with the attribute and among those without, where the "
            "answer is what is likelier than the attribute's share of the probe split; guessing is 50 %. The other "
            f"column is plain accuracy; always the commoner answer gives {commoner:.1f} %.",
            "Not transductive: BatchNorm uses the statistics of pre-training (eval mode), never of test images.",
        ],
    }
    return judged, figures


def usable(probe_set: ImageSet, test_set: ImageSet, data: str) -> tuple[list[str], Tensor, Tensor, list[str]]:
    """The attributes that some images of both splits have and some lack; (n, A), (m, A), and a line for the others."""
    first, second = probe_set.attributes, test_set.attributes
    if first is None or second is None or first.names != second.names:
        raise ValueError(f"data: {data} must have the same attributes in both splits")
    known, truth = torch.from_numpy(first.values), torch.from_numpy(second.values)
    both = known.any(0) & ~known.all(0) & truth.any(0) & ~truth.all(0)
    names = np.array(first.names)
    if not bool(both.any()):
        raise ValueError(f"data: {data} has no attribute that some images of both splits have and some lack")
    left = names[~both.numpy()].tolist()
    said = [f"not judged, for all images of a split have it or lack it: {', '.join(left)}"] if left else []
    return names[both.numpy()].tolist(), known[:, both], truth[:, both], said
