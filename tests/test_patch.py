"""`patch` finds known losses, runs both, switches or raises, and leaves the model as it was but for them."""

from __future__ import annotations

import copy
import pathlib
import pickle
import types

import pytest
import torch
from torch import nn

from fused_nce import patch
from fused_nce.compat import amdim, bolts, known, lightly, open_clip, pml, supcontrast
from fused_nce.compat.base import Adapter, standing_in


class SupConLoss(nn.Module):
    """SupContrast's, as a file of one's own has it; and one that is wrong by a factor."""

    def __init__(self, temperature=0.1, factor=1.0):
        super().__init__()
        self.temperature, self.contrast_mode, self.base_temperature, self.factor = temperature, "all", 0.07, factor
        self.calls = 0

    def forward(self, features, labels=None):
        """Views next to each other."""
        self.calls += 1
        n = len(features)
        z = features.transpose(0, 1).flatten(0, 1)
        own = torch.arange(n).repeat(2) if labels is None else labels.repeat(2)
        s = (z @ z.T / self.temperature).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
        positive = (own[:, None] == own) & ~torch.eye(2 * n, dtype=torch.bool)
        each = (s.log_softmax(1).masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean()
        return -self.factor * self.temperature / self.base_temperature * each


class Model(nn.Module):
    """A network that holds two losses, one of them deeper down and twice."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.net, self.criterion = nn.Linear(6, 4), SupConLoss(0.5)
        self.again = SupConLoss(factor=factor)
        self.heads = nn.ModuleDict({"main": nn.ModuleList([self.again])})

    def forward(self, x, labels=None):
        """The sum of both."""
        z = nn.functional.normalize(self.net(x), dim=-1)
        return self.criterion(z) + self.again(features=z, labels=labels)


def batch(seed=0, n=8):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 6, generator=g), torch.randint(0, 3, (n,), generator=g)


def test_both_run_and_then_ours_alone(capsys):
    """Upstream's result to the bit while on trial, the module clean afterwards; what is replaced is said."""
    model, plain = Model(), Model()
    plain.load_state_dict(model.state_dict())
    theirs = model.again
    keys, weight = list(model.state_dict()), model.net.weight
    assert patch(model, verify_steps=3) is model
    assert "fused_nce.patch: criterion: tests.test_patch.SupConLoss -> fused_nce.compat.supcontrast.SupConLoss, af" in (
        said := capsys.readouterr().out
    )
    assert "again: " in said
    assert said.count("\n") == 2  # the one that is there twice is one
    assert model.again is model.get_submodule("heads.main.0")
    assert isinstance(model.again, supcontrast.SupConLoss)
    for step in range(5):
        x, labels = batch(step)
        model.eval()
        with torch.no_grad():
            model(x, labels)  # an evaluation is no step
        model.train()
        found, expected = model(x, labels), plain(x, labels)
        grads = [torch.autograd.grad(loss, list(m.parameters())) for loss, m in ((found, model), (expected, plain))]
        if step < 3:
            assert torch.equal(found, expected)
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert ("forward" in vars(model.again)) == (step < 2)
    assert theirs.calls == 3 * 2  # an evaluation and a step; what is compared runs on copies
    assert capsys.readouterr().out.count("both agree, ours runs alone") == 2
    assert (list(model.state_dict()), model.net.weight is weight) == (keys, True)


def test_a_difference_is_raised_and_upstreams_loss_stays(capsys):
    model = patch(Model(factor=1.001), verify_steps=2, show=False)
    for _ in range(3):
        with pytest.raises(
            ValueError, match=r"^again: ours: \w.* differs by 0.0\d* of its largest value, .* need <= 50$"
        ):
            model(*batch())
    with torch.no_grad():
        model(*batch())
    assert capsys.readouterr().out == ""


def test_copies_and_pickles_are_on_trial_too():
    model = patch(Model(), verify_steps=2, show=False)
    model(*batch(0))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(*batch(1)), copy.deepcopy(model)(*batch(1)))
        assert "forward" not in vars(twin.criterion)
    assert "forward" in vars(model.criterion)


