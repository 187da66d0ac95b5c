"""The adapters against the packages themselves: 200 random configurations each; `make test-compat`."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import random
import subprocess
import sys

import pytest
import torch
from torch import nn

from fused_nce import patch
from fused_nce.compat import bolts, lightly, open_clip, pml, solo
from tests.compat import gathering, packages
from tests.distributed import launch

pytestmark = pytest.mark.nightly
WITHIN = 5e-5  # as in test_formulas; both sides are float32 here
SEEDS = pytest.mark.parametrize("seed", range(200))


def agree(theirs, ours, tensors):
    """Values, and gradients by every tensor."""
    found = []
    for loss in (theirs, ours):
        given = [x.clone().requires_grad_() for x in tensors]
        value = loss(*given)
        grads = torch.autograd.grad(value, given, allow_unused=True)
        found.append([value, *(torch.zeros_like(x) if g is None else g for x, g in zip(given, grads, strict=True))])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= WITHIN * a.abs().max() + 1e-2 * WITHIN


@SEEDS
def test_lightly(seed):
    """Several steps with one bank: the same start from the same seed, the same contents after each step."""
    theirs = packages.or_skip("lightly")
    pick = random.Random(seed)
    n, width, temperature = pick.randint(2, 20), pick.choice((3, 16, 33)), pick.choice((0.07, 0.1, 0.5, -0.5))
    size = pick.choice((0, (n * pick.randint(1, 3), width)))
    losses = []
    for module in (theirs, lightly):
        torch.manual_seed(seed)
        losses.append(module.NTXentLoss(temperature, memory_bank_size=size))
    for _ in range(4):
        agree(losses[0], losses[1], [torch.randn(n, width) for _ in range(2)])
        if size:
            torch.testing.assert_close(losses[1].memory_bank.bank, losses[0].memory_bank.bank, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
@SEEDS
def test_open_clip(name, seed):
    theirs = packages.or_skip("open_clip")
    pick = random.Random(seed)
    torch.manual_seed(seed)
    n, width = pick.randint(2, 20), pick.choice((3, 16, 33))
    rows = [nn.functional.normalize(torch.randn(n, width), dim=1) for _ in range(2)]
    tensors = [*rows, torch.tensor(pick.choice((1.0, 14.0))), torch.tensor(pick.choice((-10.0, 0.0)))]
    agree(getattr(theirs, name)(), getattr(open_clip, name)(), tensors)


@SEEDS
def test_lightly_dcl(seed):
    theirs = packages.or_skip("lightly")
    pick = random.Random(seed)
    torch.manual_seed(seed)
    views = [torch.randn(pick.randint(2, 20), pick.choice((3, 16, 33)))]
    views.append(torch.randn_like(views[0]))
    temperature, sigma = pick.choice((0.07, 0.1, 0.5)), pick.choice((0.3, 0.5))

    def weight_fn(a, b):
        return (a * b).sum(1)

    for name, words in (("DCLLoss", {}), ("DCLLoss", {"weight_fn": weight_fn}), ("DCLWLoss", {"sigma": sigma})):
        one, two = (getattr(module, name)(temperature, **words) for module in (theirs, lightly))
        agree(one, two, views)


@SEEDS
def test_solo(seed):
    theirs = packages.or_skip("solo")
    pick = random.Random(seed)
    torch.manual_seed(seed)
    n, width, temperature = pick.randint(2, 20), pick.choice((3, 16, 33)), pick.choice((0.1, 0.5))
    views = [nn.functional.normalize(torch.randn(n, width), dim=1) for _ in range(2)]
    agree(
        lambda a, b: theirs.simclr.simclr_loss_func(a, b, temperature),
        lambda a, b: solo.simclr_loss_func(torch.cat((a, b)), torch.arange(n).repeat(2), temperature),
        views,
    )
    agree(
        lambda a, b: theirs.nnclr.nnclr_loss_func(a, b, temperature),
        lambda a, b: solo.nnclr_loss_func(a, b, temperature),
        views,
    )
    queue = nn.functional.normalize(torch.randn(width, 30), dim=0)
    agree(
        lambda a, b: theirs.moco.moco_loss_func(a, b, queue, temperature),
        lambda a, b: solo.moco_loss_func(a, b, queue, temperature),
        views,
    )


@SEEDS
def test_bolts(seed):
    """Losses at the same draws; CPCTask with upstream's parameters, loaded by name."""
    upstream = packages.or_skip("bolts")
    pick = random.Random(seed)
    torch.manual_seed(seed)
    n, width, temperature = pick.randint(2, 20), pick.choice((3, 16, 33)), pick.choice((0.1, 0.5))
    views = [nn.functional.normalize(torch.randn(n, width), dim=1) for _ in range(2)]
    agree(
        lambda a, b: upstream.nt_xent_loss(a, b, temperature),
        lambda a, b: bolts.nt_xent_loss(a, b, temperature),
        views,
    )
    images, side = pick.randint(2, 4), pick.randint(3, 4)
    z, other = torch.randn(images, width, side, side), torch.randn(images, width, side, side)

    def maps(module, parts):
        def loss(a, b):
            torch.manual_seed(seed)
            losses, penalty = module.FeatureMapContrastiveTask("00, 01", tclip=pick_clip)((a, b), (b, a))
            return (losses.sum(), penalty)[parts]

        return loss

    pick_clip = pick.choice((5.0, 10.0))
    for part in range(2):
        agree(maps(upstream, part), maps(bolts, part), [z, other])
    if seed < 10:
        theirs, ours = (module.CPCTask(width, target_dim=8) for module in (upstream, bolts))
        ours.load_state_dict(theirs.state_dict())
        agree(theirs, ours, [z])


