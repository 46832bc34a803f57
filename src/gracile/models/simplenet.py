"""The small networks of Distiller's first examples, after LeNet-5 (LeCun et al. 1998, figure 2).

Names and sizes are Distiller's. The output is logits; an early version of `simplenet_mnist` there
ended in a log-softmax.
"""

from collections import OrderedDict

from torch import nn

from gracile import registry

LENET = "LeCun et al. 1998, 'Gradient-based learning applied to document recognition', figure 2"
WHOSE = f"{LENET}, with ReLU and max pooling; the network Distiller calls"


class SimpleNetCifar(nn.Sequential):
    """Two 5x5 convolutions of 6 and 16 channels, three linear layers.

    (N, in_channels, 32, 32) -> logits (N, num_classes).
    """

    def __init__(self, *, num_classes: int, in_channels: int):
        super().__init__(
            OrderedDict(
                conv1=nn.Conv2d(in_channels, 6, 5),
                relu_conv1=nn.ReLU(),
                pool1=nn.MaxPool2d(2),
                conv2=nn.Conv2d(6, 16, 5),
                relu_conv2=nn.ReLU(),
                pool2=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                fc1=nn.Linear(16 * 5 * 5, 120),
                relu_fc1=nn.ReLU(),
                fc2=nn.Linear(120, 84),
                relu_fc2=nn.ReLU(),
                fc3=nn.Linear(84, num_classes),
            )
        )


class SimpleNetMnist(nn.Sequential):
    """Two 5x5 convolutions of 20 and 50 channels, then a head.

    (N, in_channels, 28, 28) -> logits (N, num_classes).

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        averaged: True for a mean over the last 4x4 map and one linear layer `fc`, False for two
            linear layers `fc1` and `fc2`.
    """

    def __init__(self, *, num_classes: int, in_channels: int, averaged: bool):
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=nn.Conv2d(in_channels, 20, 5),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(20, 50, 5),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
        )
        if averaged:
            layers.update(
                avgpool=nn.AvgPool2d(4), flatten=nn.Flatten(), fc=nn.Linear(50, num_classes)
            )
        else:
            layers.update(
                flatten=nn.Flatten(),
                fc1=nn.Linear(4 * 4 * 50, 500),
                relu3=nn.ReLU(),
                fc2=nn.Linear(500, num_classes),
            )
        super().__init__(layers)


@registry.register("model", "simplenet_cifar", source=f"{WHOSE} simplenet_cifar")
def simplenet_cifar(*, num_classes: int = 10, in_channels: int = 3) -> SimpleNetCifar:
    """LeNet-like network for 32x32 images: 62 thousand parameters, 0.65 M MACs."""
    return SimpleNetCifar(num_classes=num_classes, in_channels=in_channels)


@registry.register("model", "simplenet_mnist", source=f"{WHOSE} simplenet_mnist")
def simplenet_mnist(*, num_classes: int = 10, in_channels: int = 1) -> SimpleNetMnist:
    """LeNet-like network for 28x28 images: 431 thousand parameters, 2.29 M MACs."""
    return SimpleNetMnist(num_classes=num_classes, in_channels=in_channels, averaged=False)


@registry.register("model", "simplenet_v2_mnist", source=f"{WHOSE} simplenet_v2_mnist")
def simplenet_v2_mnist(*, num_classes: int = 10, in_channels: int = 1) -> SimpleNetMnist:
    """simplenet_mnist with a mean and one small linear layer: 26 thousand parameters."""
    return SimpleNetMnist(num_classes=num_classes, in_channels=in_channels, averaged=True)
