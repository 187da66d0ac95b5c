"""Pictures of the test images for the report: a 2-D embedding and nearest neighbours with thumbnails."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fused_nce.train.evaluation.knn import nearest

THUMBNAIL_PX = 64
PCA_WIDTH = 50  # t-SNE's authors reduce to about 50 first: it drops noise and makes 2,000 points a matter of seconds


@dataclass
class Figures:
    """What the pictures need beyond the numbers in `eval.json`."""

    points: list[tuple[float, float]] = field(default_factory=list)  # 2-D embedding of some test images
    point_labels: list[int] = field(default_factory=list)
    neighbours: list[list[tuple[str, bool]]] = field(default_factory=list)  # (data URI, right class?), query first


def embed(
    features: Tensor,  # (n, D)
    seed: int = 0,
) -> list[tuple[float, float]]:
    """2-D coordinates by PCA to 50 dimensions, then t-SNE. Distances between far groups mean little."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    values = features.numpy()
    reduced = PCA(min(PCA_WIDTH, *values.shape), random_state=seed).fit_transform(values)
    perplexity = min(30.0, (len(values) - 1) / 3)
    points = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(reduced)
    return [(round(float(x), 2), round(float(y), 2)) for x, y in points]


def png_uri(
    image: Tensor,  # (3, H, W) uint8
) -> str:
    """The image as a PNG data URI, at most 64 px a side."""
    from PIL import Image

    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


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
    result = Figures(point_labels=query_labels[some].tolist())
    # t-SNE needs a few points more than dimensions to have neighbours at all.
    if len(some) >= 10:
        result.points = embed(queries[some], seed)
    else:
        result.point_labels = []
    shown = _one_of_each(query_labels, order, rows)
    index = nearest(bank, queries[shown], min(neighbours, len(bank)))[1]
    for query, found in zip(shown.tolist(), index, strict=True):
        label = int(query_labels[query])
        images = [(png_uri(bank_images[i]), int(bank_labels[i]) == label) for i in found.tolist()]
        result.neighbours.append([(png_uri(query_images[query]), True), *images])
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
