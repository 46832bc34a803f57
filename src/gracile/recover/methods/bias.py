"""Bias correction: what rounding adds to a layer's mean output is taken off its bias again.

Rounded weights and inputs shift the mean of each output channel, and the shifts of a deep network
add up. The mean is that over calibration data, as in section 4.2 of the paper's empirical form.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from gracile.core import method as core
from gracile.core.schedule import When
from gracile.distribute.collective import all_reduce_mean_
from gracile.errors import BindError, GracileError
from gracile.graph.graph import Graph, Node
from gracile.quantize.engine import LAYER, Quantizer
from gracile.quantize.patterns import TRANSPARENT_OPS, WEIGHT_OPS
from gracile.recover.behind import refuse_before


class BiasOptions(core.Options):
    """Options of `recover: bias`.

    Attributes:
        mode: fast: each layer by itself, fed with what it would read in the float network, rounded.
            full: in order, fed by the quantized and already corrected layers before it, so that
            their errors are made up for too; activations of all calibration images are in memory,
            a few layers at a time.
        when: the firings; behind the quantizer.
    """

    mode: Literal["fast", "full"] = "fast"
    when: When = Field(default_factory=lambda: When(at="end"))


@dataclass(frozen=True)
class Corrected:
    """A layer whose mean output can be moved.

    Attributes:
        node: of the layer.
        fed: the quantizer of its input, else what it reads.
        bias: address of its bias, or "".
        norm: path of the BatchNorm that alone reads it, where there is no bias.
    """

    node: Node
    fed: Node
    bias: str
    norm: str

    def means(self, y: Tensor) -> Tensor:
        """Mean of each output channel, (channels,)."""
        dim = y.dim() - 1 if self.node.op == "linear" else 1
        return y.mean([d for d in range(y.dim()) if d != dim])


@core.method(
    "recover",
    "bias",
    source="Nagel et al. 2019, arXiv:1906.04721, section 4.2 (on data); fast: Finkelstein et al. "
    "2019, arXiv:1906.03193",
)
class BiasCorrection(core.Method):
    """Give each quantized layer the mean output per channel that it has in the float network."""

    Options = BiasOptions
    needs = frozenset({"calibration", "graph"})

    def on_attach(self, s: Any) -> None:
        quantizers = [m for m in s.methods if isinstance(m, Quantizer)]
        if not quantizers:
            raise BindError(
                f"'{self.id}' makes up for quantization, and this recipe has none; add "
                "int8: {quantize: ptq, when: {at: end}} before it."
            )
        if self in s.methods:
            refuse_before(self, s, quantizers)

    def on_fire(self, s: Any, progress: float) -> None:
        layers = self._layers(s)
        if self.options.mode == "fast":
            self._fast(s, layers)
        else:
            self._full(s, {v.node.id: v for v in layers})
        s.changed = True

    def quantized(self, s: Any) -> bool:
        """Whether a layer's weight or input is on a grid by now."""
        return bool(self._asked(s))

    def _fast(self, s: Any, layers: Iterable[Corrected]) -> None:
        layers = list(layers)
        if not layers:
            return
        ids = {v.fed.id for v in layers} | {v.node.id for v in layers}
        sums: dict[str, Tensor] = {}
        images = 0
        for seen in s.look(self, ids, unquantized=True):
            n = len(seen[layers[0].node.id])
            images += n
            for v in layers:
                x = seen[v.fed.id]
                if v.fed.op == "quantize":
                    x = s.model.get_submodule(v.fed.module)(x)
                error = v.means(seen[v.node.id] - s.operate(v.node.id, x))
                sums[v.node.id] = sums.get(v.node.id, 0.0 * error) + n * error
        for v in layers:
            _shift(s, v, sums[v.node.id] / images)

    def _full(self, s: Any, layers: dict[str, Corrected]) -> None:
        def before(id: str) -> None:
            if id not in layers:
                return
            v = layers[id]
            pairs = list(zip(model.need(v.node.inputs[0]), floats.need(id), strict=True))
            errors = [len(y) * v.means(y - s.operate(id, x)) for x, y in pairs]
            _shift(s, v, torch.stack(errors).sum(0) / sum(len(y) for _, y in pairs))

        with s.walk(self, before, beside="unquantized") as (model, floats):
            for node in s.graph:
                if node.op != "output":
                    model.need(node.id)

    def _layers(self, s: Any) -> list[Corrected]:
        asked = self._asked(s)
        if not asked:
            raise GracileError(
                f"'{self.id}' fires while nothing is quantized; put it behind the quantizer, at "
                "the same time or later."
            )
        uses = Counter(v.bias or v.norm for v in asked)
        able = [v for v in asked if (v.bias or v.norm) and uses[v.bias or v.norm] == 1]
        left = [v.node.id for v in asked if v not in able]
        if left:
            s.warn(
                "bias.left",
                f"'{self.id}' left {', '.join(left)} as they are: they have no bias and no "
                "BatchNorm of their own behind them. Give these layers bias=True.",
            )
        return able

    def _asked(self, s: Any) -> list[Corrected]:
        """Layers whose weight or input is on a grid."""
        graph: Graph = s.graph
        on_grid = set(s.overlays.addresses(LAYER))
        found = [_layer(graph, n) for n in graph.of_op(*WEIGHT_OPS) if "weight" in n.params]
        return [v for v in found if v.node.params["weight"] in on_grid or v.fed.op == "quantize"]


def _layer(graph: Graph, node: Node) -> Corrected:
    fed = graph[node.inputs[0]]
    while fed.op in TRANSPARENT_OPS:
        fed = graph[fed.inputs[0]]
    readers = graph.consumers(node.id)
    alone = len(readers) == 1 and readers[0].op == "batch_norm"
    running = alone and "running_mean" in readers[0].params
    norm = (readers[0].module or "") if running else ""
    return Corrected(node, fed, node.params.get("bias", ""), norm)


def _shift(s: Any, v: Corrected, error: Tensor) -> None:
    """Add to a layer's mean output; ranks that train together have seen different images."""
    all_reduce_mean_(error)
    if v.bias:
        s.parameter(v.bias).data.add_(error)
    else:
        s.model.get_submodule(v.norm).running_mean.sub_(error)  # as it is subtracted
