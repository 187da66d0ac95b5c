"""AMDIM's loss against dense implementations written from the papers' text, and the module over feature maps."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

from fused_nce import AMDIMLoss, NCEOutput, NTXentLoss, amdim_nce, nt_xent, tile_loss
from fused_nce.core.spec import Block, Spec, TanhClip
from fused_nce.core.tails import Nce
from fused_nce.losses import amdim
from fused_nce.losses.amdim import PRESETS
from tests.layouts import LAYOUTS

F64 = ("reference", "chunked")


def maps(batch=5, d=6, sides=(1, 5, 7), seed=0, dtype=torch.float64):
    """Feature maps of one view, (B, D, H, W) each."""
    g = torch.Generator().manual_seed(seed)
    return {
        f"f{s}": torch.randn(batch, d, s, s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in sides
    }


def dense_paper(r_src, r_trg, strength=0.04, clip=20.0):
    """Eq. 4-5 as written: Φ = φ₁ᵀφ₇ without a scale, 0.04·Φ², each positive against all locations of other images.

    Args:
        r_src: (n, d) antecedents.
        r_trg: (n, n_c, d) consequents.
        strength: λ.
        clip: c of c·tanh(Φ/c).
    """
    n, n_c, _ = r_trg.shape
    phi = torch.einsum("id,kjd->ikj", r_src, r_trg)
    squared = strength * phi.square().mean()
    phi = clip * torch.tanh(phi / clip)
    loss = phi.new_zeros(())
    for i in range(n):
        others = torch.cat([phi[i, k] for k in range(n) if k != i])
        for j in range(n_c):
            loss = loss + torch.logsumexp(torch.cat([phi[i, i, j : j + 1], others]), 0) - phi[i, i, j]
    return loss / (n * n_c), squared


def dense_amdim_public(r_src, r_trg, strength=0.05, clip=20.0):
    """The nine steps of amdim-public's `_model_scores`: 1/√d, filler −c, max over the negatives, mask applied twice."""
    n, n_c, d = r_trg.shape
    mask = torch.eye(n, dtype=r_src.dtype)[:, :, None]
    scores = (r_src @ r_trg.reshape(n * n_c, d).T).view(n, n, n_c) / math.sqrt(d)
    squared = strength * scores.square().mean()
    scores = clip * torch.tanh(scores / clip)
    positive = (mask * scores).sum(1)
    negative = ((1 - mask) * scores - clip * mask).reshape(n, -1)
    top = negative.max(1, keepdim=True).values
    mass = ((1 - mask).expand(n, n, n_c).reshape(n, -1) * torch.exp(negative - top)).sum(1, keepdim=True)
    log_sum = torch.log(torch.exp(positive - top) + mass)
    return -((positive - top) - log_sum).mean(), squared


DENSE = {"paper": dense_paper, "amdim-public": dense_amdim_public}


@pytest.mark.parametrize("preset", DENSE)
@pytest.mark.parametrize("backend", F64)
@pytest.mark.parametrize("seed", range(3))
def test_preset_equals_its_source(preset, backend, seed):
    """The multi-scale objective: pairs summed, directions averaged; values and all gradients."""
    views = [{name: x for name, x in maps(seed=2 * seed + i).items() if name != "f5"} for i in range(2)]
    if seed == 2:  # scores that the clip bends
        views = [{name: (4 * x).detach().requires_grad_() for name, x in view.items()} for view in views]
    leaves = [x for view in views for x in view.values()]
    pairs = ("1>7", "7>1")
    out = AMDIMLoss(pairs, antecedents="all", preset=preset, backend=backend)(*views)
    nce, squared = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for one, two in (views, views[::-1]):
        for pair in pairs:
            source, target = (f"f{side}" for side in pair.split(">"))
            rows, columns = (x.flatten(2).transpose(1, 2) for x in (one[source], two[target]))
            for location in rows.unbind(1):
                parts = DENSE[preset](location, columns)
                nce = nce + parts[0] / rows.shape[1] / 2
                squared = squared + parts[1] / rows.shape[1] / 2
    assert out.nce.item() == pytest.approx(nce.item(), rel=1e-12)
    assert out.penalty.item() == pytest.approx(squared.item(), rel=1e-12)
    assert out.loss.item() == pytest.approx((nce + squared).item(), rel=1e-12)
    exact = torch.autograd.grad(nce + squared, leaves)
    for found, value in zip(torch.autograd.grad(out.loss, leaves), exact, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-12)


