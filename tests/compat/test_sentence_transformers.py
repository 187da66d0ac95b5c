"""sentence-transformers' losses against the package itself, their place in its trainer, and `patch` of one."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fused_nce import patch
from fused_nce.compat import known
from tests.compat import packages, tiny_bert
from tests.distributed import launch

pytestmark = [pytest.mark.nightly, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
SEEDS = range(60)
ARROWS = ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")
RANKING = ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss")
SYMMETRIC = ("MultipleNegativesSymmetricRankingLoss", "CachedMultipleNegativesSymmetricRankingLoss")
GIST = ("GISTEmbedLoss", "CachedGISTEmbedLoss")


@pytest.fixture(scope="module")
def both():
    """(upstream's losses, ours)."""
    theirs = packages.or_skip("sentence_transformers.sentence_transformer.losses")
    from fused_nce.compat import sentence_transformers as ours

    return theirs, ours


@pytest.fixture(scope="module")
def encoder(both, tmp_path_factory: pytest.TempPathFactory):
    """A function that makes a model of `tiny_bert`."""

    def make(seed: int = 0, dropout: float = 0.0, width: int = 16) -> Any:
        return tiny_bert.model(tiny_bert.save(tmp_path_factory.mktemp("bert"), seed, dropout, width), width)

    return make


def agree(one, two, leaves, dtype):
    """Values and gradients, within the roundings of the dtype."""
    found = [(x, *torch.autograd.grad(x, leaves, allow_unused=True)) for x in (one, two)]
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).abs().max() <= 400 * torch.finfo(dtype).eps * (a.abs().max() + 1e-3)


def drawn(pick, columns, dtype):
    n, width = pick.randint(2, 24), pick.choice((3, 16, 33))
    base = torch.randn(n, width, dtype=dtype)
    return [(0.5 * base + torch.randn(n, width, dtype=dtype)).requires_grad_() for _ in range(columns)]


def called(loss, columns, guides=None):
    """A loss on embeddings; cached ones have them in parts."""
    if hasattr(loss, "calculate_loss"):
        parts = [list(x.split(3)) for x in columns]
        return loss.calculate_loss(parts) if guides is None else loss.calculate_loss(parts, [[g] for g in guides])
    return loss.compute_loss_from_embeddings(columns, None)


@pytest.mark.parametrize("name", [*RANKING, *SYMMETRIC])
def test_ranking(both, name):
    """60 random settings, in float64 and float32; columns from two to five."""
    from sentence_transformers.util import cos_sim, dot_score

    for seed in SEEDS:
        pick = random.Random(seed)
        torch.manual_seed(seed)
        dtype = pick.choice((torch.float64, torch.float32))
        settings: dict[str, Any] = {
            "scale": pick.choice((1.0, 5.0, 20.0)),
            "similarity_fct": pick.choice((cos_sim, dot_score)),
        }
        if name in RANKING:
            settings["partition_mode"] = pick.choice(("joint", "per_direction"))
            free = ARROWS[1:] if settings["partition_mode"] == "joint" else ARROWS[1:2]
            chosen = [ARROWS[0], *pick.sample(free, pick.randint(0, len(free)))]
            pick.shuffle(chosen)
            settings["directions"] = tuple(chosen)
            settings["hardness_mode"] = pick.choice((None, "in_batch_negatives", "hard_negatives", "all_negatives"))
            settings["hardness_strength"] = pick.choice((0.5, 5.0)) if settings["hardness_mode"] else 0.0
        if "Cached" in name:
            settings["mini_batch_size"] = pick.choice((2, 7, 100))
        if settings["similarity_fct"] is dot_score:
            settings["scale"] = 0.2
        theirs, ours = (getattr(module, name)(nn.Sequential(nn.Identity()), **settings) for module in both)
        columns = drawn(pick, pick.randint(2, 5), dtype)
        agree(called(theirs, columns), called(ours, columns), columns, dtype)
        assert ours.get_config_dict() == theirs.get_config_dict()
        assert isinstance(ours, type(theirs))


