"""Pictures of neighbours: which images stand where, and the colour below each."""

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fused_nce.train.evaluation import figures
from fused_nce.train.evaluation.figures import PAPER, QUERY, RIGHT, WRONG


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)))


def plain(*levels):
    return torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 16, 16)


def test_a_query_stands_before_its_neighbours_by_each_metric():
    """By cosine the nearest is far by L1; each image is of one gray level, so that it is known in the picture."""
    bank, labels = torch.tensor([[8.0, 8.0], [1.0, 0.0], [0.0, -3.0]]), torch.tensor([0, 1, 1])
    found = figures.draw_figures(
        bank=bank, bank_images=plain(10, 20, 30), bank_labels=labels, queries=torch.tensor([[1.0, 1.0]]),
        query_images=plain(200), query_labels=torch.tensor([0]), neighbours=2,
    )  # fmt: skip
    for metric, order in (("cosine", (0, 1)), ("l1", (1, 2))):
        picture = pixels(found.pictures[f"neighbours-{metric}"])
        assert picture.shape == (64 + 4 + 6, 3 * 70, 3)
        assert [int(picture[35, 35 + 70 * i, 0]) for i in range(3)] == [200, *(10 * (i + 1) for i in order)]
        bars = [tuple(int(x) for x in picture[69, 35 + 70 * i]) for i in range(3)]
        assert bars == [QUERY, *((RIGHT, WRONG)[int(labels[i])] for i in order)]
        assert tuple(picture[0, 0]) == PAPER
    assert [[right for _, right in row] for row in found.neighbours] == [[True, True, False]]


def test_large_images_keep_their_size():
    image = torch.randint(0, 255, (3, 96, 80), dtype=torch.uint8)
    picture = pixels(figures.sheet([[(image, RIGHT), (image.flip(2), WRONG)]]))
    assert picture.shape == (96 + 4 + 6, 2 * 86, 3)
    assert np.array_equal(picture[3:99, 3:83], image.permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    "features",
    [
        torch.full((20, 3), 0.1),
        torch.zeros(20, 3),
        torch.randn(20, 3) * torch.tensor([1.0, 1.0, 3e38]),
        torch.randn(9, 3),
        torch.randn(1, 3),
        torch.randn(20, 1),
    ],
)
def test_what_cannot_be_embedded_has_no_points(features, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)  # whoever asks for it fails
    assert figures.embed(features) == []