def test_presets_are_what_the_docstring_says():
    assert PRESETS["paper"] == {"scale": 1.0, "clip": 20.0, "penalty": 0.04}
    assert PRESETS["amdim-public"] == {"scale": None, "clip": 20.0, "penalty": 0.05}
    assert AMDIMLoss().settings == {"scale": None, "clip": 20.0, "penalty": 0.04}  # the default is neither


def test_penalty_keeps_its_full_weight_on_each_pair():
    """½ over the directions, a sum over the pairs: unit scores cost 3λ."""
    view = {name: torch.ones_like(x) / 6**0.25 for name, x in maps().items()}  # ⟨a, c⟩/√6 = 1
    out = AMDIMLoss(antecedents="all")(view, view)
    assert out.penalty.item() == pytest.approx(3 * 0.04, rel=1e-12)


def test_all_antecedents_are_the_rows_of_each_image():
    one, two = maps(seed=1), maps(seed=2)
    whole = AMDIMLoss(("5>7",), "all", backend="chunked")(one, two)
    rows = one["f5"].flatten(2).transpose(1, 2)
    columns = two["f7"].flatten(2).transpose(1, 2)
    there = [amdim_nce(rows[:, j], columns, backend="chunked").nce for j in range(25)]
    back_rows, back_columns = two["f5"].flatten(2).transpose(1, 2), one["f7"].flatten(2).transpose(1, 2)
    back = [amdim_nce(back_rows[:, j], back_columns, backend="chunked").nce for j in range(25)]
    assert whole.nce.item() == pytest.approx(torch.stack(there + back).mean().item(), rel=1e-13)


def test_sample_draws_one_location_an_image_and_view():
    one, two = maps(seed=1), maps(seed=2)
    loss = AMDIMLoss(("5>5",), "sample", backend="chunked")
    torch.manual_seed(0)
    first = loss(one, two)
    second = loss(one, two)
    torch.manual_seed(0)
    again = loss(one, two)
    assert torch.equal(first.loss, again.loss)
    assert not torch.equal(first.loss, second.loss)
    # The antecedent's gradient reaches one location, the consequent's all 25.
    frozen = {name: x.detach() for name, x in two.items()}
    (g,) = torch.autograd.grad(
        amdim_nce(loss._antecedents("f5", one), frozen["f5"].flatten(2).transpose(1, 2)).loss, one["f5"]
    )
    assert ((g != 0).any(1).flatten(1).sum(1) == 1).all()


def test_every_location_is_drawn():
    loss, view = AMDIMLoss(("5>5",)), {"f5": torch.arange(25.0).view(1, 1, 5, 5).expand(400, 1, 5, 5)}
    assert loss._antecedents("f5", view).unique().numel() == 25


@pytest.mark.parametrize("pair", ["1>5", "1>7", "5>5", "5>7", "7>7", "7>1"])
@pytest.mark.parametrize("antecedents", ["sample", "all"])
def test_any_pair(pair, antecedents):
    one, two = maps(seed=1, dtype=torch.float32), maps(seed=2, dtype=torch.float32)
    out = AMDIMLoss((pair,), antecedents)(one, two)
    out.loss.backward()
    source, target = pair.split(">")
    for view in (one, two):
        assert view[f"f{source}"].grad.abs().sum() > 0
        assert view[f"f{target}"].grad.abs().sum() > 0
    assert set(out.stats) >= {"top1", "mi_bound", f"{pair}/top1", f"{pair}/mi_bound"}


