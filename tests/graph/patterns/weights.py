"""Weights that the forward computes from parameters: standardized, masked, normalized, summed."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from patterns.base import pattern

SQUARE = (2, 3, 8, 8)


class _StdConv(nn.Conv2d):
    """timm's ScaledStdConv2d: mean and variance of each filter, by batch_norm, and a gain."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)
        self.scale = self.weight[0].numel() ** -0.5

    def forward(self, x):
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1),
            None,
            None,
            weight=(self.gain * self.scale).view(-1),
            training=True,
            momentum=0.0,
            eps=1e-6,
        ).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class _Net(nn.Module):
    """A layer of the subclass between two plain ones, 3 -> 4 -> 6 -> 2 channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), self.middle(), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.c(torch.sigmoid(self.b(torch.sigmoid(self.a(x)))))


class _Two(nn.Module):
    """The same in the middle, with a method that computes its weight from `w`."""

    def __init__(self, kernel=3, groups=1):
        super().__init__()
        self.a, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(6, 2, 1)
        self.w = nn.Parameter(torch.randn(6, 4 // groups, kernel, kernel))
        self.groups = groups

    def forward(self, x):
        x = torch.sigmoid(self.a(x))  # not zero where the channel before it is
        return self.c(torch.sigmoid(F.conv2d(x, self.weight(), groups=self.groups)))


# a: 3 weights, a bias, and 6 x 9 that read it; w: 4 x 9, and 2 that read it.
A, B = 3 + 1 + 6 * 9, 4 * 9 + 2


@pattern(SQUARE, free={"a.weight": (4, A), "b.weight": (6, B + 2)}, masked=False)
class StandardizedByBatchNorm(_Net):  # and a bias and a gain
    def middle(self):
        return _StdConv(4, 6, 3)


@pattern(SQUARE, free={"a.weight": (4, 3 + 1 + 6), "b.weight": (6, 4 + 1 + 1 + 2)}, masked=False)
class StandardizedPointwise(_Net):
    def middle(self):
        return _StdConv(4, 6, 1)


@pattern(SQUARE, kinds=[("outer", 2), ("inner", 2), ("inner", 3)], masked=False)
class StandardizedGrouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = _StdConv(3, 4, 3), _StdConv(4, 6, 3, groups=2), _StdConv(6, 2, 3)

    def forward(self, x):
        return self.c(torch.sigmoid(self.b(F.gelu(self.a(x)))))


@pattern(SQUARE, free={"a.weight": (6, 3 + 1 + 9 + 1 + 1 + 2)}, masked=False)
class StandardizedDepthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 1), _StdConv(6, 6, 3, groups=6), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


@pattern(SQUARE, free={"a.weight": (4, A), "w": (6, B)}, masked=False)
class StandardizedByVarMean(_Two):
    def weight(self):
        var, mean = torch.var_mean(self.w, dim=(1, 2, 3), keepdim=True, unbiased=False)
        return (self.w - mean) / torch.sqrt(var + 1e-5)


@pattern(SQUARE, free={"a.weight": (4, A), "b.weight": (6, B + 2)}, masked=False)
class StandardizedInTheExport(StandardizedByBatchNorm):  # fx cannot follow the question
    def forward(self, x):
        return super().forward(x if x.shape[1] == 3 else x[:, :3])


@pattern(SQUARE, free={"a.weight": (4, A), "w": (6, B)}, masked=False)
class StandardizedByArithmetic(_Two):
    def weight(self):
        w = self.w - self.w.mean((1, 2, 3), keepdim=True)
        return w / (w.flatten(1).std(1).view(-1, 1, 1, 1) + 1e-5)


@pattern(SQUARE, free={"a.weight": (4, A), "w": (6, B)}, masked=False)
class StandardizedByStdMean(_Two):
    def weight(self):
        std, mean = torch.std_mean(self.w.flatten(1), 1, False)
        return (self.w - mean[:, None, None, None]) / (std[:, None, None, None] + 1e-5)


@pattern(SQUARE, free={"a.weight": (4, A), "w": (6, B)}, masked=False)
class StandardizedByRsqrt(_Two):  # as lucidrains writes it
    def weight(self):
        var = self.w.var((1, 2, 3), keepdim=True, unbiased=False)
        return (self.w - self.w.mean((1, 2, 3), keepdim=True)) * (var + 1e-5).rsqrt()


@pattern(SQUARE, free={"a.weight": (4, A), "w": (6, B + 1)}, masked=False)
class WeightNormByHand(_Two):
    def __init__(self):
        super().__init__()
        self.g = nn.Parameter(torch.rand(6, 1, 1, 1))

    def weight(self):
        length = self.w.flatten(1).pow(2).sum(1).sqrt().view(-1, 1, 1, 1)
        return self.g * self.w / length


@pattern(SQUARE, free={"a.weight": (4, A), "w": (6, B)})
class MaskedKernel(_Two):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", (torch.rand(6, 4, 3, 3) < 0.7).float())

    def weight(self):
        return self.w * self.mask


@pattern(SQUARE, free={"a.weight": (4, A), "w": (6, B)}, masked=False)
class PositiveKernel(_Two):  # 0 is no zero of the weight
    def weight(self):
        return F.softplus(self.w)


@pattern(SQUARE, free={"a.weight": (4, A + 6), "w": (6, B + 4)})
class SumOfKernels(_Two):  # as RepVGG's branches in one convolution
    def __init__(self):
        super().__init__()
        self.k = nn.Parameter(torch.randn(6, 4, 1, 1))

    def weight(self):
        return self.w + F.pad(self.k, [1, 1, 1, 1])


@pattern(SQUARE, free={"a.weight": (4, A + 6), "w": (6, B + 4 + 4)})
class ScaledAndShifted(_Two):  # a computed bias
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(6, 4, 1, 1))
        self.shift = nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        x = self.a(x).relu()
        return self.c(F.conv2d(x, self.w * self.scale, self.shift.sum(1)).relu())


@pattern(SQUARE, kinds=[("outer", 2), ("inner", 2), ("inner", 3)])
class GroupedMask(_Two):
    def __init__(self):
        super().__init__(groups=2)
        self.register_buffer("mask", (torch.rand(6, 2, 3, 3) < 0.7).float())

    def weight(self):
        return self.w * self.mask


@pattern(SQUARE, free={"a.weight": (4, A), "w": (6, B)})
class TransposedMask(_Two):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 6, 3, 3))
        self.register_buffer("mask", (torch.rand(4, 6, 3, 3) < 0.7).float())

    def forward(self, x):
        x = torch.sigmoid(self.a(x))
        return self.c(torch.sigmoid(F.conv_transpose2d(x, self.w * self.mask)))


@pattern((2, 5), free={"a.weight": (4, 5 + 1 + 6), "w": (6, 4 + 1 + 3)})
class LinearOfAMask(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(5, 4), nn.Linear(6, 3)
        self.w, self.bias = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6))
        self.register_buffer("mask", (torch.rand(6, 4) < 0.7).float())

    def forward(self, x):
        return self.c(F.linear(self.a(x).relu(), self.w * self.mask, self.bias).relu())


@pattern((2, 5), free={"a.weight": (4, 5 + 1 + 6), "w": (6, 4 + 3)}, masked=False)
class MatrixOfAMask(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(5, 4), nn.Linear(6, 3)
        self.w = nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        return self.c((self.a(x).relu() @ torch.tanh(self.w).t()).relu())


@pattern((2, 5), free={"a.weight": (4, 5 + 1 + 3)}, protected={"w": "output"})
class CosineClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.w = nn.Linear(5, 4), nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return F.linear(F.normalize(self.a(x)), F.normalize(self.w))


@pattern((2, 5), free={"a.weight": (4, 5 + 1 + 2), "v": (6, 2 + 3)})
class LowRank(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(5, 4), nn.Linear(6, 3)
        self.v, self.u = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 4))

    def forward(self, x):
        return self.c(F.linear(self.a(x).relu(), self.v @ self.u).relu())


@pattern(SQUARE, free={"a.weight": (4, A), "w": (6, B + 1)}, masked=False)
class WeightNormCall(_Two):  # a filter of zeros has no direction
    def __init__(self):
        super().__init__()
        self.g = nn.Parameter(torch.rand(6, 1, 1, 1))

    def weight(self):
        return torch._weight_norm(self.w, self.g, 0)


@pattern(
    SQUARE,
    free={"a.weight": (4, A), "b.parametrizations.weight.original1": (6, B + 2)},
    masked=False,
)
class WeightNormParametrization(_Net):  # original0 are the lengths, original1 the kernel
    def middle(self):
        return parametrizations.weight_norm(nn.Conv2d(4, 6, 3))


@pattern(SQUARE, free={"a.weight": (4, A), "w": (6, B)}, masked=False)
class ViewedKernel(_Two):
    def weight(self):
        return F.softplus(self.w.flatten(1)).view(self.w.shape)


@pattern(SQUARE, free={"a.weight": (4, A + 6 * 9), "w": (6, B + 4 * 9)})
class HalfAKernel(_Two):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 4, 3, 6))

    def weight(self):
        return self.w.chunk(2, 3)[0]


@pattern(SQUARE, protected={"a.weight": "'linalg_pinv' is not known", "w": "is not known"})
class UnknownWeight(_Two):
    def weight(self):
        return torch.linalg.pinv(self.w.flatten(1)).t().reshape(6, 4, 3, 3)