def test_a_copy_of_what_stands_in_for_a_model_leaves_the_trial_behind():
    ours = standing_in(Model(), Adapter)
    ours.loss_of, ours.kept = types.SimpleNamespace(on_trial=True), 3
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert (type(twin), twin.kept, "loss_of" in vars(twin)) == (type(ours), 3, False)
        torch.testing.assert_close(twin.state_dict(), ours.state_dict())


def test_at_once_and_of_a_loss_itself():
    loss = SupConLoss(0.5)
    ours = patch(loss, verify_steps=0, show=False)
    assert isinstance(ours, supcontrast.SupConLoss)
    assert (ours.temperature, ours.contrast_mode, ours.base_temperature) == (0.5, "all", 0.07)
    assert "forward" not in vars(ours)
    with pytest.raises(
        ValueError, match=r"^module: got fused_nce.*SupConLoss without a .* docs/migrating.md lists them$"
    ) as caught:
        patch(ours)
    assert len(str(caught.value)) < 200
    page = pathlib.Path(__file__).parents[1].joinpath("docs/migrating.md").read_text(encoding="utf-8")
    missing = {x.name for x in (*known.KNOWN, *known.BY_PROJECT) if f"`{x.name}`" not in page}
    assert not missing, "docs/migrating.md lists what `patch` knows"
    with pytest.raises(ValueError, match=r"^verify_steps: got -1, need >= 0"):
        patch(loss, verify_steps=-1)


def test_every_name_of_a_loss_in_one_module_is_replaced():
    model = Model()
    model.loss_fn = model.criterion
    model.register_module("empty", None)
    patch(model, show=False)
    assert isinstance(model.loss_fn, supcontrast.SupConLoss)
    assert model.loss_fn is model.criterion


def test_a_compiled_model_has_its_trial():
    model = patch(Model(), verify_steps=2, show=False)
    compiled, plain = torch.compile(model, backend="eager"), copy.deepcopy(model)
    for step in range(3):
        torch.testing.assert_close(compiled(*batch(step)), plain(*batch(step)))
        assert ("forward" in vars(model.criterion)) == (step < 1)


def test_autocast_is_judged_in_its_own_roundings():
    """Upstream's scores in bfloat16 are off by hundreds of float32's: no difference of formulas."""
    model = patch(Model(), verify_steps=1, show=False)
    views = nn.functional.normalize(torch.randn(8, 2, 64, generator=torch.Generator().manual_seed(0)), dim=-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(*batch())
        patch(nn.Sequential(SupConLoss()), verify_steps=1, show=False)(
            views.requires_grad_()
        )  # float32, scored in 16 bits
    assert "forward" not in vars(model.criterion)


# ---- every known class ------------------------------------------------------------------------------------------


def stand_in(name, module, **attributes):
    """A module of somebody's class."""
    found = type(name, (nn.Module,), {"__module__": module})()
    for key, value in attributes.items():
        setattr(found, key, value)
    return found


class Bank(nn.Module):
    """lightly's memory bank, as much of it as is looked at."""

    bank: torch.Tensor
    bank_ptr: torch.Tensor

    def __init__(self, size):
        super().__init__()
        self.size = size
        self.register_buffer("bank", nn.functional.normalize(torch.randn(*size), dim=-1), persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.int64), persistent=False)