def test_flat_global_vector_equals_a_1x1_map():
    one, two = maps(seed=1), maps(seed=2)
    flat = [{**view, "f1": view["f1"].flatten(1)} for view in (one, two)]
    loss = AMDIMLoss(("1>5", "1>7"))
    assert torch.equal(loss(one, two).loss, loss(*flat).loss)


def test_channels_last_maps(backend):
    """What a convolution hands over in channels-last memory."""
    one, two = maps(seed=1, dtype=torch.float32), maps(seed=2, dtype=torch.float32)
    last = [
        {name: x.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for name, x in view.items()}
        for view in (one, two)
    ]
    loss = AMDIMLoss(("1>5", "1>7"), backend=backend)
    for views in ((one, two), last):
        loss(*views).loss.backward()
    for view, other in zip((one, two), last, strict=True):
        for name in ("f1", "f5", "f7"):
            torch.testing.assert_close(view[name].grad, other[name].grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_both_arguments(backend, layout):
    g = torch.Generator().manual_seed(1)
    a, c = torch.randn(6, 8, generator=g), torch.randn(6, 3, 8, generator=g)
    plain = amdim_nce(a, c, backend=backend)
    laid = amdim_nce(LAYOUTS[layout](a), LAYOUTS[layout](c.view(18, 8)).unflatten(0, (6, 3)), backend=backend)
    torch.testing.assert_close(laid.loss, plain.loss, rtol=1e-6, atol=0)
    permuted = amdim_nce(a, c.permute(0, 2, 1).contiguous().permute(0, 2, 1), backend=backend)
    torch.testing.assert_close(permuted.loss, plain.loss, rtol=1e-6, atol=0)


# ---- the function -----------------------------------------------------------------------------------------------


def test_default_scale_is_the_root_of_the_width():
    a, c = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 3, 9, dtype=torch.float64)
    assert torch.equal(amdim_nce(a, c).loss, amdim_nce(a, c, scale=1 / 3).loss)


def test_reductions_speak_of_nce_alone():
    a, c = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 3, 9, dtype=torch.float64)
    mean, total, none = (amdim_nce(a, c, reduction=name) for name in ("mean", "sum", "none"))
    assert none.nce.shape == (4, 3)
    assert torch.equal(mean.penalty, total.penalty)
    assert torch.equal(mean.penalty, none.penalty)
    torch.testing.assert_close(none.nce.mean(), mean.nce)
    torch.testing.assert_close(none.nce.sum(), total.nce)
    torch.testing.assert_close(none.loss, mean.loss)
    torch.testing.assert_close(total.loss, total.nce + total.penalty)


def test_learnable_scale():
    a, c = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 3, 9, dtype=torch.float64)
    scale = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(amdim_nce(a, c, scale=scale).loss, scale)
    low, high = (amdim_nce(a, c, scale=0.4 + h).loss for h in (-1e-5, 1e-5))
    assert slope.item() == pytest.approx(((high - low) / 2e-5).item(), rel=1e-7)


def test_output_is_named_and_its_stats_detached(backend):
    out = amdim_nce(torch.randn(4, 8, requires_grad=True), torch.randn(4, 3, 8), backend=backend)
    assert isinstance(out, NCEOutput)
    assert list(out.stats) == ["top1", "pos_mean", "neg_lse_mean", "nce_minus_chance", "mi_bound"]
    assert not any(x.requires_grad for x in out.stats.values())
    assert all(x.requires_grad for x in out[:3])
    assert out.loss.dtype == torch.float32


def test_one_image_alone(backend):
    a, c = torch.randn(1, 8, requires_grad=True), torch.randn(1, 3, 8, requires_grad=True)
    with pytest.warns(UserWarning, match="one image has no negatives"):
        out = amdim_nce(a, c, backend=backend)
    assert out.nce.item() == 0
    assert torch.equal(out.loss, out.penalty)
    assert out.penalty > 0
    for g in torch.autograd.grad(out.nce, (a, c)):
        assert torch.equal(g, torch.zeros_like(g))


