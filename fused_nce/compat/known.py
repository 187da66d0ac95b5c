"""Which upstream class each adapter stands in for, and how to build it from a finished upstream module.

Nothing of upstream is imported: a class is known by its name and module, or, where the module is a file in somebody's
folder, by its settings. A subclass is another class: what it overrides could not be heard.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from fused_nce.compat import amdim, bolts, lightly, open_clip, supcontrast

Build = Callable[[Any], Any]


class Known(NamedTuple):
    """An upstream class."""

    name: str
    module: str | None  # that it is in, or in a part of; None for a file of one's own
    build: Build
    settings: tuple[str, ...] = ()  # attributes that it must have
    trial: Callable[[Any, Any], Trial] | None = None  # of (theirs, ours); None: `forward` of both


class Trial(NamedTuple):
    """Where upstream's and its twin meet on tensors."""

    holder: Any  # of the twin's method
    name: str  # of the method
    theirs: Callable[..., Any]  # upstream's, of the same arguments


def words(adapter: Callable[..., nn.Module], *names: str) -> Build:
    """Of an adapter whose constructor words are upstream's attributes, as far as its release has them."""
    return lambda theirs: adapter(**{name: getattr(theirs, name) for name in names if hasattr(theirs, name)})


def is_known(module: Any) -> bool:
    """Whether `adapter` has one for it."""
    return _find(module) is not None


def adapter(theirs: Any) -> Any:
    """The adapter of an upstream module, in its state and sharing its parameters; the module itself without one.

    Raises:
        NotImplementedError, TypeError, ValueError: for settings that the adapter refuses.
    """
    known = _find(theirs)
    if known is None:
        return theirs
    ours = known.build(theirs)
    return ours.train(theirs.training) if isinstance(theirs, nn.Module) else ours


def trial(theirs: Any, ours: Any) -> Trial:
    """What `patch` runs of both on a batch of the user's."""
    known = _find(theirs)
    return Trial(ours, "forward", theirs) if known is None or known.trial is None else known.trial(theirs, ours)


def _find(module: Any) -> Known | None:
    kind = type(module)
    for known in (*KNOWN, *BY_PROJECT):
        here = known.module is None or f"{kind.__module__}.".startswith(f"{known.module}.")
        ours = kind.__module__.startswith("fused_nce.")
        if known.name == kind.__name__ and here and not ours and all(hasattr(module, x) for x in known.settings):
            return known
    return None


def _lightly_nt_xent(theirs: Any) -> nn.Module:
    bank = theirs.memory_bank
    size = tuple(bank.size) if isinstance(bank.size, (tuple, list)) else (bank.size,)
    ours = lightly.NTXentLoss(theirs.temperature, size if size[0] else 0, theirs.gather_distributed)
    if size[0]:
        ours.memory_bank.bank, ours.memory_bank.bank_ptr = bank.bank.clone(), bank.bank_ptr.clone()
    return ours


def _lightly_dclw(theirs: Any) -> nn.Module:
    return lightly.DCLWLoss(theirs.temperature, theirs.weight_fn.keywords["sigma"], theirs.gather_distributed)


def _pml(name: str, *own: str) -> Known:
    """A pair loss: its words, and the options as they are, of which upstream has filled in the defaults."""

    def build(theirs: Any) -> nn.Module:
        from fused_nce.compat import pml  # not before it is asked for: it imports upstream's package

        options = {option: getattr(theirs, option) for option in pml.OPTIONS if hasattr(theirs, option)}
        ours: nn.Module = getattr(pml, name)(**{word: getattr(theirs, word) for word in own}, **options)
        return ours

    return Known(name, "pytorch_metric_learning.losses", build)


def _pml_memory(theirs: Any) -> nn.Module:
    from fused_nce.compat import pml

    ours = pml.CrossBatchMemory(adapter(theirs.loss), theirs.embedding_size, theirs.memory_size, theirs.miner)
    ours.embedding_memory, ours.label_memory = theirs.embedding_memory.clone(), theirs.label_memory.clone()
    ours.queue_idx, ours.has_been_filled = theirs.queue_idx, theirs.has_been_filled
    return ours


def _pml_wrapper(name: str, setting: str) -> Build:
    def build(theirs: Any) -> nn.Module:
        from fused_nce.compat import pml

        ours: nn.Module = getattr(pml, name)(adapter(theirs.loss), getattr(theirs, setting))
        return ours

    return build


