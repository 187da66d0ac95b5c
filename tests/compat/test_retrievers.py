"""Tevatron's, FlagEmbedding's, ms-swift's and PyLate's losses against the packages themselves, and `patch` of each."""

from __future__ import annotations

import copy
import functools
import os
import pickle
import random
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from fused_nce import patch
from fused_nce.compat import flagembedding, known, swift, tevatron
from tests.compat import packages
from tests.distributed import launch

pytestmark = pytest.mark.nightly
DTYPES = (torch.float64, torch.float32)
CONFIGURATIONS = 50


def drawn(seed):
    """Generators, and (queries, passages, G) of a random shape and dtype."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    n, width, size, dtype = pick.randint(1, 12), pick.choice((3, 16, 33)), pick.randint(1, 4), pick.choice(DTYPES)
    q = torch.randn(n, width, dtype=dtype)
    p = 0.5 * q.repeat_interleave(size, dim=0) + torch.randn(n * size, width, dtype=dtype)
    return pick, q.requires_grad_(), p.requires_grad_(), size


def agree(both, leaves, seed):
    """Values and gradients, within the roundings of scores of some tens."""
    eps = torch.finfo(leaves[0].dtype).eps
    found = [(x.sum(), *torch.autograd.grad(x.sum(), leaves, allow_unused=True)) for x in both]
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None), seed
        if a is not None:
            assert (a - b).abs().max() <= 400 * eps * (a.abs().max() + 1e-2), f"seed {seed}"


class Given(nn.Module):
    """An encoder whose hidden state is its input."""

    def forward(self, reps: Any = None, attention_mask: Any = None, return_dict: bool = True) -> Any:
        """(N, 1, D)."""
        return types.SimpleNamespace(last_hidden_state=reps[:, None])


def features(x):
    return {"reps": x, "attention_mask": torch.ones(len(x), 1, dtype=torch.int64)}


# ---- Tevatron ----------------------------------------------------------------------------------------------------


def tevatron_model(size, rows, everywhere=False):
    modeling = packages.or_skip("tevatron.modeling")
    train = types.SimpleNamespace(negatives_x_device=everywhere, per_device_train_batch_size=rows)
    data = types.SimpleNamespace(train_n_passages=size)
    return modeling.DenseModel(Given(), Given(), None, None, data, train)


def test_tevatron_losses():
    upstream = packages.or_skip("tevatron.loss")
    for seed in range(CONFIGURATIONS):
        pick, q, p, size = drawn(seed)
        target = torch.randint(0, len(p), (len(q),)) if pick.random() < 0.3 else None
        options = {"target": target, "reduction": pick.choice(("mean", "sum", "none"))}
        both = (module.SimpleContrastiveLoss(size)(q, p, **options) for module in (upstream, tevatron))
        agree(both, (q, p), seed)


def test_tevatron_model():
    for seed in range(CONFIGURATIONS):
        _, q, p, size = drawn(seed)
        theirs = tevatron_model(size, len(q))
        ours = known.adapter(theirs)
        assert type(ours).__mro__[2:4] == (type(ours).__mro__[2], type(theirs))
        found = [model(features(q), features(p)) for model in (theirs, ours)]
        agree([x.loss for x in found], (q, p), seed)
        assert torch.equal(found[0].q_reps, found[1].q_reps)
        assert torch.equal(found[0].p_reps, found[1].p_reps)
        assert ours.eval()(features(q), features(q)).scores.shape == (len(q),)
        theirs.train()


# ---- FlagEmbedding -----------------------------------------------------------------------------------------------

FLAG = ("BiEncoderOnlyEmbedderModel", "BiDecoderOnlyEmbedderModel", "BiDecoderOnlyEmbedderICLModel")


@pytest.mark.parametrize("name", FLAG)
def test_flagembedding(name):
    """With teachers of both kinds, without in-batch negatives, and Matryoshka."""
    upstream = getattr(packages.or_skip("FlagEmbedding"), name)
    seen = set()
    for seed in range(3 * CONFIGURATIONS):
        pick, q, p, _ = drawn(seed)
        words: dict[str, Any] = {
            "temperature": pick.choice((1.0, 0.2)),
            "normalize_embeddings": pick.random() < 0.5,
            "kd_loss_type": pick.choice(("kl_div", "m3_kd_loss")),
            "sentence_pooling_method": "last_token",
        }
        if pick.random() < 0.3 and "ICL" not in name:
            words |= {"use_mrl": True, "mrl_dims": [2, 3]}
        alone = pick.random() < 0.3
        teacher = [pick.random() for _ in range(len(p))] if pick.random() < 0.6 else None
        if alone and teacher and words["kd_loss_type"] == "m3_kd_loss":
            continue  # upstream's targets are beyond its scores
        seen.add((alone, teacher is None, words["kd_loss_type"], "use_mrl" in words))
        theirs = upstream(Given(), **words)
        ours = known.adapter(theirs)
        found = [m(features(q), features(p), teacher, alone).loss for m in (theirs, ours)]
        agree(found, (q, p), seed)
    assert len(seen) >= (7 if "ICL" in name else 13)


# ---- ms-swift ----------------------------------------------------------------------------------------------------


def test_swift(monkeypatch):
    """Every option; groups of one size and of several."""
    upstream = packages.or_skip("swift").InfonceLoss
    for seed in range(3 * CONFIGURATIONS):
        pick, q, p, size = drawn(seed)
        for key, choices in {
            "TEMPERATURE": (None, "0.5", "1"),
            "USE_BATCH": (None, "true", "0"),
            "HARD_NEGATIVES": (None, None, "1", "3"),
            "MASK_FAKE_NEGATIVE": (None, "True", "yes"),
            "FAKE_NEG_MARGIN": (None, "0", "0.7"),
            "INCLUDE_QQ": (None, "1"),
            "INCLUDE_DD": (None, "1"),
        }.items():
            value = pick.choice(choices)
            if key == "HARD_NEGATIVES" and size < 2:
                value = None
            if value is None:
                monkeypatch.delenv(f"INFONCE_{key}", raising=False)
            else:
                monkeypatch.setenv(f"INFONCE_{key}", value)
        groups = p.split(size)
        if pick.random() < 0.5:
            groups = [x[: pick.randint(min(2, size), size)] for x in groups]
        labels = torch.cat([torch.tensor([1.0] + [0.0] * (len(x) - 1)) for x in groups])
        sentences = 0.4 * torch.cat([y for i, x in enumerate(groups) for y in (q[i : i + 1], x)])
        results = []
        for kind in (upstream, swift.InfonceLoss):
            np.random.seed(seed)
            results.append(kind(None, object())({"last_hidden_state": sentences}, labels))
        agree(results, (sentences,), seed)


def test_what_is_refused(monkeypatch):
    """In one line that names the argument or the variable."""
    q, p, simple = torch.randn(4, 3), torch.randn(8, 3), tevatron.SimpleContrastiveLoss

    class BaseMegatronTrainer:
        pass

    def infonce(labels=(1, 0), **options):
        with monkeypatch.context() as m:
            for key, value in options.items():
                m.setenv(f"INFONCE_{key}", value)
            return swift.InfonceLoss(None, None).loss_of(p[: len(labels) + sum(labels)], torch.tensor(labels))

    everywhere = tevatron.DistributedContrastiveLoss(2)
    model = flagembedding.InBatch()
    model.temperature, model.kd_loss_type = 1.0, "mse"
    for kind, message, call in (
        (ValueError, r"y: got 8 passages, need 3 for each of 4", lambda: simple(3)(q, p)),
        (ValueError, r"p: got 7 passages, need a multiple of the 4", lambda: simple()(q, p[1:])),
        (ValueError, r"reduction: got 'max', need", lambda: simple(2)(q, p, reduction="max")),
        (NotImplementedError, r"target: got one among", lambda: everywhere(q, p, torch.arange(4))),
        (NotImplementedError, r"reduction: got 'sum' among", lambda: everywhere(q, p, reduction="sum")),
        (ValueError, r"kd_loss_type: got 'mse', need", lambda: model.loss_of(q, p, torch.rand(4, 2), False)),
        (NotImplementedError, r"trainer: got Megatron's", lambda: swift.InfonceLoss(None, BaseMegatronTrainer())),
        (ValueError, r"INFONCE_TEMPERATURE: got 'hot', need", lambda: infonce(TEMPERATURE="hot")),
        (ValueError, r"INFONCE_TEMPERATURE: got 0.0, need", lambda: infonce(TEMPERATURE="0")),
        (ValueError, r"INFONCE_USE_BATCH: got 'maybe', need", lambda: infonce(USE_BATCH="maybe")),
        (
            ValueError,
            r"INFONCE_FAKE_NEG_MARGIN: got -0.1, need",
            lambda: infonce(FAKE_NEG_MARGIN="-0.1", MASK_FAKE_NEGATIVE="1"),
        ),
        (ValueError, r"labels: got a positive without", lambda: infonce((1, 1, 0), HARD_NEGATIVES="1")),
        (ValueError, r"labels: got 2 with 0 positives", lambda: infonce((0, 0))),
    ):
        with pytest.raises(kind, match=f"^{message}"):
            call()


# ---- PyLate ------------------------------------------------------------------------------------------------------


class ColBERT(nn.Module):
    """A model whose token embeddings are its input."""

    def __init__(self, expansion: bool, skiplist: list[int]) -> None:
        super().__init__()
        self.do_query_expansion, self.skiplist = expansion, skiplist

    def forward(self, x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The embeddings in the features."""
        return {"token_embeddings": x["given"]}


