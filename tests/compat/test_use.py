"""What people do with upstream's classes beside calling them: hooks, settings set later, states, devices, dtypes."""

from __future__ import annotations

import copy
import io
import operator
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

from fused_nce import patch
from fused_nce.compat import amdim, bolts, lightly, moco, open_clip, pml, solo, supcontrast
from fused_nce.compat.pml.base import INSTALLED
from tests.compat import dense
from tests.compat.test_moco import Encoder, model, views
from tests.compat.test_pml import stand_in
from tests.distributed import launch

CROSS_ENTROPY = nn.functional.cross_entropy
X = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(9) % 4
PAIRS = {"NTXentLoss": (0.2,), "SupConLoss": (0.2,), "ContrastiveLoss": (0.1, 0.9), "TripletMarginLoss": (0.3,)}


def pair_losses():
    return {name: getattr(pml, name)(*words) for name, words in PAIRS.items()}


# ---- hooks ------------------------------------------------------------------------------------------------------

HOOKED: dict[Any, tuple[Any, ...]] = {
    lightly.DCLLoss: (),
    lightly.DCLWLoss: (),
    open_clip.ClipLoss: (),
    open_clip.SigLipLoss: (),
    amdim.NCE_MI_MULTI: (),
    amdim.LossMultiNCE: (),
    bolts.CPCTask: (3,),
    bolts.FeatureMapContrastiveTask: (),
}


def test_a_hook_that_nobody_would_call_is_refused():
    """Of a subclass, of a class that it inherits from beside ours, and set on an object."""
    assert all(kind.HOOKS for kind in HOOKED)
    for kind, words in HOOKED.items():
        made, plain = kind(*words), type("Plain", (kind,), {"mine": 1})
        assert isinstance(plain(*words), kind)
        for name in kind.HOOKS:
            with pytest.raises(TypeError, match=rf"^Mine: got a {name} of its own, which"):
                type("Mine", (kind,), {name: lambda *_: None})
            with pytest.raises(TypeError, match=rf"^Mine: got a {name} of its own, which"):
                type("Mine", (type("Mixin", (), {name: lambda *_: None}), kind), {})
            with pytest.raises(TypeError, match=rf"^{kind.__name__}: got a {name} of its own, which"):
                setattr(made, name, lambda *_: None)


@pytest.mark.skipif(INSTALLED, reason="with pytorch-metric-learning its code hears them: test_packages.py")
def test_pml_without_the_package_refuses_hooks():
    for kind in (pml.NTXentLoss, pml.ContrastiveLoss, pml.CrossBatchMemory):
        for name in kind.HOOKS:
            with pytest.raises(TypeError, match=rf"^Mine: got a {name} of its own, which"):
                type("Mine", (kind,), {name: lambda *_: None})


def test_mocos_helpers_are_upstreams_and_a_subclass_may_have_its_own():
    called = []

    class Mine(moco.MoCo):
        def _momentum_update_key_encoder(self):
            called.append("update")

        def _batch_shuffle_ddp(self, x):
            called.append("shuffle")
            return x.flip(0), None

        def _batch_unshuffle_ddp(self, x, idx_unshuffle):
            called.append("unshuffle")
            return x.flip(0)

        def _dequeue_and_enqueue(self, keys):
            called.append("enqueue")

    torch.manual_seed(0)
    mine = Mine(Encoder, dim=8, K=37)
    before = mine.queue.clone()
    out, labels = mine(*views())
    assert called == ["update", "shuffle", "unshuffle", "enqueue"]
    assert torch.equal(mine.queue, before)
    torch.testing.assert_close(CROSS_ENTROPY(out, labels), CROSS_ENTROPY(*model()(*views())))