class NTXentLoss(nn.Module):
    """lightly's, with a bank."""

    __module__ = "lightly.loss.ntx_ent_loss"

    def __init__(self, temperature, size):
        super().__init__()
        self.temperature, self.memory_bank, self.gather_distributed = temperature, Bank(size), False

    def forward(self, out0, out1):
        """A query among its twin and the bank, which takes the twins in."""
        z0, z1 = (nn.functional.normalize(x, dim=1) for x in (out0, out1))
        bank = self.memory_bank
        logits = torch.cat(((z0 * z1).sum(1, keepdim=True), z0 @ bank.bank.clone().T), 1) / self.temperature
        at = (bank.bank_ptr + torch.arange(len(z1))) % len(bank.bank)
        bank.bank[at] = z1.detach()
        bank.bank_ptr[0] = (bank.bank_ptr[0] + len(z1)) % len(bank.bank)
        return nn.functional.cross_entropy(logits, torch.zeros(len(z0), dtype=torch.int64))


def test_a_memory_goes_on_on_both_sides():
    theirs = NTXentLoss(0.3, (10, 4))
    ours = patch(theirs, verify_steps=4, show=False)
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        out0, out1 = (torch.randn(3, 4, generator=g).requires_grad_() for _ in range(2))
        ours(out0, out1)
        if seed < 4:
            torch.testing.assert_close(ours.get_buffer("memory_bank.bank"), theirs.memory_bank.bank)
            assert ours.get_buffer("memory_bank.bank_ptr") == theirs.memory_bank.bank_ptr
    assert ours.get_buffer("memory_bank.bank_ptr") == 18 % 10
    assert theirs.memory_bank.bank_ptr == 12 % 10


def test_a_memory_goes_on_where_nothing_is_compared():
    upstreams = type("CrossBatchMemory", (pml.CrossBatchMemory,), {"__module__": known.PML})
    theirs = upstreams(pml.NTXentLoss(), 3, 12)
    ours = patch(theirs, verify_steps=2, show=False)
    for wanted in (False, True, False, True):
        ours(torch.randn(4, 3).requires_grad_(wanted), torch.tensor([0, 0, 1, 1]))
        assert torch.equal(ours.embedding_memory, theirs.embedding_memory)
        assert ours.queue_idx == theirs.queue_idx
    assert "forward" not in vars(ours)


LIGHTLY, CLIP, PML, BOLTS = "lightly.loss.x", "open_clip.loss", "pytorch_metric_learning.losses.x", known.BOLTS
COSINE = {"distance": stand_in("CosineSimilarity", "pytorch_metric_learning.distances.x", normalize_embeddings=True)}
CLIP_WORDS = {"local_loss": True, "gather_with_grad": True, "cache_labels": True, "rank": 0, "world_size": 1}
SIG_WORDS = {"cache_labels": True, "rank": 0, "world_size": 1, "dist_impl": "gather", "chunk_size": 4}
TASK = bolts.CPCTask(3, 5, 0.2)
CPC = {name: getattr(TASK, name) for name in ("target_cnn", "pred_cnn", "context_cnn", "target_dim", "embed_scale")}
MEMORY = pml.CrossBatchMemory(pml.NTXentLoss(), 3, 6)
MEMORY(torch.randn(4, 3), torch.tensor([0, 0, 1, 1]))
XBM = {
    name: getattr(MEMORY, name) for name in ("embedding_size", "memory_size", "miner", "queue_idx", "has_been_filled")
}
XBM |= {name: getattr(MEMORY, name) for name in ("embedding_memory", "label_memory")}


def weighted(a, b):
    return (a * b).sum(1)