@pytest.mark.parametrize("name", ["Contrastive", "CachedContrastive"])
def test_pylate(name, monkeypatch):
    """In one tile, and in tiles of one query; with the metrics that upstream has."""
    upstream = packages.or_skip("pylate.losses")
    from pylate import scores

    from fused_nce.compat import pylate

    for seed in range(CONFIGURATIONS):
        pick = random.Random(seed)
        torch.manual_seed(seed)
        monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", pick.choice(("16", "0.002", "0.0001")))
        n, dtype, columns = pick.randint(1, 9), pick.choice(DTYPES), []
        for tokens in (pick.randint(1, 6), *[pick.randint(2, 7)] * pick.randint(1, 3)):
            mask = torch.rand(n, tokens) < 0.8
            mask[:, 0] = True
            given = torch.randn(n, tokens, 5, dtype=dtype, requires_grad=True)
            columns.append({"given": given, "input_ids": torch.randint(0, 9, (n, tokens)), "attention_mask": mask})
        leaves = [x["given"] for x in columns]
        metric = pick.choice((None, scores.XTRScores(k=3)))
        words = {"temperature": pick.choice((1.0, 0.3)), "size_average": pick.random() < 0.5, "score_metric": metric}
        words["score_mini_batch_size"] = pick.choice((None, 2))
        model = ColBERT(pick.random() < 0.5, [1, 2])
        values = []
        for module in (upstream, pylate):
            loss = getattr(module, name)(model, **words, **({"mini_batch_size": 4} if "Cached" in name else {}))
            if name == "Contrastive":
                values.append(loss(columns))
                continue
            parts = [[y.detach().requires_grad_() for y in nn.functional.normalize(x, dim=-1).split(4)] for x in leaves]
            value = loss.calculate_loss(parts, [x["attention_mask"] for x in columns], with_backward=True)
            grads = [torch.cat([y.grad for y in x]) for x in parts]
            values.append(value + sum(((x - x.detach()) * g).sum() for x, g in zip(leaves, grads, strict=True)))
        agree(values, leaves, seed)


