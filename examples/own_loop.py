"""A training script like any other, and the 12 lines that make gracile compress what it trains.

    python examples/own_loop.py --recipe examples/own_loop.yaml --runtime openvino --out runs/own

Lines marked `gracile` were added; without them this is the script as it was before.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import gracile  # gracile


class DigitNet(nn.Module):
    """Two residual stages for 8x8 gray images, 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(32)
        self.a = Block(32)
        self.b = Block(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_bn(self.stem(x)))
        x = self.b(F.max_pool2d(self.a(x), 2))
        return self.head(x.mean((2, 3)))


class Block(nn.Module):
    """x + conv(conv(x)), with batch normalization."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(y)))


def loaders(batch_size: int) -> tuple[DataLoader, DataLoader]:
    """Training batches, and the 360 last digits as one test batch."""
    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 16
    labels = torch.from_numpy(found.target).long()
    train = TensorDataset(images[:-360], labels[:-360])
    test = TensorDataset(images[-360:], labels[-360:])
    return DataLoader(train, batch_size, shuffle=True), DataLoader(test, len(test))


@torch.no_grad()
def accuracy(model: nn.Module, batches: DataLoader) -> float:
    """Share of right answers."""
    model.eval()
    hits = [(model(x).argmax(1) == y).float().mean() for x, y in batches]
    return float(torch.stack(hits).mean())


def main(argv: list[str] | None = None) -> float:
    """Train, and return the test accuracy."""
    parser = argparse.ArgumentParser(description="Train a small network on digits.")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    gracile.add_arguments(parser)  # gracile
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    train, test = loaders(args.batch_size)
    model = DigitNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=1e-4)
    steps = len(train)

    session = gracile.session_from(args, model, optimizer, train, epochs=args.epochs)  # gracile
    for epoch in range(args.epochs):
        session.on_epoch_begin(epoch)  # gracile
        for batch, (x, y) in enumerate(train):
            session.on_minibatch_begin(epoch, batch, steps)  # gracile
            model = session.model  # gracile
            model.train()
            loss = F.cross_entropy(model(x), y)
            loss = session.before_backward_pass(epoch, batch, steps, loss)  # gracile
            optimizer.zero_grad()
            loss.backward()
            session.before_parameter_optimization(epoch, batch, steps)  # gracile
            optimizer.step()
            session.on_minibatch_end(epoch, batch, steps)  # gracile
        session.on_epoch_end(epoch)  # gracile
        print(f"epoch {epoch + 1}: test accuracy {100 * accuracy(model, test):.1f} %")

    result = gracile.finish(args, session)  # gracile
    model = result.model  # gracile
    return accuracy(model, test)


if __name__ == "__main__":
    main()
