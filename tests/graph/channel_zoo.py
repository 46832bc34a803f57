"""Tiny networks, one for each pattern of channels, that the graph tests share."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gracile.nn.shortcut import ChannelPad


class Residual(nn.Module):
    """Two branches of one stream, BatchNorm with a bias, functional dropout, global mean."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.bn0 = nn.BatchNorm2d(6)
        self.conv1 = nn.Conv2d(6, 5, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        y = F.dropout(F.relu(self.bn1(self.conv1(x))), 0.5, self.training)
        x = x + self.bn2(self.conv2(y))
        return self.fc(F.relu(x).mean((2, 3)))


class Concat(nn.Module):
    """Two producers joined, one of them through a sigmoid: f(0) is not 0."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 5, 3)
        self.bn = nn.BatchNorm2d(9)
        self.mix = nn.Conv2d(9, 6, 1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([torch.sigmoid(self.a(x)), self.b(x)], 1)
        x = self.mix(torch.sigmoid(self.bn(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class CatTwice(nn.Module):
    """The same tensor twice in one concatenation, then flattened with pixels left."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.fc = nn.Linear(4 * 2 * 9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(x))
        return self.fc(torch.flatten(torch.cat([x, x], dim=1), 1))


class Depthwise(nn.Module):
    """Separable convolution; the depthwise part has two filters per channel."""

    def __init__(self):
        super().__init__()
        self.point1 = nn.Conv2d(3, 6, 1)
        self.depth = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.bn = nn.BatchNorm2d(12)
        self.depth2 = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.point2 = nn.Conv2d(12, 5, 1)
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn(self.depth(self.point1(x))))
        return self.fc(self.point2(F.hardswish(self.depth2(x))).mean([2, 3]))


class Grouped(nn.Module):
    """Convolution in two groups that are not depthwise, behind a plain one."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2)
        self.head = nn.Conv2d(12, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.elu(self.grouped(F.silu(self.stem(x))))).flatten(1)


class Shared(nn.Module):
    """One module called twice, a learned scale, and a tied linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.scale = nn.Parameter(torch.rand(1, 6, 1, 1) + 0.5)
        self.up, self.down = nn.Linear(6, 5), nn.Linear(5, 6)
        self.up2, self.down2 = nn.Linear(6, 5), nn.Linear(5, 6)
        self.up2.weight, self.down2.weight = self.up.weight, self.down.weight
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.scale * self.conv(F.gelu(self.conv(x)))
        x = x.mean((-1, -2))
        x = x + self.down(F.relu(self.up(x)))
        x = x + self.down2(F.relu(self.up2(x)))
        return self.fc(x)


class OptionA(nn.Module):
    """Parameter-free shortcut: half the zero channels in front, half behind."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.pad = ChannelPad(4, 2, 2, stride=2)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.bn(self.conv(x)) + self.pad(x))
        return self.fc(F.avg_pool2d(x, x.size(3)).view(x.size(0), -1))


class TwoOutputs(nn.Module):
    """Two inputs and two outputs; one output is read inside as well."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 5, 3), nn.Conv2d(3, 5, 3)
        self.c, self.d = nn.Conv2d(5, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        z = F.relu(self.a(x) + self.b(y))
        c = self.c(z)
        return {"features": c, "scores": self.d(torch.relu(c)[:, :, 1:, ::2])}


class Transposed(nn.Module):
    """Transposed convolutions: plain, grouped and depthwise, with norms without parameters."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.bn = nn.BatchNorm2d(6, affine=False)
        self.grouped = nn.ConvTranspose2d(6, 8, 3, groups=2)
        self.norm = nn.InstanceNorm2d(8)
        self.depth = nn.ConvTranspose2d(8, 16, 2, groups=8)
        self.group_norm = nn.GroupNorm(4, 16)
        self.head = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.bn(self.up(self.stem(x))))
        x = self.depth(self.norm(self.grouped(x)))
        return self.head(F.pad(self.group_norm(x), (1, 1, 0, 1)))


class Gates(nn.Module):
    """Squeeze-and-excitation, a GLU, equal chunks and a channel shuffle."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.squeeze, self.excite = nn.Conv2d(8, 3, 1), nn.Conv2d(3, 8, 1)
        self.wide, self.glu = nn.Conv2d(8, 12, 1), nn.GLU(dim=1)
        self.mix = nn.Conv2d(6, 8, 1, groups=2)
        self.act = nn.PReLU(8)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1))))
        x = self.glu(self.wide(x * gate.sigmoid()))
        x = self.act(self.mix(x))
        n, c, h, w = x.size()
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
        a, b = x.chunk(2, dim=1)
        x = (a - b).permute(0, 2, 3, 1)
        return self.head(x.unsqueeze(1).squeeze(1)).softmax(-1).mean((1, 2))


class Unknown(nn.Module):
    """Operators that nobody explained, a hard-coded reshape, a LayerNorm over the channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 5, 1)
        self.d, self.norm, self.e = nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cumsum(self.a(x), 1)
        x = self.c(self.b(x)).reshape(-1, 5, 36)
        return self.e(self.norm(self.d(x.mean(2))))


SQUARE = (2, 3, 8, 8)
ZOO = {
    "residual": (Residual, (SQUARE,)),
    "concat": (Concat, (SQUARE,)),
    "cat_twice": (CatTwice, (SQUARE,)),
    "depthwise": (Depthwise, (SQUARE,)),
    "grouped": (Grouped, ((2, 3, 6, 6),)),
    "shared": (Shared, ((2, 3, 5, 5),)),
    "option_a": (OptionA, (SQUARE,)),
    "two_outputs": (TwoOutputs, (SQUARE, SQUARE)),
    "transposed": (Transposed, ((2, 3, 5, 5),)),
    "gates": (Gates, ((2, 3, 5, 5),)),
    "unknown": (Unknown, (SQUARE,)),
}


def build(name: str, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network with random weights and BatchNorm statistics, and an example for it."""
    torch.manual_seed(seed)
    cls, shapes = ZOO[name]
    model = cls()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            if m.affine:
                nn.init.normal_(m.weight)
                nn.init.normal_(m.bias)
    return model, tuple(torch.randn(s) for s in shapes)