def noted(sizes, x):
    sizes.append(x.numel())
    return x


def test_pylate_holds_one_tile(monkeypatch):
    """The largest tensor that the backward keeps is no tile of token scores."""
    packages.or_skip("pylate.losses")
    from pylate import losses as upstream

    from fused_nce.compat import pylate

    monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", "0.05")
    q, d = torch.randn(16, 8, 4, requires_grad=True), torch.randn(16, 1, 8, 4)
    largest = []
    for module in (upstream, pylate):
        kept: list[Any] = []
        with torch.autograd.graph.saved_tensors_hooks(functools.partial(noted, kept), lambda x: x):
            module.Contrastive(ColBERT(True, [])).score_metric(q, d, documents_mask=torch.ones(16, 1, 8))
        largest.append(max(kept))
    assert largest[0] >= 16 * 16 * 8
    assert largest[1] <= max(q.numel(), d.numel())


# ---- among processes ---------------------------------------------------------------------------------------------


def flat(x: Any) -> list[Any]:
    """accelerate's `gather_object`, which asks for a launcher: the elements of all processes' lists."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, x)
    return [y for each in found for y in each]


def obey(rank: int) -> dict[str, float]:
    """How far the values and gradients of this process are from upstream's, of their largest."""
    torch.manual_seed(rank)
    q, p = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (4, 8))
    modeling, flag = packages.load("tevatron.loss"), packages.load("FlagEmbedding")
    cases: dict[str, Any] = {}
    for scaled in (True, False):
        both = [module.DistributedContrastiveLoss(2, scaled) for module in (modeling, tevatron)]
        cases[f"tevatron, {scaled}"] = (lambda x=both[0]: x(q, p), lambda x=both[1]: x(q, p))
    models = [tevatron_model(2, 4, everywhere=True)]
    for kind in ("kl_div", "m3_kd_loss"):
        models.append(flag.BiEncoderOnlyEmbedderModel(Given(), temperature=0.3, negatives_cross_device=True))
        models[-1].kd_loss_type = kind
    teacher = torch.rand(8).tolist()
    for i, theirs in enumerate(models):
        for more in ((None,), (teacher,)) if i else ((),):
            cases[f"model {i}, {more == (teacher,)}"] = tuple(
                lambda m=m, more=more: m(features(q), features(p), *more).loss for m in (theirs, known.adapter(theirs))
            )
    os.environ |= {"INFONCE_INCLUDE_QQ": "1", "INFONCE_INCLUDE_DD": "1", "INFONCE_MASK_FAKE_NEGATIVE": "1"}
    packages.load("swift")
    module = sys.modules["swift.loss.embedding"]
    vars(module).update(gather_object=flat, get_dist_setting=lambda: (rank, rank, dist.get_world_size(), 1))
    labels = torch.tensor([1, 0] * 4)
    rows = torch.cat([torch.cat([q[i : i + 1], p[2 * i : 2 * i + 2]]) for i in range(4)])
    cases["swift"] = tuple(
        lambda kind=kind: kind(None, None)({"last_hidden_state": rows}, labels)
        for kind in (module.InfonceLoss, swift.InfonceLoss)
    )
    worst = {}
    for name, calls in cases.items():
        a, b = ((x := call(), *torch.autograd.grad(x, (q, p), retain_graph=True)) for call in calls)
        worst[name] = max(float((x - y).abs().max() / x.abs().max()) for x, y in zip(a, b, strict=True))
    return worst


