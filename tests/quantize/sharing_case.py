"""The example of figure 3 of Deep Compression, and sessions that share weights."""

import torch
from torch import nn
from torch.nn import functional as F

from gracile.recipe.load import loads
from gracile.train.session import Session

# Han et al. 2016, figure 3: weights, their clusters, a gradient, centroids before and after.
WEIGHTS = torch.tensor(
    [
        [2.09, -0.98, 1.48, 0.09],
        [0.05, -0.14, -1.08, 2.12],
        [-0.91, 1.92, 0.0, -1.03],
        [1.87, 0.0, 1.53, 1.49],
    ]
)
CODES = torch.tensor([[3, 0, 2, 1], [1, 1, 0, 3], [0, 3, 1, 0], [3, 1, 2, 2]])
GRADIENT = torch.tensor(
    [
        [-0.03, -0.01, 0.03, 0.02],
        [-0.01, 0.01, -0.02, 0.12],
        [-0.01, 0.02, 0.04, 0.01],
        [-0.07, -0.02, 0.01, -0.02],
    ]
)
CENTROIDS = torch.tensor([-1.0, 0.0, 1.5, 2.0])
TUNED = torch.tensor([-0.97, -0.04, 1.48, 1.96])
EPOCHS, STEPS = 3, 3
CUT = "cut: {prune: structure, ratio: 0.5, scope: layer, when: {at: 2ep}}"


class Small(nn.Module):
    """Two convolutions and a head: 3 x 8 x 8 -> 4."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 12, 3, padding=1)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = F.relu(self.bn(self.first(x)))
        return self.head(F.relu(self.second(x)).mean((2, 3)))


def small(seed=0):
    torch.manual_seed(seed)
    return Small()


def batches(epoch, n=STEPS):
    g = torch.Generator().manual_seed(epoch)
    return [
        (torch.randn(8, 3, 8, 8, generator=g), torch.randint(4, (8,), generator=g))
        for _ in range(n)
    ]


def session(*methods, model=None, epochs=EPOCHS, example=None, calibration=None):
    model = small() if model is None else model
    lines = "".join(f"  {m}\n" for m in methods)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    return Session(
        model,
        loads(f"recipe: 1\ntrain: {{epochs: {epochs}}}\nmethods:\n{lines}", name="r.yaml"),
        sgd,
        example=batches(99)[0][0][:2] if example is None else example,
        steps_per_epoch=STEPS if epochs else None,
        calibration=calibration or batches(77),
        loss_of=F.cross_entropy,
    )


def train(s, first=0, last=EPOCHS):
    for epoch in range(first, last):
        s.on_epoch_begin(epoch)
        for k, (x, y) in enumerate(batches(epoch)):
            s.on_minibatch_begin(epoch, k, STEPS)
            s.model.train()
            loss = s.before_backward_pass(epoch, k, STEPS, F.cross_entropy(s.model(x), y))
            s.optimizer.zero_grad(set_to_none=False)  # the stored weights must stand still anyway
            loss.backward()
            s.before_parameter_optimization(epoch, k, STEPS)
            s.optimizer.step()
            s.on_minibatch_end(epoch, k, STEPS)
        s.on_epoch_end(epoch)


def trained(*methods, **options):
    s = session(*methods, **options)
    train(s)
    return s, s.finish()
