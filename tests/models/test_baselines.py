"""What DIM compares with, and its generator: each loss by other means, and whom each of its terms reaches."""

import copy
import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence
from torch.nn import functional as F

from fused_nce.models import AAE, DIM, NAT, VAE, BiGAN, PriorGenerator, nat
from fused_nce.models.adversary import GameLoss, GameOutput
from fused_nce.models.dim_prior import PriorMatching
from fused_nce.models.nat import Targets, assign
from fused_nce.models.vae import VAELoss
from tests.distributed.launch import run
from tests.refusals import unlike

ALL = {"VAE": VAE, "AAE": AAE, "BiGAN": BiGAN, "NAT": NAT, "PriorGenerator": PriorGenerator}
DECODED = ("VAE", "AAE", "BiGAN", "PriorGenerator")


def small(name, **settings):
    torch.manual_seed(0)
    own = {"NAT": {"size": 20}, "DIM": {}}.get(name, {"decoder": 8})
    return (ALL | {"DIM": DIM})[name](**({"width": 1 / 16, "code": 8} | own | settings))


def images(count=4):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)).tanh()


def batch(name, count=4):
    return (images(count), torch.arange(count) + 3) if name == "NAT" else images(count)


def reached(loss, model):
    """The parts of a model that a term's gradient reaches."""
    found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
    names = [name.partition(".")[0] for name, _ in model.named_parameters()]
    return {name for name, grad in zip(names, found, strict=True) if grad is not None and grad.any()}


# --- all of them --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_a_loss_reaches_every_weight_and_each_side_has_its_own_group(name):
    model = small(name)
    out = model(batch(name))
    torch.testing.assert_close(out.loss, out.nce + out.penalty)
    out.loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    groups = [{id(p) for p in group} for group in model.parameter_groups().values()]
    assert sum(map(len, groups)) == len(set().union(*groups)) == len(list(model.parameters()))
    assert len(groups) == (1 if name in ("VAE", "NAT") else 2)
    model.eval()
    taps, alone = model.encode(images()), model.encode(images()[:1])
    assert set(taps) == {"conv", "fc", "Y", "local"}
    assert all(torch.allclose(values[:1], alone[tap], atol=1e-5) for tap, values in taps.items())


@pytest.mark.parametrize("name", ["DIM", *ALL])
def test_in_16_bits_a_loss_is_near_its_own(name):
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model = small(name).to(dtype)
        given = batch(name)
        out = model((given[0].to(dtype), given[1]) if name == "NAT" else given.to(dtype))
        out.loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        losses.append(out.loss)
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=0.1, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_generated_images_are_in_the_range_of_images(name):
    made = small(name).eval().generate(3)
    assert (made is not None) == (name in DECODED)
    assert made is None or (made.shape == (3, 3, 32, 32) and made.abs().max() <= 1 and made.min() < -0.01)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    *((name, {"architecture": "vgg"}, "architecture: must be one of dcgan32") for name in ALL),
    *((name, {"code": 0}, "code: got 0, need >= 1") for name in ALL),
    *(
        (name, {"decoder": n}, f"decoder: must be a multiple of 8, at least 8, got {n}")
        for name in DECODED
        for n in (12, -8)
    ),
    *((name, {"game": "go"}, "game: got 'go', need one of") for name in DECODED[1:]),
    *((name, {"gradient_penalty": -1}, "gradient_penalty: got -1") for name in DECODED[1:]),
    ("VAE", {"beta": -1}, "beta: got -1, need a finite number >= 0"),
    ("AAE", {"gamma": -1}, "gamma: got -1, need a finite number >= 0"),
    ("NAT", {"every": 0}, "every: got 0, need >= 1"),
    ("NAT", {"size": 0}, "size: got 0, need >= 1"),
    ("PriorGenerator", {"apart": 0}, "apart: got 0, need a finite number > 0"),
]


def test_refusals():
    assert unlike([(partial(small, name, **more), ValueError, words) for name, more, words in REFUSED]) == []


