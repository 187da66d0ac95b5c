"""AMDIM's noise-contrastive loss (Bachman, Hjelm, Buchwalter 2019, arXiv:1906.00910).

Every image is scored against every location of every other image: s = scale·⟨a_i, c_kj⟩, clipped softly to
t = clip·tanh(s / clip). Each of the n_c locations of the row's own image is one positive, classified against all
locations of all other images; its siblings are left out. A penalty λ·mean(s²) over all raw scores pulls saturated
ones back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fused_nce.core import checks
from fused_nce.core.engine import Term, as_matmul, loss_of, tile_losses
from fused_nce.core.group import Group, peers
from fused_nce.core.spec import Block, Identity, Spec, TanhClip, cached
from fused_nce.core.tails import REDUCTIONS, REPORT, Nce
from fused_nce.losses.common import dense_nce
from fused_nce.losses.heard import heard
from fused_nce.losses.module import Copied
from fused_nce.losses.output import NCEOutput
from fused_nce.losses.registry import Entry, Size, dense_scores, features, register


@heard
def amdim_nce(
    antecedents: Tensor,  # (n_a, D), or (n_a, n_r, D): n_r rows of each image
    consequents: Tensor,  # (n_k, n_c, D)
    *,
    offset: int = 0,
    scale: float | Tensor | None = None,
    clip: float | None = 20.0,
    penalty: float = 0.04,
    reduction: str = "mean",
    group: Group = None,
    backend: str | None = None,
) -> NCEOutput:
    """AMDIM's NCE of one antecedent map against one consequent map, without holding the (n_a, n_k, n_c) scores.

    The default, scale 1/√D with λ = 0.04, is neither the paper's formula (no scale, λ = 0.04) nor amdim-public's (1/√D,
    λ = 0.05): scale, λ and clip are one package. `AMDIMLoss(preset=...)` has both.

    Args:
        antecedents: (n_a, D), one row an image, or (n_a, n_r, D), n_r rows an image; float64, 32, 16 or bfloat16.
        consequents: (n_k, n_c, D), the other view's n_c locations of n_k >= n_a images; same dtype and device.
        offset: row i's image is i + offset, among this process's own.
        scale: factor of the dot product, > 0; None is 1/√D, a 0-d tensor is learnable.
        clip: range c of the soft clip c·tanh(s/c), in units of the score; None for none.
        penalty: λ of λ·mean(s²) over all scores, before the clip.
        reduction: of `nce`: "mean" or "sum" over all positives, or "none" for (n_a·n_r, n_c). The penalty stays a mean.
        group: processes whose rows are negatives too (see `fused_nce.losses`); None for this one alone.
        backend: a name of `fused_nce.backends()`, or None to choose the fastest.

    Returns:
        NCEOutput(loss, nce, penalty, stats), float32 (float64 for float64 inputs), in nats. One image alone has no
        negatives: nce 0, with a warning. NaN or Inf in the features comes out in the loss and the gradients they reach.

    Raises:
        TypeError: another dtype than a float one, two dtypes outside autocast, or something that is not a dense tensor.
        ValueError: wrong rank, sizes that do not fit, an empty batch, two devices, clip <= 0, penalty < 0, a NaN.

    Example:
        ```
        amdim_nce(torch.randn(8, 16), torch.randn(8, 49, 16)).loss
        ```
    """
    check_features(antecedents, consequents, offset)
    check_settings(scale, clip, penalty, antecedents.device)
    checks.check_choice("reduction", reduction, REDUCTIONS)
    part = _part(antecedents, consequents, offset, clip, _tail(float(penalty), reduction))
    out = loss_of(*part[:4], scale=_scale(scale, antecedents), offset=offset, group=group, backend=backend)
    return NCEOutput(out.loss, out.nce, out.penalty, out.report)


def _part(
    antecedents: Tensor,  # (n_a, D) or (n_a, n_r, D)
    consequents: Tensor,  # (n_k, n_c, D)
    offset: int,
    clip: float | None,
    tail: Nce,
    report_groups: int = 1,
) -> Term:
    """The problem of checked arguments. A factor of the tail costs no pass over gradients."""
    n_c, d = consequents.shape[1:]
    rows_an_image = 1 if antecedents.dim() == 2 else antecedents.shape[1]
    spec = _spec(n_c, rows_an_image, None if clip is None else float(clip))
    return Term(antecedents.reshape(-1, d), consequents.reshape(-1, d), spec, tail, offset, report_groups)


@cached
def _spec(n_c: int, rows_per_image: int, clip: float | None) -> Spec:
    return Spec(Block(n_c, rows_per_image), Identity() if clip is None else TanhClip(clip))


_tail = cached(Nce)


def _scale(scale: float | Tensor | None, features: Tensor) -> float | Tensor:
    return 1 / math.sqrt(features.shape[-1]) if scale is None else scale  # fault: default-scale-1


def check_features(antecedents: Tensor, consequents: Tensor, offset: int) -> None:
    rows = ("n_a", "D") if not isinstance(antecedents, Tensor) or antecedents.dim() != 3 else ("n_a", "n_r", "D")
    checks.check_tensor("antecedents", antecedents, rows)
    checks.check_tensor("consequents", consequents, ("n_k", "n_c", "D"))
    checks.check_pair("antecedents", antecedents, "consequents", consequents)
    n_a, n_k = antecedents.shape[0], consequents.shape[0]
    offset = checks.checked_int("offset", offset)
    if offset < 0 or offset + n_a > n_k:
        raise ValueError(
            f"consequents: got n_k = {n_k} images for n_a = {n_a} antecedents at offset {offset}, "
            f"need 0 <= offset and n_k >= offset + n_a"
        )


def check_settings(scale: float | Tensor | None, clip: float | None, penalty: float, device: torch.device) -> None:
    if clip is not None:
        checks.check_number("clip", clip, above=0)
    checks.check_number("penalty", penalty, at_least=0)
    if scale is not None:
        checks.check_scale("scale", scale, device, above=0)


Settings = dict[str, float | Tensor | None]
DEFAULTS: Settings = {"scale": None, "clip": 20.0, "penalty": 0.04}
PRESETS: dict[str, Settings] = {
    # Bachman et al. 2019, eq. 4-5: a plain dot product.
    "paper": {"scale": 1.0, "clip": 20.0, "penalty": 0.04},
    # github.com/Philip-Bachman/amdim-public, costs.py and train.py.
    "amdim-public": {"scale": None, "clip": 20.0, "penalty": 0.05},  # fault: preset-another-lambda
}


class Keys(NamedTuple):
    """What one map is compared against."""

    columns: Tensor  # (n_k, n_c, D)
    offset: int  # the image of the first row
    group: Group  # whose columns are still to come


class AMDIMLoss(Copied):
    """The multi-scale AMDIM objective over feature maps of two views: pairs summed, both directions averaged.

    loss = Σ_pairs ½(nce₁→₂ + nce₂→₁) + ½ Σ_pairs (penalty₁→₂ + penalty₂→₁), so each pair's penalty has full weight λ.

    Args:
        pairs: "antecedent>consequent" map sizes; "5>7" and "7>7" work too.
        antecedents: "sample" draws one antecedent location an image, anew for each view and call; "all" uses every one.
        preset: "paper" or "amdim-public" gives scale, clip and penalty where they are not given; None is `amdim_nce`'s
            defaults, which are neither.
        scale, clip, penalty: as in `amdim_nce`; one that is given wins over the preset.
        group, backend: as in `amdim_nce`. A map that two pairs compare against is gathered once.

    Shape:
        each view: mapping of "f1", "f5", "f7" to (B, D, H, W), or (B, D) for a 1×1 map; any sizes that the pairs name.

    Example:
        ```
        views = [{f"f{s}": torch.randn(8, 16, s, s) for s in (1, 5, 7)} for _ in range(2)]
        AMDIMLoss()(*views).loss
        ```

    Returns:
        NCEOutput; `stats` has the mean over pairs of each number, and "1>5/top1" etc. for each pair.

    Raises:
        ValueError: for an unknown pair, preset or map; `amdim_nce` lists the rest.
    """

    gathers = True

    def __init__(
        self,
        pairs: Sequence[str] = ("1>5", "1>7", "5>5"),
        antecedents: str = "sample",
        *,
        preset: str | None = None,
        group: Group = None,
        backend: str | None = None,
        **settings: float | None,
    ) -> None:
        super().__init__()
        checks.check_choice("antecedents", antecedents, ("sample", "all"))
        checks.check_choice("preset", preset, (None, *PRESETS))
        if isinstance(pairs, str) or not pairs:
            raise ValueError(f"pairs: got {pairs!r}, need a non-empty sequence such as ('1>5', '1>7', '5>5')")
        for pair in pairs:
            sides = pair.split(">")
            if len(sides) != 2 or not all(side.isdigit() for side in sides):
                raise ValueError(f"pairs: got {pair!r}, need 'A>C' with the sizes of two maps, such as '1>5'")
        self.pairs = tuple(pairs)
        self.antecedents = antecedents
        checks.check_names("AMDIMLoss", settings, (*DEFAULTS, "pairs", "antecedents", "preset", "group", "backend"))
        self.settings: Settings = {**(PRESETS[preset] if preset else DEFAULTS), **settings}
        check_settings(**self.settings, device=torch.device("cpu"))  # type: ignore[arg-type]
        self.group, self.backend = group, backend

    def extra_repr(self) -> str:
        """The settings, as `print(module)` shows them."""
        return f"pairs={self.pairs}, antecedents={self.antecedents!r}, {self.settings}"

    def forward(self, view1: Mapping[str, Tensor], view2: Mapping[str, Tensor]) -> NCEOutput:
        """The loss of two views' maps."""
        views = (view1, view2)
        keys = self._keys(views)
        terms: list[Term] = []
        order: list[str] = []  # the pair of each line of the report; both ways come in the same one
        group: Group = None
        for i in (0, 1):
            for target, sources in self._by_target().items():
                against = keys[target, 1 - i]
                group = against.group
                rows = {source: self._antecedents(f"f{source}", views[i]) for source in sources}
                for each in rows.values():
                    check_features(each, against.columns, against.offset)
                for together in _together(rows):
                    terms.append(self._direction_problem([rows[source] for source in together], against))
                    order += [f"{source}>{target}" for source in together]
        scale = _scale(self.settings["scale"], terms[0].q)
        loss, nce, penalty, report = tile_losses(terms, scale=scale, group=group, backend=self.backend)
        ways = report.view(2, len(order) // 2, len(REPORT)).mean(dim=0)
        stats = dict(zip(REPORT, ways.mean(dim=0).unbind(0), strict=True))
        named = dict(zip(order, ways.unbind(0), strict=False))
        for pair in self.pairs:
            stats |= {f"{pair}/{name}": x for name, x in zip(REPORT, named[pair].unbind(0), strict=True)}
        return NCEOutput(loss, nce, penalty, stats)

    def _by_target(self) -> dict[str, list[str]]:
        """The sources of each target."""
        found: dict[str, list[str]] = {}
        for source, target in (pair.split(">") for pair in dict.fromkeys(self.pairs)):
            found.setdefault(target, []).append(source)
        return found

    def _keys(self, views: Sequence[Mapping[str, Tensor]]) -> dict[tuple[str, int], Keys]:
        """The maps that are compared against, by size and view. Of several processes each is gathered once, however
        many pairs compare against it; in a ring it goes round for each problem.
        """
        maps = {(target, i): locations(f"f{target}", views[i]) for target in self._by_target() for i in (0, 1)}
        everyone = peers(self.group)
        if everyone is None or everyone.ring:
            return {at: Keys(x, 0, self.group) for at, x in maps.items()}
        from fused_nce.core.distributed.collectives import gather

        columns = [as_matmul(x) for x in maps.values()]
        b, _, d = columns[0].shape
        seen = {
            "B": b,
            "D": d,
            "locations": sum(x.shape[1] for x in columns),
            "dtype": checks.DTYPES.index(columns[0].dtype),
            "maps' requires_grad": sum(x.requires_grad for x in columns),
        }
        return {
            at: Keys(x, everyone.rank * b, None) for at, x in zip(maps, gather(columns, everyone, seen), strict=True)
        }

    def _direction_problem(self, rows: Sequence[Tensor], keys: Keys) -> Term:
        """One problem for all single-row sources that share a target, each with weight ½: both directions are averaged.

        An image has a row of each source, and the mean over all rows is the mean of the sources' means; hence the
        weight grows with their number.
        """
        count, weight = len(rows), 0.5 * len(rows)  # fault: directions-summed-not
        penalty, clip = cast(float, self.settings["penalty"]), cast("float | None", self.settings["clip"])
        together = rows[0] if count == 1 else torch.stack(tuple(rows), dim=1)
        return _part(together, keys.columns, keys.offset, clip, Nce(weight * penalty, "mean", weight), count)

    def _antecedents(self, name: str, view: Mapping[str, Tensor]) -> Tensor:
        """(B, D) sampled rows, or (B, H·W, D) all of them."""
        rows = locations(name, view)
        if rows.shape[1] == 1:
            return rows.squeeze(1)
        if self.antecedents == "all":
            return rows
        batch = torch.arange(rows.shape[0], device=rows.device)
        # fault: one-location-drawn
        return rows[batch, torch.randint(rows.shape[1], (rows.shape[0],), device=rows.device)]


def _together(rows: Mapping[str, Tensor]) -> list[list[str]]:
    """Which sources share a problem. Those with one row an image do, so that the target is read, and its gradient
    written, once. A source with many rows has its own, since a mean over all rows would give it a larger weight.
    """
    single = [source for source, x in rows.items() if x.dim() == 2]
    return [*([single] if single else []), *([source] for source in rows if source not in single)]


def locations(name: str, view: Mapping[str, Tensor]) -> Tensor:
    """A view's map as (B, H·W, D)."""
    if name not in view:
        raise ValueError(f"view: got maps {sorted(view)}, need {name!r} for the pairs of this loss")
    features = view[name]
    if features.dim() == 2:
        return features[:, None, :]
    checks.check_tensor(name, features, ("B", "D", "H", "W"))
    return features.flatten(2).transpose(1, 2)


def oracle(
    antecedents: Tensor,
    consequents: Tensor,
    *,
    scale: float | Tensor,
    clip: float | None = 20.0,
    penalty: float = 0.04,
) -> Tensor:
    """`amdim_nce`'s loss, dense, for one row an image."""
    n_k, n_c, d = consequents.shape
    s = dense_scores(antecedents, consequents.reshape(-1, d), scale)
    t = s if clip is None else clip * torch.tanh(s / clip)
    own = torch.arange(len(antecedents))[:, None] == torch.arange(n_k * n_c) // n_c
    return dense_nce(t, own, ~own).mean() + penalty * s.square().mean()


def _draw(seed: int, size: Size) -> dict[str, Any]:
    return {
        "antecedents": features(seed, size.n, size.d),
        "consequents": features(seed + 1, size.n, size.p, size.d),
        "scale": torch.tensor(0.41),
        "clip": 4.0,
    }


register(
    Entry(
        amdim_nce,
        AMDIMLoss,
        "mean_ip −log(e^t_ip / (e^t_ip + Σ_neg e^t)) + λ·mean s², t = c·tanh(s/c)",
        "Bachman et al. 2019, arXiv:1906.00910",
        _draw,
        oracle,
    )
)
