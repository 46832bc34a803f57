"""gracile as a library: your own network and DataLoader in, a proven INT8 artifact and Records out.

python examples/library.py --out runs/library
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import gracile


class Net(nn.Module):
    """Three convolutions and a linear head for 8x8 gray images, 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def digits() -> tuple[DataLoader, DataLoader]:
    """Training and test batches."""
    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 16
    labels = torch.from_numpy(found.target).long()
    train = TensorDataset(images[:-360], labels[:-360])
    test = TensorDataset(images[-360:], labels[-360:])
    return DataLoader(train, 64, shuffle=True), DataLoader(test, 90)


def train(model: nn.Module, batches: DataLoader, epochs: int) -> None:
    """Train it your way: gracile starts from a network that works."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, batches: DataLoader) -> float:
    """Share of right answers."""
    model.eval()
    hits = [(model(x).argmax(1) == y).float().mean() for x, y in batches]
    return float(torch.stack(hits).mean())


def recipe(epochs: int) -> gracile.Recipe:
    """Half of the filters of two layers, distilled from the original, then INT8."""
    return gracile.Recipe.build(
        train={
            "epochs": epochs,
            "optimizer": {"class": "SGD", "lr": 0.02, "momentum": 0.9},
        },
        data={"calibration": 200},
        methods={
            "filters": {
                "prune": "oneshot",
                "weights": ["features.0.weight", "features.3.weight"],
                "granularity": "filter",
                "sparsity": 0.5,
                "when": {"at": "0ep"},
            },
            "thin": {"prune": "thin", "when": {"at": "0ep"}},
            "teacher": {"distill": "kd", "alpha": 0.3},
            "int8": {"quantize": "ptq", "when": {"at": "end"}},
        },
    )


def main(argv: list[str] | None = None) -> list[gracile.Record]:
    """Train, compress, export, measure; returns the Records."""
    parser = argparse.ArgumentParser(description="Compress a network of your own.")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--out", type=Path, default=Path("runs/library"))
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    batches, test = digits()
    x, _ = next(iter(test))
    model = Net()
    train(model, batches, args.epochs)
    print(f"original: test accuracy {100 * accuracy(model, test):.1f} %")
    dense = gracile.export(model, args.runtime, args.out / "dense", example=x)

    result = gracile.compress(
        model, recipe(args.epochs), example=x[:2], train=batches, val=test, profile=args.runtime
    )
    print(f"compressed: test accuracy {100 * accuracy(result.model, test):.1f} %")
    gracile.save_model(args.out, result)
    small = gracile.export(result, args.runtime, args.out / "small", example=x)

    records = gracile.benchmark({"dense": dense, "small": small}, threads=1)
    for r in records:
        if r.metric in ("latency_ms", "speedup"):
            print(f"{r.subject['model']}: {r.metric} {r.value:.3g} {r.unit} in {r.runtime}")
    return records


if __name__ == "__main__":
    main()
