"""A cached step has the gradient of one pass over the whole batch, the same draws, and one all-reduce."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import spectral_norm

from fused_nce import AMDIMLoss, GradientCache, info_nce
from fused_nce.models import AMDIM, SupCon

from .distributed.launch import run
from .refusals import unlike

BATCH, WIDE = 12, 6


class Encoder(nn.Module):
    """Two views through one network."""

    def __init__(self, *middle):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDE, 8), *middle, nn.Tanh(), nn.Linear(8, 5)).double()

    def forward(self, views):
        return {"q": self.net(views[0]), "k": self.net(views[1]), "labels": views[2]}


class Exact(nn.Linear):
    """A layer in float32 also where the others are under autocast."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class Loss(nn.Module):
    """InfoNCE whose scale is learned, and a parameter that nothing uses."""

    def __init__(self, group=None):
        super().__init__()
        self.group = group
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, maps):
        assert maps["labels"].dtype == torch.int64
        return info_nce(maps["q"], maps["k"], temperature=1 / self.scale.exp(), group=self.group)


def views(rows=BATCH):
    generator = torch.Generator().manual_seed(5)
    pair = [torch.randn(rows, WIDE, generator=generator, dtype=torch.float64) for _ in range(2)]
    return (*pair, torch.arange(rows))


def pair_of(*middle):
    torch.manual_seed(1)
    return Encoder(*middle), Loss()


def gradients(*modules):
    return [p.grad for module in modules for p in module.parameters()]


def assert_same(found, exact, relative=1e-12):
    assert [g is None for g in found] == [g is None for g in exact]
    for g, e in zip(found, exact, strict=True):
        if g is not None:
            assert (g - e).abs().max() <= relative * e.abs().max().clamp(min=1e-30)


@pytest.mark.parametrize("part", [1, 5, 12, 99])
def test_gradients_are_those_of_one_pass(part):
    encoder, loss = pair_of()
    plain = loss(encoder(views()))
    plain.loss.backward()
    exact = gradients(encoder, loss)
    encoder, loss = pair_of()
    with torch.set_grad_enabled(part != 5):  # whatever the caller is under
        out = GradientCache(encoder, loss, part=part).backward(views())
    assert_same([out.loss], [plain.loss.detach()])
    assert not out.loss.requires_grad
    assert_same(gradients(encoder, loss), exact)


def test_gradients_add_to_what_is_there_and_are_scaled():
    encoder, loss = pair_of()
    step = GradientCache(encoder, loss, part=5)
    step.backward(views())
    once = [None if g is None else g.clone() for g in gradients(encoder, loss)]
    step.backward(views(), scale=lambda x: 4 * x)
    assert_same(gradients(encoder, loss), [None if g is None else 5 * g for g in once])


def test_dropout_draws_the_same_twice_and_goes_on_after_the_loss():
    encoder, loss = pair_of(nn.Dropout(0.5))
    torch.manual_seed(2)
    parts = [encoder([x[i : i + 5] for x in views()]) for i in range(0, BATCH, 5)]
    loss({name: torch.cat([part[name] for part in parts]) for name in parts[0]}).loss.backward()
    exact, following = gradients(encoder, loss), torch.rand(3)
    encoder, loss = pair_of(nn.Dropout(0.5))
    torch.manual_seed(2)
    GradientCache(encoder, loss, part=5).backward(views())
    assert_same(gradients(encoder, loss), exact)
    assert torch.equal(torch.rand(3), following)


def test_running_statistics_move_once_a_part():
    encoder, loss = pair_of(nn.BatchNorm1d(8))
    with torch.no_grad():
        for i in range(0, BATCH, 4):
            encoder([x[i : i + 4] for x in views()])
    exact = dict(encoder.named_buffers())
    encoder, loss = pair_of(nn.BatchNorm1d(8))
    GradientCache(encoder, loss, part=4).backward(views())
    assert {name for name, b in encoder.named_buffers() if not torch.equal(b, exact[name])} == set()
    assert all(isinstance(b, torch.Tensor) for b in encoder.net[1].buffers())


