"""ResNet-18 and ResNet-50 for images of ImageNet size, and the blocks all our ResNets share.

He et al. 2015, arXiv:1512.03385; the stride of a bottleneck sits on its 3x3 convolution ("v1.5").
Parameter names are torchvision's, so its weights fit. Every activation is a module of its own, so
that it can be observed and quantized on its own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gracile import registry

SOURCE = "He et al. 2015, arXiv:1512.03385, table 1; parameter names as in torchvision"


def conv3x3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution that keeps the image's size at stride 1; no bias, BatchNorm follows."""
    return nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)


def conv1x1(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    """A 1x1 convolution without bias."""
    return nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)


def projection(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    """The 1x1-convolution shortcut (option B of the paper)."""
    return nn.Sequential(conv1x1(channels_in, channels_out, stride), nn.BatchNorm2d(channels_out))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (N, in, H, W) -> (N, width, H/stride, W/stride).

    Args:
        channels_in: channels of the input.
        width: channels of the output.
        stride: of the first convolution.
        downsample: the shortcut where shapes change; None for the identity.
    """

    expansion = 1

    def __init__(
        self, channels_in: int, width: int, stride: int = 1, downsample: nn.Module | None = None
    ):
        super().__init__()
        self.conv1 = conv3x3(channels_in, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """The residual sum, rectified."""
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu2(y + shortcut)
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut: (N, in, H, W) -> (N, 4 width, H/stride, W/stride).

    Args:
        channels_in: channels of the input.
        width: channels of the inner convolutions; the output has four times as many.
        stride: of the 3x3 convolution.
        downsample: the shortcut where shapes change; None for the identity.
    """

    expansion = 4

    def __init__(
        self, channels_in: int, width: int, stride: int = 1, downsample: nn.Module | None = None
    ):
        super().__init__()
        self.conv1 = conv1x1(channels_in, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = conv1x1(width, width * self.expansion)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.downsample = downsample
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """The residual sum, rectified."""
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        shortcut = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu3(y + shortcut)
        return out


class ResNet(nn.Module):
    """A stem, four stages of 64 to 512 channels (times the block's expansion), a linear head.

    Args:
        block: the kind of residual block.
        depths: blocks per stage.
        num_classes: outputs.
        in_channels: channels of the images.
        small_images: for 32x32: a 3x3 stem at stride 1 without pooling. torchvision's weights fit
            all but `conv1.weight` then.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        *,
        num_classes: int,
        in_channels: int,
        small_images: bool,
    ):
        super().__init__()
        if small_images:
            self.conv1 = conv3x3(in_channels, 64)
            self.maxpool: nn.Module = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        channels, stages = 64, []
        for width, depth, stride in zip((64, 128, 256, 512), depths, (1, 2, 2, 2), strict=True):
            stages.append(_stage(block, channels, width, depth, stride))
            channels = width * block.expansion
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> logits (N, num_classes)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def init_convolutions(model: nn.Module) -> None:
    """Draw convolution weights from N(0, 2 / (kernel area x output channels)), in place.

    He et al. 2015, arXiv:1502.01852, eq. 14 (the "fan out" form).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


@registry.register("model", "resnet18", source=SOURCE)
def resnet18(
    *, num_classes: int = 1000, in_channels: int = 3, small_images: bool = False
) -> ResNet:
    """ResNet-18: 11.7 M parameters, 1.81 G MACs at 224x224."""
    return ResNet(
        BasicBlock,
        (2, 2, 2, 2),
        num_classes=num_classes,
        in_channels=in_channels,
        small_images=small_images,
    )


@registry.register("model", "resnet50", source=SOURCE)
def resnet50(
    *, num_classes: int = 1000, in_channels: int = 3, small_images: bool = False
) -> ResNet:
    """ResNet-50: 25.6 M parameters, 4.09 G MACs at 224x224."""
    return ResNet(
        Bottleneck,
        (3, 4, 6, 3),
        num_classes=num_classes,
        in_channels=in_channels,
        small_images=small_images,
    )


def _stage(
    block: type[BasicBlock] | type[Bottleneck], channels: int, width: int, depth: int, stride: int
) -> nn.Sequential:
    out = width * block.expansion
    shortcut = projection(channels, out, stride) if stride != 1 or channels != out else None
    first = block(channels, width, stride, shortcut)
    return nn.Sequential(first, *(block(out, width) for _ in range(depth - 1)))
