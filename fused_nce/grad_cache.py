"""Batches larger than memory: the encoder sees a few inputs at a time, the loss all of them, and the gradient is exact.

Three passes (Gao et al. 2021, arXiv:2101.06983). The encoder's outputs are made without a graph, part by part. The loss
of all of them gives the gradient of each output. Then each part is encoded once more, and its gradient goes through.
Memory: the graph of one part, all outputs with their gradients, copies of the encoder's buffers. Time: one more forward
pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from fused_nce.core import checks
from fused_nce.core.replay import Draws, copied, swapped, untracked


class _Owed(NamedTuple):
    """What the loss's gradient is, before it is in any `.grad`."""

    outputs: list[Tensor | None]  # of the encoder's, in their order; None where there is none
    parameters: dict[str, Tensor]  # of those that the loss used, by name


class GradientCache(nn.Module):
    """An encoder in parts and a loss of the whole batch, with the gradient of one pass over all.

    ```
    step = GradientCache(encoder, loss, part=64)
    out = step.backward((view1, view2))        # gradients are in .grad, as after loss.backward()
    optimizer.step()
    ```

    Under DDP: `ddp = DistributedDataParallel(step)`, then `step.backward(batch, through=ddp)`. The gradients of all
    parameters, those inside the loss too, are averaged in one all-reduce a step.

    The gradient equals one pass's where an input's outputs do not depend on the other inputs. A BatchNorm inside the
    encoder makes them: it takes its statistics over a part, as it does over a process's share under DDP. Leave it to
    `loss`, which sees the whole batch, where it is the encoder's last layer (`models.AMDIM` does). Random draws of the
    second pass are those of the first. Buffers (running statistics, vectors of a spectral norm) are there what they
    were, and keep what the first made of them; under DDP with such as differ between processes and are read in the
    forward, set `broadcast_buffers=False`.

    Args:
        encoder: called with a part of the inputs; returns tensors of one row an input, in any nesting of tuples and
            dicts. A module, a method of one, or a function: without parameters under DDP, and without buffers that
            move, for what it captures is not known here.
        loss: a module, a method of one, or a function without parameters of another; called with the encoder's
            outputs for the whole batch; returns a 0-d tensor, or a tuple with the name `loss`.
        part: inputs encoded at a time.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed; in a step too, for a function
            that uses a parameter of no module given here.
    """

    def __init__(self, encoder: Callable[[Any], Any], loss: Callable[[Any], Any], *, part: int) -> None:
        super().__init__()
        self.encoder, self.loss, self.part = encoder, loss, checks.checked_int("part", part, at_least=1)
        # A method is no sub-module, but what it belongs to is: once, where both are methods of one.
        owners = dict.fromkeys(getattr(f, "__self__", None) for f in (encoder, loss))
        self.owners = nn.ModuleList(owner for owner in owners if isinstance(owner, nn.Module))

    def forward(
        self,
        inputs: Any,  # a part of the batch
        others: tuple[str, ...] = (),
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs for a part, and views of the named parameters.

        Through the second, DDP sees in its one pass of a step the parameters that only the loss used.
        """
        parameters = dict(self.named_parameters()) if others else {}
        outputs = tree_flatten(self.encoder(inputs))[0]
        return outputs, [parameters[name].view_as(parameters[name]) for name in others]

    def backward(
        self,
        inputs: Any,  # tensors (B, ...), in any nesting of tuples and dicts
        *,
        through: nn.Module | None = None,
        scale: Callable[[Tensor], Tensor] | None = None,
    ) -> Any:
        """Add the gradient of the batch's loss to every parameter's `.grad`.

        Args:
            inputs: of the whole batch, of this process.
            through: what wraps this module, such as DDP; its reduction is started by the last part.
            scale: of the loss before its gradient is taken, such as `GradScaler.scale`.

        Returns:
            What `loss` returned, its tensors detached.

        Raises:
            ValueError: inputs of different lengths, or outputs that are not one row an input.
        """
        rows, device = _rows("inputs", inputs)
        starts = range(0, rows, self.part)
        owner = getattr(self.encoder, "__self__", self.encoder)
        known = [*self.parameters(), *(x for x in tree_flatten(inputs)[0] if x.is_leaf)]
        buffers = copied((owner if isinstance(owner, nn.Module) else self).modules())
        draws, found = [], []
        for start in starts:
            draws.append(Draws.now(device))
            with torch.no_grad():
                part = self.encoder(_cut(inputs, start, self.part))
            _rows("encoder's outputs", part, min(self.part, rows - start))
            found.append(part)
        # Under autocast, older torch would give the second pass the casts of the first, which have no graph.
        torch.clear_autocast_cache()
        del part
        out, owed = self._whole(found, scale)
        after = Draws.now(device)
        # Whatever the caller is under, as in `_whole`; a BatchNorm may belong to the loss, or have had no shape before.
        with torch.enable_grad(), swapped(buffers), untracked(self):
            for start, drawn in zip(starts, draws, strict=True):
                drawn.restore(device)
                last = start == starts[-1]
                # Only a pass through the wrapper is reduced: earlier parts add up in `.grad` first.
                module = through if last and through is not None else self
                rest = owed.parameters if last else {}
                outputs, others = module(_cut(inputs, start, self.part), tuple(rest))
                if through is not None and not isinstance(owner, nn.Module):  # DDP would reduce no gradient of it
                    _check_held("encoder", outputs, known)
                pairs = [
                    (x, g[start : start + self.part])
                    for x, g in zip(outputs, owed.outputs, strict=True)
                    if g is not None and x.requires_grad
                ]
                pairs += zip(others, rest.values(), strict=True)
                if pairs:
                    with checks.uncast(outputs[0]):  # a layer that was not under autocast stays so, backwards
                        torch.autograd.backward([x for x, _ in pairs], [g for _, g in pairs])
        after.restore(device)
        return out

    def _whole(self, found: list[Any], scale: Callable[[Tensor], Tensor] | None) -> tuple[Any, _Owed]:
        """The loss of all parts, and its gradient."""
        like = tree_flatten(found[0])[1]
        outputs = [torch.cat(xs) for xs in zip(*(tree_flatten(part)[0] for part in found), strict=True)]
        found.clear()
        for x in outputs:
            x.requires_grad_(x.is_floating_point())
        with torch.enable_grad():
            out = self.loss(tree_unflatten(outputs, like))
            loss = out if isinstance(out, Tensor) else out.loss
            scaled = loss if scale is None else scale(loss)
        _check_held("loss", [scaled], [*self.parameters(), *outputs])
        names = {name: p for name, p in self.named_parameters() if p.requires_grad}
        wanted = [x for x in outputs if x.requires_grad]
        with checks.uncast(scaled):
            gradients = list(torch.autograd.grad(scaled, [*wanted, *names.values()], allow_unused=True))
        of_outputs = [gradients.pop(0) if x.requires_grad else None for x in outputs]
        parameters = {name: g for name, g in zip(names, gradients, strict=True) if g is not None}
        return tree_map_only(Tensor, Tensor.detach, out), _Owed(of_outputs, parameters)


def _rows(name: str, tree: Any, need: int | None = None) -> tuple[int, torch.device]:
    """How many rows all tensors have, at least one, and the first tensor's device.

    Raises:
        ValueError: where they differ, or are not the number needed.
    """
    leaves = tree_flatten(tree)[0]
    if not leaves or not all(isinstance(x, Tensor) and x.dim() for x in leaves):
        raise ValueError(f"{name}: got {type(tree).__name__}, need tensors with a row an input, nested or not")
    lengths = sorted({len(x) for x in leaves})
    if len(lengths) > 1 or lengths[0] < 1 or lengths[0] != (need or lengths[0]):
        raise ValueError(f"{name}: got tensors of {lengths} rows, need {need or 'one number, at least 1'} for all")
    return lengths[0], leaves[0].device


def _check_held(name: str, outputs: Iterable[Tensor], known: Iterable[Tensor]) -> None:
    """What a function captures would be left without a gradient, in silence.

    Raises:
        ValueError: for a leaf that wants a gradient and is none of the known tensors.
    """
    held, nodes = {id(x) for x in known}, [x.grad_fn for x in outputs]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        leaf = getattr(node, "variable", None) if node is not None and node.name().endswith("AccumulateGrad") else None
        if leaf is not None and id(leaf) not in held:
            raise ValueError(
                f"{name}: uses a parameter of shape {tuple(leaf.shape)} that no module given here holds, "
                "need a module or its method"
            )
        new = {following for following, _ in node.next_functions} - seen if node is not None else set()
        seen |= new
        nodes += new


def _cut(tree: Any, start: int, count: int) -> Any:
    return tree_map_only(Tensor, lambda x: x[start : start + count], tree)
