"""MobileNet, the first: each block filters by 3x3 in every channel, then mixes channels by 1x1.

Howard et al. 2017, arXiv:1704.04861, table 1. Parameter names are Distiller's: `model.N.M`, `fc`.
"""

from collections import OrderedDict

from torch import nn

from gracile.models.resnet import init_convolutions
from gracile.models.variants import register_variant

SOURCE = "Howard et al. 2017, arXiv:1704.04861, table 1; the network Distiller calls"
STEM = 32
# output channels and stride of the blocks: table 1, which gives the last one stride 2 by mistake
BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *((512, 1),) * 5,
    (1024, 2),
    (1024, 1),
)
LEAST = 8  # channels, however narrow


class MobileNet(nn.Sequential):
    """The network of table 1: (N, in_channels, H, W) -> logits (N, num_classes).

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        width_mult: factor on all channel counts, which are rounded down, to no less than 8.

    Raises:
        ValueError: `width_mult` is not positive.
    """

    def __init__(self, *, num_classes: int, in_channels: int, width_mult: float):
        if width_mult <= 0:
            raise ValueError(f"width_mult must be > 0, got {width_mult}.")
        channels = _scaled(STEM, width_mult)
        layers = [nn.Sequential(*_conv(in_channels, channels, 3, 2))]
        for width, stride in BLOCKS:
            out = _scaled(width, width_mult)
            depthwise = _conv(channels, channels, 3, stride, groups=channels)
            layers.append(nn.Sequential(*depthwise, *_conv(channels, out, 1, 1)))
            channels = out
        super().__init__(
            OrderedDict(
                model=nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1)),
                flatten=nn.Flatten(),
                fc=nn.Linear(channels, num_classes),
            )
        )
        init_convolutions(self)


def _conv(channels: int, width: int, kernel: int, stride: int, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(
        channels, width, kernel, stride, padding=kernel // 2, groups=groups, bias=False
    )
    return [conv, nn.BatchNorm2d(width), nn.ReLU()]


def _scaled(channels: int, width_mult: float) -> int:
    return max(int(channels * width_mult), LEAST)


def _register(name: str, width_mult: float) -> None:
    def factory(*, num_classes: int = 1000, in_channels: int = 3) -> MobileNet:
        return MobileNet(num_classes=num_classes, in_channels=in_channels, width_mult=width_mult)

    summary = f"MobileNet (v1), {width_mult:g} times as wide as the paper's."
    register_variant(name, factory, source=f"{SOURCE} {name}", summary=summary)


for _name, _width in (("", 1.0), ("_075", 0.75), ("_050", 0.5), ("_025", 0.25)):
    _register(f"mobilenet{_name}", _width)