def test_open_clips_logits_are_there_for_a_subclass_that_asks():
    """As CoCaLoss and DistillClipLoss are."""
    a, b = (nn.functional.normalize(x, dim=1) for x in (X, X.roll(1, 0)))

    class Distilled(open_clip.ClipLoss):
        def forward(self, image_features, text_features, logit_scale, *rest):
            there, back = self.get_logits(image_features, text_features, logit_scale)
            target = self.get_ground_truth(there.device, len(there))
            own = (CROSS_ENTROPY(there, target) + CROSS_ENTROPY(back, target)) / 2
            return own, super().forward(image_features, text_features, logit_scale, *rest)

    torch.testing.assert_close(*Distilled()(a, b, 9.0))
    loss = open_clip.SigLipLoss()
    logits = loss.get_logits(a, b, 9.0, -3.0)
    signs = loss.get_ground_truth(a.device, a.dtype, len(a))
    torch.testing.assert_close(-nn.functional.logsigmoid(signs * logits).sum() / len(a), loss(a, b, 9.0, -3.0))
    assert (loss.get_ground_truth(a.device, a.dtype, 3, negative_only=True) == -1).all()


# ---- settings ---------------------------------------------------------------------------------------------------


def test_settings_count_as_they_are_at_the_call():
    dots = stand_in("DotProductSimilarity", "distances.x", normalize_embeddings=False, p=2, power=1)
    for name, words in PAIRS.items():
        later, first = getattr(pml, name)(*words), getattr(pml, name)(*words, distance=dots, reducer=None)
        later.distance = dots
        assert torch.equal(later(X, LABELS), first(X, LABELS))
        later.reducer = stand_in("MeanReducer", "reducers.x")
        assert later.reason is None
        assert later.reduction == "MeanReducer"
        assert (later(X, LABELS) != first(X, LABELS)) == (name in ("ContrastiveLoss", "TripletMarginLoss"))
        for setting, value, reason in (
            ("distance", stand_in("SNRDistance", "distances.x"), "distance=SNRDistance"),
            ("distance", stand_in("CosineSimilarity", "distances.x", collect_stats=True), "distance=CosineSimilarity"),
            ("reducer", stand_in("ThresholdReducer", "reducers.x"), "reducer=ThresholdReducer"),
            ("reducer", stand_in("AvgNonZeroReducer", "reducers.x", low=0.1), "reducer=AvgNonZeroReducer"),
            ("collect_stats", True, "collect_stats"),
        ):
            changed = copy.deepcopy(first)
            setattr(changed, setting, value)
            assert changed.reason == reason
    triplets = pml.TripletMarginLoss(0.3)
    for setting, value in (("swap", True), ("smooth_loss", True), ("triplets_per_anchor", 2), ("margin", -1.0)):
        changed = copy.deepcopy(triplets)
        setattr(changed, setting, value)
        assert str(changed.reason) == f"{setting}={value}"
    margin: Any = torch.tensor(0.1)
    assert pml.ContrastiveLoss(margin).reason == "a tensor pos_margin"


def several(**kinds):
    """As upstream's ContrastiveLoss makes of one reducer."""
    parts = nn.ModuleDict({name: stand_in(kind, "reducers.x") for name, kind in kinds.items()})
    return stand_in("MultipleReducers", "reducers.x", reducers=parts, default_reducer=stand_in("MeanReducer", "r.x"))


@pytest.mark.skipif(INSTALLED, reason="stand-ins are no reducers of the package's: test_packages.py")
def test_patch_says_what_stays(capsys):
    """A ContrastiveLoss as upstream makes it is fused; one with two ways to reduce is not, and is left alone."""

    def made(reducer):
        words = {"pos_margin": 0.1, "neg_margin": 0.9, "reducer": reducer}
        return stand_in("ContrastiveLoss", "losses.contrastive_loss", **words)

    same, mixed = (several(pos_loss="AvgNonZeroReducer", neg_loss=x) for x in ("AvgNonZeroReducer", "MeanReducer"))
    net = nn.ModuleDict({"same": made(same), "mixed": made(mixed)})
    theirs = net["mixed"]
    patch(net, verify_steps=0)
    assert torch.equal(net["same"](X, LABELS), pml.ContrastiveLoss(0.1, 0.9)(X, LABELS))
    assert net["mixed"] is theirs
    why = "ContrastiveLoss stays, reducer=MultipleReducers is not fused"
    assert why in capsys.readouterr().out
    with pytest.raises(ValueError, match=rf"^module: got nothing to replace, need a loss that is fused \(.*{why}"):
        patch(theirs, show=False)


