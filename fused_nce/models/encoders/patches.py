"""Images as a grid of overlapping patches on the batch axis, and back: the strided crops of CPC and DIM."""

from torch import Tensor


def to_patches(
    x: Tensor,  # (B, C, H, H)
    size: int,
) -> Tensor:  # (B·G·G, C, size, size), G = 2·H / size − 1
    """Square patches of `size` px, half of which overlaps the next one; rows of the grid first."""
    windows = x.unfold(2, size, size // 2).unfold(3, size, size // 2)  # (B, C, G, G, size, size)
    return windows.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


def to_grid(
    vectors: Tensor,  # (B·G·G, C)
    side: int,
) -> Tensor:  # (B, C, G, G), G = side
    """The inverse, for one vector a patch."""
    return vectors.unflatten(0, (-1, side, side)).permute(0, 3, 1, 2)


def grid_side(image_size: int, patch_size: int) -> int:
    """How many patches lie along a side: 7 for a quarter of the image.

    Raises:
        ValueError: if the patches do not tile the image in steps of half a patch.
    """
    if patch_size < 2 or patch_size % 2 or image_size % (patch_size // 2) or patch_size > image_size:
        raise ValueError(f"patch_size: must be even, with steps of a half that tile {image_size} px, got {patch_size}")
    return 2 * image_size // patch_size - 1
