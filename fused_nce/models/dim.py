"""Deep InfoMax as an `nn.Module`: images in, losses out; no trainer needed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_nce.core import checks
from fused_nce.losses import DIMLoss, NCEOutput
from fused_nce.models.base import Embedded, Losses
from fused_nce.models.coded import Coded
from fused_nce.models.dim_critics import GlobalConcat, GlobalDot, LocalConcat, LocalDot, PairLoss
from fused_nce.models.dim_prior import PriorMatching
from fused_nce.models.dim_tasks import AbsoluteCoordinates, RelativeCoordinates, occlude

CRITICS = ("dot", "concat")
Pairs = tuple[Any, ...] | None  # what a critic returns


class OtherTerms(NamedTuple):
    """The terms of DIM's loss beside the information: their weighted sum, 0-d, and each term, detached."""

    penalty: Tensor
    stats: dict[str, Tensor]


class DIMObjective(nn.Module):
    """The whole loss: α·global + β·local information and the other terms.

    Args:
        estimator: called with what a critic returns.
        alpha: weight of the global information.
        beta: weight of the local information.
    """

    def __init__(self, estimator: nn.Module, alpha: float, beta: float) -> None:
        super().__init__()
        self.estimator, self.alpha, self.beta = estimator, alpha, beta

    def forward(self, local: Pairs, whole: Pairs, rest: OtherTerms) -> NCEOutput:
        """`nce` is the weighted negative information, `penalty` the other terms; `stats` has each term unweighted."""
        nce, stats = torch.zeros_like(rest.penalty), dict(rest.stats)
        if local is not None:
            found: Losses = self.estimator(*local)
            nce = nce + self.beta * found.loss
            stats |= {"local": found.loss.detach()} | found.stats
        if whole is not None:
            found = self.estimator(*whole)
            nce = nce + self.alpha * found.loss
            stats |= {"global": found.loss.detach()} | {f"global/{name}": x for name, x in found.stats.items()}
        return NCEOutput(nce + rest.penalty, nce, rest.penalty, stats)