def hold(one, two, rows):
    """Upstream's loss and ours: rows, references, a miner's pairs, and steps of the memory, one with a mask."""
    from pytorch_metric_learning import losses, miners

    n, width = rows[0].shape
    labels, other = (torch.randint(0, 3, (n,)) for _ in range(2))
    agree(lambda x: one(x, labels), lambda x: two(x, labels), rows[:1])
    agree(lambda x, y: one(x, labels, None, y, other), lambda x, y: two(x, labels, None, y, other), rows)
    mined = miners.MultiSimilarityMiner()(rows[0], labels)
    agree(lambda x: one(x, labels, mined), lambda x: two(x, labels, mined), rows[:1])
    memories = losses.CrossBatchMemory(one, width, n + 3), pml.CrossBatchMemory(two, width, n + 3)
    for step in range(4):
        x, ids = rows[0].std() * torch.randn(n, width), torch.randint(0, 3, (n,))
        options = {} if step != 2 else {"enqueue_mask": torch.rand(n) < 0.5}
        steps = [functools.partial(memory, labels=ids, **options) for memory in memories]
        agree(steps[0], steps[1], [x])


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
@SEEDS
def test_pml(name, seed):
    """Rows, references, other reducers and distances; a miner's pairs, in upstream's code; the memory; two views."""
    packages.or_skip("pml")
    from pytorch_metric_learning import distances, losses, reducers

    pick = random.Random(seed)
    torch.manual_seed(seed)
    n, width, temperature = pick.randint(4, 20), pick.choice((3, 16, 33)), pick.choice((0.1, 0.5))
    words = pick.choice(
        (
            {},
            {"reducer": reducers.MeanReducer()},
            {"reducer": reducers.AvgNonZeroReducer()},
            {"distance": distances.DotProductSimilarity(normalize_embeddings=False)},
            {"distance": distances.CosineSimilarity()},
            {"distance": distances.LpDistance()},
            {"reducer": reducers.ThresholdReducer(low=0.1)},
        )
    )
    one, two = (getattr(module, name)(temperature, **words) for module in (losses, pml))
    rows = [0.3 * torch.randn(n, width) for _ in range(2)]  # upstream's −log(p + 1e-38) ends at 87
    hold(one, two, rows)
    agree(losses.SelfSupervisedLoss(one), pml.SelfSupervisedLoss(two), rows)
    agree(losses.SelfSupervisedLoss(one, symmetric=False), pml.SelfSupervisedLoss(two, symmetric=False), rows)