class Centred(nn.Module):
    """Less a moving mean, which is written to in place or anew."""

    mean: torch.Tensor

    def __init__(self, inplace):
        super().__init__()
        self.inplace = inplace
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        mean = self.mean.lerp(x.detach().mean(0), 0.5)
        self.mean = self.mean.copy_(mean) if self.inplace else mean
        return x - mean


MOVING = {
    "spectral": lambda: spectral_norm(nn.Linear(8, 8), n_power_iterations=1),
    "instance": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten()
    ),
    "in place": lambda: Centred(inplace=True),
    "anew": lambda: Centred(inplace=False),
}


@pytest.mark.parametrize("kind", MOVING)
def test_buffers_that_the_forward_moves_and_reads_are_those_of_the_first_pass(kind):
    encoder, loss = pair_of(MOVING[kind]())
    cached, its_loss = copy.deepcopy((encoder, loss))
    parts = [encoder([x[i : i + 5] for x in views()]) for i in range(0, BATCH, 5)]
    loss({name: torch.cat([part[name] for part in parts]) for name in parts[0]}).loss.backward()
    GradientCache(cached, its_loss, part=5).backward(views())
    assert_same(gradients(cached, its_loss), gradients(encoder, loss))
    assert_same(list(cached.buffers()), list(encoder.buffers()))


def amdim(use_bn=False):
    torch.manual_seed(3)
    model = AMDIM(ndf=2, n_rkhs=9, n_depth=1, use_bn=use_bn, init="kaiming", loss=AMDIMLoss(antecedents="all"))
    return model.double()


class Whole(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, maps):
        return self.model.loss(*self.model.finish(maps).inputs)


def test_amdim_is_exact_for_its_output_norms_see_the_whole_batch():
    images = torch.randn(2, 6, 3, 32, 32, dtype=torch.float64)
    model, cached = amdim(), amdim()
    plain = model(tuple(images))
    plain.loss.backward()
    step = GradientCache(cached.begin, Whole(cached), part=4)
    out = step.backward(tuple(images))
    assert_same([out.loss], [plain.loss.detach()])
    # A bias before a BatchNorm has the gradient 0: what is left of it is measured by the largest gradient.
    largest = max(g.abs().max() for g in gradients(model) if g is not None)
    for g, e in zip(gradients(cached), gradients(model), strict=True):
        assert (g - e).abs().max() <= 1e-12 * largest
    for (name, b), e in zip(cached.named_buffers(), model.buffers(), strict=True):
        assert torch.allclose(b, e, rtol=1e-12, atol=1e-12), name


def test_labels_reach_a_models_loss():
    model = SupCon(backbone="tiny", layers=1).eval().double()
    images, labels = torch.randn(2, 6, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 2, 2])
    batch = (*images, labels)
    model(batch).loss.backward()
    exact = gradients(model)
    model.zero_grad()
    step = GradientCache(model.begin, lambda begun: model.loss(*model.finish(begun, [labels]).inputs), part=4)
    step.backward(batch)
    assert_same(gradients(model), exact, 1e-11)


def test_under_autocast_one_part_has_the_bits_of_the_plain_step():
    def fresh():
        torch.manual_seed(0)
        encoder, loss = pair_of(Exact(8, 8))
        return encoder.float(), loss.float()

    inputs = [x.float() if x.is_floating_point() else x for x in views()]
    encoder, loss = fresh()
    with torch.autocast("cpu", torch.bfloat16):
        plain = loss(encoder(inputs)).loss
    plain.backward()  # outside, for autocast would cast what was float32 before
    exact = gradients(encoder, loss)
    encoder, loss = fresh()
    with torch.autocast("cpu", torch.bfloat16):
        GradientCache(encoder, loss, part=BATCH).backward(inputs, scale=lambda x: x * 2.0**10)
    assert_same([None if g is None else g / 2**10 for g in gradients(encoder, loss)], exact, 0.0)