@pytest.mark.parametrize("name", GIST)
def test_gist(both, encoder, name):
    """60 random settings; cached ones with several negatives."""
    _, ours_module = both
    model, guide = encoder(0), encoder(1)
    for seed in SEEDS:
        pick = random.Random(seed)
        torch.manual_seed(seed)
        dtype = pick.choice((torch.float64, torch.float32))
        settings = {
            "temperature": pick.choice((0.05, 0.2)),
            "margin_strategy": pick.choice(("absolute", "relative")),
            "margin": pick.choice((0.0, 0.0, 0.05, 0.3, -0.1)),
            "contrast_anchors": pick.random() < 0.5,
            "contrast_positives": pick.random() < 0.5,
        }
        columns = drawn(pick, pick.choice((2, 3, 3, 4 if "Cached" in name else 2)), dtype)
        guides = list(torch.randn(len(columns), len(columns[0]), 4, dtype=dtype).unbind())
        if pick.random() < 0.5:  # the same texts twice: ties, of the positive with itself and with others
            guides[1][0], guides[1][1], guides[-1][0] = guides[0][0], guides[1][0], guides[1][0]
        theirs, ours = (getattr(module, name)(model, guide, **settings) for module in both)
        if name == "GISTEmbedLoss":
            exact, found = ours_module._gist_of(theirs, columns, guides), ours.loss_of(columns, guides)
        else:
            exact, found = called(theirs, columns, guides), called(ours, columns, guides)
        agree(exact, found, columns, dtype)
        assert ours.get_config_dict() == theirs.get_config_dict()


def test_refusals(both):
    upstream, ours = both
    model = nn.Sequential(nn.Identity())
    other = upstream.MultipleNegativesRankingLoss(model, similarity_fct=torch.cdist)
    with pytest.raises(NotImplementedError, match=r"^similarity_fct: got .*, need cos_sim or dot_score$"):
        known.adapter(other)
    with pytest.raises(NotImplementedError, match=r"^similarity_fct: got .*, need cos_sim or dot_score$"):
        called(
            ours.MultipleNegativesRankingLoss(model, similarity_fct=torch.cdist),
            drawn(random.Random(0), 2, torch.float32),
        )
    with pytest.raises(ValueError, match=r"^embeddings: got 1 columns, need at least 2$"):
        called(ours.MultipleNegativesRankingLoss(model), drawn(random.Random(0), 1, torch.float32))


# ---- the trainer ------------------------------------------------------------------------------------------------


def pairs(columns, n=240):
    """Made-up sentences: words of one of twenty topics, several a row."""
    from datasets import Dataset
    from datasets.table import InMemoryTable

    pick, names = random.Random(0), ("anchor", "positive", "negative", "further")[:columns]
    topics = [pick.randrange(20) for _ in range(n)]

    def text(topic):
        return " ".join(f"w{3 * topic + pick.randrange(3)}" for _ in range(pick.randint(3, 8)))

    drift = {"anchor": 0, "positive": 0, "negative": 1, "further": 7}
    table = {name: [text((t + drift[name]) % 20) for t in topics] for name in names}
    return Dataset(InMemoryTable.from_pydict(table), fingerprint=f"made-{columns}-{n}")


def trained(model, loss, data, folder, wrap=lambda x: x, **more):
    """The losses of each step, and the parameters after them."""
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    arguments = {"per_device_train_batch_size": 24, "num_train_epochs": 4, "learning_rate": 3e-3, "logging_steps": 1}
    settings = SentenceTransformerTrainingArguments(
        str(folder), report_to=[], save_strategy="no", disable_tqdm=True, seed=3, **(arguments | more)
    )
    trainer = wrap(SentenceTransformerTrainer(model=model, args=settings, train_dataset=data, loss=loss))
    trainer.train()
    values = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return values, [p.detach().clone() for p in model.parameters()], trainer


