"""Pictures for the report and beside it: a 2-D embedding, nearest neighbours, and what a generator makes."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fused_nce.models.base import Model
from fused_nce.train.evaluation.features import mean_and_sd
from fused_nce.train.evaluation.knn import METRICS, nearest
from fused_nce.train.seeded import seeded

THUMBNAIL_PX = 64
PCA_WIDTH = 50  # t-SNE's authors reduce to about 50 first: it drops noise and makes 2,000 points a matter of seconds
FEWEST_POINTS = 10
SAMPLES = 8  # rows and columns of generated images
GAP, BAR = 3, 4  # px of a sheet: around each image, and below it
Colour = tuple[int, int, int]
PAPER, QUERY, RIGHT, WRONG = (255, 255, 255), (34, 34, 34), (0, 158, 115), (213, 94, 0)


@dataclass
class Figures:
    """What the pictures need beyond the numbers in `eval.json`."""

    points: list[tuple[float, float]] = field(default_factory=list)  # 2-D embedding of some test images
    point_labels: list[int] = field(default_factory=list)  # of the test images, whether or not they have points
    neighbours: list[list[tuple[str, bool]]] = field(default_factory=list)  # (data URI, right class?), query first
    pictures: dict[str, bytes] = field(default_factory=dict)  # PNG files, by their names without the ending


def embed(
    features: Tensor,  # (n, D)
    seed: int = 0,
) -> list[tuple[float, float]]:
    """2-D coordinates by PCA to 50 dimensions, then t-SNE. Distances between far groups mean little.

    None of fewer than 10 rows, of a single feature, and where all rows are equal, as a collapsed encoder's are.
    """
    # t-SNE needs a few points more than dimensions to have neighbours at all, starts from two principal axes, and
    # divides by their deviation.
    if len(features) < FEWEST_POINTS or features.shape[1] < 2:
        return []
    if not bool(features.std(0).isfinite().all()) or not bool(mean_and_sd(features)[1].isfinite().any()):
        return []
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    values = features.numpy()
    reduced = PCA(min(PCA_WIDTH, *values.shape), random_state=seed).fit_transform(values)
    perplexity = min(30.0, (len(values) - 1) / 3)
    points = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(reduced)
    return [(round(float(x), 2), round(float(y), 2)) for x, y in points]


def _png(
    image: Tensor,  # (3, H, W) uint8
    limit_px: int | None = None,
) -> bytes:
    from PIL import Image

    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    if limit_px is not None:
        picture.thumbnail((limit_px, limit_px))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def data_uri(png: bytes) -> str:
    """A PNG as a page holds it."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def png_uri(
    image: Tensor,  # (3, H, W) uint8
) -> str:
    """The image as a PNG data URI, at most 64 px a side."""
    return data_uri(_png(image, THUMBNAIL_PX))


def sheet(
    rows: Sequence[Sequence[tuple[Tensor, Colour]]],  # (3, H, W) uint8 each, of one size; as many in each row
) -> bytes:
    """One PNG of all images, enlarged to 64 px or more, each above a bar of its colour."""
    height, width = rows[0][0][0].shape[1:]
    scale = max(1, -(-THUMBNAIL_PX // max(height, width)))

    def cell(image: Tensor, colour: Colour) -> Tensor:
        large = image.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        bar = torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(-1, BAR, large.shape[2])
        return functional.pad(torch.cat((large, bar), 1), (GAP,) * 4, value=255)

    return _png(torch.cat([torch.cat([cell(*one) for one in row], 2) for row in rows], 1))


def samples(model: Model, seed: int) -> bytes | None:
    """A sheet of images that a model makes; None of one that makes none."""
    with seeded(seed), torch.inference_mode():
        made = model.generate(SAMPLES**2)
    if made is None:
        return None
    images = ((made.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
    return sheet([[(image, PAPER) for image in row] for row in images.split(SAMPLES)])


def draw_figures(
    *,
    bank: Tensor,  # (n, D) features of the probe split
    bank_images: Tensor,  # (n, 3, H, W) uint8
    bank_labels: Tensor,  # (n,)
    queries: Tensor,  # (m, D) features of the test split
    query_images: Tensor,  # (m, 3, H, W) uint8
    query_labels: Tensor,  # (m,)
    points: int = 2000,
    rows: int = 12,
    neighbours: int = 5,
    seed: int = 0,
) -> Figures:
    """Embedding of up to `points` test images, and the neighbours of `rows` of them, one of each class in turn."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(queries)))
    some = order[:points]
    result = Figures(embed(queries[some], seed), query_labels[some].tolist())
    shown = _one_of_each(query_labels, order, rows)
    for metric in METRICS:
        lines = []
        index = nearest(bank, queries[shown], min(neighbours, len(bank)), metric=metric)[1]
        for query, found in zip(shown.tolist(), index.tolist(), strict=True):
            right = (bank_labels[found] == query_labels[query]).tolist()
            lines.append([(query_images[query], True), *zip(bank_images[found], right, strict=True)])
        result.pictures[f"neighbours-{metric}"] = sheet([
            [(images[0][0], QUERY), *((image, RIGHT if right else WRONG) for image, right in images[1:])]
            for images in lines
        ])  # fmt: skip
        if metric == METRICS[0]:
            result.neighbours = [[(png_uri(image), right) for image, right in images] for images in lines]
    return result


def _one_of_each(labels: Tensor, order: Tensor, rows: int) -> Tensor:
    """Up to `rows` indices from `order`, going round the classes."""
    seen: dict[int, int] = {}
    ranked = []
    for position, index in enumerate(order.tolist()):
        label = int(labels[index])
        seen[label] = seen.get(label, 0) + 1
        ranked.append((seen[label], label if seen[label] == 1 else position, index))
    return torch.tensor([index for _, _, index in sorted(ranked)[:rows]])
