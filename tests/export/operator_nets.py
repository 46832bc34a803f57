"""Networks of one operator each, that several exporters write node by node."""

import torch
from torch import nn
from torch.nn import functional as F

from gracile.nn.shortcut import ChannelPad

IMAGE, LINE = (3, 7, 5), (4, 6)


class Of(nn.Module):
    """A function of what its layers make, as a network."""

    def __init__(self, function, *layers):
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, x):
        return self.function(x, *self.layers)


def after(function):
    """A network that computes something of a convolution's result: of a tensor that is no input."""
    return Of(lambda x, conv: function(conv(x)), nn.Conv2d(3, 4, 1))


def scattered(source):
    """A ChannelPad after a cut."""
    pad = ChannelPad(3)
    pad.source = source
    return pad


# Name -> network, and the shape of one sample.
COMMON = {
    "conv": (nn.Conv2d(3, 5, 3, (2, 1), (1, 2), (1, 2)), IMAGE),
    "conv without bias": (nn.Conv2d(3, 8, 3, bias=False), IMAGE),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (4, 7, 5)),
    "linear": (nn.Sequential(nn.Flatten(), nn.Linear(105, 5)), IMAGE),
    "linear of rows": (nn.Linear(6, 5), LINE),
    "functional": (Of(lambda x, f: F.linear(x, f.weight, f.bias), nn.Linear(6, 5)), LINE),
    "batch norm": (Of(lambda x, b: b(torch.relu(x)), nn.BatchNorm2d(3)), IMAGE),
    "max pool": (nn.MaxPool2d(3, 2, 1), IMAGE),
    "max pool of a rest": (nn.MaxPool2d(2), IMAGE),
    "avg pool": (nn.AvgPool2d(3, 2, 1), IMAGE),
    "avg pool of what is there": (nn.AvgPool2d(3, 2, 1, count_include_pad=False), IMAGE),
    "global pool": (nn.AdaptiveAvgPool2d(1), IMAGE),
    "mean": (Of(lambda x: x.mean((2, 3))), IMAGE),
    "mean kept": (Of(lambda x: x.mean((-1, -2), keepdim=True)), IMAGE),
    "mean of channels": (Of(lambda x: x.mean(1)), IMAGE),
    "mean of rows": (Of(lambda x: x.mean(1)), LINE),
    "squeeze and excite": (after(lambda x: x * torch.sigmoid(x.mean((2, 3), True))), IMAGE),
    "flatten": (nn.Flatten(), IMAGE),
    "reshape": (Of(lambda x: x.reshape(x.shape[0], 7, 15)), IMAGE),
    "shuffle": (Of(lambda x: x.view(-1, 2, 2, 7, 5).transpose(1, 2).reshape(-1, 4, 7, 5)),
                (4, 7, 5)),
    "cat": (Of(lambda x: torch.cat([x, torch.relu(x)], 1)), IMAGE),
    "chunk": (Of(lambda x: torch.mul(*x.chunk(2, 1))), (4, 7, 5)),
    "split": (Of(lambda x: (lambda a, b: torch.cat([b, a], 1))(*x.split([1, 3], 1))), (4, 7, 5)),
    "slice": (Of(lambda x: x[:, 1:, :-2]), IMAGE),
    "every second": (Of(lambda x: x[:, :, ::2, 1::3]), IMAGE),
    "pad": (nn.ZeroPad2d((1, 2, 0, 3)), IMAGE),
    "pad with a number": (nn.ConstantPad2d((1, 0, 2, 1), 0.5), IMAGE),
    "pad channels": (ChannelPad(3, 2, 3, stride=2), IMAGE),
    "channels in any order": (Of(lambda x, p: p(torch.relu(x)), scattered([2, -1, 0, 1])), IMAGE),
    "numbers": (Of(lambda x: (1 - x) * 2 + 3 / (x * x + 1)), IMAGE),
    "a difference": (after(lambda x: x - torch.relu(x)), IMAGE),
    "attention": (Of(lambda x, q, k: torch.softmax(q(x) @ k(x).transpose(1, 2) / 6**0.5, -1) @ x,
                     nn.Linear(6, 6), nn.Linear(6, 6)), LINE),
    "two heads": (Of(lambda x, q: F.gelu(q(x).view(-1, 4, 2, 3).transpose(1, 2)
                                         @ x.view(-1, 4, 2, 3).permute(0, 2, 3, 1)),
                     nn.Linear(6, 6)), LINE),
    "log softmax": (Of(lambda x: F.log_softmax(x, 1)), IMAGE),
}  # fmt: skip