SETTINGS = [
    ("NTXentLoss", LIGHTLY, {"temperature": 0.2, "gather_distributed": True, "memory_bank": Bank((5, 3))}, lightly),
    ("DCLLoss", LIGHTLY, {"temperature": 0.2, "weight_fn": weighted, "gather_distributed": True}, lightly),
    ("ClipLoss", CLIP, CLIP_WORDS, open_clip),
    ("SigLipLoss", CLIP, SIG_WORDS, open_clip),
    ("NTXentLoss", PML, {"temperature": 0.2, **COSINE}, pml),
    ("SupConLoss", PML, {"temperature": 0.2, **COSINE}, pml),
    ("ContrastiveLoss", PML, {"pos_margin": 0.1, "neg_margin": 0.8}, pml),
    ("TripletMarginLoss", PML, {"margin": 0.1, "swap": False, "smooth_loss": False, "triplets_per_anchor": "all"}, pml),
    ("CrossBatchMemory", PML, {"loss": stand_in("NTXentLoss", PML, temperature=0.1, **COSINE), **XBM}, pml),
    (
        "SelfSupervisedLoss",
        PML,
        {"loss": stand_in("NTXentLoss", PML, temperature=0.1, **COSINE), "symmetric": False},
        pml,
    ),
    (
        "DistributedLossWrapper",
        "pytorch_metric_learning.utils.distributed",
        {"loss": stand_in("NTXentLoss", PML, temperature=0.1, **COSINE), "efficient": True},
        pml,
    ),
    ("AmdimNCELoss", BOLTS, {"tclip": 7.0}, bolts),
    ("CPCTask", BOLTS, CPC, bolts),
    ("FeatureMapContrastiveTask", BOLTS, {"comparisons": "01", "tclip": 7.0, "bidirectional": False}, bolts),
    ("SupConLoss", "losses", {"temperature": 0.2, "contrast_mode": "one", "base_temperature": 0.3}, supcontrast),
    ("NCE_MI_MULTI", "costs", {"tclip": 7.0}, amdim),
]


@pytest.mark.parametrize(("name", "module", "attributes", "project"), SETTINGS, ids=lambda x: str(x)[:24])
def test_settings_and_state_are_taken_over(name, module, attributes, project):
    theirs = stand_in(name, module, **attributes).eval()
    ours = known.adapter(theirs)
    assert type(ours) is getattr(project, name)
    assert not ours.training
    for key, value in attributes.items():
        found = getattr(ours, key)
        if isinstance(value, torch.Tensor):
            assert torch.equal(found, value)
        elif isinstance(value, Bank):
            assert torch.equal(found.keys, value.bank)
        elif key == "loss":
            assert type(found) is pml.NTXentLoss
        else:
            assert found is value or found == value
    assert [id(x) for x in ours.parameters()] == [id(x) for x in theirs.parameters()]
    if project is pml and "loss" not in attributes:
        assert ours.reason is None


def test_the_rest_of_the_known():
    """Those whose settings lie deeper; and of every class a test."""
    weight_fn = lightly.DCLWLoss(sigma=0.7).weight_fn
    dclw = known.adapter(stand_in("DCLWLoss", LIGHTLY, temperature=0.2, weight_fn=weight_fn, gather_distributed=False))
    assert isinstance(dclw, lightly.DCLWLoss)
    assert vars(dclw)["weight_fn"].keywords == {"sigma": 0.7}
    masks = nn.Parameter(torch.eye(25), requires_grad=False)
    multi = known.adapter(stand_in("LossMultiNCE", "costs", nce_func=amdim.NCE_MI_MULTI(7.0), masks_r5=masks))
    assert isinstance(multi, amdim.LossMultiNCE)
    assert multi.nce_func.tclip == 7
    assert multi.masks_r5 is masks
    tested = {(name, module) for name, module, *_ in SETTINGS} | {("DCLWLoss", LIGHTLY), ("LossMultiNCE", "costs")}
    assert len(tested) == len(known.KNOWN)
    for stranger in (stand_in("SupConLoss", "losses"), stand_in("NTXentLoss", "mine"), amdim.NCE_MI_MULTI()):
        assert not known.is_known(stranger)
        assert known.adapter(stranger) is stranger
    assert not known.is_known(type("ClipLoss", (open_clip.ClipLoss,), {"__module__": "fused_nce.x"})())


def test_settings_that_a_twin_refuses():
    with pytest.raises(ValueError, match=r"^contrast_mode: got 'two'"):
        patch(stand_in("SupConLoss", "losses", temperature=0.1, contrast_mode="two", base_temperature=0.1))