MADE: dict[str, Any] = {
    "ranking": lambda t, m, g: t.MultipleNegativesRankingLoss(m),
    "every direction": lambda t, m, g: t.MultipleNegativesRankingLoss(m, directions=ARROWS),
    "symmetric": lambda t, m, g: t.MultipleNegativesSymmetricRankingLoss(m),
    "cached, hardness": lambda t, m, g: t.CachedMultipleNegativesRankingLoss(
        m, mini_batch_size=7, hardness_mode="all_negatives", hardness_strength=2.0
    ),
    "gist": lambda t, m, g: t.GISTEmbedLoss(m, g, temperature=0.1),
    "cached gist": lambda t, m, g: t.CachedGISTEmbedLoss(m, g, temperature=0.1, mini_batch_size=9),
    "matryoshka": lambda t, m, g: t.MatryoshkaLoss(m, t.MultipleNegativesRankingLoss(m), [16, 8, 4], [1, 0.5, 2]),
    "matryoshka, cached": lambda t, m, g: t.MatryoshkaLoss(
        m, t.CachedMultipleNegativesRankingLoss(m, mini_batch_size=10), [16, 8]
    ),
    "matryoshka, gist": lambda t, m, g: t.MatryoshkaLoss(m, t.GISTEmbedLoss(m, g, temperature=0.1), [16, 8]),
}


@pytest.mark.parametrize("name", MADE)
def test_a_patched_trainer_trains_as_upstream_does(both, encoder, name, tmp_path, capsys):
    """Step by step from the same start, dropout included, with three columns; the trial's steps and those after it."""
    data = pairs(2 if name == "symmetric" else 3)
    runs = []
    for wrap in (lambda x: x, lambda x: patch(x, verify_steps=3)):
        model = encoder(0, dropout=0.1)
        loss = MADE[name](both[0], model, encoder(1, width=8))
        runs.append(trained(model, loss, data, tmp_path, wrap))
    (plain, parameters, _), (found, others, trainer) = runs
    held = trainer.loss if "matryoshka" not in name else trainer.loss.loss
    assert type(held).__module__ == "fused_nce.compat.sentence_transformers"
    assert "both agree, ours runs alone from here" in capsys.readouterr().out
    assert len(plain) == 40
    torch.testing.assert_close(torch.tensor(found), torch.tensor(plain), rtol=2e-3, atol=2e-4)
    for a, b in zip(parameters, others, strict=True):
        torch.testing.assert_close(b, a, rtol=5e-2, atol=5e-3)
    assert sum(found[-5:]) < 0.7 * sum(found[:5])


def test_losses_by_data_set(both, encoder, tmp_path):
    """A trainer with a dict of losses: those without a twin stay."""
    model = encoder(0)
    losses = {"a.b": both[0].MultipleNegativesRankingLoss(model), "c": both[0].CoSENTLoss(model)}

    class Trainer:
        loss = losses

    found = patch(Trainer(), show=False).loss
    assert type(found["a.b"]).__module__ == "fused_nce.compat.sentence_transformers"
    assert found["c"] is losses["c"]
    Trainer.loss = {"c": losses["c"]}
    with pytest.raises(ValueError, match=r"without a known loss"):
        patch(Trainer())
    with pytest.raises(TypeError, match=r"^module: got PosixPath, need a module, or a trainer whose `loss` is one$"):
        patch(Path())


def test_a_wrong_twin_is_found_on_trial(both, monkeypatch):
    """A scale that is off by a thousandth."""
    from fused_nce.compat import sentence_transformers as ours

    loss = patch(both[0].MultipleNegativesRankingLoss(nn.Sequential(nn.Identity())), show=False)
    columns = drawn(random.Random(1), 3, torch.float32)
    called(loss, columns)
    right = ours.ranking
    monkeypatch.setattr(ours, "ranking", lambda *arguments: 1.001 * right(*arguments))
    with pytest.raises(ValueError, match=r"^the module: ours: .* differs by"):
        called(loss, columns)


# ---- among processes ---------------------------------------------------------------------------------------------