@SEEDS
def test_pml_margins(seed):
    """Pairs and triplets, of distances and similarities; the settings that go to upstream's code; the memory."""
    packages.or_skip("pml")
    from pytorch_metric_learning import distances, losses, reducers

    pick = random.Random(seed)
    torch.manual_seed(seed)
    n, width = pick.randint(4, 20), pick.choice((3, 16, 33))
    words = pick.choice(
        (
            {},
            {"reducer": reducers.MeanReducer()},
            {"distance": distances.LpDistance(normalize_embeddings=False)},
            {"distance": distances.DotProductSimilarity(normalize_embeddings=False)},
            {"distance": distances.CosineSimilarity(), "reducer": reducers.MeanReducer()},
            {"distance": distances.LpDistance(power=2)},
        )
    )
    own = {
        "ContrastiveLoss": {"pos_margin": pick.choice((0, 0.3)), "neg_margin": pick.choice((1, 0.4, 0))},
        "TripletMarginLoss": {"margin": pick.choice((0.05, 0.7)), **pick.choice(({}, {}, {"smooth_loss": True}))},
    }
    rows = [0.5 * torch.randn(n, width) for _ in range(2)]
    for name, settings in own.items():
        one, two = (getattr(module, name)(**settings, **words) for module in (losses, pml))
        hold(one, two, rows)


def _processes(rank: int, names: list[str]) -> dict[str, float]:
    """How far ours is from the package's; Inf-CL computes in float32, lightly's bank holds it."""
    found = {}
    for name in names:
        case = gathering.CASES[name]
        ours = importlib.import_module(f"fused_nce.compat.{case.package}")
        dtype = torch.float32 if case.package in ("inf_cl", "lightly") else torch.float64
        found[name] = gathering.compared(case, ours, packages.load(case.package), dtype)
    torch.distributed.barrier()  # a process that leaves while another still talks to it ends in an abort
    return found


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("package", sorted({case.package for case in gathering.CASES.values()}))
def test_among_processes(package, size, tmp_path):
    """Gathering, in real processes: values, gradients of the rows, and DDP's mean of those of scale and bias."""
    packages.or_skip(package)
    names = [name for name, case in gathering.CASES.items() if case.package == package]
    for found in launch.run(tmp_path, size, _processes, names):
        assert {name: error for name, error in found.items() if not error <= WITHIN} == {}


def test_inf_cl_interpreted():
    """In a process of its own, for Triton is told at its import to interpret."""
    packages.or_skip("inf_cl")
    command = [sys.executable, "-O", "-m", "tests.compat.interpreted_inf_cl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= WITHIN


def test_patch():
    """The real classes are known, and agree with their twins."""
    theirs_lightly, theirs_open_clip, _ = map(packages.or_skip, ("lightly", "open_clip", "pml"))
    from pytorch_metric_learning import losses

    model = nn.ModuleDict(
        {
            "lightly": theirs_lightly.NTXentLoss(0.2),
            "bank": theirs_lightly.NTXentLoss(0.2, memory_bank_size=(24, 5)),
            "dcl": theirs_lightly.DCLLoss(0.2),
            "dclw": theirs_lightly.DCLWLoss(0.2),
            "views": losses.SelfSupervisedLoss(losses.NTXentLoss()),
            "clip": theirs_open_clip.ClipLoss(),
            "siglip": theirs_open_clip.SigLipLoss(),
            "pml": losses.SupConLoss(),
            "pairs": losses.ContrastiveLoss(0.1, 0.9),
            "triplets": losses.TripletMarginLoss(0.3),
            "memory": losses.CrossBatchMemory(losses.SupConLoss(), 5, 16),
        }
    )
    patch(model, verify_steps=3, show=False)
    for _ in range(5):
        a, b = (nn.functional.normalize(torch.randn(8, 5), dim=1).requires_grad_() for _ in range(2))
        scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-5.0, requires_grad=True)
        labels = torch.randint(0, 3, (8,))
        for name in ("lightly", "bank", "dcl", "dclw", "views"):
            model[name](a, b)
        model["clip"](image_features=a, text_features=b, logit_scale=scale, output_dict=True)
        model["siglip"](a, b, scale, bias)
        for name in ("pml", "pairs", "triplets"):
            model[name](a, labels)
        model["memory"](a, labels)
    for name, loss in model.items():
        assert type(loss).__module__.startswith("fused_nce.compat."), name
        assert "forward" not in vars(loss), name
        assert getattr(loss, "reason", None) is None, name