class DIM(Coded):
    """Deep InfoMax (Hjelm et al. 2019, arXiv:1808.06670): DIM(G), DIM(L) or both, with a prior on the code.

    ```
    model = DIM(architecture="dcgan32", estimator="nce")           # DIM(L), as the paper weighs it
    optimizers = [torch.optim.Adam(p, lr=1e-4) for p in model.parameter_groups().values()]
    for images in loader:
        for optimizer in optimizers: optimizer.zero_grad()
        model(images).loss.backward()                              # encoder and discriminator in one pass
        for optimizer in optimizers: optimizer.step()
    ```

    The loss is α·global + β·local − γ·(how well the discriminator is deceived) + the discriminator's own loss, whose
    gradient reaches the discriminator alone, + the coordinate tasks. The paper's weights (α, β, γ): DIM(G) 1, 0, 1;
    DIM(L) 0, 1, 0.1; DIM(L+G) 0.5, 0.1, and a γ that it does not state. A part whose weight is 0 is not built.

    `stats` has each part on its own, without its weight: `local`, `global`, `prior` (the encoder's term),
    `discriminator`, `discriminator_acc`, `absolute`, `absolute_acc`, `relative`, `relative_acc`, and what the estimator
    reports, of the global information after "global/".

    Args:
        architecture: `dcgan32` (CIFAR), `alexnet64` (STL-10, Tiny ImageNet), `dcgan64`, our `tiny32`, or one that runs
            on strided crops, a 7×7 map: `crops-resnet19-32`, `crops-resnet37-32`, `crops-alexnet64`, and with a 5×5 map
            of global vectors `crops-resnet19-32-several`, `crops-alexnet64-several`.
        width: multiplies the encoder's channels; 1 is the paper's.
        code: units of Y.
        critic: "dot" embeds locations and code and takes dot products, on the engine; "concat" has a network of its own
            behind every pair, in plain torch.
        mi_units: width of the "dot" embeddings.
        critic_negatives: other images that "concat" compares each with; None for all of the batch.
        estimator: "jsd", "dv" or "nce".
        anchor: of "nce": "global", "local" or "both".
        alpha: weight of the global information.
        beta: weight of the local information.
        gamma: weight of the prior in the encoder's loss.
        game: "minimax" or "non-saturating".
        gradient_penalty: of the discriminator.
        absolute: weight of the coordinates of a location.
        relative: weight of the coordinates between two.
        occlusion: side of the square, of the image's side, that is hidden from the code but not from the local map; 0
            for none.
        loss: called with what a critic returns: of "dot" two embeddings (B, L, D) and (B, G, D), of "concat" the scores
            (1 + K, B, L); `DIMLoss` or `PairLoss` of the estimator if left out. The model's `loss` wraps it.

    Shape:
        batch: (B, 3, H, H), alone or as the one view of a batch.

    Raises:
        TypeError, ValueError: for a setting outside these, or without any information to maximise.
    """

    def __init__(
        self,
        *,
        architecture: str = "dcgan32",
        width: float = 1.0,
        code: int = 64,
        critic: str = "dot",
        mi_units: int = 2048,
        critic_negatives: int | None = 1,
        estimator: str = "jsd",
        anchor: str = "global",
        alpha: float = 0.0,
        beta: float = 1.0,
        gamma: float = 0.1,
        game: str = "minimax",
        gradient_penalty: float = 1.0,
        absolute: float = 0.0,
        relative: float = 0.0,
        occlusion: float = 0.0,
        loss: nn.Module | None = None,
    ) -> None:
        weights = {"alpha": alpha, "beta": beta, "gamma": gamma, "absolute": absolute, "relative": relative}
        for name, value in weights.items():
            checks.check_number(name, value, at_least=0)
        if alpha == beta == 0:
            raise ValueError("beta: got 0 with alpha = 0, need one above 0: there is no information to maximise")
        checks.check_choice("critic", critic, CRITICS)
        _check_sizes(mi_units, critic_negatives, occlusion)
        super().__init__(architecture, code, width)
        self.weights, self.occlusion, encoder = weights, occlusion, self.encoder
        self.several = encoder.architecture.several
        if critic == "concat" and self.several:
            raise ValueError(f"critic: got 'concat' with architecture={architecture!r}, need 'dot' for several globals")
        self.local: nn.Module | None = None
        self.whole: nn.Module | None = None
        if critic == "dot":
            own: nn.Module = DIMLoss(estimator, anchor=anchor)
            self.local = LocalDot(encoder, encoder.top.channels if self.several else code, mi_units) if beta else None
            self.whole = GlobalDot(encoder, mi_units) if alpha else None
        else:
            own = PairLoss(estimator, anchor=anchor)
            self.local = LocalConcat(encoder, critic_negatives) if beta else None
            self.whole = GlobalConcat(encoder, critic_negatives) if alpha else None
        self.loss = DIMObjective(own if loss is None else loss, alpha, beta)
        place = (encoder.channels, code, encoder.side)
        self.absolute = AbsoluteCoordinates(*place) if absolute else None
        self.relative = RelativeCoordinates(*place) if relative else None
        self.prior = PriorMatching(code, game=game, gradient_penalty=gradient_penalty) if gamma else None

    def embedded(self, images: Tensor) -> Embedded:  # (B, 3, H, H)
        """The taps (of the images without occlusion); what the critics and the other tasks return."""
        taps = self.encode(images)
        seen = self.encode(occlude(images, self.occlusion)) if self.occlusion else taps
        local, code = taps["local"], seen["Y"]
        globals_ = seen["conv"] if self.several else code[:, :, None, None]
        pairs = None if self.local is None else self.local(local, globals_)
        whole = None if self.whole is None else self.whole(local, code)
        return Embedded((taps,), (pairs, whole, self._rest(local, code)))

    def _rest(self, local: Tensor, code: Tensor) -> OtherTerms:
        penalty, stats = code.new_zeros((), dtype=torch.promote_types(code.dtype, torch.float32)), dict[str, Tensor]()
        for name, task in (("absolute", self.absolute), ("relative", self.relative)):
            if task is not None:
                loss, accuracy = task(local, code)
                penalty = penalty + self.weights[name] * loss
                stats |= {name: loss.detach(), f"{name}_acc": accuracy}
        if self.prior is not None:
            prior = self.prior(code)
            penalty = penalty + self.weights["gamma"] * prior.encoder + prior.discriminator
            stats |= {"prior": prior.encoder.detach(), "discriminator": prior.discriminator.detach()}
            stats["discriminator_acc"] = prior.accuracy
        return OtherTerms(penalty, stats)


def _check_sizes(mi_units: int, critic_negatives: int | None, occlusion: float) -> None:
    checks.checked_int("mi_units", mi_units, at_least=1)
    if critic_negatives is not None:
        checks.checked_int("critic_negatives", critic_negatives, at_least=1)
    checks.check_number("occlusion", occlusion, at_least=0)
    if occlusion >= 1:
        raise ValueError(f"occlusion: must be below 1, of the image's side, got {occlusion}")