TEMPERED = {
    "lightly": lambda t: lightly.NTXentLoss(t)(X, X.roll(1, 1)),
    "lightly, a bank": lambda t: lightly.NTXentLoss(t, (8, 4))(X, X.roll(1, 1)),
    "lightly DCL": lambda t: lightly.DCLLoss(t)(X, X.roll(1, 1)),
    "SupContrast": lambda t: supcontrast.SupConLoss(t, base_temperature=t)(X[:, None].repeat(1, 2, 1), LABELS),
    "pml NT-Xent": lambda t: pml.NTXentLoss(t)(X, LABELS),
    "pml SupCon": lambda t: pml.SupConLoss(t)(X, LABELS),
    "moco": lambda t: CROSS_ENTROPY(*model(T=t)(*views())),
}


@pytest.mark.parametrize("name", TEMPERED)
def test_a_temperature_may_be_a_tensor_and_learned(name):
    def value(t):
        torch.manual_seed(1)
        return TEMPERED[name](t)

    t = torch.tensor([0.5] if name == "lightly" else 0.5, requires_grad=True)
    loss = value(t)
    torch.testing.assert_close(loss, value(0.5))
    loss.backward()
    assert t.grad is not None
    around = (value(0.51) - value(0.49)) / 0.02
    torch.testing.assert_close(t.grad.reshape(()), around, rtol=2e-2, atol=1e-3)
    with pytest.raises(ValueError, match=r"^(temperature|T): got 0"):
        value(torch.tensor(0.0))


# ---- labels, masks, few rows ------------------------------------------------------------------------------------


def test_labels_of_any_dtype():
    """Floats count by their values, those of the references too."""
    floats, others = LABELS / 7, torch.cat((LABELS[3:], LABELS[:3]))
    for loss in pair_losses().values():
        assert torch.equal(loss(X, floats), loss(X, LABELS))
        assert torch.equal(loss(X, floats, None, X, others / 7), loss(X, LABELS, None, X, others))
        assert torch.equal(loss(X, LABELS.to(torch.uint8)), loss(X, LABELS))
        a, b = (pml.CrossBatchMemory(loss, 4, 20) for _ in range(2))
        for _ in range(3):
            torch.testing.assert_close(a(X, floats), b(X, LABELS))
        assert a.label_memory.is_floating_point()
    features = nn.functional.normalize(X, dim=1)[:, None].repeat(1, 2, 1)
    loss = supcontrast.SupConLoss()
    assert torch.equal(loss(features, floats), loss(features, LABELS))


def test_the_same_labels_on_both_sides_leave_the_row_itself_out():
    """By the object, as upstream asks; equal ones do not."""
    for loss in pair_losses().values():
        left_out = loss(X, LABELS, None, X.roll(1, 0))
        assert torch.equal(loss(X, LABELS, ref_emb=X.roll(1, 0), ref_labels=LABELS), left_out)
        assert loss(X, LABELS, ref_emb=X.roll(1, 0), ref_labels=LABELS.clone()) != left_out


def test_an_empty_batch_costs_nothing():
    for loss in pair_losses().values():
        x = X[:0].clone().requires_grad_()
        for value in (loss(x, LABELS[:0]), loss(x, LABELS[:0], None, X, LABELS)):
            value.backward()
            assert value == 0
        assert loss(X, LABELS, None, X[:0], LABELS[:0]) == 0


def test_a_mask_of_booleans():
    clip: Any = torch.tensor(10.0)
    task, rows = bolts.AmdimNCELoss(clip), torch.randn(4, 12)
    masks = torch.eye(3), torch.eye(3).bool()
    assert torch.equal(*(torch.stack(task(rows.T[:3], rows, mask)) for mask in masks))
    with pytest.raises(TypeError, match=r"^tclip: got a tensor with a gradient, need a number"):
        bolts.AmdimNCELoss(clip.requires_grad_())


def test_mocov3s_keys_learn_where_there_is_no_group(monkeypatch):
    for group in (False, True):
        monkeypatch.setattr(solo, "has_group", lambda group=group: group)
        key = X.roll(1, 1).clone().requires_grad_()
        solo.mocov3_loss_func(X.clone().requires_grad_(), key).backward()
        assert (key.grad is None) == group


# ---- memories: devices, dtypes, states --------------------------------------------------------------------------