def test_batches_that_are_refused():
    calls = [(partial(small(name), images(1)), "batch: must hold at least 2 images, got 1") for name in DECODED]
    calls += [(partial(small(name), (images(), images())), "batch: must hold 1 view, got 2") for name in DECODED]
    words = r"batch: must hold images and their indices, got lengths \[4, 3\]"
    calls += [(partial(small("NAT"), (images(), torch.arange(3))), words)]
    calls += [(partial(PriorMatching, 3, prior="cauchy"), "prior: got 'cauchy', need one of 'uniform', 'normal'")]
    assert unlike([(call, ValueError, words) for call, words in calls]) == []


# --- VAE ----------------------------------------------------------------------------------------------------------


def test_the_vae_maximises_the_bound_on_the_likelihood():
    torch.manual_seed(0)
    x, made = images().double(), images().flip(0).double()
    mean, log_variance = torch.randn(4, 8).double(), torch.randn(4, 8).double()
    law = Independent(Normal(made, 0.5**0.5), 3)
    constant = law.log_prob(made)
    kl = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0, 1)).sum(1)
    for beta in (0.0, 0.5, 1.0):
        found = VAELoss(beta)(x, made, mean, log_variance)
        torch.testing.assert_close(found.loss, (beta * kl + constant - law.log_prob(x)).mean())
        torch.testing.assert_close((found.stats["kl"], found.penalty), (kl.mean(), beta * kl.mean()))


def test_the_code_is_drawn_from_its_law():
    """4,000 draws of two codes of known mean and deviation, within five standard errors."""
    model = small("VAE", code=2).eval()
    model.decoder = torch.nn.Identity()
    torch.nn.init.zeros_(model.log_variance.weight)
    model.log_variance.bias.data = torch.tensor([2 * 0.5, -2 * 1.0])  # deviations e^0.5 and e^-1
    with torch.no_grad():
        drawn = torch.stack([(model.embed(images(2)).inputs[1] + 1) / 2 for _ in range(4000)])
        mean = model.encode(images(2))["Y"]
    deviation = torch.tensor([0.5, -1.0]).exp()
    assert ((drawn.mean(0) - mean).abs() < 5 * deviation / 4000**0.5).all()
    assert ((drawn.std(0) / deviation - 1).abs() < 5 / 8000**0.5).all()


# --- the games ----------------------------------------------------------------------------------------------------


def logits(net, *parts):
    return net(*parts).squeeze(1)


@pytest.mark.parametrize(("game", "sign"), [("minimax", -1), ("non-saturating", 1)])
def test_both_sides_of_a_game_of_pairs(game, sign):
    """By the discriminator's own logits, its slopes by jacobians one sample at a time, and whom each term reaches."""
    model = small("BiGAN", game=game, gradient_penalty=3.0).double()
    net, x = model.adversary.discriminator, images().double()
    torch.manual_seed(5)
    found = model(x)
    torch.manual_seed(5)
    code = model.encode(x)["Y"]
    z = torch.randn_like(code)
    made = model.decode(z)
    real, fake = logits(net, x, code), logits(net, made, z)
    torch.testing.assert_close(found.stats["prior"], sign * (F.softplus(sign * real) + F.softplus(-sign * fake)).mean())
    penalty = 0.0
    for one, other in ((x, code), (made, z)):
        for pair in zip(one.detach(), other.detach(), strict=True):
            slopes = torch.autograd.functional.jacobian(net, tuple(part[None] for part in pair))
            penalty += sum(slope.square().sum() for slope in slopes) / 4
    own = F.softplus(-real).mean() + F.softplus(fake).mean() + 3.0 * 0.5 * penalty
    torch.testing.assert_close(found.penalty, own)
    assert reached(found.nce, model) == {"encoder", "decoder"}
    assert reached(found.penalty, model) == {"adversary"}
    right = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
    assert found.stats["discriminator_acc"] == right


def test_the_autoencoders_game_is_of_its_codes_and_a_normal_prior():
    model = small("AAE", gamma=0.3, gradient_penalty=0).double()
    torch.manual_seed(5)
    found = model(images().double())
    torch.manual_seed(5)
    code = model.encode(images().double())["Y"]
    drawn, net = torch.randn_like(code), model.prior.discriminator
    error = (images() - model.decode(code)).square().mean()
    torch.testing.assert_close(found.nce, error + 0.3 * F.softplus(-logits(net, code)).mean())
    torch.testing.assert_close(
        found.penalty, F.softplus(-logits(net, drawn)).mean() + F.softplus(logits(net, code)).mean()
    )
    assert reached(found.nce, model) == {"encoder", "decoder"}
    assert reached(found.penalty, model) == {"prior"}


