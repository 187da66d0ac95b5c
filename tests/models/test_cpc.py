"""CPC in a loop of one's own: geometry, no leak from the future, and every step's loss exactly once."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fused_nce.losses import CPCLoss, NCEOutput, cpc_nce
from fused_nce.models import CPC
from fused_nce.models.cpc import SampledCPCLoss
from fused_nce.models.encoders.cpc import AudioEncoder, GRUContext, PatchEncoder, PixelCNN, shake
from fused_nce.models.encoders.patches import grid_side, to_grid, to_patches
from tests.refusals import unlike

TINY_VISION: dict[str, Any] = {"image_size": 16, "patch_size": 4, "width": 2, "stages": (1, 1, 1)}


def audio(**settings):
    torch.manual_seed(0)
    return CPC.audio(**({"channels": 12, "hidden": 8, "steps": 3} | settings))


def vision(**settings):
    torch.manual_seed(0)
    return CPC.vision(**(TINY_VISION | settings))


def waves(count=3, samples=1600):
    return torch.randn(count, samples, generator=torch.Generator().manual_seed(1))


def gradient(x):
    assert x.grad is not None
    return x.grad


def dense(c, z, predict, ahead, *, same=None):
    """One step's loss, a candidate at a time: c (B, C, R, W), z (B, D, R, W)."""
    images, _, rows, columns = z.shape
    places = [(b, r, x) for b in range(images) for r in range(rows - ahead) for x in range(columns)]
    losses = []
    for b, r, x in places:
        guess = predict.weight @ c[b, :, r, x]
        candidates = [p for p in places if same is None or p[0] == b]
        scores = torch.stack([guess @ z[p, :, s + ahead, y] for p, s, y in candidates])
        losses.append(F.cross_entropy(scores[None], torch.tensor([candidates.index((b, r, x))])))
    return torch.stack(losses).mean()


