"""MobileNetV2: inverted residual blocks with linear bottlenecks.

Sandler et al. 2018, arXiv:1801.04381, table 2. Parameter names are torchvision's: its weights fit.
"""

import torch
from torch import Tensor, nn

from gracile import registry
from gracile.models.resnet import init_convolutions

# expansion t, output channels c, repeats n, stride s of the first: table 2 of the paper
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM, LAST = 32, 1280


class ConvBNReLU6(nn.Sequential):
    """Convolution, BatchNorm, ReLU6; the image's size is kept at stride 1."""

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int = 3, stride: int = 1, groups: int = 1
    ):
        super().__init__(
            nn.Conv2d(
                channels_in,
                channels_out,
                kernel,
                stride,
                padding=kernel // 2,
                groups=groups,
                bias=False,
            ),
            nn.BatchNorm2d(channels_out),
            nn.ReLU6(),
        )


class InvertedResidual(nn.Module):
    """Widen by 1x1, filter depthwise by 3x3, narrow by 1x1 without activation.

    Args:
        channels_in: channels of the input.
        channels_out: channels of the output.
        stride: of the depthwise convolution; at 1 and with equal channels the input is added back.
        expansion: hidden channels = expansion x channels_in; 1 leaves the widening out.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int, expansion: int):
        super().__init__()
        hidden = channels_in * expansion
        self.use_res_connect = stride == 1 and channels_in == channels_out
        widen = [ConvBNReLU6(channels_in, hidden, kernel=1)] if expansion != 1 else []
        self.conv = nn.Sequential(
            *widen,
            ConvBNReLU6(hidden, hidden, stride=stride, groups=hidden),
            nn.Conv2d(hidden, channels_out, 1, bias=False),
            nn.BatchNorm2d(channels_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels_in, H, W) -> (N, channels_out, H/stride, W/stride)."""
        y: Tensor = self.conv(x)
        return x + y if self.use_res_connect else y


class MobileNetV2(nn.Module):
    """The network of table 2; see `mobilenet_v2` for the arguments."""

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        width_mult: float,
        dropout: float,
        small_images: bool,
    ):
        super().__init__()
        if width_mult <= 0:
            raise ValueError(f"width_mult must be > 0, got {width_mult}.")
        channels = round_channels(STEM * width_mult)
        last = round_channels(LAST * max(1.0, width_mult))
        layers: list[nn.Module] = [
            ConvBNReLU6(in_channels, channels, stride=1 if small_images else 2)
        ]
        for expansion, width, repeats, stride in STAGES:
            if small_images and width == 24:
                stride = 1
            out = round_channels(width * width_mult)
            for k in range(repeats):
                layers.append(InvertedResidual(channels, out, stride if k == 0 else 1, expansion))
                channels = out
        layers.append(ConvBNReLU6(channels, last, kernel=1))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        head = nn.Linear(last, num_classes)
        self.classifier = nn.Sequential(nn.Dropout(dropout), head)
        init_convolutions(self)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> logits (N, num_classes)."""
        logits: Tensor = self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
        return logits


def round_channels(channels: float, multiple: int = 8) -> int:
    """The nearest multiple of 8 that is no more than 10 % below `channels`, at least 8.

    The rule of the authors' code (`_make_divisible` in tensorflow/models).

    >>> round_channels(32 * 0.35), round_channels(24 * 0.75)
    (16, 24)
    """
    rounded = max(multiple, int(channels + multiple / 2) // multiple * multiple)
    return rounded + multiple if rounded < 0.9 * channels else rounded


@registry.register(
    "model",
    "mobilenet_v2",
    source="Sandler et al. 2018, arXiv:1801.04381, table 2; parameter names as in torchvision",
)
def mobilenet_v2(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    width_mult: float = 1.0,
    dropout: float = 0.2,
    small_images: bool = False,
) -> MobileNetV2:
    """MobileNetV2: 3.5 M parameters, 0.30 G MACs at 224x224.

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        width_mult: factor on all channel counts, rounded to multiples of 8.
        dropout: probability before the classifier.
        small_images: for 32x32: stride 1 instead of 2 in the stem and in the 24-channel stage, so
            that the last feature map is 4x4. The parameters are the same.
    """
    return MobileNetV2(
        num_classes=num_classes,
        in_channels=in_channels,
        width_mult=width_mult,
        dropout=dropout,
        small_images=small_images,
    )
