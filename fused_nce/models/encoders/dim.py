"""Deep InfoMax's encoders for 32 and 64 px images (Hjelm et al. 2019, arXiv:1808.06670, appendix).

Convolutions up to a map of local features, the rest of the convolutions, fully connected layers, and a code Y. The
`crops` architectures, made for the comparison with CPC, run on patches of a quarter of the image in steps of an eighth:
a 7×7 map, no location of which has seen more than its patch.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from fused_nce.core import checks
from fused_nce.models.encoders.patches import grid_side, to_grid, to_patches
from fused_nce.models.encoders.tiny import Block


class Conv(NamedTuple):
    """Convolution without bias, BatchNorm, ReLU and, where `pool`, max pooling of 3×3 in steps of 2."""

    channels: int
    kernel: int
    stride: int = 1
    padding: int = 0
    pool: bool = False

    def side(self, side: int) -> int:
        """The side of the map that comes out."""
        out = (side + 2 * self.padding - self.kernel) // self.stride + 1
        return (out - 3) // 2 + 1 if self.pool else out

    def build(self, c_in: int, width: float) -> tuple[nn.Module, int]:
        """The layer, and its output channels."""
        c_out = scaled(self.channels, width)
        conv = nn.Conv2d(c_in, c_out, self.kernel, self.stride, self.padding, bias=False)
        pool = [nn.MaxPool2d(3, 2)] if self.pool else []
        return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True), *pool), c_out


class Unit(NamedTuple):
    """A residual bottleneck: 1×1, 3×3 in steps of `stride`, 1×1 to four times the channels."""

    channels: int
    stride: int = 1

    def side(self, side: int) -> int:
        """The side of the map that comes out."""
        return (side - 1) // self.stride + 1

    def build(self, c_in: int, width: float) -> tuple[nn.Module, int]:
        """The layer, and its output channels."""
        inner = scaled(self.channels, width)
        return Bottleneck(c_in, inner, self.stride), 4 * inner


class Residual(NamedTuple):
    """The two-layer residual block of our own small encoder (`encoders.tiny`), in steps of 2."""

    channels: int

    def side(self, side: int) -> int:
        """The side of the map that comes out."""
        return (side - 1) // 2 + 1

    def build(self, c_in: int, width: float) -> tuple[nn.Module, int]:
        """The layer, and its output channels."""
        c_out = scaled(self.channels, width)
        return Block(c_in, c_out, 2), c_out


Layer = Conv | Unit | Residual


class Architecture(NamedTuple):
    """An encoder as data: `bottom` makes the local map, of each crop where `crop` > 0; `top` and `fc` the rest."""

    image_size: int
    bottom: tuple[Layer, ...]
    top: tuple[Layer, ...]
    fc: tuple[int, ...]
    crop: int = 0
    several: bool = False  # every location of the top's map is a global vector


def _halving(*channels: int) -> tuple[Layer, ...]:
    return tuple(Conv(c, 4, 2, 1) for c in channels)


def _resnet(*counts: int) -> tuple[Layer, ...]:
    units = [Unit(64), Unit(64), Unit(128, 2), Unit(128), Unit(256, 2), Unit(256)]
    return (Conv(64, 3, 2, 1), *(unit for unit, count in zip(units, counts, strict=True) for _ in range(count)))


ALEX_BOTTOM = (Conv(96, 3, 1, 1, pool=True), Conv(192, 3, 1, 1, pool=True), Conv(384, 3, 1, 1))
ALEX_TOP = (Conv(384, 3, 1, 1), Conv(192, 3, 1, 1, pool=True))
RESNET19, RESNET37 = _resnet(1, 1, 1, 1, 1, 1), _resnet(1, 2, 1, 5, 1, 2)

# The paper's: `dcgan32` for CIFAR, `alexnet64` for STL-10 and Tiny ImageNet, `dcgan64` for CelebA; the others for its
# comparison with CPC, `-several` with a 5×5 map of global vectors from a 3×3 convolution over the patches. `tiny32` is
# ours: the convolutions of the other methods' `tiny`, so that results compare.
ARCHITECTURES: dict[str, Architecture] = {
    "dcgan32": Architecture(32, _halving(64, 128), _halving(256), (1024,)),
    "tiny32": Architecture(32, (Conv(32, 3, 1, 1), Residual(64), Residual(128)), (Residual(256),), (256,)),
    "dcgan64": Architecture(64, _halving(64, 128, 256), _halving(512), (1024,)),
    "alexnet64": Architecture(64, ALEX_BOTTOM, ALEX_TOP, (4096, 4096)),
    "crops-resnet19-32": Architecture(32, RESNET19, (), (1024,), crop=8),
    "crops-resnet37-32": Architecture(32, RESNET37, (), (1024,), crop=8),
    "crops-alexnet64": Architecture(64, ALEX_BOTTOM + ALEX_TOP, (), (4096, 4096), crop=16),
    "crops-resnet19-32-several": Architecture(32, RESNET19, (Conv(1024, 3), Conv(1024, 1)), (1024,), 8, True),
    "crops-alexnet64-several": Architecture(
        64, ALEX_BOTTOM + ALEX_TOP, (Conv(192, 3), Conv(192, 1)), (4096,), 16, True
    ),
}


def scaled(size: int, width: float) -> int:
    """A published size times `width`."""
    return max(1, round(size * width))


class Bottleneck(nn.Module):
    """See `Unit`; a 1×1 convolution with BatchNorm stands in the shortcut where the shape changes."""

    def __init__(self, c_in: int, inner: int, stride: int) -> None:
        super().__init__()
        c_out = 4 * inner
        self.branch = nn.Sequential(
            nn.Conv2d(c_in, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, inner, 3, stride, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, c_out, 1, bias=False),
            nn.BatchNorm2d(c_out),
        )
        same = c_in == c_out and stride == 1
        self.shortcut: nn.Module = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))
        )

    def forward(self, x: Tensor) -> Tensor:  # (B, c_in, H, W) -> (B, 4·inner, H', W')
        return nn.functional.relu(self.branch(x) + self.shortcut(x))


def _convolutions(layers: Sequence[Layer], c_in: int, side: int, width: float) -> tuple[nn.Sequential, int, int]:
    """The layers, their output channels and side."""
    built = []
    for layer in layers:
        module, c_in = layer.build(c_in, width)
        side = layer.side(side)
        built.append(module)
    return nn.Sequential(*built), c_in, side


class Top(nn.Module):
    """From the local map to a vector: the remaining convolutions, the fully connected layers, a linear one.

    The encoder ends in one; the global critic has another of its own, as in the paper's code.
    """

    def __init__(self, architecture: Architecture, c_in: int, side: int, units: int, *, width: float) -> None:
        super().__init__()
        self.convs, self.channels, self.side = _convolutions(architecture.top, c_in, side, width)
        size, layers = self.channels * self.side**2, list[nn.Module]()
        for units_fc in architecture.fc:
            out = scaled(units_fc, width)
            layers += [nn.Linear(size, out, bias=False), nn.BatchNorm1d(out), nn.ReLU(inplace=True)]
            size = out
        self.fc, self.out = nn.Sequential(*layers), nn.Linear(size, units)
        self.fc_units = size

    def forward(
        self,
        local: Tensor,  # (B, C, M, M)
    ) -> tuple[Tensor, Tensor, Tensor]:  # (B, C', M', M'), (B, F), (B, units)
        conv = self.convs(local)
        fc = self.fc(conv.flatten(1))
        return conv, fc, self.out(fc)


class DIMEncoder(nn.Module):
    """Image to `{tap: tensor}`: `local`, `conv`, `fc` and the code `Y`, which has no activation.

    Args:
        architecture: a name in `ARCHITECTURES`.
        code: units of Y.
        width: multiplies all channels and units but Y's; 1 is the paper's.

    Attributes:
        channels: of the local map.
        side: of the local map, M.
    """

    def __init__(self, architecture: str = "dcgan32", *, code: int = 64, width: float = 1.0) -> None:
        super().__init__()
        if architecture not in ARCHITECTURES:
            raise ValueError(f"architecture: must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}")
        checks.checked_int("code", code, at_least=1)
        if not 0 < width < float("inf"):
            raise ValueError(f"width: must be above 0, got {width}")
        self.architecture, self.code, self.width = ARCHITECTURES[architecture], code, width
        self.image_size, self.crop = self.architecture.image_size, self.architecture.crop
        self.bottom, self.channels, self.side = _convolutions(
            self.architecture.bottom, 3, self.crop or self.image_size, width
        )
        if self.crop:  # each patch ends in one vector
            self.side = grid_side(self.image_size, self.crop)
        self.top = self.make_top(code)

    def make_top(self, units: int) -> Top:
        """A new, untrained `Top` for this encoder's local map."""
        return Top(self.architecture, self.channels, self.side, units, width=self.width)

    def forward(
        self,
        x: Tensor,  # (B, 3, H, H) images
    ) -> dict[str, Tensor]:  # local (B, C, M, M), conv (B, C', M', M'), fc (B, F), Y (B, code)
        bottom = self.bottom(to_patches(x, self.crop) if self.crop else x)
        local = to_grid(bottom.flatten(1), self.side) if self.crop else bottom
        conv, fc, code = self.top(local)
        return {"conv": conv, "fc": fc, "Y": code, "local": local}
