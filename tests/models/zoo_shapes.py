"""What the tests of the zoo share: shapes, sizes and costs, without drawing a single weight."""

import torch
from torch import nn

from gracile.models.spec import list_models, resolve

NAMES = [entry.name for entry in list_models()]
SIZES = {"simplenet_mnist": 28, "simplenet_v2_mnist": 28, "alexnet": 64, "alexnet_bn": 64}


def shaped(spec):
    """The network on the meta device: names, shapes and operators, no values."""
    with torch.device("meta"):
        return resolve(spec).model.eval()


def example(name, channels=None):
    """A batch of two the network takes."""
    if name == "word_lstm":
        return torch.arange(10).reshape(2, 5)
    size = SIZES.get(name, 32)
    return torch.randn(2, channels or (1 if "mnist" in name else 3), size, size)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def weights(model):
    """Entries of matrices and filters, which is what Distiller counts."""
    return sum(p.numel() for p in model.parameters() if p.dim() > 1)


def macs(model, *shape):
    """MACs of convolutions and linear layers, in the order they run."""
    out = []

    def count(module, _, y):
        out.append(module.weight.numel() * (y[0, 0].numel() if y.dim() == 4 else 1))

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    model(torch.zeros(1, *shape, device="meta"))
    return out
