"""A training step of ResNet-20 with fake quantization, ours beside NNCF's and torchao's.

Batch 128, one thread, SGD with momentum, weights and activations of 8 bits; every variant has a
network of its own, and all take their steps in turn. "float" is the same step without quantization.
`qat` follows the ranges of activations, as it does for the first two thirds of a training; `lsq`
learns all scales, as NNCF's step does; torchao's is its PT2E flow with the x86 quantizer.
"compiled" is `torch.compile` of the network's forward.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.cell import Cell, Values, latency, ratio, side_by_side, template
from benchmarks.networks import fresh, inputs
from gracile import Recipe, Session
from gracile.core.record import Record

NAME = "qat_step"
NEEDS: Mapping[str, str] = {"nncf": "nncf", "torchao": "torchao"}
NETWORK = "resnet20_cifar_a"
BATCH = 128
SHAPE = (3, 32, 32)
STEPS = 10_000  # of one epoch: no firing falls into the measurement
FLOAT, COMPILED = "float", "float, compiled"
Step = Callable[[], None]


def cells() -> Iterator[Cell]:
    """One cell: all variants side by side."""
    facts = {"batch": BATCH, "shape": (BATCH, *SHAPE), "peers": tuple(NEEDS)}
    metrics = {"step_ms": "ms", "ratio": "ratio", "ratio_compiled": "ratio"}
    records = tuple(
        template(NAME, NETWORK, metric, unit, variant, **facts)
        for variant in VARIANTS
        for metric, unit in metrics.items()
        if metric in _metrics(variant)
    )
    yield Cell(NAME, NETWORK, "full", records, measure)


def measure() -> Values:
    """Make every variant, then take steps in turn."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        steps = {name: make() for name, make in VARIANTS.items()}
    finally:
        torch.set_num_threads(before)
    t = side_by_side(steps, min_round_ms=1.0)
    found: dict[tuple[str, str], Mapping[str, Any]] = {}
    for name in VARIANTS:
        found["step_ms", name] = latency(t[name])
        if "ratio" in _metrics(name):
            found["ratio", name] = ratio(t[name], t[FLOAT])
        if "ratio_compiled" in _metrics(name):
            found["ratio_compiled", name] = ratio(t[name], t[COMPILED])
    return found


def _metrics(variant: str) -> tuple[str, ...]:
    if variant == FLOAT:
        return ("step_ms",)
    if variant.endswith("compiled") and variant != COMPILED:
        return ("step_ms", "ratio", "ratio_compiled")
    return ("step_ms", "ratio")


def ours(quantize: str | None, compiled: bool = False) -> Step:
    """A step driven by a Session; without a method it is the float one."""
    model = fresh(NETWORK).train()
    optimizer = _optimizer(model)
    x = inputs(SHAPE, BATCH)
    methods = {} if quantize is None else {"q": {"quantize": quantize, "when": {"start": "0ep"}}}
    session = Session(
        model,
        Recipe.build(methods=methods, train={"epochs": 1}),
        optimizer,
        example=x[:2],
        steps_per_epoch=STEPS,
        calibration=[x],
    )
    session.on_epoch_begin(0)
    network = session.model.train()
    if compiled:
        network.forward = torch.compile(network.forward)  # type: ignore[method-assign]
    y = torch.arange(BATCH) % 10

    def step() -> None:
        session.on_minibatch_begin(0, 0, STEPS)
        loss = F.cross_entropy(network(x), y)
        loss = session.before_backward_pass(0, 0, STEPS, loss)
        optimizer.zero_grad()
        loss.backward()
        session.before_parameter_optimization(0, 0, STEPS)
        optimizer.step()
        session.on_minibatch_end(0, 0, STEPS)

    return step


def nncf_step() -> Step:
    """NNCF's post-training quantization, whose ranges and weights then train."""
    os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "0")  # its extension is compiled first
    import nncf

    x = inputs(SHAPE, BATCH)
    model = nncf.quantize(fresh(NETWORK).eval(), nncf.Dataset([x[:32]]), subset_size=1)
    return plain(model.train())


def torchao_step() -> Step:
    """torchao's quantization-aware training of an exported graph."""
    from torchao.quantization.pt2e import move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    exported = torch.export.export(fresh(NETWORK).train(), (inputs(SHAPE, BATCH),)).module()
    config = x86.get_default_x86_inductor_quantization_config(is_qat=True)
    model = prepare_qat_pt2e(exported, x86.X86InductorQuantizer().set_global(config))
    move_exported_model_to_train(model)
    return plain(model)


def plain(model: nn.Module) -> Step:
    """A step of a model that quantizes by itself."""
    optimizer = _optimizer(model)
    x, y = inputs(SHAPE, BATCH), torch.arange(BATCH) % 10

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)


VARIANTS: Mapping[str, Callable[[], Step]] = {
    FLOAT: partial(ours, None),
    "gracile, qat": partial(ours, "qat"),
    "gracile, lsq": partial(ours, "lsq"),
    "NNCF": nncf_step,
    "torchao": torchao_step,
    COMPILED: partial(ours, None, compiled=True),
    "gracile, lsq, compiled": partial(ours, "lsq", compiled=True),
}


TITLES = ("step", "ms", "of the float step", "of the compiled float step")


def table(records: Iterable[Record], texts: Mapping[str, Any]) -> list[str]:
    """Markdown: one row for each variant."""
    rows: dict[str, dict[str, Record]] = {}
    for r in records:
        rows.setdefault(r.subject["variant"], {})[r.metric] = r
    lines = [
        "| step | ms | of the float step | of the compiled float step |",
        "|---|---:|---:|---:|",
    ]
    for name in VARIANTS:
        row = rows.get(name)
        if row:
            lines.append(
                f"| {name} | {row['step_ms'].value:.0f} | {_ratio(row.get('ratio'))} | "
                f"{_ratio(row.get('ratio_compiled'))} |"
            )
    return lines


def _ratio(r: Record | None) -> str:
    if r is None:
        return ""
    ends = f" [{r.ci95[0]:.2f}, {r.ci95[1]:.2f}]" if r.ci95 else ""
    return f"{r.value:.2f}x{ends}"