def train(rank):
    """The gradients of a cached step under DDP, and how often it reduced."""
    dist.barrier()
    encoder, _ = pair_of()
    loss = Loss(group="world")
    loss.idle.requires_grad_(False)
    step = GradientCache(encoder, loss, part=2)
    ddp = DistributedDataParallel(step)
    buckets = []

    def hook(state, bucket):
        buckets.append(bucket.index())
        work = dist.all_reduce(bucket.buffer().div_(2), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    ddp.register_comm_hook(None, hook)
    size = BATCH // 2
    for _ in range(2):  # DDP makes its buckets anew after the first step
        ddp.zero_grad()
        buckets.clear()
        step.backward([x[rank * size : (rank + 1) * size] for x in views()], through=ddp)
    return gradients(encoder, loss), buckets


@pytest.mark.nightly
def test_under_ddp_gradients_are_those_of_one_process_in_one_reduction(tmp_path):
    encoder, loss = pair_of()
    loss(encoder(views())).loss.backward()
    for found, buckets in run(tmp_path, 2, train):
        assert_same(found, gradients(encoder, loss))
        assert buckets == [0]


def test_a_function_that_captures_a_parameter_is_refused():
    """The gradient of one pass would reach it; a module's own method or a held parameter is fine."""
    norm, scale, x = nn.BatchNorm1d(WIDE), nn.Parameter(torch.tensor(2.0)), torch.randn(6, WIDE)
    for step, name, shape in (
        (GradientCache(norm, lambda z: (scale.exp() * z).sum(), part=4), "loss", r"\(\)"),
        (GradientCache(lambda z: norm(z), lambda z: z.sum(), part=4), "encoder", r"\(6,\)"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: uses a parameter of shape {shape} that no module"):
            step.backward(x, through=None if name == "loss" else step)  # as under DDP, which would not reduce it
        assert gradients(norm) == [None, None]
    GradientCache(lambda z: norm(z), lambda z: z.sum(), part=4).backward(x)
    assert norm.bias.grad is not None
    x.requires_grad_()
    GradientCache(norm.forward, lambda z: (z * norm.weight).sum(), part=4).backward(x)
    GradientCache(lambda z: z.exp(), lambda z: z.sum(), part=4).backward(x)  # an input is no parameter
    assert x.grad is not None
    assert norm.weight.grad is not None


def cache(encoder=lambda x: x, part=2):
    return GradientCache(encoder, lambda x: x.sum(), part=part)


TWO = [torch.ones(3, WIDE), torch.ones(4, WIDE)]
ERRORS = [
    (lambda: cache().backward(TWO), ValueError, r"^inputs: got tensors of \[3, 4\] rows"),
    (lambda: cache().backward([]), ValueError, "^inputs: got list, need tensors"),
    (lambda: cache().backward(TWO[0][:0]), ValueError, r"^inputs: got tensors of \[0\] rows"),
    (lambda: cache(lambda x: x[:1]).backward(TWO[1]), ValueError, r"outputs: got tensors of \[1\] rows, need 2"),
    (lambda: cache(part=0), ValueError, "^part: got 0, need >= 1"),
    (lambda: cache(part=2.0), TypeError, "^part: got float"),
]


def test_what_is_refused():
    assert unlike(ERRORS) == []


def test_buffers_that_two_modules_share_or_that_come_with_the_first_part():
    class Scaled(nn.Module):
        scale: torch.Tensor

        def __init__(self, scale, moves):
            super().__init__()
            self.moves = moves
            self.register_buffer("scale", scale)

        def forward(self, x):
            if self.moves:
                self.scale.mul_(0.9)
            return x * self.scale

    x, scale = torch.randn(8, 5), torch.ones(5)
    linear = nn.Linear(5, 5)
    shared = nn.Sequential(linear, Scaled(scale, True), Scaled(scale, False))
    GradientCache(shared, lambda z: z.square().sum(), part=4).backward(x)
    z = torch.cat([linear(part) * 0.9**n * 0.9**n for n, part in enumerate(x.split(4), 1)])
    (wanted,) = torch.autograd.grad(z.square().sum(), linear.weight)
    torch.testing.assert_close(linear.weight.grad, wanted)
    lazy = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d())
    GradientCache(lazy, lambda z: z.square().sum(), part=4).backward(x)
    assert lazy[1].num_batches_tracked == 2
