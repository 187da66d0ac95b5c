"""Each loss as its users write it down, as we compute it, and on what: keyed by the name in `fused_nce.losses`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from fused_nce import losses
from fused_nce.measure import CLIP, PENALTY, naive_loss

Draw = Callable[..., Tensor]  # sizes → standard normal numbers
LOGIT_SCALE = 1 / 0.07  # CLIP's initial factor


@dataclass(frozen=True)
class Problem:
    """One call of a loss, whose score matrix is n × m, `steps` of them, at width d."""

    loss: str  # a function of `fused_nce.losses`
    label: str
    n: int
    m: int
    d: int
    n_c: int = 1  # columns an image: AMDIM's locations
    steps: int = 1  # CPC's prediction steps


class Formula(NamedTuple):
    """One loss. `inputs` are leaves; `ours` takes them and a backend's name or None, `naive` them alone."""

    inputs: Callable[[Problem, Draw], tuple[Tensor, ...]]
    ours: Callable[..., Tensor]
    naive: Callable[..., Tensor]


def _ours(loss: str, **options: object) -> Callable[..., Tensor]:
    """Our loss as a number: some return it with its parts."""

    def call(*inputs: Tensor | str | None) -> Tensor:
        *tensors, backend = inputs
        out = getattr(losses, loss)(*tensors, **options, backend=backend)
        value: Tensor = getattr(out, "loss", out)
        return value

    return call


def _diagonal(scores: Tensor) -> Tensor:
    """Cross-entropy with the i-th column as the i-th row's positive, in float32 as autocast does it."""
    return cross_entropy(_at_least_float32(scores), torch.arange(len(scores), device=scores.device))


def _at_least_float32(scores: Tensor) -> Tensor:
    return scores if scores.dtype == torch.float64 else scores.float()


# ---- AMDIM ------------------------------------------------------------------------------------------------------


def _amdim_inputs(p: Problem, draw: Draw) -> tuple[Tensor, ...]:
    return draw(p.n, p.d).requires_grad_(), draw(p.n, p.n_c, p.d).requires_grad_()


# ---- the others, at their functions' default temperatures ---------------------------------------------------------


def _pair_inputs(p: Problem, draw: Draw) -> tuple[Tensor, ...]:
    return draw(p.n, p.d).requires_grad_(), draw(p.m, p.d).requires_grad_()


def _naive_info_nce(q: Tensor, k: Tensor) -> Tensor:
    return _diagonal(normalize(q, dim=1) @ normalize(k, dim=1).T / 0.1)


def _moco_inputs(p: Problem, draw: Draw) -> tuple[Tensor, ...]:
    return draw(p.n, p.d).requires_grad_(), draw(p.n, p.d), normalize(draw(p.m, p.d), dim=1)


def _naive_moco(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    q, k = normalize(q, dim=1), normalize(k, dim=1)
    logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ queue.T], dim=1) / 0.07
    return cross_entropy(_at_least_float32(logits), torch.zeros(len(q), dtype=torch.long, device=q.device))


def _view_inputs(p: Problem, draw: Draw) -> tuple[Tensor, ...]:
    return draw(p.n // 2, p.d).requires_grad_(), draw(p.n // 2, p.d).requires_grad_()


def _naive_nt_xent(view0: Tensor, view1: Tensor) -> Tensor:
    z = normalize(torch.cat([view0, view1]), dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    scores = _at_least_float32(z @ z.T / 0.5).masked_fill(itself, -torch.inf)
    return cross_entropy(scores, torch.arange(len(z), device=z.device).roll(len(view0)))


def _clip_inputs(p: Problem, draw: Draw) -> tuple[Tensor, ...]:
    image, text = (normalize(draw(p.n, p.d), dim=1).requires_grad_() for _ in range(2))
    return image, text, torch.tensor(LOGIT_SCALE, device=image.device).requires_grad_()


def _naive_clip(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    scores = logit_scale * (image @ text.T)
    return (_diagonal(scores) + _diagonal(scores.T)) / 2


def _cpc_inputs(p: Problem, draw: Draw) -> tuple[Tensor, ...]:
    scale = p.d**-0.25  # scores of variance 1, as a trained network's
    return tuple((draw(p.steps, p.n, p.d) * scale).requires_grad_() for _ in range(2))


def _naive_cpc(predictions: Tensor, targets: Tensor) -> Tensor:
    steps = [_diagonal(q @ k.T) for q, k in zip(predictions, targets, strict=True)]
    return torch.stack(steps).mean()


def _siglip_inputs(p: Problem, draw: Draw) -> tuple[Tensor, ...]:
    image, text, scale = _clip_inputs(p, draw)
    return image, text, scale, torch.tensor(-10.0, device=image.device).requires_grad_()


def _naive_siglip(image: Tensor, text: Tensor, logit_scale: Tensor, bias: Tensor) -> Tensor:
    scores = logit_scale * (image @ text.T) + bias
    sign = 2 * torch.eye(len(image), dtype=scores.dtype, device=scores.device) - 1
    return -logsigmoid(sign * scores).sum() / len(image)


def _sup_con_inputs(p: Problem, draw: Draw) -> tuple[Tensor, ...]:
    classes = max(2, min(10, p.n // 2))
    return draw(p.n, p.d).requires_grad_(), torch.arange(p.n) % classes


def _naive_sup_con(features: Tensor, labels: Tensor) -> Tensor:
    z = normalize(features, dim=1)
    scores = _at_least_float32(z @ z.T / 0.1)
    others = 1 - torch.eye(len(z), dtype=scores.dtype, device=z.device)
    same = (labels[:, None] == labels).to(scores.dtype) * others
    scores = scores - scores.amax(dim=1, keepdim=True).detach()
    log_p = scores - (scores.exp() * others).sum(dim=1, keepdim=True).log()
    return -((same * log_p).sum(dim=1) / same.sum(dim=1)).mean()


FORMULAS = {
    "amdim_nce": Formula(_amdim_inputs, _ours("amdim_nce", clip=CLIP, penalty=PENALTY), naive_loss),
    "info_nce": Formula(_pair_inputs, _ours("info_nce", normalize=True), _naive_info_nce),
    "moco_nce": Formula(_moco_inputs, _ours("moco_nce"), _naive_moco),
    "nt_xent": Formula(_view_inputs, _ours("nt_xent"), _naive_nt_xent),
    "clip_loss": Formula(_clip_inputs, _ours("clip_loss"), _naive_clip),
    "siglip_loss": Formula(_siglip_inputs, _ours("siglip_loss"), _naive_siglip),
    "sup_con": Formula(_sup_con_inputs, _ours("sup_con"), _naive_sup_con),
    "cpc_nce": Formula(_cpc_inputs, _ours("cpc_nce"), _naive_cpc),
}
