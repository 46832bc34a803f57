"""A small network with exits, trained for a moment on labelled noise."""

import torch
from torch import Tensor, nn

from gracile.recipe.load import loads
from gracile.train.session import Session

STEPS, BATCH = 3, 8
EXITS = "m: {early_exit: branches, at: [relu, relu_1], goal: {mean_cost: 0.7}}"


class Net(nn.Module):
    """Stem, a residual block, pooling, a head: 3 x 8 x 8 -> 4.

    `relu` ends the stem, `relu_1` stands inside the block, so two tensors are alive behind it.
    """

    def __init__(self, width: int = 8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.inner = nn.Conv2d(width, width, 3, padding=1)
        self.outer = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.stem(x)))
        x = self.relu(x + self.outer(self.relu(self.inner(x))))
        return self.head(self.pool(x).flatten(1))


def batches(seed: int, n: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    """Images that are brighter the higher their class."""
    rng = torch.Generator().manual_seed(seed)
    labels = [torch.randint(0, 4, (BATCH,), generator=rng) for _ in range(n)]
    return [
        (torch.randn(BATCH, 3, 8, 8, generator=rng) + y[:, None, None, None] / 2, y) for y in labels
    ]


def session(
    methods: str = EXITS, epochs: int = 2, model: nn.Module | None = None, **more
) -> Session:
    """Bound, with SGD."""
    text = f"recipe: 1\ntrain: {{epochs: {epochs}}}\nmethods:\n  {methods}\n"
    torch.manual_seed(0)
    model = Net() if model is None else model
    options = {"calibration": batches(77), "val": lambda: batches(55, 8)} | more
    return Session(
        model,
        loads(text, name="case.yaml"),
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        example=batches(99)[0][0][:4],
        steps_per_epoch=STEPS,
        **options,
    )


def train(s: Session, epoch: int, labels: bool = True) -> None:
    """One epoch; labels are told to the session."""
    s.on_epoch_begin(epoch)
    for batch, (x, y) in enumerate(batches(epoch)):
        s.on_minibatch_begin(epoch, batch, STEPS)
        s.model.train()
        loss = nn.functional.cross_entropy(s.model(x), y)
        told = {"labels": y} if labels else {}
        loss = s.before_backward_pass(epoch, batch, STEPS, loss, **told)
        s.optimizer.zero_grad()
        loss.backward()
        s.before_parameter_optimization(epoch, batch, STEPS)
        s.optimizer.step()
        s.on_minibatch_end(epoch, batch, STEPS)
    s.on_epoch_end(epoch)


def finished(methods: str = EXITS, epochs: int = 2, **more):
    """The result of a whole run."""
    s = session(methods, epochs, **more)
    for epoch in range(epochs):
        train(s, epoch)
    return s.finish()


def images() -> Tensor:
    """24 of them, as in training."""
    return torch.cat([x for x, _ in batches(3)])
