"""Upstream's words: the parameters of every class and function that an adapter stands in for, with their defaults."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple


class Upstream(NamedTuple):
    """One class or function."""

    module: str  # that users import it from
    words: str  # of the constructor, or of the function
    call: str | None = None  # of `forward`; None for a function

    @property
    def on_pypi(self) -> bool:
        """Whether `make test-compat` installs it; others are folders in somebody's repository."""
        return self.module.partition(".")[0] in (
            "inf_cl",
            "lightly",
            "open_clip",
            "pl_bolts",
            "pytorch_metric_learning",
        )


CLIP = "image_features, text_features, logit_scale, logit_bias"
PAIRS = "embeddings, labels=None, indices_tuple=None, ref_emb=None, ref_labels=None"
BOLTS, PML = "pl_bolts.losses.self_supervised_learning", "pytorch_metric_learning.losses"
DIM = "cortex_DIM.functions.dim_losses"
INF = "q, k, labels=None, scale=None, head_dim=256"
SOURCES = "r1_src_1, r5_src_1, r1_src_2, r5_src_2, r5_trg_1, r7_trg_1, r5_trg_2, r7_trg_2, mask_mat, mode"

UPSTREAM = {
    "amdim.NCE_MI_MULTI": Upstream("costs", "tclip=20.0", SOURCES),
    "amdim.LossMultiNCE": Upstream("costs", "tclip=10.0", "r1_x1, r5_x1, r7_x1, r1_x2, r5_x2, r7_x2"),
    "bolts.AmdimNCELoss": Upstream(BOLTS, "tclip", "anchor_representations, positive_representations, mask_mat"),
    "bolts.FeatureMapContrastiveTask": Upstream(
        BOLTS, "comparisons='00, 11', tclip=10.0, bidirectional=True", "anchor_maps, positive_maps"
    ),
    "bolts.CPCTask": Upstream(BOLTS, "num_input_channels, target_dim=64, embed_scale=0.1", "z"),
    "bolts.nt_xent_loss": Upstream(BOLTS, "out_1, out_2, temperature"),
    "dim.infonce_loss": Upstream(DIM, "l, m"),
    "dim.fenchel_dual_loss": Upstream(DIM, "l, m, measure=None"),
    "dim.donsker_varadhan_loss": Upstream(DIM, "l, m"),
    "inf_cl.cal_flash_loss": Upstream("inf_cl", INF),
    "inf_cl.cal_ring_loss": Upstream("inf_cl", INF),
    "inf_cl.cal_inf_loss": Upstream("inf_cl", INF),
    "lightly.NTXentLoss": Upstream(
        "lightly.loss", "temperature=0.5, memory_bank_size=0, gather_distributed=False", "out0, out1"
    ),
    "lightly.DCLLoss": Upstream(
        "lightly.loss", "temperature=0.1, weight_fn=None, gather_distributed=False", "out0, out1"
    ),
    "lightly.DCLWLoss": Upstream("lightly.loss", "temperature=0.1, sigma=0.5, gather_distributed=False", "out0, out1"),
    "moco.MoCo": Upstream("moco.builder", "base_encoder, dim=128, K=65536, m=0.999, T=0.07, mlp=False", "im_q, im_k"),
    "open_clip.ClipLoss": Upstream(
        "open_clip.loss",
        "local_loss=False, gather_with_grad=False, cache_labels=False, rank=0, world_size=1, use_horovod=False",
        f"{CLIP}=None, output_dict=False",
    ),
    "open_clip.SigLipLoss": Upstream(
        "open_clip.loss", "cache_labels=False, rank=0, world_size=1, dist_impl=None", f"{CLIP}, output_dict=False"
    ),
    "pml.NTXentLoss": Upstream(PML, "temperature=0.07, **kwargs", PAIRS),
    "pml.SupConLoss": Upstream(PML, "temperature=0.1, **kwargs", PAIRS),
    "pml.CrossBatchMemory": Upstream(
        PML,
        "loss, embedding_size, memory_size=1024, miner=None, **kwargs",
        "embeddings, labels, indices_tuple=None, enqueue_mask=None",
    ),
    "pml.SelfSupervisedLoss": Upstream(PML, "loss, symmetric=True, **kwargs", "embeddings, ref_emb"),
    "pml.DistributedLossWrapper": Upstream(
        "pytorch_metric_learning.utils.distributed", "loss, efficient=False", f"{PAIRS}, enqueue_mask=None"
    ),
    "solo.simclr_loss_func": Upstream("solo.losses", "z, indexes, temperature=0.1"),
    "solo.mocov2plus_loss_func": Upstream("solo.losses", "query, key, queue, temperature=0.1"),
    "solo.mocov3_loss_func": Upstream("solo.losses", "query, key, temperature=0.2"),
    "solo.nnclr_loss_func": Upstream("solo.losses", "nn, p, temperature=0.1"),
    "supcontrast.SupConLoss": Upstream(
        "losses", "temperature=0.07, contrast_mode='all', base_temperature=0.07", "features, labels=None, mask=None"
    ),
}


def parameters(text: str) -> list[tuple[str, Any, Any]]:
    """(name, kind, default) of each."""
    found: Any = eval(f"lambda {text}: 0")
    return _of(found)


def of(thing: Any, call: bool) -> list[tuple[str, Any, Any]]:
    """The same of a function, a constructor or, with `call`, a class's `forward`."""
    found = _of(thing.forward if call else thing)
    return found[1:] if call else found


def _of(function: Any) -> list[tuple[str, Any, Any]]:
    kept = inspect.signature(function).parameters.values()
    return [("**" if p.kind is p.VAR_KEYWORD else p.name, p.kind, p.default) for p in kept]