def obey(rank: int) -> dict[str, float]:
    """How far gathering losses are from upstream's on this process, value and gradients, of their largest."""
    upstream = packages.load("sentence_transformers.sentence_transformer.losses")
    from fused_nce.compat import sentence_transformers as ours

    worst: dict[str, float] = {}
    for seed in range(12):
        pick = random.Random(seed)
        torch.manual_seed(100 * seed + rank)
        columns = [torch.randn(5, 6, dtype=torch.float64, requires_grad=True) for _ in range(pick.randint(2, 4))]
        guides = list(torch.randn(len(columns), 5, 3, dtype=torch.float64).unbind())
        chosen = (ARROWS[0], *pick.sample(ARROWS[1:], pick.randint(0, 3)))
        for name in (*RANKING, *SYMMETRIC, *GIST):
            if name == "GISTEmbedLoss" and len(columns) > 3:
                continue
            cached: dict[str, Any] = {"mini_batch_size": 2} if "Cached" in name else {}
            words: dict[str, Any] = {"directions": chosen} if name in RANKING else {}
            found = []
            for module in (upstream, ours):
                loss = gathering(getattr(module, name), words | cached)
                if name == "GISTEmbedLoss":
                    value = (
                        ours._gist_of(loss, columns, guides) if module is upstream else loss.loss_of(columns, guides)
                    )
                else:
                    value = called(loss, columns, guides if name in GIST else None)
                found.append((value, *torch.autograd.grad(value, columns)))
            error = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*found, strict=True))
            worst[name] = max(worst.get(name, 0.0), error)
    return worst


def gathering(kind: Any, words: dict[str, Any]) -> Any:
    """A loss that takes negatives from all processes; GIST's without a model."""
    if "GIST" not in kind.__name__:
        return kind(nn.Sequential(nn.Identity()), gather_across_devices=True, **words)
    loss = kind.__new__(kind)
    nn.Module.__init__(loss)
    settings = {"temperature": 0.1, "margin": 0.05, "margin_strategy": "absolute", "gather_across_devices": True}
    settings |= {"contrast_anchors": True, "contrast_positives": True, "show_progress_bar": False}
    settings |= {"similarity_fct": nn.CosineSimilarity(dim=-1), "cross_entropy_loss": nn.CrossEntropyLoss()}
    vars(loss).update(settings | words)
    return loss


def test_gathered_among_three_processes(both, tmp_path):
    for worst in launch.run(tmp_path, 3, obey):
        assert len(worst) == 6
        assert max(worst.values()) <= 1e-12, worst


ZERO = {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True, "gradient_clipping": "auto"}
ZERO |= dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"), "auto")


def train(rank: int, saved: str, folder: str, size: int, words: dict[str, Any]) -> list[Any]:
    """Losses and parameters of upstream's and the patched trainer's, and what wraps the model."""
    upstream = packages.load("sentence_transformers.sentence_transformer.losses")
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_SIZE": size, "MASTER_PORT": 0}
    os.environ |= {name: str(x) for name, x in names.items()} | {"MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}
    runs = []
    for wrap in (lambda x: x, lambda x: patch(x, verify_steps=3, show=False)):
        model = tiny_bert.model(Path(saved))
        loss = upstream.MultipleNegativesRankingLoss(model, gather_across_devices=True)
        more = words | {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 24 // size}
        values, parameters, trainer = trained(model, loss, pairs(3), folder, wrap, num_train_epochs=2, **more)
        runs.append((values, parameters, type(trainer.model_wrapped).__name__))
    return runs


@pytest.mark.parametrize(
    ("size", "words", "wrapper"),
    [(2, {"use_cpu": True}, "DistributedDataParallel"), (1, {"deepspeed": ZERO}, "DeepSpeedEngine")],
)
def test_a_patched_trainer_that_accumulates(both, tmp_path, size, words, wrapper):
    """Under DDP, which leaves every other step's gradients alone, and under DeepSpeed's ZeRO-2."""
    if "deepspeed" in words:
        packages.or_skip("deepspeed")
    folders = [tmp_path / name for name in ("meet", "bert", "out")]
    for folder in folders:
        folder.mkdir()
    tiny_bert.save(folders[1])
    runs = launch.run(folders[0], size, train, *map(str, folders[1:]), size, words)
    for (plain, parameters, one), (found, others, two) in runs:
        assert one == two == wrapper
        assert len(plain) == len(found) == 10
        torch.testing.assert_close(torch.tensor(found), torch.tensor(plain), rtol=2e-3, atol=2e-4)
        for a, b in zip(parameters, others, strict=True):
            torch.testing.assert_close(b, a, rtol=5e-2, atol=5e-3)
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1][1], runs[-1][1][1], strict=True))