def test_the_warning_is_of_the_callers_line(backend):
    q = torch.randn(1, 8)
    view = {f"f{size}": torch.randn(1, 8, size, size) for size in (1, 5, 7)}
    compiled = torch.compile(lambda q: nt_xent(q, q, backend=backend).loss, backend="eager")
    calls = {
        "function": lambda: nt_xent(q, q, backend=backend),
        "module": lambda: NTXentLoss(backend=backend)(q, q),
        "pairs": lambda: AMDIMLoss(backend=backend)(view, view),
        "engine": lambda: tile_loss(q, q, Spec(Block(1)), Nce(), backend=backend),
        "compiled": lambda: compiled(q),
    }
    for name, call in calls.items():
        with pytest.warns(UserWarning, match="one image has no negatives") as caught:
            call()
        assert {w.filename for w in caught} == {__file__}, name


def test_two_images_do_not_warn(backend, recwarn):
    amdim_nce(torch.randn(2, 8), torch.randn(2, 3, 8), backend=backend)
    assert not [w for w in recwarn if "no negatives" in str(w.message)]


# ---- the module as an object ------------------------------------------------------------------------------------


def test_copy_and_pickle():
    loss = AMDIMLoss(("5>7",), "all", preset="paper", backend="chunked")
    one, two = maps(seed=1), maps(seed=2)
    expected = loss(one, two).loss
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin(one, two).loss, expected)
        assert repr(twin) == repr(loss)
    assert loss.state_dict() == {}


def test_repr_tells_the_settings():
    text = repr(AMDIMLoss(preset="paper"))
    assert "1>5" in text
    assert "'scale': 1.0" in text


def test_preset_is_not_shared_between_modules():
    one = AMDIMLoss(preset="paper")
    one.settings["penalty"] = 1.0
    assert AMDIMLoss(preset="paper").settings["penalty"] == 0.04


def test_specs_are_hashable_and_equal():
    assert hash(Block(49)) == hash(Block(49))
    assert TanhClip(20.0) == TanhClip(20.0) != TanhClip(10.0)


@pytest.mark.parametrize("antecedents", ["sample", "all"])
def test_sources_of_one_row_share_a_problem_and_keep_their_own_numbers(backend, antecedents, monkeypatch):
    """1→5 and 5→5 of one direction are one call; the value, the gradients and each pair's report are those of two."""
    calls: list[int] = []
    plain = amdim.tile_losses

    def counted(parts, **options):
        calls.extend(len(part.q) for part in parts)
        return plain(parts, **options)

    monkeypatch.setattr(amdim, "tile_losses", counted)
    views = [maps(seed=seed, dtype=torch.float32) for seed in (1, 2)]
    leaves = [x for view in views for x in view.values()]
    pairs = ("1>5", "1>7", "5>5")
    torch.manual_seed(3)
    whole = AMDIMLoss(pairs, antecedents, backend=backend)(*views)
    assert len(calls) == (4 if antecedents == "sample" else 6)
    assert sorted(calls)[:2] == [5, 5]
    gradients = torch.autograd.grad(whole.loss, leaves)
    torch.manual_seed(3)
    total = [torch.zeros(()) for _ in range(3)]
    for pair in pairs:  # one after the other; only 5>5 draws, and in the same order
        out = AMDIMLoss((pair,), antecedents, backend=backend)(*views)
        total = [x + y for x, y in zip(total, out[:3], strict=True)]
        for name in ("top1", "pos_mean", "neg_lse_mean", "nce_minus_chance", "mi_bound"):
            torch.testing.assert_close(whole.stats[f"{pair}/{name}"], out.stats[name], rtol=1e-5, atol=1e-6)
    for x, y in zip(whole[:3], total, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-6, atol=0)
    for x, y in zip(gradients, torch.autograd.grad(total[0], leaves), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-7)
