"""What a Session costs in training: the same step in a plain loop, and with methods at work."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.cell import Cell, Values, latency, ratio, side_by_side, template
from benchmarks.networks import fresh, inputs
from gracile import Recipe, Session

NAME = "session_overhead"
NETWORK = "resnet20_cifar_a"
BATCH = 16
SHAPE = (3, 32, 32)
STEPS = 10_000  # of one epoch: no firing falls into the measurement
EPOCHS = {"train": {"epochs": 1}}
RECIPES: dict[str, dict[str, Any]] = {
    "session without methods": {},
    "session with masks": {
        "weights": {
            "prune": "gradual",
            "weights": "type:Conv2d",
            "sparsity": 0.5,
            "when": {"at": "0ep"},
        }
    },
    "session with qat": {"int8": {"quantize": "qat", "when": {"start": "0ep"}}},
}
VARIANTS = ("plain loop", *RECIPES)


def cells() -> Iterator[Cell]:
    """One cell: a step of ResNet-20."""
    records = []
    for variant in VARIANTS:
        facts = {"batch": BATCH, "shape": (BATCH, *SHAPE)}
        records.append(template(NAME, NETWORK, "step_ms", "ms", variant, **facts))
        if variant != "plain loop":
            records.append(template(NAME, NETWORK, "ratio", "ratio", variant, **facts))
    yield Cell(NAME, NETWORK, "smoke", tuple(records), measure)


def measure() -> Values:
    """Training steps in turn, each variant with a network of its own."""
    steps = {v: step(RECIPES.get(v)) for v in VARIANTS}
    t = side_by_side(steps, min_round_ms=150.0)
    found = {("step_ms", v): latency(x) for v, x in t.items()}
    base = t["plain loop"]
    return {**found, **{("ratio", v): ratio(t[v], base) for v in RECIPES}}


def step(methods: dict[str, Any] | None) -> Callable[[], None]:
    """One training step: of a plain loop (None), or of a Session with these methods."""
    model = fresh(NETWORK).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x = inputs(SHAPE, BATCH)
    y = torch.arange(BATCH) % 10
    if methods is None:

        def plain() -> None:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return plain
    recipe = Recipe.build(methods=methods, **EPOCHS)
    session = Session(
        model, recipe, optimizer, example=x[:2], steps_per_epoch=STEPS, calibration=[x]
    )
    session.on_epoch_begin(0)
    batch = 0

    def driven() -> None:
        nonlocal batch
        session.on_minibatch_begin(0, batch, STEPS)
        loss = F.cross_entropy(session.model(x), y)
        loss = session.before_backward_pass(0, batch, STEPS, loss)
        optimizer.zero_grad()
        loss.backward()
        session.before_parameter_optimization(0, batch, STEPS)
        optimizer.step()
        session.on_minibatch_end(0, batch, STEPS)
        batch += 1

    return driven