def gather(rank: int) -> dict[str, float]:
    """The same of PyLate's, with negatives from every process, in tiles of few queries."""
    packages.load("pylate.losses")
    from pylate import losses as upstream

    from fused_nce.compat import pylate

    os.environ["FUSED_NCE_WORKSPACE_MB"] = "0.002"
    torch.manual_seed(rank)
    leaves = [torch.randn(5, tokens, 4, dtype=torch.float64, requires_grad=True) for tokens in (3, 6, 6)]
    columns = [
        {"given": x, "input_ids": torch.randint(0, 9, x.shape[:2]), "attention_mask": torch.ones(x.shape[:2])}
        for x in leaves
    ]
    worst = {}
    for mean in (True, False):
        words: dict[str, Any] = {"gather_across_devices": True, "temperature": 0.3, "size_average": mean}
        theirs = upstream.Contrastive(ColBERT(True, [1, 2]), **words)
        both = theirs, known.adapter(theirs)
        assert isinstance(both[1], pylate.Contrastive)
        found = [(x := loss(columns), *torch.autograd.grad(x, leaves)) for loss in both]
        worst[f"plain, {mean}"] = max(float((x - y).abs().max() / x.abs().max()) for x, y in zip(*found, strict=True))
        found = []
        for module in (upstream, pylate):
            loss = module.CachedContrastive(ColBERT(True, [1, 2]), mini_batch_size=2, **words)
            parts = [[y.detach().requires_grad_() for y in nn.functional.normalize(x, dim=-1).split(2)] for x in leaves]
            value = loss.calculate_loss(parts, [x["attention_mask"] for x in columns], with_backward=True)
            found.append((value.detach(), *[torch.cat([y.grad for y in x]) for x in parts]))
        worst[f"cached, {mean}"] = max(float((x - y).abs().max() / x.abs().max()) for x, y in zip(*found, strict=True))
    return worst