def test_a_game_can_be_won():
    """Encoder of one number, to N(0, 1): mean and deviation come near, whatever they were."""
    torch.manual_seed(0)
    place, prior = torch.nn.Linear(1, 1), PriorMatching(1, hidden=(64, 32), game="non-saturating", prior="normal")
    torch.nn.init.constant_(place.weight, 0.2)
    torch.nn.init.constant_(place.bias, 3.0)
    sides = [torch.optim.Adam(part.parameters(), lr=3e-3, betas=(0.5, 0.9)) for part in (place, prior)]
    for _ in range(1200):
        game = prior(place(torch.randn(128, 1)))
        for side in sides:
            side.zero_grad()
        (game.encoder + game.discriminator).backward()
        for side in sides:
            side.step()
    assert place.bias.detach().abs() < 0.2
    assert 0.8 < place.weight.detach().abs() < 1.2


def test_a_loss_of_games_weighs_one_side():
    games = [GameOutput(*torch.tensor([1.0, 2.0, 0.5])), GameOutput(*torch.tensor([3.0, 5.0, 1.0]))]
    found = GameLoss(0.1)(torch.tensor(7.0), games)
    assert [round(float(x), 6) for x in found[:3]] == [14.4, 7.4, 7.0]
    assert {name: float(x) for name, x in found.stats.items()} == {
        "error": 7.0, "prior": 4.0, "discriminator": 7.0, "discriminator_acc": 0.75
    }  # fmt: skip


# --- NAT ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_no_other_assignment_is_nearer(seed):
    """All permutations of six; and of many the price of any exchange of two, which must not pay."""
    torch.manual_seed(seed)
    features, targets = (F.normalize(torch.randn(6, 3), dim=1).double() for _ in range(2))
    apart = torch.cdist(features, targets).square()
    best = min(sum(float(apart[i, j]) for i, j in enumerate(order)) for order in itertools.permutations(range(6)))
    order = assign(features, targets)
    assert float((features - targets[order]).square().sum()) == pytest.approx(best)
    many, points = (F.normalize(torch.randn(60, 8), dim=1) for _ in range(2))
    order = assign(many, points)
    gains = (many.double() @ points.double().T)[:, order]
    assert sorted(order.tolist()) == list(range(60))
    assert (gains.diagonal()[:, None] + gains.diagonal() - gains - gains.T).min() > -1e-9


def test_images_exchange_targets_and_none_is_lost():
    """Two passes of one update hold the same image: both exchanges count, in their order."""
    model = small("NAT")
    before = model.targets.vectors.clone()
    out = model(batch("NAT", 6))
    features, own, order = model.embed((images(5), torch.tensor([5, 9, 8, 3, 11]))).inputs
    torch.testing.assert_close(own, before[[5, 9, 8, 3, 11]])
    torch.testing.assert_close(model.loss(features, own, order).loss, 1 - (features * own[order]).sum(1).mean())
    assert torch.equal(model.targets.vectors, before)  # until the update
    pending = [(indices.tolist(), whose.tolist()) for indices, whose in model._pending._items]
    model.after_step()
    places = list(range(20))
    for indices, whose in pending:
        taken = [places[indices[j]] for j in whose]
        for i, place in zip(indices, taken, strict=True):
            places[i] = place
    assert sorted(places) == list(range(20)) != places
    assert torch.equal(model.targets.vectors, before[places])
    assert 0 < out.stats["moved"] <= 1
    assert model.targets.seen == 11


def test_a_skipped_update_or_a_bad_number_exchanges_nothing():
    model = small("NAT")
    before = model.targets.vectors.clone()
    model(batch("NAT"))
    model.after_step(skipped=True)
    assert not model(((images() * torch.nan), torch.arange(4))).loss.isfinite()
    model.after_step(skipped=True)
    model.eval()(batch("NAT"))
    model.after_step()
    assert torch.equal(model.targets.vectors, before)


