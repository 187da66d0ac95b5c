"""ms-swift's InfoNCE (swift.loss.embedding, 4.6), which takes its settings from the environment at every call.

| variable | meaning |
|---|---|
| `INFONCE_TEMPERATURE=0.1` | of the softmax |
| `INFONCE_USE_BATCH=True` | the passages of other queries are negatives, those of all processes too |
| `INFONCE_HARD_NEGATIVES` | so many a query: more are cut, fewer drawn again, by NumPy's generator as upstream |
| `INFONCE_MASK_FAKE_NEGATIVE=False` | what is above the query's positive and a margin is no negative |
| `INFONCE_FAKE_NEG_MARGIN=0.1` | that margin, of the dot product |
| `INFONCE_INCLUDE_QQ=False` | other queries are negatives too, in the same denominator (Qwen3-Embedding) |
| `INFONCE_INCLUDE_DD=False` | so are all passages of the positive, which no margin masks |
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_nce.compat.base import tensor
from fused_nce.compat.processes import everyone, mean_of_all
from fused_nce.core import checks
from fused_nce.core.engine import tile_stats
from fused_nce.core.spec import Block, Identity, Index, Spec
from fused_nce.losses import candidates
from fused_nce.losses.candidates import Batch, Rules
from fused_nce.losses.common import row_dots

YES, NO = ("y", "yes", "t", "true", "on", "1"), ("n", "no", "f", "false", "off", "0")


def _flag(name: str, default: str) -> bool:
    text = os.environ.get(name, default)
    checks.check_choice(name, text.lower(), (*YES, *NO))
    return text.lower() in YES


def _number(name: str, default: str, **bounds: Any) -> float:
    text = os.environ.get(name, default)
    try:
        found = float(text)
    except ValueError:
        raise ValueError(f"{name}: got {text!r}, need a number") from None
    checks.check_number(name, found, **bounds)
    return found


class InfonceLoss:
    """InfoNCE of anchors among passages; `swift.loss.loss_map["infonce"] = InfonceLoss` puts it there.

    Args:
        args: kept, as upstream has it.
        trainer: kept.

    Raises:
        NotImplementedError: under Megatron.
    """

    def __init__(self, args: Any, trainer: Any) -> None:
        self.args, self.trainer = args, trainer
        if "BaseMegatronTrainer" in (kind.__name__ for kind in type(trainer).__mro__):
            raise NotImplementedError("trainer: got Megatron's, need one of transformers'")

    def __call__(self, outputs: Any, labels: Tensor, **kwargs: Any) -> Tensor:
        """The loss in nats, 0-d.

        Args:
            outputs: `last_hidden_state`, (R, D): each anchor, its positive, its negatives.
            labels: (R − anchors,): 1 for a positive, 0 for each of its negatives.
            kwargs: nobody reads them.
        """
        return self.loss_of(outputs["last_hidden_state"], labels)

    def loss_of(self, sentences: Tensor, labels: Tensor) -> Tensor:
        """Of the embeddings.

        Raises:
            TypeError, ValueError: naming the argument or variable, the value seen and the value needed.
        """
        checks.check_tensor("sentences", sentences, ("R", "D"))
        temperature = _number("INFONCE_TEMPERATURE", "0.1", above=0)
        anchors, groups = _groups(tensor("labels", labels).reshape(-1).tolist(), sentences.shape[0])
        sizes = torch.tensor([len(x) for x in groups], device=sentences.device)
        q = sentences[torch.tensor(anchors, device=sentences.device)]
        p = sentences[torch.tensor([i for x in groups for i in x], device=sentences.device)]
        starts = sizes.cumsum(0) - sizes
        if _flag("INFONCE_USE_BATCH", "True"):
            return _among_all(q, p, starts, temperature)
        return _among_own(q, p, sizes, temperature)


def _groups(labels: list[Any], rows: int) -> tuple[list[int], list[list[int]]]:
    """The row of each anchor, and those of its passages, the positive first."""
    ones = [i for i, label in enumerate(labels) if label]
    if not ones or rows != len(labels) + len(ones):
        raise ValueError(
            f"labels: got {len(labels)} with {len(ones)} positives for R = {rows} rows, need R - positives"
        )
    starts = [at + i for i, at in enumerate([*ones, len(labels)])]
    groups = [list(range(a + 1, b)) for a, b in itertools.pairwise(starts)]
    kept = os.environ.get("INFONCE_HARD_NEGATIVES")
    if kept is not None:
        if not kept.isdecimal():
            raise ValueError(f"INFONCE_HARD_NEGATIVES: got {kept!r}, need a whole number >= 0")
        groups = [_resized(x, int(kept)) for x in groups]
    return starts[:-1], groups


def _resized(passages: list[int], kept: int) -> list[int]:
    have = len(passages) - 1
    if not have:
        raise ValueError("labels: got a positive without a negative, need one under INFONCE_HARD_NEGATIVES")
    if have >= kept:
        return passages[: kept + 1]
    import numpy as np  # its generator is upstream's

    drawn = np.random.choice(list(range(have)), size=kept - have, replace=True)
    return passages + [passages[1 + i] for i in drawn]


def _among_own(q: Tensor, p: Tensor, sizes: Tensor, temperature: float) -> Tensor:
    """Each query among its own passages."""
    s = row_dots(q.repeat_interleave(sizes, dim=0), p) / temperature
    rows = [x.logsumexp(dim=0) - x[0] for x in s.split(sizes.tolist())]
    return torch.stack(rows).mean()


def _among_all(q: Tensor, p: Tensor, starts: Tensor, temperature: float) -> Tensor:
    """Each query among all passages, with what else is in the denominator."""
    group, scale = everyone(), 1 / temperature
    masked = _flag("INFONCE_MASK_FAKE_NEGATIVE", "False")
    own = p[starts]
    more: dict[str, Any] = {"scale": scale, "group": group}
    filtered = more
    if masked:
        margin = _number("INFONCE_FAKE_NEG_MARGIN", "0.1", at_least=0)  # below, upstream masks the positive itself
        filtered = more | {"ceilings": candidates.ceilings(Batch(q, p, starts), Rules(margin=margin))}
    stats, filters = ("neg_lse",), ("ceiling",) * masked
    found = [tile_stats(q, p, Spec(Index(), Identity(), stats, filters=filters), row_ids=starts, **filtered)]
    if _flag("INFONCE_INCLUDE_QQ", "False"):
        found.append(tile_stats(q, None, Spec(Block(1), Identity(), stats, filters=filters), **filtered))
    if _flag("INFONCE_INCLUDE_DD", "False"):  # which no margin masks
        found.append(tile_stats(own, p, Spec(Index(), Identity(), stats), row_ids=starts, **more))  # fault: swift-dd
    positive = found[0]["pos"]
    every = torch.cat([positive, *(x["neg_lse"][:, None] for x in found)], dim=1)
    loss = (every.logsumexp(dim=1) - positive[:, 0]).mean()
    return mean_of_all(loss) if group else loss


# ---- in place of a finished loss ---------------------------------------------------------------------------------


def replaced(theirs: Any) -> InfonceLoss:
    """A loss of upstream's as ours."""
    parallel = getattr(sys.modules.get("swift.sequence_parallel"), "sequence_parallel", None)
    if getattr(parallel, "dp_group", None) is not None:
        raise NotImplementedError("sequence_parallel: got a group of its own, need the default group")
    return InfonceLoss(theirs.args, theirs.trainer)


def embedded(theirs: Any, ours: Any) -> tuple[Any, str, Callable[..., Any]]:
    """(who holds the method that takes embeddings, its name, upstream's of the same arguments)."""
    return ours, "loss_of", lambda sentences, labels: theirs({"last_hidden_state": sentences}, labels)