def test_pylate_gathers_among_two_processes(tmp_path):
    """Upstream's value on each, and upstream's gradients of its own rows."""
    packages.or_skip("pylate.losses")
    for worst in launch.run(tmp_path, 2, gather):
        assert len(worst) == 4
        assert max(worst.values()) <= 1e-12, worst


def test_among_three_processes(tmp_path):
    """Every process has upstream's value, and upstream's gradients of its own rows."""
    for project in ("tevatron.loss", "FlagEmbedding", "swift"):
        packages.or_skip(project)
    for worst in launch.run(tmp_path, 3, obey):
        assert len(worst) == 8
        assert max(worst.values()) <= 1e-12, worst


# ---- patch -------------------------------------------------------------------------------------------------------


def held():
    """By project: what a trainer has, where, and a step of it."""
    q, p = torch.randn(5, 6, requires_grad=True), torch.randn(10, 6, requires_grad=True)
    upstream = packages.or_skip("FlagEmbedding")
    flag = upstream.BiEncoderOnlyEmbedderModel(Given(), temperature=0.1, normalize_embeddings=True)
    rows = torch.cat([torch.cat([q[i : i + 1], p[2 * i : 2 * i + 2]]) for i in range(5)])
    infonce = packages.or_skip("swift").InfonceLoss(None, None)
    columns = [
        {"given": x, "input_ids": torch.zeros(4, 3, dtype=torch.int64), "attention_mask": torch.ones(4, 3)}
        for x in torch.randn(2, 4, 3, 5).requires_grad_()
    ]
    late = packages.or_skip("pylate.losses").Contrastive(ColBERT(True, []))
    simple, labels = packages.or_skip("tevatron.loss").SimpleContrastiveLoss(2), torch.tensor([1, 0] * 5)
    return {
        "tevatron": ("model", tevatron_model(2, 5), lambda m: m(features(q), features(p)).loss),
        "gradient cache": ("loss_fn", simple, lambda loss: loss(q, p)),
        "flagembedding": ("model", flag, lambda m: m(features(q), features(p), [0.5] * 10).loss),
        "swift": ("compute_loss_func", infonce, lambda loss: loss({"last_hidden_state": rows}, labels)),
        "pylate": ("loss", late, lambda loss: loss(columns)),
    }


@pytest.mark.parametrize("name", ["tevatron", "gradient cache", "flagembedding", "swift", "pylate"])
def test_patched_in_a_trainer(name, capsys):
    """Two steps on both, then ours alone, and the same loss."""
    place, theirs, step = held()[name]
    trainer = types.SimpleNamespace(**{place: theirs})
    if place == "model":
        trainer.model_wrapped = theirs
    outer = types.SimpleNamespace(gc=trainer) if place == "loss_fn" else trainer
    assert patch(outer, verify_steps=2) is outer
    ours = getattr(trainer, place)
    assert type(ours).__module__.startswith("fused_nce.compat.")
    assert getattr(trainer, "model_wrapped", ours) is ours
    losses = [step(ours) for _ in range(3)]
    assert capsys.readouterr().out.count("both agree") == 1
    torch.testing.assert_close(losses[0], losses[2])
    torch.testing.assert_close(step(theirs), losses[2])


@pytest.mark.parametrize("name", ["tevatron", "flagembedding"])
def test_a_patched_model_is_saved_whole(name):
    """Pickled or copied, on trial or past it, it has the losses of before, and no trial."""
    place, theirs, step = held()[name]
    trainer = types.SimpleNamespace(**{place: theirs})
    ours = getattr(patch(trainer, verify_steps=2, show=False), place)
    for _ in range(4):
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert type(twin) is type(ours)
            assert "loss_of" not in vars(twin)
            torch.testing.assert_close(step(twin), step(theirs))
        step(ours)


def test_a_model_with_a_hook_of_its_own_is_refused():
    model = packages.or_skip("FlagEmbedding").BiEncoderOnlyEmbedderModel(Given())
    model.compute_score = lambda q, p: q @ p.T
    with pytest.raises(TypeError, match=r"^BiEncoderOnlyEmbedderModel: got a compute_score of its own"):
        known.adapter(model)
