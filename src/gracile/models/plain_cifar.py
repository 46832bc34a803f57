"""Plain-20: ResNet-20 for 32x32 images without its shortcuts.

He et al. 2015, arXiv:1512.03385, section 4.2 ("plain nets"). Names are Distiller's.
"""

from collections import OrderedDict

from torch import nn

from gracile import registry
from gracile.models.resnet import conv3x3, init_convolutions
from gracile.models.resnet_cifar import PAPER, WIDTHS

BLOCKS = 3  # per stage: 6 * 3 + 2 layers with weights


class PlainCifar(nn.Sequential):
    """A 3x3 stem, three stages of 16, 32 and 64 channels, average pooling, the head `fc`.

    (N, in_channels, H, W) -> logits (N, num_classes).

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        norm: with BatchNorm behind each convolution.
    """

    def __init__(self, *, num_classes: int, in_channels: int, norm: bool):
        layers = _conv("1", in_channels, WIDTHS[0], 1, norm)
        layers["relu"] = layers.pop("relu1")
        channels = WIDTHS[0]
        for k, width in enumerate(WIDTHS, start=1):
            stage = []
            for i in range(BLOCKS):
                first = _conv("1", channels, width, 2 if i == 0 and k > 1 else 1, norm)
                stage.append(nn.Sequential(first | _conv("2", width, width, 1, norm)))
                channels = width
            layers[f"layer{k}"] = nn.Sequential(*stage)
        layers.update(
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(channels, num_classes),
        )
        super().__init__(layers)
        init_convolutions(self)


@registry.register("model", "plain20_cifar", source=f"{PAPER}; Distiller's plain20_cifar")
def plain20_cifar(*, num_classes: int = 10, in_channels: int = 3) -> PlainCifar:
    """Plain-20 for 32x32 images: 0.27 M parameters."""
    return PlainCifar(num_classes=num_classes, in_channels=in_channels, norm=True)


@registry.register("model", "plain20_cifar_nobn", source=f"{PAPER}; Distiller's plain20_cifar_nobn")
def plain20_cifar_nobn(*, num_classes: int = 10, in_channels: int = 3) -> PlainCifar:
    """Plain-20 for 32x32 images without BatchNorm: 0.27 M parameters."""
    return PlainCifar(num_classes=num_classes, in_channels=in_channels, norm=False)


def _conv(
    k: str, channels: int, width: int, stride: int, norm: bool
) -> OrderedDict[str, nn.Module]:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers[f"conv{k}"] = conv3x3(channels, width, stride)
    if norm:
        layers[f"bn{k}"] = nn.BatchNorm2d(width)
    layers[f"relu{k}"] = nn.ReLU()
    return layers
