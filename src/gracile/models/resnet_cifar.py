"""The ResNets for 32x32 images, 6n + 2 layers deep, in the two forms that share their name.

He et al. 2015, arXiv:1512.03385, section 4.2. `resnet20_cifar_a` is the paper's: shortcuts without
parameters (option A), head `linear`, the names of Y. Idelbayev's published weights.
`resnet20_cifar` is Distiller's: 1x1-convolution shortcuts (option B), head `fc`.
"""

import torch
from torch import Tensor, nn

from gracile.models.resnet import BasicBlock, conv3x3, init_convolutions, projection
from gracile.models.variants import register_variant
from gracile.nn.shortcut import ChannelPad

PAPER = "He et al. 2015, arXiv:1512.03385, section 4.2"
WIDTHS = (16, 32, 64)


class CifarResNet(nn.Module):
    """A 3x3 stem, three stages of 16, 32 and 64 channels, average pooling, a linear head.

    Args:
        depth: layers with weights on the main path, 6n + 2.
        num_classes: outputs.
        in_channels: channels of the images.
        padded: True for shortcuts that pad with zero channels (option A, head named `linear`),
            False for 1x1 convolutions (option B, head named `fc`).
        width_mult: times as many channels in every layer, as WRPN wants (arXiv:1709.01134).

    Raises:
        ValueError: depth is not 6n + 2, or width_mult is not above 0.
    """

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int,
        in_channels: int,
        padded: bool,
        width_mult: float = 1.0,
    ):
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 6n + 2 with n >= 1, got {depth}.")
        if width_mult <= 0:
            raise ValueError(f"width_mult must be > 0, got {width_mult}.")
        first, second, third = (max(1, round(w * width_mult)) for w in WIDTHS)
        self.conv1 = conv3x3(in_channels, first)
        self.bn1 = nn.BatchNorm2d(first)
        self.relu = nn.ReLU()
        self.layer1 = _stage(first, first, blocks, 1, padded)
        self.layer2 = _stage(first, second, blocks, 2, padded)
        self.layer3 = _stage(second, third, blocks, 2, padded)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.head_name = "linear" if padded else "fc"
        self.add_module(self.head_name, nn.Linear(third, num_classes))
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> logits (N, num_classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = getattr(self, self.head_name)(torch.flatten(self.avgpool(x), 1))
        return logits


def _stage(channels: int, width: int, blocks: int, stride: int, padded: bool) -> nn.Sequential:
    shortcut: nn.Module | None = None
    if stride != 1 or channels != width:
        gap = width - channels
        shortcut = (
            ChannelPad(channels, front=gap // 2, back=gap - gap // 2, stride=stride)
            if padded
            else projection(channels, width, stride)
        )
    first = BasicBlock(channels, width, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(width, width) for _ in range(blocks - 1)))


def _register(depth: int, padded: bool) -> None:
    name = f"resnet{depth}_cifar" + ("_a" if padded else "")
    whose = (
        f"{PAPER}, option A; parameter names of Y. Idelbayev's pytorch_resnet_cifar10"
        if padded
        else f"{PAPER}, option B; the network Distiller calls resnet{depth}_cifar"
    )

    def factory(
        *, num_classes: int = 10, in_channels: int = 3, width_mult: float = 1.0
    ) -> CifarResNet:
        return CifarResNet(
            depth,
            num_classes=num_classes,
            in_channels=in_channels,
            padded=padded,
            width_mult=width_mult,
        )

    shortcuts = "zero-padded" if padded else "1x1-convolution"
    summary = f"ResNet-{depth} for 32x32 images with {shortcuts} shortcuts."
    register_variant(name, factory, source=whose, summary=summary)


for _depth in (20, 32, 44, 56):
    _register(_depth, padded=True)
for _depth in (20, 32, 44, 56, 110):
    _register(_depth, padded=False)
