"""Random small networks: chains, branches and merges of operators from a table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 4  # maps are (N, C, 4, 4), tokens (N, 16, C)
STATISTIC = {"layer_norm", "group_norm"}  # these see a zero channel


@dataclass(frozen=True)
class Step:
    """One operator: its name, which values it reads (modulo how many there are), a width."""

    op: str
    a: int
    b: int
    width: int


Call = Callable[..., Tensor]
Made = tuple[nn.Module | None, Call, str, int]  # module, its call, kind and channels of the output
TABLE: dict[str, tuple[str, Callable[[int, int], Made | None]]] = {}


def operator(kind: str) -> Callable[[Callable[[int, int], Made | None]], None]:
    """Add to the table: (channels, width) -> what is called; None where it does not fit."""

    def add(make: Callable[[int, int], Made | None]) -> None:
        TABLE[make.__name__] = (kind, make)

    return add


def _plain(kind: str, name: str, make: Callable[[int], nn.Module]) -> None:
    TABLE[name] = (kind, lambda c, w: (make(c), lambda m, x: m(x), kind, c))


for _name, _make in {
    "batch_norm": nn.BatchNorm2d,
    "instance_norm": nn.InstanceNorm2d,
    "prelu_map": nn.PReLU,
    "sigmoid": lambda c: nn.Sigmoid(),
    "max_pool": lambda c: nn.MaxPool2d(3, 1, 1),
    "avg_pool": lambda c: nn.AvgPool2d(3, 1, 1),
    "depthwise": lambda c: nn.Conv2d(c, c, 3, padding=1, groups=c),
    "upsample_and_pool": lambda c: nn.Sequential(nn.Upsample(scale_factor=2), nn.AvgPool2d(2)),
}.items():
    _plain("map", _name, _make)
for _name, _make in {
    "layer_norm": nn.LayerNorm,
    "gelu": lambda c: nn.GELU(),
    "dropout": lambda c: nn.Dropout(0.1),
}.items():
    _plain("tokens", _name, _make)


@operator("map")
def conv(c, w):
    return nn.Conv2d(c, w, 3, padding=1), lambda m, x: m(x), "map", w


@operator("map")
def grouped(c, w):
    if c % 2:
        return None
    return nn.Conv2d(c, 2 * w, 3, padding=1, groups=2), lambda m, x: m(x), "map", 2 * w


@operator("map")
def multiplier(c, w):
    return nn.Conv2d(c, 2 * c, 1, groups=c), lambda m, x: m(x), "map", 2 * c


@operator("map")
def transposed(c, w):
    return nn.ConvTranspose2d(c, w, 3, padding=1), lambda m, x: m(x), "map", w


@operator("map")
def group_norm(c, w):
    return None if c % 2 else (nn.GroupNorm(2, c), lambda m, x: m(x), "map", c)


@operator("map")
def gate(c, w):
    return nn.Conv2d(c, c, 1), lambda m, x: x * m(x.mean((2, 3), True)).sigmoid(), "map", c


@operator("map")
def glu(c, w):
    return None if c % 2 else (None, lambda m, x: F.glu(x, 1), "map", c // 2)


@operator("map")
def chunk(c, w):
    def call(m, x):
        left, right = x.chunk(2, 1)
        return left - F.relu(right)

    return None if c % 2 else (None, call, "map", c // 2)


@operator("map")
def half_through_a_layer(c, w):
    def call(m, x):
        left, right = x.chunk(2, 1)
        return torch.cat([m(right), left], 1)

    return None if c % 2 else (nn.Conv2d(c // 2, c // 2, 1), call, "map", c)


@operator("map")
def shuffle(c, w):
    def call(m, x):
        n, c, h, v = x.size()
        return x.view(n, 2, c // 2, h, v).transpose(1, 2).reshape(n, c, h, v)

    return None if c % 2 else (None, call, "map", c)


@operator("map")
def pad_and_crop(c, w):
    return None, lambda m, x: F.pad(x, (1, 1, 0, 1))[:, :, 1:, 1:-1], "map", c


@operator("map")
def pixels(c, w):
    return None, lambda m, x: F.pixel_shuffle(F.pixel_unshuffle(x, 2), 2), "map", c


@operator("map")
def to_tokens(c, w):
    return None, lambda m, x: x.flatten(2).transpose(1, 2), "tokens", c


@operator("tokens")
def to_map(c, w):
    return None, lambda m, x: x.transpose(1, 2).unflatten(2, (SIDE, SIDE)), "map", c


@operator("tokens")
def linear(c, w):
    return nn.Linear(c, w), lambda m, x: m(x), "tokens", w


@operator("tokens")
def swiglu(c, w):
    layers = nn.ModuleList([nn.Linear(c, 2 * w), nn.Linear(w, c)])

    def call(m, x):
        value, gate = m[0](x).chunk(2, -1)
        return m[1](value * F.silu(gate))

    return layers, call, "tokens", c


@operator("tokens")
def attention(c, w):
    layers = nn.ModuleList([nn.Linear(c, 2 * w), nn.Linear(c, 2 * w), nn.Linear(c, 2 * w)])

    def call(m, x):
        n, t, _ = x.shape
        q, k, v = (f(x).view(n, t, 2, -1).transpose(1, 2) for f in m)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, -1)

    return layers, call, "tokens", 2 * w


MERGES: dict[str, Call] = {
    "add": lambda x, y: x + y,
    "mul": lambda x, y: x * torch.tanh(y),
    "maximum": torch.maximum,
}


class RandomNet(nn.Module):
    """Run the steps; the means of all values that nobody read go through one linear layer.

    Args:
        steps: a step that does not fit what it reads is left out.
    """

    def __init__(self, steps: Sequence[Step]):
        super().__init__()
        self.layers = nn.ModuleList()
        self.program: list[tuple[Call, int | None, tuple[int, ...]]] = []
        self.kinds = [("map", 3), ("map", 6)]
        self.names: set[str] = set()
        self.layers.append(nn.Conv2d(3, 6, 3, padding=1))
        self.program.append((lambda m, x: m(x), 0, (0,)))
        self.read = {0}
        for step in steps:
            self._merge(step) if step.op in (*MERGES, "cat") else self._add(step)
        self.ends = [i for i in range(len(self.kinds)) if i not in self.read]
        self.head = nn.Linear(sum(self.kinds[i][1] for i in self.ends), 3)

    def _add(self, step: Step) -> None:
        kind, make = TABLE[step.op]
        fitting = [i for i, (k, _) in enumerate(self.kinds) if k == kind and i > 0]
        if not fitting:
            return
        at = fitting[step.a % len(fitting)]
        made = make(self.kinds[at][1], step.width)
        if made is None:
            return
        module, call, out, channels = made
        if module is not None:
            self.layers.append(module)
        self._do(
            step.op, call, None if module is None else len(self.layers) - 1, (at,), out, channels
        )

    def _merge(self, step: Step) -> None:
        a = 1 + step.a % (len(self.kinds) - 1)
        kind, channels = self.kinds[a]
        fitting = [
            i
            for i, (k, c) in enumerate(self.kinds)
            if k == kind and i > 0 and (step.op == "cat" or c == channels)
        ]
        b = fitting[step.b % len(fitting)]
        if step.op == "cat":
            dim = 1 if kind == "map" else 2
            total = channels + self.kinds[b][1]
            self._do("cat", lambda m, x, y: torch.cat([x, y], dim), None, (a, b), kind, total)
        else:
            merge = MERGES[step.op]
            self._do(step.op, lambda m, x, y: merge(x, y), None, (a, b), kind, channels)

    def _do(self, name, call, layer, reads, kind, channels) -> None:
        self.names.add(name)
        self.program.append((call, layer, reads))
        self.read.update(reads)
        self.kinds.append((kind, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 4, 4) -> (N, 3)."""
        values = [x]
        for call, layer, reads in self.program:
            module = None if layer is None else self.layers[layer]
            values.append(call(module, *(values[i] for i in reads)))
        means = [values[i].mean((2, 3) if self.kinds[i][0] == "map" else 1) for i in self.ends]
        return self.head(torch.cat(means, 1))
