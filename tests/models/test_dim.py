"""DIM in a loop of one's own: its parts against dense formulas, and what its reference code gets wrong."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fused_nce.losses import NCEOutput
from fused_nce.losses.dim import oracle
from fused_nce.models import DIM
from fused_nce.models.dim_critics import LocalDot, PairLoss
from fused_nce.models.dim_prior import PriorMatching
from fused_nce.models.dim_tasks import AbsoluteCoordinates, RelativeCoordinates, occlude
from fused_nce.models.encoders.dim import DIMEncoder
from tests.refusals import unlike


def small(**settings):
    torch.manual_seed(0)
    return DIM(**({"width": 1 / 16, "mi_units": 16, "code": 8} | settings))


def images(count=4, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_five_line_loop_learns_with_two_optimisers():
    model, x = small(width=1 / 8, mi_units=32, estimator="nce"), images(16)
    optimizers = [torch.optim.Adam(p, lr=1e-3) for p in model.parameter_groups().values()]
    found = []
    for _ in range(20):
        for optimizer in optimizers:
            optimizer.zero_grad()
        found.append(model(x))
        found[-1].loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    assert found[-1].nce < found[0].nce - 2
    assert found[-1].stats["discriminator_acc"] > 0.5


@pytest.mark.parametrize("estimator", ["jsd", "dv", "nce"])
def test_the_local_objective_is_the_dense_one_on_unscaled_scores(estimator):
    """No 1/√U, no filler for the image's own pairs, and every product pair in the mean."""
    model, x = small(estimator=estimator, gamma=0).double(), images().double()
    taps = model.encode(x)
    local, globals_ = model.local(taps["local"], taps["Y"][:, :, None, None])
    out = model(x)
    torch.testing.assert_close(out.loss, oracle(local, globals_, estimator=estimator), rtol=1e-9, atol=1e-9)
    assert out.loss == out.nce
    # LayerNorm leaves norms of √U, and scores have a deviation of up to √U.
    torch.testing.assert_close(local.square().sum(2), torch.full(local.shape[:2], 16.0).double(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("critic", ["dot", "concat"])
def test_the_weights_are_alpha_beta_and_gamma(critic):
    model = small(critic=critic, alpha=0.5, beta=0.1, gamma=0.7, absolute=0.3, relative=0.2, game="non-saturating")
    out = model(images())
    s = out.stats
    torch.testing.assert_close(out.nce, 0.5 * s["global"] + 0.1 * s["local"])
    tasks = 0.3 * s["absolute"] + 0.2 * s["relative"]
    torch.testing.assert_close(out.penalty, 0.7 * s["prior"] + s["discriminator"] + tasks)
    torch.testing.assert_close(out.loss, out.nce + out.penalty)
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_part_of_weight_0_is_not_there():
    assert small(alpha=1, beta=0).local is None
    assert small().whole is None
    assert small(gamma=0).prior is None
    assert list(small(gamma=0).parameter_groups()) == ["encoder"]


def test_the_groups_share_nothing_and_leave_nothing_out():
    model = small(alpha=1)
    groups = model.parameter_groups()
    names = [{id(p) for p in group} for group in groups.values()]
    assert not names[0] & names[1]
    assert names[0] | names[1] == {id(p) for p in model.parameters()}
    assert {id(p) for p in model.prior.parameters()} == names[1]


@pytest.mark.parametrize(("game", "sign"), [("minimax", -1), ("non-saturating", 1)])
def test_the_prior_game_reaches_each_side_alone(game, sign):
    torch.manual_seed(0)
    prior = PriorMatching(5, hidden=(7,), game=game, gradient_penalty=0).double()
    code, drawn = torch.randn(6, 5).double().requires_grad_(), torch.rand(6, 5).double()
    d_code, d_drawn = prior.discriminator(code.sigmoid()).squeeze(1), prior.discriminator(drawn).squeeze(1)
    found = prior(code, drawn)
    torch.testing.assert_close(found.encoder, sign * F.softplus(-sign * d_code).mean())
    torch.testing.assert_close(found.discriminator, F.softplus(-d_drawn).mean() + F.softplus(d_code).mean())

    found.encoder.backward(retain_graph=True)
    assert code.grad is not None
    assert all(p.grad is None for p in prior.parameters())
    code.grad = None
    found.discriminator.backward()
    assert code.grad is None
    assert all(p.grad is not None for p in prior.parameters())


def test_the_gradient_penalty_is_of_every_sample():
    """The reference takes the discriminator's output of the last one alone."""
    torch.manual_seed(0)
    prior = PriorMatching(5, hidden=(7,), gradient_penalty=0).double()
    code, drawn = torch.randn(6, 5).double(), torch.rand(6, 5).double()
    without = prior(code, drawn).discriminator
    prior.gradient_penalty = 3.0
    norms = []
    for samples in (drawn, code.sigmoid()):
        each = [torch.autograd.functional.jacobian(prior.discriminator, y[None]).flatten() for y in samples]
        norms.append(sum(slope.square().sum() for slope in each) / 6)
    torch.testing.assert_close(prior(code, drawn).discriminator - without, 3.0 * 0.5 * sum(norms))
    with torch.no_grad():
        torch.testing.assert_close(prior(code, drawn).discriminator, without)


def test_autocast_leaves_the_game_alone():
    torch.manual_seed(0)
    prior, code, drawn = PriorMatching(64, hidden=(64,)), torch.randn(6, 64), torch.rand(6, 64)
    exact = prior(code, drawn)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(found, term) for found, term in zip(prior(code, drawn), exact, strict=True))


@pytest.mark.parametrize(
    ("estimator", "anchor"), [("jsd", "global"), ("dv", "global"), ("nce", "global"), ("nce", "local"), ("nce", "both")]
)
def test_the_loss_of_pairs_is_the_estimator_where_all_images_are_compared(estimator, anchor):
    torch.manual_seed(0)
    local, code = torch.randn(4, 3, 5).double(), torch.randn(4, 5).double()
    scores = torch.stack([(local.roll(-r, 0) * code[:, None]).sum(2) for r in range(4)])
    expected = oracle(local, code, estimator=estimator, anchor=anchor)
    torch.testing.assert_close(PairLoss(estimator, anchor=anchor)(scores).loss, expected)


def test_concatenation_is_a_network_on_location_and_code():
    model, x = small(critic="concat", critic_negatives=2, gamma=0), images()
    taps = model.encode(x)
    (scores,) = model.local(taps["local"], taps["Y"][:, :, None, None])
    assert scores.shape == (3, 4, 64)
    critic = model.local
    joined = torch.cat((taps["local"][3, :, 2, 5], taps["Y"][1]))  # image 1 and, two further on, image 3
    first = torch.nn.Linear(len(joined), 512)
    first.weight.data = torch.cat((critic.location.weight, critic.code.weight), 1).detach()
    first.bias.data = critic.location.bias.detach()
    torch.testing.assert_close(scores[2, 1, 2 * 8 + 5], critic.rest(first(joined)).squeeze())


def test_occlusion_hides_a_square_from_the_code_and_not_from_the_locations():
    torch.manual_seed(0)
    x = torch.ones(50, 3, 12, 16)
    hidden = occlude(x, 0.5)[:, 0] == 0
    assert (hidden.sum((1, 2)) == 6 * 8).all()
    assert (occlude(x, 0.5)[0, 0] == 0).any(0).sum() == 8
    assert len({tuple(h.nonzero()[0].tolist()) for h in hidden}) > 5  # another place in each
    model, seen = small(occlusion=0.5, gamma=0), []
    handle = model.local.register_forward_pre_hook(lambda module, args: seen.append(args))
    model(images())
    handle.remove()
    local, globals_ = seen[0]
    model.train()
    torch.testing.assert_close(local, model.encode(images())["local"])
    assert not torch.allclose(globals_.flatten(1), model.encode(images())["Y"])


def test_coordinates_are_cross_entropies_of_rows_and_columns():
    torch.manual_seed(0)
    task = AbsoluteCoordinates(3, 2, 4)
    local, code = torch.randn(2, 3, 4, 4), torch.randn(2, 2)
    loss, _ = task(local, code)
    logits = task.net(torch.cat((local, code[:, :, None, None].expand(-1, -1, 4, 4)), 1)).view(2, 4, 4, 8)
    expected = torch.zeros(2)
    for i in range(4):
        for j in range(4):
            expected -= logits[:, i, j, :4].log_softmax(1)[:, i] + logits[:, i, j, 4:].log_softmax(1)[:, j]
    torch.testing.assert_close(loss, expected.mean() / 16)


def test_coordinates_can_be_learned():
    """Locations that carry their own place, so that the targets must be the right way round."""
    torch.manual_seed(0)
    side = 3
    place = torch.eye(side * side).view(side * side, side, side)
    local, code = place.expand(16, -1, -1, -1), torch.randn(16, 2)
    for task in (AbsoluteCoordinates(9, 2, side), RelativeCoordinates(9, 2, side)):
        optimizer = torch.optim.Adam(task.parameters(), lr=1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            loss, accuracy = task(local, code)
            loss.backward()
            optimizer.step()
        assert accuracy > 0.95, type(task).__name__


def test_encode_in_eval_mode_treats_images_one_by_one():
    model, x = small().eval(), images()
    together, alone = model.encode(x), model.encode(x[:1])
    assert set(together) == {"conv", "fc", "Y", "local"}
    for tap, values in together.items():
        torch.testing.assert_close(values[:1], alone[tap])


@pytest.mark.parametrize(("critic", "shapes"), [("dot", [(4, 64, 16), (4, 1, 16)]), ("concat", [(2, 4, 64)])])
def test_an_injected_loss_is_called_with_what_the_critic_returns(critic, shapes):
    class Square(torch.nn.Module):
        def forward(self, *found):
            assert [tuple(x.shape) for x in found] == shapes
            loss = sum(x.square().mean() for x in found)
            return NCEOutput(loss, loss, 0 * loss, {"squares": loss.detach()})

    out = small(critic=critic, loss=Square(), gamma=0)(images())
    assert out.loss == out.stats["squares"] == out.stats["local"]


# Parameters of the encoder, code of 64, from the published lists of layers.
@pytest.mark.parametrize(
    ("architecture", "count"),
    [
        ("dcgan32", 48 * 64 + 1024 * 128 + 2048 * 256 + 4096 * 1024 + 2 * (64 + 128 + 256 + 1024) + 1024 * 64 + 64),
        (
            "alexnet64",
            27 * 96 + 9 * (96 * 192 + 192 * 384 + 384 * 384 + 384 * 192) + 9408 * 4096 + 4096 * 4096
            + 2 * (96 + 192 + 384 + 384 + 192 + 4096 + 4096) + 4096 * 64 + 64,
        ),
    ],
)  # fmt: skip
def test_parameter_counts(architecture, count):
    with torch.device("meta"):
        encoder = DIMEncoder(architecture)
    assert sum(p.numel() for p in encoder.parameters()) == count


@pytest.mark.parametrize(
    ("architecture", "size", "local", "conv", "fc"),
    [
        ("dcgan32", 32, (128, 8, 8), (256, 4, 4), 1024),
        ("dcgan64", 64, (256, 8, 8), (512, 4, 4), 1024),
        ("alexnet64", 64, (384, 15, 15), (192, 7, 7), 4096),
        ("crops-resnet19-32", 32, (1024, 7, 7), (1024, 7, 7), 1024),
        ("crops-resnet37-32", 32, (1024, 7, 7), (1024, 7, 7), 1024),
        ("crops-alexnet64", 64, (192, 7, 7), (192, 7, 7), 4096),
        ("crops-resnet19-32-several", 32, (1024, 7, 7), (1024, 5, 5), 1024),
        ("crops-alexnet64-several", 64, (192, 7, 7), (192, 5, 5), 4096),
    ],
)
def test_tap_shapes(architecture, size, local, conv, fc):
    with torch.device("meta"):
        model = DIM(architecture=architecture)
        taps = model.encode(torch.empty(2, 3, size, size))
    shapes = {name: tuple(tap.shape[1:]) for name, tap in taps.items()}
    assert shapes == {"local": local, "conv": conv, "fc": (fc,), "Y": (64,)}
    critic = model.local
    assert isinstance(critic, LocalDot)
    assert critic.local.conv1.weight.shape == (2048, local[0], 1, 1)


def test_depths_are_the_published_ones():
    def layers(name):
        convs = [m for m in DIMEncoder(name, width=1 / 64).bottom.modules() if isinstance(m, torch.nn.Conv2d)]
        return sum(m.kernel_size != (1, 1) for m in convs)

    assert layers("crops-resnet19-32") == 1 + 6  # a 3×3 in each of 6 bottlenecks of 3: 19 layers
    assert layers("crops-resnet37-32") == 1 + 12


def test_a_strided_crop_sees_its_patch_alone():
    model, x = small(architecture="crops-resnet19-32", width=1 / 8).eval(), images(1).requires_grad_()
    model.encode(x)["local"][0, :, 2, 3].square().sum().backward()
    touched = x.grad[0].abs().sum(0) > 0
    rows, columns = touched.any(1).nonzero().flatten(), touched.any(0).nonzero().flatten()
    assert (int(rows.min()), int(rows.max())) == (8, 15)
    assert (int(columns.min()), int(columns.max())) == (12, 19)


def test_several_global_vectors_are_all_compared():
    model, x = small(architecture="crops-resnet19-32-several", width=1 / 64, gamma=0, estimator="nce"), images()
    taps = model.encode(x)
    local, globals_ = model.local(taps["local"], taps["conv"])
    assert globals_.shape == (4, 25, 16)
    torch.testing.assert_close(model(x).loss, oracle(local, globals_, estimator="nce"), rtol=1e-4, atol=1e-4)


def test_chance_of_nce_is_a_count_of_all_other_locations():
    model = small(estimator="nce", gamma=0)
    with torch.no_grad():
        model.local.local.out_norm.weight.zero_()
    assert model(images()).loss.item() == pytest.approx(math.log(1 + 3 * 64), rel=1e-5)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"architecture": "vgg"}, "architecture: must be one of dcgan32"),
    ({"width": 0}, "width: must be above 0, got 0"),
    ({"code": 0}, "code: got 0, need >= 1"),
    ({"beta": 0}, "beta: got 0 with alpha = 0"),
    ({"gamma": -1}, "gamma: got -1, need a finite number >= 0"),
    ({"critic": "cosine"}, "critic: got 'cosine', need one of 'dot', 'concat'"),
    ({"estimator": "mine"}, "estimator: got 'mine'"),
    ({"estimator": "dv", "anchor": "both"}, "anchor: got 'both'"),
    ({"critic": "concat", "critic_negatives": 0}, "critic_negatives: got 0, need >= 1"),
    ({"critic": "concat", "architecture": "crops-resnet19-32-several"}, "critic: got 'concat' with architecture="),
    ({"mi_units": 0}, "mi_units: got 0, need >= 1"),
    ({"occlusion": 1.0}, "occlusion: must be below 1, of the image's side, got 1.0"),
    ({"game": "zero-sum"}, "game: got 'zero-sum', need one of 'minimax', 'non-saturating'"),
]


def test_refusals():
    calls = [(partial(small, **settings), words) for settings, words in REFUSED]
    calls += [(partial(small(), torch.zeros(1, 3, 32, 32)), "batch: must hold at least 2 images, got 1")]
    of = r"x: must be \(B, 3, 32, 32\) images, got \(4, 1, 32, 32\)"
    calls += [(partial(small(), torch.zeros(4, 1, 32, 32)), of)]
    calls += [(partial(small(), (images(), images())), "batch: must hold 1 view, got 2")]
    assert unlike([(call, ValueError, words) for call, words in calls]) == []


def test_a_batch_may_be_a_sequence_of_one_view():
    model, x = small(gamma=0), images()
    assert torch.equal(model((x,)).loss, model(x).loss)
