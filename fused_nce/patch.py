"""Known losses inside a model, replaced by their fused twins once both have agreed on the user's own batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fused_nce.verify import check_within, compare, of_leaves

if TYPE_CHECKING:
    from fused_nce.compat.known import Trial


def patch(
    module: Any,
    *,
    verify_steps: int = 20,
    within: float = 50.0,
    show: bool = True,
) -> Any:
    """Replace the losses that `fused_nce.compat` knows, by their class, in a module and all that it holds.

    For the first steps that want a gradient both run: upstream's result is returned, and value and gradients are
    compared in the unit of `verify`, which costs three more runs of upstream's; a call without a gradient runs both,
    for their memories. Then ours runs alone. Parameters are upstream's from the start, so an optimizer goes on;
    settings and the rows of a memory are taken over. Move the module to its device first. Functions have no place in a
    module: swap their import.

    Args:
        module: a model, a loss itself, or a trainer: its `loss`, one or a dict of them, `compute_loss_func` or `model`.
        verify_steps: how many steps of each loss run both; 0 replaces at once.
        within: roundings that a difference may have.
        show: print what is replaced, and when.

    Returns:
        The module or trainer, or, for a loss itself, what replaces it.

    Raises:
        ValueError: for a module without a known loss, verify_steps < 0, or, at a step, a difference: upstream's loss
            then stays.
        NotImplementedError, TypeError: for a loss with settings that its twin refuses.

    A loss with settings that only upstream's code honours stays, with a line that says why.
    """
    if verify_steps < 0:
        raise ValueError(f"verify_steps: got {verify_steps}, need >= 0")
    from fused_nce.compat import known  # not before it is asked for: a plain import of the package needs no adapter

    options: dict[str, Any] = {"verify_steps": verify_steps, "within": within, "show": show}
    if not isinstance(module, nn.Module) and not known.is_known(module):
        return _patch_trainer(module, **options)
    return _patched(module, **options)


def _patched(module: Any, *, verify_steps: int, within: float, show: bool) -> Any:
    from fused_nce.compat import known

    made: dict[Any, Any] = {}
    stays: list[str] = []
    for path, parent, name, theirs in _losses(module, known.is_known):
        if theirs not in made:
            ours = known.adapter(theirs)
            reason = getattr(ours, "reason", None)
            if reason is not None:
                stays.append(f"{path or 'the module'}: {_named(theirs)} stays, {reason} is not fused")
                if show:
                    print(f"fused_nce.patch: {stays[-1]}")
                continue
            made[theirs] = ours
            if show:
                rest = f", after {verify_steps} steps on both" if verify_steps else ""
                print(f"fused_nce.patch: {path or 'the module'}: {_named(theirs)} -> {_named(ours)}{rest}")
            if verify_steps:
                _Trial(known.trial(theirs, ours), theirs, ours, path, verify_steps, within, show)
        if parent is not None:
            setattr(parent, name, made[theirs])
    if stays and not made:
        raise ValueError(f"module: got nothing to replace, need a loss that is fused ({'; '.join(stays)})")
    if not made:
        raise ValueError(f"module: got {_named(module)} without a known loss, need {KNOWN}")
    return made.get(module, module)


KNOWN = "a loss of a project that fused_nce.compat stands in for: docs/migrating.md lists them"
"""What `patch` looks for, in short."""
PLACES = ("loss", "compute_loss_func", "gc.loss_fn", "model")
"""Of a trainer's: sentence-transformers' and PyLate's, ms-swift's, Tevatron's, and a model that holds its loss."""


