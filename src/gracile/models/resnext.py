"""ResNeXt-101 (32x4d): bottlenecks whose 3x3 convolution runs in 32 groups.

Xie et al. 2016, arXiv:1611.05431, table 1. Parameter names are those of Cadene's
pretrained-models.pytorch, which Distiller uses: `features.STAGE.BLOCK.0...`, `last_linear`. The
numbers in them are places in nested sequences; `features.4` is the first stage.
"""

from collections import OrderedDict

from torch import Tensor, nn

from gracile import registry
from gracile.models.resnet import conv1x1, init_convolutions, projection

GROUPS = 32
DEPTHS = (3, 4, 23, 3)
WIDTHS = (128, 256, 512, 1024)  # of the 3x3 convolutions; outputs have twice as many


class Branches(nn.Sequential):
    """The sum of two branches of the same input: `0` is the residual, `1` the shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape both branches return."""
        out: Tensor = self[0](x) + self[1](x)
        return out


class ResNeXt(nn.Sequential):
    """A stem, four stages with 256 to 2048 outputs, average pooling, the head `last_linear`.

    (N, in_channels, H, W) -> logits (N, num_classes).

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        depths: blocks per stage.
    """

    def __init__(self, *, num_classes: int, in_channels: int, depths: tuple[int, ...] = DEPTHS):
        stem = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        pool = nn.MaxPool2d(3, stride=2, padding=1)
        layers: list[nn.Module] = [stem, nn.BatchNorm2d(64), nn.ReLU(), pool]
        channels = 64
        for k, (width, depth) in enumerate(zip(WIDTHS, depths, strict=True)):
            stage = []
            for i in range(depth):
                stage.append(_block(channels, width, 2 if i == 0 and k > 0 else 1))
                channels = 2 * width
            layers.append(nn.Sequential(*stage))
        super().__init__(
            OrderedDict(
                features=nn.Sequential(*layers),
                avg_pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                last_linear=nn.Linear(channels, num_classes),
            )
        )
        init_convolutions(self)


def _block(channels: int, width: int, stride: int) -> nn.Sequential:
    inner = nn.Sequential(
        conv1x1(channels, width),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, stride, padding=1, groups=GROUPS, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    )
    out = 2 * width
    residual = nn.Sequential(inner, conv1x1(width, out), nn.BatchNorm2d(out))
    same = stride == 1 and channels == out
    shortcut = nn.Identity() if same else projection(channels, out, stride)
    # the sum is place 1 in the published names; here it is made in place 0
    return nn.Sequential(OrderedDict({"0": Branches(residual, shortcut), "2": nn.ReLU()}))


@registry.register(
    "model",
    "resnext101_32x4d",
    source="Xie et al. 2016, arXiv:1611.05431, table 1; "
    "parameter names as in Cadene's pretrained-models.pytorch",
)
def resnext101_32x4d(*, num_classes: int = 1000, in_channels: int = 3) -> ResNeXt:
    """ResNeXt-101 (32x4d): 44.2 M parameters, 7.99 G MACs at 224x224."""
    return ResNeXt(num_classes=num_classes, in_channels=in_channels)