def test_processes_exchange_within_their_own_batches(monkeypatch):
    model, others = small("NAT", size=6), [torch.tensor([3, 4, 5]), torch.tensor([2, 0, 1])]
    before = model.targets.vectors.clone()
    monkeypatch.setattr(nat, "gathered", lambda x: torch.cat((x, others.pop(0))))
    model._pending.add((torch.arange(3), torch.tensor([1, 0, 2])))
    model.after_step()
    assert torch.equal(model.targets.vectors, before[[1, 0, 2, 5, 3, 4]])


def test_targets_stay_in_the_epochs_between():
    model, moved = small("NAT", size=12, every=2), []
    for _ in range(6):  # two batches are an epoch of twelve images
        moved.append(float(model((images(6), torch.arange(6))).stats["moved"]))
        model.after_step()
        with torch.no_grad():
            model.encoder.top.out.weight.normal_()
    assert [m > 0 for m in moved] == [True, True, False, False, True, True]


def test_no_target_is_lost_where_an_image_comes_twice():
    torch.manual_seed(0)
    targets = Targets(9, 3)
    before = targets.vectors.clone()
    targets.exchange(torch.tensor([8, 8, 3]), torch.tensor([2, 0, 1]))
    assert torch.equal(targets.vectors, before)
    assert targets.seen == 3
    targets.exchange(torch.tensor([8, 1, 3]), torch.tensor([2, 0, 1]))
    assert torch.equal(targets.vectors[[8, 1, 3]], before[[3, 8, 1]])


def test_targets_are_even_on_the_sphere():
    torch.manual_seed(0)
    points = Targets(4000, 3).vectors
    torch.testing.assert_close(points.norm(dim=1), torch.ones(4000))
    assert points.mean(0).norm() < 0.05
    torch.testing.assert_close(points.T @ points / 4000, torch.eye(3) / 3, atol=0.03, rtol=0)


# --- DIM's generator ----------------------------------------------------------------------------------------------


def test_the_generator_follows_the_mean_of_its_codes_alone():
    model = small("PriorGenerator", apart=1.5, gradient_penalty=0).double()
    twin, x = copy.deepcopy(model), images().double()
    torch.manual_seed(5)
    taps, (moment, games) = model.embed(x)
    torch.manual_seed(5)
    made = twin.decode(torch.randn(4, 8, dtype=torch.double))
    code = twin.encode(torch.cat((x, made)))["Y"]  # one batch to BatchNorm, and its statistics see it once
    assert all(torch.equal(b, twin.get_buffer(n)) for n, b in model.named_buffers())
    torch.testing.assert_close(taps[0]["Y"], code[:4])
    torch.testing.assert_close(moment, code[4:].mean().square())
    assert reached(moment, model) == {"decoder"}
    for game, net, codes in ((games[0], 0, code[:4]), (games[1], 1, code[4:] + 1.5)):
        judged = model.priors[net].discriminator(codes)
        torch.testing.assert_close(game.encoder, -F.softplus(judged).mean())
        assert reached(game.encoder, model) == {"encoder"}
        assert reached(game.discriminator, model) == {"priors"}


def generated(rank, alone=False):
    """The generator's term and its gradient by the decoder, of one process' draws; `alone`: its mean's instead."""
    model, x = small("PriorGenerator").double(), images().double() * (1 + rank)
    torch.manual_seed(rank)
    if alone:
        made = model.decode(torch.randn(4, 8, dtype=torch.double))
        term = model.encode(torch.cat((x, made)))["Y"][4:].mean()
    else:
        term = model.embed(x).inputs[0]
    return term.detach(), torch.autograd.grad(term, list(model.decoder.parameters()))


def test_the_generators_mean_is_of_all_processes(tmp_path):
    """What DDP makes of both gradients is that of the square of the mean of both."""
    means, slopes = zip(*(generated(rank, alone=True) for rank in range(2)), strict=True)
    mean = sum(means) / 2
    assert abs(means[0] - means[1]) > 0.1 * abs(mean)  # or it would not tell
    for (term, slope), own in zip(run(tmp_path, 2, generated), slopes, strict=True):
        torch.testing.assert_close((term, slope), (mean.square(), tuple(2 * mean * x for x in own)))