def _cpc_task(theirs: Any) -> nn.Module:
    ours = bolts.CPCTask(theirs.target_cnn.in_channels, theirs.target_dim, theirs.embed_scale)
    for name in ("target_cnn", "pred_cnn", "context_cnn"):
        setattr(ours, name, getattr(theirs, name))
    return ours


def _loss_multi_nce(theirs: Any) -> nn.Module:
    ours = amdim.LossMultiNCE(getattr(theirs.nce_func, "module", theirs.nce_func).tclip)
    ours.masks_r5 = theirs.masks_r5
    return ours


BOLTS, PML = "pl_bolts.losses.self_supervised_learning", "pytorch_metric_learning.losses"
KNOWN = (
    Known("NTXentLoss", "lightly.loss", _lightly_nt_xent),
    Known("DCLWLoss", "lightly.loss", _lightly_dclw),
    Known("DCLLoss", "lightly.loss", words(lightly.DCLLoss, "temperature", "weight_fn", "gather_distributed")),
    Known(
        "ClipLoss",
        "open_clip.loss",
        words(open_clip.ClipLoss, "local_loss", "gather_with_grad", "cache_labels", "rank", "world_size"),
    ),
    Known(
        "SigLipLoss",
        "open_clip.loss",
        words(open_clip.SigLipLoss, "cache_labels", "rank", "world_size", "dist_impl", "chunk_size"),
    ),
    _pml("NTXentLoss", "temperature"),
    _pml("SupConLoss", "temperature"),
    _pml("ContrastiveLoss", "pos_margin", "neg_margin"),
    _pml("TripletMarginLoss", "margin", "swap", "smooth_loss", "triplets_per_anchor"),
    Known("CrossBatchMemory", PML, _pml_memory),
    Known("SelfSupervisedLoss", PML, _pml_wrapper("SelfSupervisedLoss", "symmetric")),
    Known(
        "DistributedLossWrapper",
        "pytorch_metric_learning.utils.distributed",
        _pml_wrapper("DistributedLossWrapper", "efficient"),
    ),
    Known("AmdimNCELoss", BOLTS, words(bolts.AmdimNCELoss, "tclip")),
    Known("CPCTask", BOLTS, _cpc_task),
    Known(
        "FeatureMapContrastiveTask",
        BOLTS,
        words(bolts.FeatureMapContrastiveTask, "comparisons", "tclip", "bidirectional"),
    ),
    Known(
        "SupConLoss",
        None,
        words(supcontrast.SupConLoss, "temperature", "contrast_mode", "base_temperature"),
        ("temperature", "contrast_mode", "base_temperature"),
    ),
    Known("NCE_MI_MULTI", None, words(amdim.NCE_MI_MULTI, "tclip"), ("tclip",)),
    Known("LossMultiNCE", None, _loss_multi_nce, ("nce_func", "masks_r5")),
)


def _held(project: str, module: str, *names: str, settings: tuple[str, ...] = ()) -> tuple[Known, ...]:
    """Losses that hold their model, or models that hold their loss: what meets is a method that takes embeddings.

    Their adapter is imported when one is seen: it may need upstream's package.
    """

    def ours() -> Any:
        return importlib.import_module(f"fused_nce.compat.{project}")

    def meet(theirs: Any, twin: Any) -> Trial:
        return Trial(*ours().embedded(theirs, twin))

    return tuple(Known(name, module, lambda x: ours().replaced(x), settings, meet) for name in names)


RANKING = ("MultipleNegativesRankingLoss", "MultipleNegativesSymmetricRankingLoss", "GISTEmbedLoss")
BY_PROJECT = (
    *_held(
        "sentence_transformers",
        "sentence_transformers.sentence_transformer.losses",
        *(f"{cached}{name}" for cached in ("", "Cached") for name in RANKING),
    ),
    *_held("pylate", "pylate.losses", "Contrastive", "CachedContrastive"),
    *_held("tevatron", "tevatron", "DenseModel", settings=("encode_query", "encode_passage")),
    *_held("tevatron", "tevatron", "SimpleContrastiveLoss", "DistributedContrastiveLoss"),
    *_held(
        "flagembedding",
        "FlagEmbedding.finetune.embedder",
        *("BiEncoderOnlyEmbedderModel", "BiDecoderOnlyEmbedderModel", "BiDecoderOnlyEmbedderICLModel"),
    ),
    *_held("swift", "swift.loss", "InfonceLoss"),
)
