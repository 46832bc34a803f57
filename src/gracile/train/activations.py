"""Statistics of activations over real data, as Distiller's collectors had them, in one pass."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from gracile.analyze.activations import (
    PERCENTILES,
    Activations,
    Channels,
    Histogram,
    Statistics,
)
from gracile.core.address import select
from gracile.errors import UserError
from gracile.graph.capture import capture
from gracile.graph.graph import Graph, Node
from gracile.quantize.observers.counting import BINS, HALF, Counting, quantile
from gracile.quantize.observers.counting import Histogram as Counts


@torch.no_grad()
def activations(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Any]],
    *,
    tensors: str | Sequence[str] | None = None,
    bins: int = 128,
    advance: Callable[[], None] = lambda: None,
) -> Activations:
    """Range, moments, percentiles, zeros and a histogram of each activation, in eval mode.

    One pass over the data and little memory: values are counted in 8192 bins that double in width
    as larger ones come, so the figures do not depend on how the images are batched.

    Args:
        model: that takes one tensor.
        batches: images, and anything (labels), on the model's device.
        tensors: selector of operators by their ids in the captured graph, default all.
        bins: of the histograms that are kept, at most.
        advance: called after each batch.

    Returns:
        What was seen; `to_csv()`, `to_distiller()` and `save(folder)` are the ways on.

    Raises:
        UserError: no batches, `bins` out of range, or a forward that cannot be followed.
        BindError: the selector matches nothing.
    """
    if not 1 <= bins <= BINS:
        raise UserError(f"bins must be from 1 to {BINS}, got {bins}.")
    watch, images, was_training = None, 0, model.training
    graph: Graph | None = None
    try:
        model.eval()
        for x, *_ in batches:
            if watch is None or graph is None:
                graph = capture(model, x[:2])
                watch = _Watch(_followed(graph), _chosen(graph, tensors))
            watch.run(x)
            images += len(x)
            advance()
    finally:
        model.train(was_training)
    if watch is None or graph is None:
        raise UserError("statistics of activations need at least one batch of images.")
    found = {id: seen for id, seen in watch.seen.items() if seen.values}
    return Activations(
        tuple(seen.told(graph[id], bins) for id, seen in found.items() if seen.finite),
        images,
        {id: "it has values that are not finite" for id, s in found.items() if not s.finite},
    )


def _followed(graph: Graph) -> fx.GraphModule:
    if graph.module is None:
        raise UserError(f"activations are seen along the forward, which failed: {graph.reason}")
    return graph.module


def _chosen(graph: Graph, tensors: str | Sequence[str] | None) -> list[str]:
    ids = [n.id for n in graph if n.op not in ("output", "param", "size") and n.shape]
    return ids if tensors is None else select(tensors, ids, {}, what="activation")


class _Watch(fx.Interpreter):
    """Runs a graph and shows what each chosen operator makes, before anything changes it."""

    def __init__(self, module: fx.GraphModule, ids: Iterable[str]):
        super().__init__(module)
        self.seen = {id: _Seen() for id in ids}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        out = super().run_node(n)
        seen = self.seen.get(n.meta["id"])
        if seen is not None and isinstance(out, Tensor) and out.is_floating_point():
            seen.add(out)
        return out


class _All(Counting):
    """Counts all values, clips none."""

    def clipped(self, seen: Counts, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The ends."""
        return low, high


class _Seen:
    """What is known about one activation so far."""

    def __init__(self) -> None:
        self.counts = _All()
        self.values = self.images = 0
        self.sums = torch.zeros(2, dtype=torch.float64)  # of x, of x^2
        self.ends = torch.zeros(2, dtype=torch.float64)  # of each image's smallest and largest
        self.channels: Tensor | None = None  # (3, C): zeros, sum of x, sum of |x|
        self.shape: tuple[int, ...] = ()
        self.finite = True

    def add(self, x: Tensor) -> None:
        """One more batch."""
        if x.dim() == 0 or x.numel() == 0:
            return
        self.finite &= bool(torch.isfinite(x).all())
        self.values += x.numel()
        self.images += len(x)
        self.shape = tuple(x.shape[1:])
        if not self.finite:
            return
        x = x.float()
        self.counts.observe(x)
        wide, each = x.double(), x.flatten(1) if x.dim() > 1 else x[:, None]
        self.sums += torch.stack([wide.sum(), wide.square().sum()]).cpu()
        ends = torch.stack([each.amin(1).double().sum(), each.amax(1).double().sum()])
        self.ends += ends.cpu()
        if x.dim() in (2, 4, 5):
            rest = [d for d in range(x.dim()) if d != 1]
            parts = ((x == 0).double(), wide, wide.abs())
            found = torch.stack([p.sum(rest) for p in parts]).cpu()
            self.channels = found if self.channels is None else self.channels + found

    def told(self, node: Node, bins: int) -> Statistics:
        """All of it in numbers."""
        low, high = (float(v) for v in self.counts.range())
        seen = self.counts.histogram()
        mean = float(self.sums[0]) / self.values
        variance = max(0.0, float(self.sums[1]) / self.values - mean**2)
        whole = seen.counts.clone()
        whole[:, HALF] += seen.zeros
        zeros = float(seen.zeros[0])
        b = float((seen.counts[0] * (seen.centers - mean).abs()).sum()) + zeros * abs(mean)
        places = (quantile(whole, q / 100) for q in PERCENTILES)
        return Statistics(
            tensor=node.id,
            op=node.op,
            inputs=node.inputs,
            shape=self.shape,
            values=self.values,
            min=low,
            max=high,
            mean=mean,
            std=variance**0.5,
            avg_min=float(self.ends[0]) / self.images,
            avg_max=float(self.ends[1]) / self.images,
            b=b / self.values,
            zeros=zeros / self.values,
            percentiles=tuple(min(max((float(p) - HALF) * seen.width, low), high) for p in places),
            histogram=_coarse(seen, bins),
            channels=self._channels(),
        )

    def _channels(self) -> Channels | None:
        if self.channels is None:
            return None
        each = self.values / self.channels.shape[1]
        zeros, mean, l1 = ((row / each).tolist() for row in self.channels)
        return Channels(tuple(zeros), tuple(mean), tuple(l1))


def _coarse(seen: Counts, bins: int) -> Histogram:
    """As many whole bins together as are needed to have no more than `bins`."""
    filled = seen.counts[0].nonzero().flatten()
    if not len(filled):
        return Histogram(0.0, seen.width, ())
    first, last = int(filled[0]), int(filled[-1])
    size = -(-(last - first + 1) // bins)
    part = seen.counts[0, first : last + 1]
    part = torch.cat([part, part.new_zeros(-len(part) % size)]).reshape(-1, size).sum(1)
    counts = tuple(int(v) for v in part)
    return Histogram((first - HALF) * seen.width, size * seen.width, counts)
