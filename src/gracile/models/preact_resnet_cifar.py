"""Pre-activation ResNets for 32x32 images, 6n + 2 layers deep.

He et al. 2016, arXiv:1603.05027, section 3. Names are Distiller's. Where widths change, the
shortcut averages 2x2 pixels and pads with zero channels, or is a 1x1 convolution (`_conv_ds`).
"""

import torch
from torch import Tensor, nn

from gracile.models.resnet import conv1x1, conv3x3, init_convolutions
from gracile.models.resnet_cifar import WIDTHS
from gracile.models.variants import register_variant
from gracile.nn.shortcut import ChannelPad

PAPER = "He et al. 2016, arXiv:1603.05027, section 3"


class PreactCifarBlock(nn.Module):
    """BatchNorm, ReLU and a 3x3 convolution, twice, and a shortcut.

    (N, channels_in, H, W) -> (N, width, H/stride, W/stride).

    Args:
        channels_in: channels of the input.
        width: channels of the output.
        stride: of the first convolution.
        conv_downsample: where shapes change, True for a 1x1 convolution of the activated input,
            False for pooling and padding of the input itself.
    """

    def __init__(self, channels_in: int, width: int, stride: int, conv_downsample: bool):
        super().__init__()
        self.pre_bn = nn.BatchNorm2d(channels_in)
        self.pre_relu = nn.ReLU()
        self.conv1 = conv3x3(channels_in, width, stride)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.conv2 = conv3x3(width, width)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels_in != width:
            self.downsample = (
                conv1x1(channels_in, width, stride)
                if conv_downsample
                else _padding(channels_in, width, stride)
            )
        self.conv_downsample = conv_downsample

    def forward(self, x: Tensor) -> Tensor:
        """The residual sum, as it is."""
        active = self.pre_relu(self.pre_bn(x))
        y: Tensor = self.conv2(self.relu(self.bn(self.conv1(active))))
        if self.downsample is not None:
            x = self.downsample(active if self.conv_downsample else x)
        return y + x


class PreactCifarResNet(nn.Module):
    """A 3x3 stem, three stages of 16, 32 and 64 channels, `final_bn`, average pooling, `fc`.

    Args:
        depth: layers with weights on the main path, 6n + 2.
        num_classes: outputs.
        in_channels: channels of the images.
        conv_downsample: the kind of shortcut, see `PreactCifarBlock`.

    Raises:
        ValueError: depth is not 6n + 2.
    """

    def __init__(self, depth: int, *, num_classes: int, in_channels: int, conv_downsample: bool):
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 6n + 2 with n >= 1, got {depth}.")
        self.conv1 = conv3x3(in_channels, WIDTHS[0])
        channels, stages = WIDTHS[0], []
        for k, width in enumerate(WIDTHS):
            stage: list[nn.Module] = []
            for i in range(blocks):
                stride = 2 if i == 0 and k > 0 else 1
                stage.append(PreactCifarBlock(channels, width, stride, conv_downsample))
                channels = width
            stages.append(nn.Sequential(*stage))
        self.layer1, self.layer2, self.layer3 = stages
        self.final_bn = nn.BatchNorm2d(channels)
        self.final_relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> logits (N, num_classes)."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = self.avgpool(self.final_relu(self.final_bn(x)))
        logits: Tensor = self.fc(torch.flatten(x, 1))
        return logits


def _padding(channels_in: int, width: int, stride: int) -> nn.Sequential:
    gap = width - channels_in
    return nn.Sequential(
        nn.AvgPool2d(stride), ChannelPad(channels_in, front=gap // 2, back=gap - gap // 2)
    )


def _register(depth: int, conv_downsample: bool) -> None:
    def factory(*, num_classes: int = 10, in_channels: int = 3) -> PreactCifarResNet:
        return PreactCifarResNet(
            depth, num_classes=num_classes, in_channels=in_channels, conv_downsample=conv_downsample
        )

    name = f"preact_resnet{depth}_cifar" + ("_conv_ds" if conv_downsample else "")
    shortcuts = "1x1-convolution" if conv_downsample else "zero-padded"
    register_variant(
        name,
        factory,
        source=f"{PAPER}; the network Distiller calls {name}",
        summary=f"Pre-activation ResNet-{depth} for 32x32 images with {shortcuts} shortcuts.",
    )


for _depth in (20, 32, 44, 56, 110):
    _register(_depth, conv_downsample=False)
    _register(_depth, conv_downsample=True)
