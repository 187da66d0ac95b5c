"""A ResNet for 32 px that trains on two CPU cores: one block a stage, 16×16, 8×8 and 4×4 maps."""

import torch.nn.functional as F
from torch import Tensor, nn

from fused_nce.models.encoders.convolution import Conv2d


class Block(nn.Module):
    """ResNet's basic block (He et al. 2016), with the projection shortcut; names as torchvision's."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = nn.Sequential(Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(
        self,
        x: Tensor,  # (B, c_in, H, W)
    ) -> Tensor:  # (B, c_out, H / stride, W / stride)
        branch = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        return F.relu(branch + self.downsample(x), inplace=True)


class TinyResNet(nn.Module):
    """Images to (B, 8·channels) vectors; 32 channels: 1,207,840 parameters and 43 million multiplications an image.

    Args:
        channels: of the first convolution; the three stages have 2, 4 and 8 times as many.
    """

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.width = 8 * channels
        self.conv1 = Conv2d(3, channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.layers = nn.Sequential(*(Block(channels << i, channels << (i + 1), 2) for i in range(3)))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(
        self,
        x: Tensor,  # (B, 3, H, W)
    ) -> Tensor:  # (B, width)
        return self.layers(F.relu(self.bn1(self.conv1(x)), inplace=True)).mean((2, 3))