def test_pml_is_a_kind_of_upstreams():
    """Its surface, its wrappers around ours, and states that load strictly both ways, a learned distance's too."""
    packages.or_skip("pml")
    from pytorch_metric_learning import distances, losses, reducers
    from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

    class Learned(distances.CosineSimilarity):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(5))

        def compute_mat(self, query_emb, ref_emb):
            return super().compute_mat(query_emb * self.w, ref_emb)

    x, labels = torch.randn(8, 5), torch.arange(8) % 3
    for name in ("NTXentLoss", "SupConLoss", "ContrastiveLoss", "TripletMarginLoss"):
        ours, theirs = (getattr(module, name)() for module in (pml, losses))
        assert isinstance(ours, type(theirs))
        assert (type(ours.distance), type(ours.reducer)) == (type(theirs.distance), type(theirs.reducer))
        assert ours.reason is None
        with pytest.warns(UserWarning, match="non-distributed"):
            assert DistributedLossWrapper(ours)(x, labels) == ours(x, labels)
        for change in (
            lambda c: c.set_reducer(reducers.MeanReducer()),
            lambda c: setattr(c, "distance", distances.LpDistance(normalize_embeddings=False)),
            lambda c: c.set_reducer(reducers.SumReducer()),
            lambda c: setattr(c, "distance", Learned()),
        ):
            for loss in (ours, theirs):
                change(loss)
            agree(functools.partial(theirs, labels=labels), functools.partial(ours, labels=labels), [x])
        assert list(ours.state_dict()) == list(theirs.state_dict()) == ["distance.w"]
        ours.load_state_dict(theirs.state_dict()), theirs.load_state_dict(ours.state_dict())
    memories = [module.CrossBatchMemory(losses.SupConLoss(), 5, 16) for module in (losses, pml)]
    assert memories[1].supported_losses() == memories[0].supported_losses()
    for memory in memories:
        memory(x, labels)
        assert memory.curr_batch_idx.tolist() == list(range(8))
    for a, b in (memories, memories[::-1]):
        a.load_state_dict(b.state_dict())
    with pytest.raises(Exception, match="not supported for ArcFaceLoss"):
        pml.CrossBatchMemory(losses.ArcFaceLoss(3, 5), 5)


def test_pml_hears_a_subclass():
    """Its hooks run, in upstream's code where ours would not ask them."""
    packages.or_skip("pml")
    from pytorch_metric_learning import distances, losses

    class Defaults:
        def get_default_distance(self):
            return distances.LpDistance(normalize_embeddings=False)

    class Squared:
        def pos_calc(self, pos_pair_dist, margin):
            return super().pos_calc(pos_pair_dist, margin) ** 2  # type: ignore[misc]

    class Shifted:
        def _compute_loss(self, *arguments):
            found = super()._compute_loss(*arguments)  # type: ignore[misc]
            found["loss"]["losses"] = found["loss"]["losses"] + 1
            return found

    x, labels = torch.randn(8, 5), torch.arange(8) % 3
    for name, hooks in (
        ("NTXentLoss", Defaults),
        ("TripletMarginLoss", Defaults),
        ("ContrastiveLoss", Squared),
        ("NTXentLoss", Shifted),
        ("SupConLoss", Shifted),
    ):
        one, two = (type(name, (hooks, getattr(module, name)), {})() for module in (losses, pml))
        assert (two.reason is None) == (hooks is Defaults and name == "TripletMarginLoss")
        agree(functools.partial(one, labels=labels), functools.partial(two, labels=labels), [x])
        memories = [m.CrossBatchMemory(loss, 5, 20) for m, loss in ((losses, one), (pml, two))]
        for _ in range(3):
            steps = [functools.partial(memory, labels=labels) for memory in memories]
            agree(steps[0], steps[1], [x])
    loss = pml.ContrastiveLoss()
    loss.pos_calc = lambda distance, margin: 2 * distance
    assert loss.reason == "pos_calc of its own"


def test_open_clip_and_lightly_states_and_logits():
    theirs_open_clip, theirs_lightly = map(packages.or_skip, ("open_clip", "lightly"))
    a, b = (nn.functional.normalize(torch.randn(6, 5), dim=1) for _ in range(2))
    for name in ("ClipLoss", "SigLipLoss"):
        one, two = (getattr(module, name)() for module in (theirs_open_clip, open_clip))
        torch.testing.assert_close(two.get_logits(a, b, 9.0, -1.0), one.get_logits(a, b, 9.0, -1.0))
    losses = [module.NTXentLoss(memory_bank_size=(16, 5)) for module in (theirs_lightly, lightly)]
    for one, two in (losses, losses[::-1]):
        one.load_state_dict(two.state_dict())
    assert losses[1].memory_bank.size == losses[0].memory_bank.size
