"""ResNets whose blocks normalize and rectify before each convolution, so that the sum stays linear.

He et al. 2016, arXiv:1603.05027, figure 1 (b), for images of ImageNet size. Parameter names are
Distiller's: `pre_bn`, `conv1`, `bn1_2`, `conv2` ..., `final_bn`, `fc`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gracile.models.resnet import conv1x1, conv3x3, init_convolutions
from gracile.models.variants import register_variant

PAPER = "He et al. 2016, arXiv:1603.05027, figure 1 (b)"
WIDTHS = (64, 128, 256, 512)


class PreactBlock(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1, and a shortcut.

    (N, channels_in, H, W) -> (N, width * expansion, H/stride, W/stride).

    Args:
        channels_in: channels of the input.
        width: channels of the inner convolutions.
        stride: of the 3x3 convolution (the first of two).
        bottleneck: 1x1, 3x3, 1x1 with four times `width` outputs.
        shortcut: a 1x1 convolution on the shortcut, which reads what the first convolution reads.
        preactivate: False where BatchNorm and ReLU come right before the block.
    """

    def __init__(
        self,
        channels_in: int,
        width: int,
        stride: int,
        *,
        bottleneck: bool,
        shortcut: bool,
        preactivate: bool,
    ):
        super().__init__()
        out = width * (4 if bottleneck else 1)
        self.pre_bn = nn.BatchNorm2d(channels_in) if preactivate else nn.Identity()
        self.pre_relu = nn.ReLU() if preactivate else nn.Identity()
        if bottleneck:
            self.conv1 = conv1x1(channels_in, width)
        else:
            self.conv1 = conv3x3(channels_in, width, stride)
        self.bn1_2 = nn.BatchNorm2d(width)
        self.relu1_2 = nn.ReLU()
        self.conv2 = conv3x3(width, width, stride if bottleneck else 1)
        if bottleneck:
            self.bn2_3 = nn.BatchNorm2d(width)
            self.relu2_3 = nn.ReLU()
            self.conv3 = conv1x1(width, out)
        self.bottleneck = bottleneck
        self.downsample = nn.Sequential(conv1x1(channels_in, out, stride)) if shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        """The residual sum, as it is."""
        active = self.pre_relu(self.pre_bn(x))
        y: Tensor = self.conv2(self.relu1_2(self.bn1_2(self.conv1(active))))
        if self.bottleneck:
            y = self.conv3(self.relu2_3(self.bn2_3(y)))
        if self.downsample is not None:
            x = self.downsample(active)
        return y + x


class PreactResNet(nn.Module):
    """A stem, four stages of 64 to 512 channels (or four times as many), `final_bn`, a head.

    Args:
        depths: blocks per stage.
        bottleneck: the kind of block.
        num_classes: outputs.
        in_channels: channels of the images.
    """

    def __init__(
        self, depths: Sequence[int], *, bottleneck: bool, num_classes: int, in_channels: int
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu1 = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels, stages = 64, []
        for k, (width, depth) in enumerate(zip(WIDTHS, depths, strict=True)):
            stage: list[nn.Module] = []
            for i in range(depth):
                stride = 2 if i == 0 and k > 0 else 1
                out = width * (4 if bottleneck else 1)
                block = PreactBlock(
                    channels,
                    width,
                    stride,
                    bottleneck=bottleneck,
                    shortcut=stride != 1 or channels != out,
                    preactivate=i > 0 or k > 0,
                )
                stage.append(block)
                channels = out
            stages.append(nn.Sequential(*stage))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.final_bn = nn.BatchNorm2d(channels)
        self.final_relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> logits (N, num_classes)."""
        x = self.maxpool(self.relu1(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = self.avgpool(self.final_relu(self.final_bn(x)))
        logits: Tensor = self.fc(torch.flatten(x, 1))
        return logits


def _register(depth: int, depths: Sequence[int], bottleneck: bool) -> None:
    def factory(*, num_classes: int = 1000, in_channels: int = 3) -> PreactResNet:
        return PreactResNet(
            depths, bottleneck=bottleneck, num_classes=num_classes, in_channels=in_channels
        )

    name = f"preact_resnet{depth}"
    register_variant(
        name,
        factory,
        source=f"{PAPER}; the network Distiller calls {name}",
        summary=f"ResNet-{depth} with pre-activation, for images of ImageNet size.",
    )


for _depth, _depths, _bottleneck in (
    (18, (2, 2, 2, 2), False),
    (34, (3, 4, 6, 3), False),
    (50, (3, 4, 6, 3), True),
    (101, (3, 4, 23, 3), True),
    (152, (3, 8, 36, 3), True),
):
    _register(_depth, _depths, _bottleneck)
