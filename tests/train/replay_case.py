"""Finished runs of a network of a thousand parameters, made by the same code as any run."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from gracile.models.spec import resolve
from gracile.recipe.load import loads
from gracile.train.finished import Finished, open_run
from gracile.train.job import Job
from gracile.train.run import run

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
RECIPE = """\
recipe: 1
train: {{epochs: {epochs}, batch_size: 32, optimizer: {{class: SGD, lr: 0.05}}}}
data: {{train: "train[:96]", val: "train[100:150]", test: "test[:20]", calibration: 64}}
methods:
  filters: {{prune: oneshot, weights: "type:Conv2d", granularity: filter, sparsity: 0.5,
            when: {{at: {filters}}}}}
  thin: {{prune: thin, when: {{at: {thin}}}}}
  few: {{prune: oneshot, weights: head, sparsity: 0.5, when: {{at: {few}}}}}
  int8: {{quantize: ptq}}
"""
TRAINED = {"epochs": 2, "filters": "0ep", "thin": "1ep", "few": "1ep"}
UNTRAINED = {"epochs": 0, "filters": "end", "thin": "end", "few": "end"}


@dataclass(frozen=True)
class Made:
    """A finished run's folder, and the weights file it began from (None: random weights)."""

    folder: Path
    weights: Path | None

    def open(self) -> Finished:
        return open_run(self.folder, self.weights)


def make(
    folder: Path, times: dict, *, weights: bool = True, more: str = "", text: str = RECIPE
) -> Made:
    """Run a recipe, with `more` entries, on the digits without any runtime."""
    net, file = folder / "net.py", folder / "w.safetensors" if weights else None
    net.write_text(NET)
    if file is not None:
        torch.manual_seed(3)
        save_file(resolve(f"{net}:Net?num_classes=10").model.state_dict(), file)
    recipe = loads(text.format(**times) + more, name="r.yaml")
    run(
        Job(
            model=f"{net}:Net", data="digits", recipe=recipe, out=folder / "run", weights=file,
            progress=False,
        )
    )  # fmt: skip
    return Made(folder / "run", file)