def test_a_bank_moves_only_where_something_is_learned(monkeypatch):
    loss = lightly.NTXentLoss(memory_bank_size=(16, 4))
    x = X.clone().requires_grad_()
    with torch.no_grad():
        loss(x, X)
    loss(X, X)
    assert loss.memory_bank.bank_ptr.tolist() == [0]
    loss(x, X)
    assert loss.memory_bank.bank_ptr.tolist() == [9]
    torch.testing.assert_close(loss.memory_bank.bank[:9], nn.functional.normalize(X, dim=1))
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    for kind in (lightly.NTXentLoss, lightly.DCLLoss):
        with pytest.raises(ValueError, match=r"^gather_distributed: got True, need"):
            kind(gather_distributed=True)


def test_what_was_not_moved_to_the_rows_device():
    """Banks, memories and scales that stayed on the CPU, with rows of a GPU, as upstream's examples have them."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        a, b = (torch.randn(9, 4, device="cuda", requires_grad=True) for _ in range(2))
        scale, bias = torch.tensor(9.0), torch.tensor([-9.0])
        temperature: Any = torch.tensor(0.1)
        found = [
            open_clip.ClipLoss()(a, b, scale, bias),
            open_clip.SigLipLoss()(a, b, scale, bias),
            lightly.NTXentLoss(memory_bank_size=(16, 4))(a, b),
            supcontrast.SupConLoss(temperature)(torch.stack((a, b), dim=1)),
        ]
        assert {x.device.type for x in found} == {"cuda"}
        memory = pml.CrossBatchMemory(pml.SupConLoss(), 4, 16)
        memory.add_to_memory(a, LABELS.cuda(), 9)
        assert {memory.embedding_memory.device.type, memory.label_memory.device.type} == {"cuda"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_batch_of_another_dtype_than_the_memory(dtype):
    """Float64 rows enter whole; 16-bit ones fit, and a memory of them alone has their dtype, as a miner needs it."""
    dots = stand_in("DotProductSimilarity", "distances.x", normalize_embeddings=False, p=2, power=1)
    for words in ({}, {"distance": dots}):
        memory, exact = (pml.CrossBatchMemory(pml.SupConLoss(**words), 4, 16) for _ in range(2))
        for i in range(3):
            x = X.roll(i, 0).double().to(dtype).requires_grad_()
            value = memory(x, LABELS.roll(i))
            torch.testing.assert_close(value.double(), exact(x.detach().double(), LABELS.roll(i)), rtol=1e-2, atol=1e-3)
            value.backward()
            assert x.grad is not None
            assert x.grad.dtype == dtype
            assert memory.embedding_memory.dtype == dtype
        assert torch.equal(memory.embedding_memory.double(), exact.embedding_memory)
        memory(X.float(), LABELS)
        assert memory.embedding_memory.dtype == torch.promote_types(dtype, torch.float32)


def saved(module):
    """Its state through a file, as trainers keep it."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_states_have_upstreams_keys_and_lose_nothing():
    """What upstream does not save goes along in the metadata; a state without it, or of older keys, loads too."""
    net: Any = nn.ModuleDict(
        {"loss": lightly.NTXentLoss(memory_bank_size=(16, 4)), "memory": pml.CrossBatchMemory(pml.NTXentLoss(), 4, 16)}
    )
    bank, memory = net["loss"].memory_bank, net["memory"]
    for _ in range(3):
        net["loss"](X.clone().requires_grad_(), X)
        memory(X, LABELS)
    assert set(net.state_dict()) == {"memory.embedding_memory", "memory.label_memory"}
    twin: Any = copy.deepcopy(net)
    for x in (twin["loss"].memory_bank.bank, twin["loss"].memory_bank.bank_ptr):
        x.zero_()
    twin["memory"].reset_queue()
    bare: Any = copy.deepcopy(twin)
    twin.load_state_dict(saved(net))
    assert torch.equal(twin["loss"].memory_bank.bank, bank.bank)
    assert twin["loss"].memory_bank.bank_ptr.tolist() == bank.bank_ptr.tolist() == [11]
    assert (twin["memory"].queue_idx, twin["memory"].has_been_filled) == (11, True)
    bare.load_state_dict(dict(net.state_dict()))
    assert not bare["loss"].memory_bank.bank.any()
    assert (bare["memory"].queue_idx, bare["memory"].has_been_filled) == (0, True)
    older = {**net.state_dict(), "memory._extra_state": {"queue_idx": 5, "has_been_filled": False}}
    older |= {"loss.memory_bank.keys": bank.bank + 1, "loss.memory_bank.pointer": torch.tensor(3)}
    older |= {"loss.memory_bank.fill": torch.tensor(3)}
    bare.load_state_dict(older)
    assert (bare["memory"].queue_idx, bare["memory"].has_been_filled) == (5, False)
    assert torch.equal(bare["loss"].memory_bank.bank, bank.bank + 1)
    assert bare["loss"].memory_bank.bank_ptr.tolist() == [3]
    with pytest.raises(RuntimeError, match=r"memory_bank\.bank: got shape \(16, 4\), need \(8, 4\)"):
        lightly.NTXentLoss(memory_bank_size=(8, 4)).load_state_dict(net["loss"].state_dict())


