"""AlexNet: torchvision's, and the one with BatchNorm that low-bit training is compared on.

Krizhevsky 2014, arXiv:1404.5997 (one column); parameter names of `alexnet` are torchvision's: its
weights fit. `alexnet_bn` is the network of Zhou et al. 2016 (DoReFa-Net, arXiv:1606.06160) as in
TensorPack and Distiller, with Distiller's names.
"""

from collections import OrderedDict

from torch import nn

from gracile import registry


class AlexNet(nn.Sequential):
    """Five convolutions and three linear layers.

    (N, in_channels, H, W) with H, W >= 63 -> logits (N, num_classes).

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        dropout: probability before the first two linear layers.
        hidden: width of the linear layers; the paper's is 4096.
    """

    def __init__(self, *, num_classes: int, in_channels: int, dropout: float, hidden: int = 4096):
        super().__init__(
            OrderedDict(
                features=nn.Sequential(
                    nn.Conv2d(in_channels, 64, 11, stride=4, padding=2),
                    nn.ReLU(),
                    nn.MaxPool2d(3, stride=2),
                    nn.Conv2d(64, 192, 5, padding=2),
                    nn.ReLU(),
                    nn.MaxPool2d(3, stride=2),
                    nn.Conv2d(192, 384, 3, padding=1),
                    nn.ReLU(),
                    nn.Conv2d(384, 256, 3, padding=1),
                    nn.ReLU(),
                    nn.Conv2d(256, 256, 3, padding=1),
                    nn.ReLU(),
                    nn.MaxPool2d(3, stride=2),
                ),
                avgpool=nn.AdaptiveAvgPool2d(6),
                flatten=nn.Flatten(),
                classifier=nn.Sequential(
                    nn.Dropout(dropout),
                    nn.Linear(256 * 6 * 6, hidden),
                    nn.ReLU(),
                    nn.Dropout(dropout),
                    nn.Linear(hidden, hidden),
                    nn.ReLU(),
                    nn.Linear(hidden, num_classes),
                ),
            )
        )


class AlexNetBN(nn.Sequential):
    """Five convolutions (three of them in 2 groups) and three linear layers, with BatchNorm.

    (N, in_channels, 224, 224) -> logits (N, num_classes). Other sizes from 48 on are averaged to
    the 6x6 map the linear layers read; at 224 the map is 6x6 already. BatchNorm has eps 1e-4 and
    momentum 0.9 as published, so its running statistics are mostly those of the last batch.

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        hidden: width of the linear layers; the published one is 4096.
    """

    def __init__(self, *, num_classes: int, in_channels: int, hidden: int = 4096):
        super().__init__(
            OrderedDict(
                features=nn.Sequential(
                    nn.Conv2d(in_channels, 96, 12, stride=4),
                    nn.ReLU(),
                    nn.Conv2d(96, 256, 5, padding=2, groups=2, bias=False),
                    _norm2d(256),
                    nn.MaxPool2d(3, stride=2, ceil_mode=True),
                    nn.ReLU(),
                    nn.Conv2d(256, 384, 3, padding=1, bias=False),
                    _norm2d(384),
                    nn.MaxPool2d(3, stride=2, padding=1),
                    nn.ReLU(),
                    nn.Conv2d(384, 384, 3, padding=1, groups=2, bias=False),
                    _norm2d(384),
                    nn.ReLU(),
                    nn.Conv2d(384, 256, 3, padding=1, groups=2, bias=False),
                    _norm2d(256),
                    nn.MaxPool2d(3, stride=2),
                    nn.ReLU(),
                ),
                avgpool=nn.AdaptiveAvgPool2d(6),
                flatten=nn.Flatten(),
                classifier=nn.Sequential(
                    nn.Linear(256 * 6 * 6, hidden, bias=False),
                    nn.BatchNorm1d(hidden, eps=1e-4, momentum=0.9),
                    nn.ReLU(),
                    nn.Linear(hidden, hidden, bias=False),
                    nn.BatchNorm1d(hidden, eps=1e-4, momentum=0.9),
                    nn.ReLU(),
                    nn.Linear(hidden, num_classes),
                ),
            )
        )
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def _norm2d(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-4, momentum=0.9)


@registry.register(
    "model",
    "alexnet",
    source="Krizhevsky 2014, arXiv:1404.5997; parameter names as in torchvision",
)
def alexnet(*, num_classes: int = 1000, in_channels: int = 3, dropout: float = 0.5) -> AlexNet:
    """AlexNet: 61.1 M parameters, 0.71 G MACs at 224x224."""
    return AlexNet(num_classes=num_classes, in_channels=in_channels, dropout=dropout)


@registry.register(
    "model",
    "alexnet_bn",
    source="Zhou et al. 2016, arXiv:1606.06160; the network Distiller calls alexnet_bn",
)
def alexnet_bn(*, num_classes: int = 1000, in_channels: int = 3) -> AlexNetBN:
    """AlexNet with BatchNorm: 61.0 M parameters; for 224x224."""
    return AlexNetBN(num_classes=num_classes, in_channels=in_channels)
