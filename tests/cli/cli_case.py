"""A network of a thousand parameters and recipes for it: what the commands are run on."""

NET = """
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=4, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.relu(self.bn(self.stem(x)))
        return self.head(self.pool(self.relu(self.inner(x))).flatten(1))
"""
HEAD = """\
recipe: 1
goal: {max_drop: 100}
train: {epochs: 2, batch_size: 32, optimizer: {class: SGD, lr: 0.05}}
data: {train: "train[:96]", val: "train[100:130]", test: "test[:40]", calibration: 64}
methods:
"""
PRUNE = """\
  filters: {prune: oneshot, weights: "type:Conv2d", granularity: filter, sparsity: 0.5,
            when: {at: 0ep}}
  thin: {prune: thin, when: {at: 1ep}}
"""
QUANTIZE = "  int8: {quantize: ptq}\n"


def compress(recipe: str, out: str, *more: str) -> list[str]:
    """Arguments of a run of `net.py:Net`."""
    return ["compress", "net.py:Net", "--recipe", recipe, "--out", out, *more]