def test_five_line_loop_learns():
    t = torch.arange(1600) / 100
    x = torch.stack([torch.sin(t * (k + 1)) for k in range(8)])
    model = audio(channels=32, hidden=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(model(x).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 1
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("negatives", ["batch", "sequence"])
@pytest.mark.parametrize("make", [audio, vision])
def test_the_loss_is_the_dense_one_and_every_step_counts_once(make, negatives):
    """The reference of lightning-bolts counts offset i i times, and an offset beyond the map as well."""
    model = make(steps=2, negatives=negatives).double()
    x = waves(2, 960).double() if make is audio else torch.randn(2, 3, 16, 16).double()
    z, c = model._grids(x)
    expected = [
        dense(c, z, predict, model.skip + k, same=None if negatives == "batch" else True)
        for k, predict in enumerate(model.predict, 1)
    ]
    out = model(x)
    torch.testing.assert_close(out.loss, sum(expected) / 2, rtol=1e-9, atol=1e-12)
    for k, loss in enumerate(expected, 1):
        torch.testing.assert_close(out.stats[f"step{k}/nce"], loss.detach(), rtol=1e-9, atol=1e-12)


def test_the_loss_is_called_once_a_step_with_all_positions():
    class Count(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = []

        def forward(self, predictions, targets, groups):
            self.calls.append((tuple(predictions.shape), tuple(targets.shape), groups.tolist()))
            loss = predictions.mean()
            return NCEOutput(loss, loss, 0 * loss, {"step0/x": loss.detach(), "x": loss.detach()})

    model = audio(steps=2, negatives="sequence", loss=Count())
    out = model(waves(2, 960))
    assert model.loss.loss.calls == [((1, 2 * n, 12), (1, 2 * n, 12), [0] * n + [1] * n) for n in (5, 4)]
    assert out.stats.keys() == {"nce", "x", "step1/nce", "step1/x", "step2/nce", "step2/x"}


def test_the_audio_encoder_is_the_papers():
    model = CPC.audio()
    encoder = model.encoder
    assert isinstance(encoder, AudioEncoder)
    assert encoder.frames(20480) == 128
    convs = [layer for layer in encoder.layers if isinstance(layer, nn.Conv1d)]
    assert [(c.kernel_size[0], c.stride[0], c.out_channels) for c in convs] == [
        (10, 5, 512), (8, 4, 512), (4, 2, 512), (4, 2, 512), (4, 2, 512)
    ]  # fmt: skip
    assert math.prod(c.stride[0] for c in convs) == 160
    assert len(model.predict) == 12
    assert all(p.weight.shape == (512, 256) and p.bias is None for p in model.predict)


@pytest.mark.parametrize("samples", [800, 1601, 2000])
def test_audio_taps(samples):
    model = audio()
    taps = model.encode(waves(2, samples))
    frames = model.encoder.frames(samples)
    assert {name: tuple(tap.shape) for name, tap in taps.items()} == {"z_t": (2, 12, frames), "c_t": (2, 8, frames)}
    torch.testing.assert_close(model.encode(waves(2, samples)[:, None])["c_t"], taps["c_t"])


@pytest.mark.parametrize("context", ["pixelcnn", "gru", "none"])
def test_vision_taps(context):
    taps = vision(context=context, hidden=6).encode(torch.randn(2, 3, 16, 16))
    hidden = 32 if context == "none" else 6
    assert {name: tuple(tap.shape) for name, tap in taps.items()} == {"z_t": (2, 32, 7, 7), "c_t": (2, hidden, 7, 7)}


def test_the_patch_encoder_is_the_papers():
    with torch.device("meta"):
        model = CPC.vision(image_size=256, patch_size=64, stages=(3, 4, 23), stem="large")
        assert model.encode(torch.empty(1, 3, 256, 256))["z_t"].shape == (1, 1024, 7, 7)
    assert not [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    convs = [m for m in model.encoder.modules() if isinstance(m, nn.Conv2d)]
    # The stem, 30 bottlenecks of three and the three shortcuts of the stages: 91 of ResNet-101's 100 convolutions.
    assert len(convs) == 1 + 3 * 30 + 3


@pytest.mark.parametrize("context", [PixelCNN(5, 6), GRUContext(5, 6), PixelCNN(5, 6, 1)])
def test_a_context_sees_no_later_row(context):
    torch.manual_seed(0)
    for row in range(7):
        z = torch.randn(1, 5, 7, 7, requires_grad=True)
        context(z)[0, :, row, 3].square().sum().backward()
        touched = gradient(z)[0].abs().sum((0, 2)) > 0
        assert not touched[row + 1 :].any()
        assert touched[row]
        assert row == 0 or touched[row - 1]


def test_a_pixelcnn_sees_its_own_row_and_reaches_up_a_row_a_layer():
    z = torch.randn(1, 5, 7, 7, requires_grad=True)
    PixelCNN(5, 6, layers=2)(z)[0, :, 4, 3].square().sum().backward()
    touched = gradient(z)[0].abs().sum(0) > 0
    assert touched.any(1).tolist() == [False, False, True, True, True, False, False]
    assert touched[4].tolist() == [False, True, True, True, True, True, False]


@pytest.mark.parametrize("make", [audio, vision])
def test_a_prediction_has_not_seen_its_target(make):
    """With `skip` = 1 the patch of the first target starts where the context's ends."""
    model = make(skip=1, steps=1)
    x = (waves(1) if make is audio else torch.randn(1, 3, 16, 16)).requires_grad_()
    _, c = model._grids(x)
    c[0, :, 0].square().sum().backward()
    along = gradient(x)[0].abs() if make is audio else gradient(x)[0].abs().sum((0, 2))
    last = int((along > 0).nonzero().max())
    assert last < (465 if make is audio else 4)  # the field of a frame; a patch


def test_patches_overlap_by_half_and_come_back_in_order():
    x = torch.arange(2 * 64.0).view(2, 1, 8, 8)
    patches = to_patches(x, 4)
    assert patches.shape == (2 * 9, 1, 4, 4)
    assert torch.equal(patches[9 + 3 * 1 + 2], x[1, :, 2:6, 4:8])
    grid = to_grid(patches[:, 0, :1, 0], 3)
    assert torch.equal(grid[:, 0], x[:, 0, 0:5:2, 0:5:2])
    assert [grid_side(*sizes) for sizes in ((256, 64), (64, 16), (32, 8))] == [7, 7, 7]


def test_jitter_moves_each_patch_on_its_own_and_only_in_training():
    torch.manual_seed(0)
    patches = torch.arange(1.0, 17).view(1, 1, 4, 4).expand(40, -1, -1, -1)
    moved = shake(patches, 2)
    assert moved.shape == patches.shape
    inner = moved[:, 0, 1:3, 1:3]
    assert (moved.sum((1, 2, 3)) == inner.sum((1, 2))).all()
    assert len({tuple(m.flatten().tolist()) for m in inner}) == 9
    for m in inner:
        i, j = divmod(int(m[0, 0]) - 1, 4)
        assert torch.equal(m, patches[0, 0, i : i + 2, j : j + 2])
    encoder = PatchEncoder(**TINY_VISION, jitter=2)
    x = torch.randn(1, 3, 16, 16)
    assert not torch.equal(encoder(x), encoder(x))
    encoder.eval()
    assert torch.equal(encoder(x), encoder(x))


def test_the_fused_loss_is_the_default():
    assert isinstance(audio().loss.loss, CPCLoss)
    assert audio(negatives="sequence").loss.loss.negatives == "sequence"


ERRORS = [
    (lambda: audio(steps=0), ValueError, "^steps: got 0, need >= 1$"),
    (lambda: audio(skip=-1), ValueError, "^skip: got -1, need >= 0$"),
    (lambda: audio(negatives="queue"), ValueError, "^negatives: got 'queue', need one of"),
    (lambda: audio(strides=(5, 4)), ValueError, "^strides: kernels, strides and paddings .* length, got 5, 2 and 5$"),
    (lambda: vision(steps=6), ValueError, "^steps: must be below the grid's 7 rows less skip = 1, got 6$"),
    (lambda: vision(patch_size=5), ValueError, "^patch_size: must be even, .* of a half that tile 16 px, got 5$"),
    (lambda: vision(context="lstm"), ValueError, "^context: got 'lstm', need one of 'pixelcnn', 'gru', 'none'$"),
    (lambda: vision(stem="big"), ValueError, "^stem: must be 'small' or 'large', got 'big'$"),
    (lambda: vision(stages=(1, 1)), ValueError, r"^stages: must be three numbers of at least 1, got \(1, 1\)$"),
    (lambda: vision(jitter=4), ValueError, r"^jitter: must be in \[0, 4 px\), got 4$"),
    (lambda: vision(layers=0), ValueError, "^layers: got 0, need >= 1$"),
    (lambda: audio()(torch.zeros(2, 2, 1600)), ValueError, r"^x: must be \(B, samples\) or .* got \(2, 2, 1600\)$"),
    (lambda: audio()(torch.zeros(2, 40)), ValueError, "^x: 40 samples give no frame"),
    (lambda: audio()(torch.zeros(2, 480)), ValueError, r"^x: gives 3 rows, need more than skip \+ steps = 3"),
    (lambda: audio(negatives="sequence")(torch.zeros(2, 640)), ValueError, "leaves the farthest step no negative"),
    (lambda: vision()(torch.zeros(2, 3, 32, 32)), ValueError, r"^x: must be \(B, 3, 16, 16\) images, got \(2, 3, 3"),
]


def test_refusals():
    assert unlike(ERRORS) == []


def test_sampled_negatives_are_the_softmax_over_the_sample():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 5, 4, dtype=torch.float64, requires_grad=True)
    drawn = torch.tensor([[1, 2], [0, 0], [4, 1], [0, 2], [3, 1]])
    out = cpc_nce(q, k, negatives=drawn)
    scores = torch.stack([q[0, i] @ k[0, [i, *drawn[i].tolist()]].T for i in range(5)])
    torch.testing.assert_close(out.loss, F.cross_entropy(scores, torch.zeros(5, dtype=torch.long)))
    for name, sign in (("nce_minus_chance", 1), ("mi_bound", -1)):
        torch.testing.assert_close(out.stats[name], sign * (out.loss.detach() - math.log(3)))
    torch.testing.assert_close(out.stats["top1"], (scores.argmax(1) == 0).double().mean())


def test_the_sample_never_holds_the_positive_and_reaches_all_others(monkeypatch):
    """Equal targets: a row's loss is log(1 + count) whatever was drawn, unless its own is told apart."""
    seen, real = [], torch.randint

    def watched(*args, **options):
        seen.append(real(*args, **options))
        return seen[-1]

    monkeypatch.setattr(torch, "randint", watched)
    q = torch.zeros(1, 6, 2)
    assert SampledCPCLoss(200)(q, q).loss == pytest.approx(math.log(201))
    drawn = seen[0] + (seen[0] >= torch.arange(6)[:, None])
    assert [sorted(set(row)) for row in drawn.tolist()] == [[j for j in range(6) if j != i] for i in range(6)]
    # Every target but a row's own is a far one: with the own among the negatives the loss could not vanish.
    far = 100 * torch.eye(6)[None]
    assert SampledCPCLoss(50)(far, far).loss < 1e-6


def test_a_single_position_has_no_sample():
    with pytest.raises(ValueError, match="targets: got N = 1, need at least 2"):
        SampledCPCLoss()(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2))
    with pytest.raises(ValueError, match="sampled: got 0, need >= 1"):
        audio(negatives="sampled", sampled=0)


def test_the_model_trains_on_sampled_negatives():
    model = audio(negatives="sampled", sampled=4)
    assert model.loss.loss.count == 4
    out = model(waves())
    out.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert 0 <= out.stats["step3/top1"] <= 1
