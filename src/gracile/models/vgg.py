"""VGG in its two sizes: for ImageNet with three linear layers, for 32x32 images with one.

Simonyan and Zisserman 2014, arXiv:1409.1556, table 1, columns A, B, D and E; with or without
BatchNorm. Parameter names are torchvision's (`vgg16`, its weights fit) and Distiller's
(`vgg16_cifar`): `features.N`, `classifier`.
"""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from gracile.models.resnet import init_convolutions
from gracile.models.variants import register_variant

SOURCE = "Simonyan and Zisserman 2014, arXiv:1409.1556, table 1"
WIDTHS = (64, 128, 256, 512, 512)  # a max pooling behind each stage
DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(nn.Sequential):
    """For images of ImageNet size: (N, in_channels, H, W) with H, W >= 32 -> (N, num_classes).

    Args:
        depths: convolutions per stage.
        num_classes: outputs.
        in_channels: channels of the images.
        norm: with BatchNorm behind each convolution.
        dropout: probability behind the first two linear layers.
        hidden: width of the linear layers; the paper's is 4096.
    """

    def __init__(
        self,
        depths: Sequence[int],
        *,
        num_classes: int,
        in_channels: int,
        norm: bool,
        dropout: float,
        hidden: int = 4096,
    ):
        super().__init__(
            OrderedDict(
                features=_features(depths, in_channels, norm),
                avgpool=nn.AdaptiveAvgPool2d(7),
                flatten=nn.Flatten(),
                classifier=nn.Sequential(
                    nn.Linear(WIDTHS[-1] * 7 * 7, hidden),
                    nn.ReLU(),
                    nn.Dropout(dropout),
                    nn.Linear(hidden, hidden),
                    nn.ReLU(),
                    nn.Dropout(dropout),
                    nn.Linear(hidden, num_classes),
                ),
            )
        )
        _init(self)


class VGGCifar(nn.Sequential):
    """For 32x32 images: (N, in_channels, 32, 32) -> logits (N, num_classes).

    Args:
        depths: convolutions per stage.
        num_classes: outputs.
        in_channels: channels of the images.
        norm: with BatchNorm behind each convolution.
    """

    def __init__(self, depths: Sequence[int], *, num_classes: int, in_channels: int, norm: bool):
        super().__init__(
            OrderedDict(
                features=_features(depths, in_channels, norm),
                flatten=nn.Flatten(),
                classifier=nn.Linear(WIDTHS[-1], num_classes),
            )
        )
        _init(self)


def _features(depths: Sequence[int], channels: int, norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for depth, width in zip(depths, WIDTHS, strict=True):
        for _ in range(depth):
            layers.append(nn.Conv2d(channels, width, 3, padding=1))
            layers += [nn.BatchNorm2d(width), nn.ReLU()] if norm else [nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def _init(model: nn.Module) -> None:
    init_convolutions(model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)


def _register(depth: int, norm: bool) -> None:
    def large(*, num_classes: int = 1000, in_channels: int = 3, dropout: float = 0.5) -> VGG:
        return VGG(
            DEPTHS[depth],
            num_classes=num_classes,
            in_channels=in_channels,
            norm=norm,
            dropout=dropout,
        )

    def small(*, num_classes: int = 10, in_channels: int = 3) -> VGGCifar:
        return VGGCifar(DEPTHS[depth], num_classes=num_classes, in_channels=in_channels, norm=norm)

    name = f"vgg{depth}" + ("_bn" if norm else "")
    what = f"VGG-{depth}" + (" with BatchNorm" if norm else "")
    register_variant(
        name,
        large,
        source=f"{SOURCE}; parameter names as in torchvision",
        summary=f"{what} for images of ImageNet size.",
    )
    register_variant(
        f"{name}_cifar",
        small,
        source=f"{SOURCE}; the network Distiller calls {name}_cifar",
        summary=f"{what} for 32x32 images, with one linear layer.",
    )


for _depth in DEPTHS:
    _register(_depth, norm=False)
    _register(_depth, norm=True)
