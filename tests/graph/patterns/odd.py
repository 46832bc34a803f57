"""What cannot be followed is protected with the reason; what only looks odd is not."""

import torch
from torch import nn
from torch.nn import functional as F

from gracile.nn.binary import Step
from gracile.nn.quantized import ActivationQuantizer
from patterns.base import pattern

SQUARE = (2, 3, 6, 6)
CONV = 27 + 1


class _Around(nn.Module):
    """A convolution of 4 channels, what is to be tried, and a convolution that reads 4."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.b(self.between(self.a(x)))


@pattern(SQUARE, protected={"a.weight": "cumsum"})
class CumulativeSum(_Around):
    def between(self, x):
        return torch.cumsum(x, 1)


@pattern(SQUARE, protected={"a.weight": "sort"})
class SortedChannels(_Around):
    def between(self, x):
        return torch.sort(x, dim=1)[0]


@pattern(SQUARE, protected={"a.weight": "fft"})
class Fourier(_Around):
    def between(self, x):
        return torch.fft.fft(x, dim=1).real


@pattern(SQUARE, protected={"a.weight": "normalizes over the channels"})
class SoftmaxOverChannels(_Around):
    def between(self, x):
        return x.softmax(1)


@pattern(SQUARE, more=True, masked=False)
class MeanOverChannels(_Around):
    def between(self, x):
        return x - x.mean(1, keepdim=True)


@pattern(SQUARE, more=True)
class Divided(_Around):
    def between(self, x):
        return x / (x.abs() + 1)


@pattern(SQUARE, more=True)
class WrittenInPlace(_Around):
    def between(self, x):
        x = x.clone()
        x[:, 1] = 0.0
        return x


@pattern(SQUARE, free={"a.weight": (4, CONV + 3)})
class InPlaceAdd(_Around):
    def between(self, x):
        y = 2 * torch.relu(x)
        y += x
        return y.mul_(0.5)


@pattern(SQUARE, free={"a.weight": (4, CONV + 3)})
class DeadBranch(_Around):
    def between(self, x):
        _ = torch.cumsum(x, 1)
        return x.contiguous()


@pattern(SQUARE, protected={"a.weight": "cannot be followed", "b.weight": "cannot be followed"})
class DependsOnData(_Around):
    def between(self, x):
        return x if x.sum() > 0 else -x


@pattern(SQUARE, free={"a.weight": (4, CONV + 3)})
class BranchOnShape(_Around):  # fx cannot follow it, torch.export can
    def between(self, x):
        if x.shape[2] % 2 or len(x) < 1:
            raise ValueError("odd")
        return F.relu(x)


@pattern(SQUARE, protected={"a.weight": "nothing to choose"})
class OneChannel(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 1, 3), nn.Conv2d(1, 3, 1)

    def forward(self, x):
        return self.b(self.a(x))


@pattern((2, 6, 6), more=True)
class Crossed(nn.Module):  # a map plus its transpose: rows become columns
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.a(x)
        return self.b(x + x.transpose(1, 2))


@pattern((4, 6), free={"a.weight": (5, 6 + 1 + 3)}, more=True)
class UnusedLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.lost = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(7, 7)

    def forward(self, x):
        return self.b(F.elu(self.a(x)))


def activations():
    """One of each; some with weights of their own."""
    return (
    nn.ReLU(), nn.ReLU6(), nn.Hardtanh(), nn.Sigmoid(), nn.Hardsigmoid(), nn.SiLU(),
    nn.Hardswish(), nn.GELU(), nn.Tanh(), nn.LeakyReLU(), nn.ELU(), nn.SELU(), nn.CELU(),
    nn.Mish(), nn.Softplus(), nn.Softsign(), nn.LogSigmoid(), nn.Hardshrink(), nn.Softshrink(),
    nn.Threshold(0.1, 0.3), nn.Identity(), nn.Dropout(0.1), nn.PReLU(), nn.PReLU(5),
    )  # fmt: skip


@pattern((4, 6), free={"a.weight": (5, 6 + 1 + 1 + 3)})
class EveryActivation(nn.Module):  # f(0) is not 0 for all of them
    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.Linear(6, 5), nn.Linear(5, 3), nn.Sequential(*activations())

    def forward(self, x):
        return self.b(sum(act(self.a(x)) for act in self.act))


@pattern((4, 6), free={"a.weight": (5, 6 + 1 + 3)})
class EveryFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        x = self.a(x)
        y = x.abs().sqrt() + torch.exp(-x) + x.pow(2).clamp(max=3) + x.float().detach()
        return self.b(y * x.sigmoid())


@pattern(SQUARE, free={"a.weight": (4, CONV + 3)})
class EveryReduction(_Around):  # over the pixels of each channel
    def between(self, x):
        y = F.log_softmax(x.flatten(2), 2).unflatten(2, (4, 4))
        lows = torch.amin(x, (2, 3), keepdim=True) + x.amax(dim=(2, 3), keepdim=True)
        return y + lows + x.sum((2, 3), True) + x.var((2, 3), keepdim=True) + x.std(3, keepdim=True)


@pattern(SQUARE, free={"a.weight": (4, CONV + 3)})
class Stepped(_Around):  # one bit, as it is written out
    def __init__(self):
        super().__init__()
        self.q = Step(torch.tensor(2.0), torch.tensor([0.1]))

    def between(self, x):
        return self.q(x)


@pattern(SQUARE, free={"a.weight": (4, CONV + 3)})
class Quantized(_Around):  # cutting a network that carries activation quantizers
    def __init__(self):
        super().__init__()
        self.q = ActivationQuantizer(bits=8, signed=True)

    def between(self, x):
        return self.q(F.relu(x))