# ---- MoCo's logits ----------------------------------------------------------------------------------------------

ASKED: dict[str, Any] = {
    "cat": lambda z: torch.cat([z, z]),
    "stack": lambda z: torch.stack((z, z)),
    "where": lambda z: torch.where(z > 0, z, -z),
    "argmax": lambda z: z.argmax(),
    "argmax kept": lambda z: torch.argmax(z, 1, keepdim=True),
    "reflected": lambda z: 1 - z + 2 * (3 / (z * z + 4)),
    "power": lambda z: 2 ** (z**2 / 99),
    "compared": lambda z: (z == z.max()) | (z != 0) & (z <= 1),
    "matmul": lambda z: z @ z.T,
    "each": lambda z: torch.stack([row.sum() for row in z]),
    "numpy": lambda z: torch.from_numpy(np.asarray(z.detach())),
    **{name: getattr(operator, name) for name in ("neg", "pos", "abs")},
    **{name: lambda z, name=name: getattr(operator, name)(z, 0.5) for name in ("eq", "lt", "ge", "mod", "floordiv")},
}


def test_operators_and_functions_are_the_tensors():
    out, _ = model()(*views())
    full = out.full()
    for name, ask in ASKED.items():
        assert torch.equal(ask(out), ask(full)), name
    assert len({out, out}) == 1
    with pytest.raises(RuntimeError, match="ambiguous"):
        bool(out)


@pytest.mark.parametrize("write", ["out[:, 0] = 2.0", "out.mul_(0.5)", "out *= 0.5", "out.clamp_(max=0.1)"])
def test_what_is_written_into_the_logits_stays(write):
    out, labels = model()(*views())
    full = out.full()
    for z in (out, full):
        exec(write, {"out": z}, {})
    torch.testing.assert_close(CROSS_ENTROPY(out, labels), CROSS_ENTROPY(full, labels))
    assert torch.equal(out.topk(3)[1], full.topk(3)[1])
    assert torch.equal(out.detach().full(), full)


def test_a_gradient_by_the_logits_themselves():
    out, labels = model()(*views())
    out.retain_grad()
    CROSS_ENTROPY(out, labels).backward()
    assert out.grad.shape == out.shape
    torch.testing.assert_close(out.grad.sum(1), torch.zeros(len(out)))


def _parallel(rank):
    """MoCo in DistributedDataParallel, as upstream's trainer has it, and the gradients of one parameter."""
    found = []
    every: tuple[dict[str, Any], ...] = ({"find_unused_parameters": True}, {"static_graph": True}, {})
    for words in every:
        net = DistributedDataParallel(model(), **words)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(2):
                net.zero_grad()
                CROSS_ENTROPY(*net(*(x[5 * rank : 5 * rank + 5] for x in views()))).backward()
        found.append(net.module.encoder_q.body.weight.grad)
    return found


def test_moco_in_any_parallel_wrapper(tmp_path):
    for first, second in zip(*launch.run(tmp_path, 2, _parallel), strict=True):
        assert torch.equal(first, second)
        assert first.any()


def test_dims_kl_is_that_of_april_2019():
    from fused_nce.compat import dim

    l, m = torch.randn(4, 3, 5) / 4, torch.randn(4, 3, 1)
    torch.testing.assert_close(dim.fenchel_dual_loss(l, m, "KL"), dense.fenchel(l, m, "KL"))
