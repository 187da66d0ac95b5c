"""CLIP's loss (Radford et al. 2021, arXiv:2103.00020): InfoNCE of images among texts and of texts among images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_nce.core import checks
from fused_nce.core.engine import loss_of
from fused_nce.core.group import Group
from fused_nce.core.spec import Block, Spec
from fused_nce.core.tails import Nce
from fused_nce.losses import blocks, candidates, targets
from fused_nce.losses.candidates import Batch, Rules
from fused_nce.losses.common import check_rows, dense_nce
from fused_nce.losses.heard import heard
from fused_nce.losses.module import LossModule, check_options
from fused_nce.losses.output import NCEOutput
from fused_nce.losses.registry import Entry, Size, dense_scores, features, register

SPEC = Spec(Block(1), stats=Nce().stats, columns=("neg_lse",))
TAIL = Nce()
SoftTargets = tuple[Tensor, Tensor]


@heard
def clip_loss(
    image: Tensor,  # (N, D)
    text: Tensor,  # (N, D)
    logit_scale: float | Tensor,
    *,
    max_scale: float | None = None,
    ids: Tensor | None = None,  # (N,) int64
    false_negative_margin: float | None = None,
    guide: tuple[Tensor, ...] | None = None,  # (N, G) twice
    guide_margin: float = 0.0,
    guide_margin_kind: str = "absolute",
    tau_plus: float | None = None,
    label_smoothing: float = 0.0,
    row_weights: Tensor | None = None,  # (N,)
    positives: tuple[Tensor, Tensor] | None = None,  # (N, P) and (N, P') int64
    soft_targets: tuple[SoftTargets, SoftTargets] | None = None,
    prefixes: Sequence[int] | None = None,
    prefix_weights: Sequence[float] | None = None,
    group: Group = None,
    backend: str | None = None,
) -> NCEOutput:
    """½(mean_i −log softmax_j(s_ij)_i + mean_j −log softmax_i(s_ij)_j), without holding the (N, N) scores s.

    Args:
        image: (N, D), unit rows; float64, 32, 16 or bfloat16.
        text: (N, D), unit rows, same dtype and device.
        logit_scale: factor of the dot product, > 0, the exponential of CLIP's parameter; a 0-d tensor is learnable.
        max_scale: the largest `logit_scale`; a learned one has no gradient beyond it.
        ids: (N,) int64, of the pairs: those of one id are no negatives of each other.
        false_negative_margin: as in `info_nce`, in both directions, and so are the rest:
        guide: (N, G) and (N, G), another model's embeddings of image and text.
        guide_margin: what a guide's similarity must stay below the positive's by.
        guide_margin_kind: "absolute" or "relative".
        tau_plus: the share of false negatives.
        label_smoothing: ε.
        row_weights: (N,), of the pairs.
        positives: (N, P) and (N, P') int64, of each image its texts and of each text its images, -1 for none, as in
            `info_nce`: two, since one is not the other's transpose where weights or numbers differ.
        soft_targets: likewise, of each direction (indices, weights).
        prefixes: widths, each a loss of its own.
        prefix_weights: of the prefixes' losses.
        group: processes whose rows are negatives too (see `fused_nce.losses`); None for this one alone.
        backend: a name of `fused_nce.backends()`, or None to choose the fastest.

    Returns:
        NCEOutput, in nats; chance is log N. `stats` is of images among texts; what is made of more than the scores has
        `info_nce`'s.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.

    Example:
        ```
        image, text = (torch.nn.functional.normalize(torch.randn(8, 16), dim=1) for _ in range(2))
        clip_loss(image, text, logit_scale=1 / 0.07).loss
        ```
    """
    check_rows("image", image, "text", text, same_n=True)
    checks.check_scale("logit_scale", logit_scale, image.device, above=0)
    several = positives is not None or soft_targets is not None
    given = (max_scale, ids, false_negative_margin, guide, tau_plus, row_weights, prefixes, prefix_weights)
    chosen = [x for x in given if x is not None] or several or label_smoothing or guide_margin
    if not chosen and guide_margin_kind == "absolute":
        parts = loss_of(image, text, SPEC, TAIL, scale=logit_scale, group=group, backend=backend)
        return NCEOutput(parts.loss, parts.nce, parts.penalty, parts.report)
    scale = candidates.clamped(logit_scale, max_scale)
    rules = Rules(
        directions=("q2k", "k2q"),
        margin=false_negative_margin,
        guide_margin=guide_margin,
        relative=candidates.checked_kind(guide_margin_kind),
        tau_plus=tau_plus,
        smoothing=label_smoothing,
    )
    if ids is not None:
        checks.check_ids("ids", ids, image.shape[0], "N", image.device)
    if several:
        if prefixes is not None:
            raise ValueError("prefixes: got them with positives or soft_targets, need one of the two")
        pairs, n = (_both("positives", positives), _both("soft_targets", soft_targets)), image.shape[0]
        rules, ways = replace(rules, directions=("q2k",)), []
        for q, k, hard, soft in zip((image, text), (text, image), *pairs, strict=True):
            of_rows = targets.checked(hard, soft, n, n, q)
            x = candidates.checked(Batch(q, k, None, None, ids, ids, guide, row_weights, several=of_rows), rules)
            ways.append(blocks.contrast(x, scale, rules, group=group, backend=backend))
        loss = torch.stack([part.loss for part in ways]).mean()  # fault: clip-targets-one-way
        return ways[0]._replace(loss=loss, nce=loss)
    x = candidates.checked(Batch(image, text, None, None, ids, ids, guide, row_weights), rules)
    if prefixes is not None:
        widths, weights = candidates.checked_prefixes(prefixes, prefix_weights, image.shape[1])
        return blocks.contrast_prefixes(x, scale, rules, widths, weights, group=group, backend=backend)
    if prefix_weights is not None:
        raise ValueError("prefix_weights: got some without prefixes, need None")
    if not candidates.one_block(x, rules, symmetric=True):
        return blocks.contrast(x, scale, rules, group=group, backend=backend)
    parts = loss_of(image, text, SPEC, TAIL, scale=scale, group=group, backend=backend)
    return NCEOutput(parts.loss, parts.nce, parts.penalty, parts.report)


def _both(name: str, given: Any) -> tuple[Any, Any]:
    """Of images and of texts."""
    if given is not None and (not isinstance(given, (tuple, list)) or len(given) != 2):
        seen = f"{len(given)} of them" if isinstance(given, (tuple, list)) else type(given).__name__
        raise ValueError(f"{name}: got {seen}, need a pair: of the images and of the texts")
    return (None, None) if given is None else (given[0], given[1])


class CLIPLoss(LossModule):
    """CLIP's loss (`clip_loss`). The scale belongs to the model, as in CLIP, and comes with each call.

    Args:
        group, backend, options: as in `clip_loss`.

    Shape:
        image, text: (N, D), rows of norm 1.
        logit_scale: a number or 0-d, the factor itself, not its log.
        ids, guide, row_weights, positives, soft_targets: as in `clip_loss`.

    Example:
        ```
        image, text = (torch.nn.functional.normalize(torch.randn(8, 16), dim=1) for _ in range(2))
        CLIPLoss()(image, text, logit_scale=1 / 0.07).loss
        ```
    """

    def __init__(self, *, group: Group = None, backend: str | None = None, **options: Any) -> None:
        super().__init__(group=group, backend=backend, **options)
        check_options(CLIPLoss, clip_loss, options)
        candidates.clamped(1.0, options.get("max_scale"))  # its check

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: float | Tensor,
        *,
        ids: Tensor | None = None,
        guide: tuple[Tensor, ...] | None = None,
        row_weights: Tensor | None = None,
        positives: tuple[Tensor, Tensor] | None = None,
        soft_targets: tuple[SoftTargets, SoftTargets] | None = None,
    ) -> NCEOutput:
        """`clip_loss` of the batch."""
        given: dict[str, Any] = {"ids": ids, "guide": guide, "row_weights": row_weights}
        given |= {"positives": positives, "soft_targets": soft_targets}
        return clip_loss(image, text, logit_scale, **given, **self.kept())


def oracle(image: Tensor, text: Tensor, logit_scale: float | Tensor) -> Tensor:
    """The loss, dense."""
    s, own = dense_scores(image, text, logit_scale), torch.eye(len(image), dtype=torch.bool)
    return (dense_nce(s, own, ~own).mean() + dense_nce(s.T, own, ~own).mean()) / 2


def _draw(seed: int, size: Size) -> dict[str, Any]:
    return {
        "image": features(seed, size.n, size.d, unit=True),
        "text": features(seed + 1, size.n, size.d, unit=True),
        "logit_scale": torch.tensor(9.5),
    }


register(
    Entry(
        clip_loss,
        CLIPLoss,
        "½(mean_i −log softmax_j(s_ij)_i + mean_j −log softmax_i(s_ij)_j)",
        "Radford et al. 2021, arXiv:2103.00020",
        _draw,
        oracle,
    )
)