def _patch_trainer(trainer: Any, **options: Any) -> Any:
    """What it holds at `PLACES`: losses of data sets without a known one stay."""
    from fused_nce.compat import known

    def has(held: Any) -> bool:
        if isinstance(held, dict):
            return any(has(x) for x in held.values())
        return any(True for _ in _losses(held, known.is_known)) if isinstance(held, nn.Module) else known.is_known(held)

    found = {name: held for name in PLACES if (held := _at(trainer, name)) is not None}
    if not any(isinstance(x, (nn.Module, dict)) or known.is_known(x) for x in found.values()):
        raise TypeError(f"module: got {type(trainer).__name__}, need a module, or a trainer whose `loss` is one")
    if not any(has(held) for held in found.values()):
        raise ValueError(f"module: got {type(trainer).__name__} without a known loss, need {KNOWN}")
    for name, held in found.items():
        if isinstance(held, dict):
            ours = {key: patch(x, **options) if has(x) else x for key, x in held.items()}
        else:
            ours = _patched(held, **options) if has(held) else held
        holder, _, last = name.rpartition(".")
        setattr(_at(trainer, holder) if holder else trainer, last, ours)
        if name == "model":  # transformers' trainer has it in three places
            for other, key in ((trainer, "model_wrapped"), (getattr(trainer, "callback_handler", None), "model")):
                if getattr(other, key, None) is held:
                    setattr(other, key, ours)
    return trainer


def _at(holder: Any, path: str) -> Any:
    """The attribute, or None."""
    for name in filter(None, path.split(".")):
        holder = getattr(holder, name, None)
    return holder


def _losses(
    module: Any, is_known: Callable[[Any], bool], path: str = ""
) -> Iterator[tuple[str, nn.Module | None, str, Any]]:
    """(path, parent, name, loss) of every known loss; what one holds is its own affair."""
    if is_known(module):
        yield path, None, "", module
        return
    for name, child in list(module._modules.items()):  # `named_children` leaves a second name of one module out
        if child is None:
            continue
        here = f"{path}.{name}" if path else name
        for found in _losses(child, is_known, here):
            yield (here, module, name, child) if found[1] is None else found


def _named(module: Any) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _devices(inputs: list[Any]) -> list[int]:
    """Of the GPUs among them."""
    return sorted({x.device.index for x in inputs if isinstance(x, Tensor) and x.is_cuda})


class _Trial:
    """A method of a twin on trial: upstream's, whose result both must come to. It goes when they have.

    As an attribute of the twin, not a module around it, it leaves the names of parameters and buffers alone.
    """

    on_trial = True

    def __init__(self, on: Trial, module: Any, ours: Any, path: str, steps: int, within: float, show: bool) -> None:
        self.on, self.theirs, self.module, self.ours = on, on.theirs, module, ours
        self.path, self.left, self.within, self.show = path, steps, within, show
        self.before = vars(on.holder).get(on.name)
        self.method = self.before or functools.partial(getattr(type(on.holder), on.name), on.holder)
        setattr(on.holder, on.name, self)

    def __call__(self, *args: Any, **options: Any) -> Any:
        if not torch.compiler.is_compiling():
            return self._run(*args, **options)
        # Dynamo is not to trace a comparison. No decorator: it would bring Dynamo at the import of this package.
        return torch.compiler.disable(self._run)(*args, **options)

    def _run(self, *args: Any, **options: Any) -> Any:
        if isinstance(self.module, nn.Module):
            self.module.train(self.ours.training)
        # Whether a loss is to differentiate itself is none of its value.
        compared = {key: x for key, x in options.items() if key != "with_backward"}
        inputs, where = pytree.tree_flatten((args, compared))
        wanted = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad]
        if wanted and torch.is_grad_enabled():
            self._compare(inputs, wanted, where)
        else:
            with torch.random.fork_rng(_devices(inputs)):
                self.method(*args, **compared)  # for its memory, which goes on as upstream's does
        return self.theirs(*args, **options)

    def _compare(self, inputs: list[Any], wanted: list[int], where: pytree.TreeSpec) -> None:
        """On copies of upstream's module, and on ours itself, whose memory goes on as upstream's does."""
        state = torch.random.get_rng_state()
        with torch.random.fork_rng(_devices(inputs)):
            both = of_leaves(self.theirs, where), of_leaves(self.method, where)  # fault: patch-upstream-own
            differences, _ = compare(*both, inputs, wanted, state)
        try:
            check_within(differences, self.within)  # fault: patch-difference-looked
        except ValueError as error:
            raise ValueError(f"{self.path or 'the module'}: {error}") from None
        self.left -= 1
        if not self.left:
            if self.before is None:
                delattr(self.on.holder, self.on.name)
            else:
                setattr(self.on.holder, self.on.name, self.before)
            if self.show:
                print(f"fused_nce.patch: {self.path or 'the module'}: both agree, ours runs alone from here")
