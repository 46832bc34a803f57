"""Cuts tried out on calibration data: the loss they would bring, without making them.

A trial sets to zero what the cut would remove; that a cut network computes what the zeroed one does
is proven when it is made. Where an operator takes statistics over the channels that go (layer or
group normalization) zeros would count, so there a copy is cut.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from gracile.core.method import Method
from gracile.core.plan import Remove
from gracile.distribute.collective import all_reduce_sum_, average_gradients, world_size
from gracile.graph import surgery
from gracile.graph.capture import capture
from gracile.graph.dependency import follow
from gracile.graph.fork import Trial, branch_points, forked, swept
from gracile.graph.verify import losing_statistics, mask_removed
from gracile.train.looking import Looking, own_gradients


class Trying(Looking):
    """The part of a Session that judges cuts before they are made."""

    def losses_after(
        self,
        m: Method,
        cuts: Mapping[str, Sequence[Remove]],
        *,
        own_statistics: bool = False,
        unchanged: bool = True,
    ) -> dict[str | None, float]:
        """Mean loss over the calibration data after each of several cuts; under None as it is.

        Operators before the first weight that a cut changes run once for all cuts.

        Args:
            m: who asks.
            cuts: name -> edits of the model as it is.
            own_statistics: BatchNorm normalizes each batch by its own mean and variance: what
                statistics counted anew would do, in one pass; running statistics stay as they are.
            unchanged: whether to say the loss without a cut too; it costs a forward.

        Raises:
            BindError: no labelled calibration data, no loss, or the forward cannot be followed.
        """
        loss_of = self.loss_for(m)
        self._followed(m)
        module = self.graph.module
        assert module is not None
        following = follow(self.model, self.graph)
        counted = [n for n, e in cuts.items() if losing_statistics(self.graph, following, e)]
        points = branch_points(
            self.graph,
            {name: self._touched(edits) for name, edits in cuts.items() if name not in counted},
        )

        @contextmanager
        def changed(name: str | None) -> Iterator[None]:
            with self._zeroed(() if name is None else cuts[name]), self.overlays.laid(module):
                yield

        sums: dict[str | None, float] = dict.fromkeys((*cuts, *([None] if unchanged else ())), 0.0)
        images = 0
        norms = self.running_norms if own_statistics else []
        with self._evaluating(m), _normalizing(norms):
            for x, y in self._labelled(m):
                found = forked(self.graph, x, points, changed, unchanged=unchanged)
                images += len(y)
                for name, out in found.items():
                    sums[name] += float(loss_of(out, y)) * len(y)
            for name in counted:
                copy = self._cut_copy(cuts[name])
                with torch.no_grad():
                    for x, y in self._labelled(m):
                        sums[name] += float(loss_of(copy(*x), y)) * len(y)
        return self._means(sums, images)

    def losses_with(
        self, m: Method, address: str, values: Sequence[Tensor], *, rows: int = 512
    ) -> list[float]:
        """How much the mean loss over the calibration data grows with a weight at other values.

        What lies before the weight runs once for all of them.

        Args:
            m: who asks.
            address: of a parameter; what lies over it (a mask) is taken off for its values.
            values: each in place of what the network computes with.
            rows: samples behind the weight that run at once.

        Raises:
            BindError: no labelled calibration data, no loss, or the forward cannot be followed.
        """
        loss_of = self.loss_for(m)
        self._followed(m)
        graph = self.graph
        if self.overlays.addresses():
            graph = capture(self.present().eval(), self.example)
        assert graph.module is not None
        trial = Trial((address,), lambda: [{address: v} for v in values])
        sums, images = dict.fromkeys(range(-1, len(values)), 0.0), 0
        with self._evaluating(m):
            for x, y in self._labelled(m):
                images += len(y)
                for name, k, out in swept(graph.module, x, {address: trial}, rows=rows):
                    sums[-1 if name is None else k] += float(loss_of(out, y)) * len(y)
        means = self._means({str(k): v for k, v in sums.items()}, images)
        return [means[str(k)] - means["-1"] for k in range(len(values))]

    def mean_loss(self, m: Method) -> float:
        """Mean loss over the calibration data of the network as it is.

        Raises:
            BindError: no labelled calibration data, or no loss.
        """
        loss_of, total, images = self.loss_for(m), 0.0, 0
        with self._evaluating(m), torch.no_grad():
            for x, y in self._labelled(m):
                total += float(loss_of(self.model(*x), y)) * len(y)
                images += len(y)
        return self._means({None: total}, images)[None]

    def tune_after(
        self,
        m: Method,
        cut: Sequence[Remove],
        *,
        batches: int,
        lr: float,
        own_statistics: bool = False,
    ) -> tuple[float, dict[str, Tensor]]:
        """The same for one cut, after a few steps of SGD on the calibration batches.

        Always with zeros: over channels that go, statistics count them.

        Args:
            m: who asks.
            cut: edits of the model as it is.
            batches: mini-batches to train on; they begin anew where there are fewer.
            lr: learning rate; no momentum, no weight decay.
            own_statistics: see `losses_after`.

        Returns:
            The mean loss, and address -> parameter after training. The model is as it was.

        Raises:
            BindError: see `losses_after`.
        """
        loss_of = self.loss_for(m)
        held = {a: p.detach().clone() for a, p in self.model.named_parameters()}
        sgd = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=lr)
        total, images = 0.0, 0
        with (
            self._evaluating(m),
            own_gradients(self.model),
            _normalizing(self.running_norms if own_statistics else ()),
        ):
            try:
                mask_removed(self.model, cut)
                with torch.enable_grad():
                    for x, y in islice(cycle(self._labelled(m)), batches):
                        self.model.zero_grad()
                        loss_of(self.model(*x), y).backward()
                        average_gradients(self.model)
                        sgd.step()
                        mask_removed(self.model, cut)
                with torch.no_grad():
                    for x, y in self._labelled(m):
                        total += float(loss_of(self.model(*x), y)) * len(y)
                        images += len(y)
                tuned = {a: p.detach().clone() for a, p in self.model.named_parameters()}
            finally:
                self.put(held)
        return self._means({None: total}, images)[None], tuned

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Give parameters these values."""
        with torch.no_grad():
            for address, value in values.items():
                self.model.get_parameter(address).copy_(value)

    def loss_for(self, m: Method) -> Callable[[Any, Tensor], Tensor]:
        """The loss that cuts are judged by.

        Raises:
            BindError: the session has none.
        """
        return self._loss(m, "compares losses on calibration data")

    def _touched(self, edits: Iterable[Remove]) -> list[nn.Parameter]:
        named = dict(self.model.named_parameters(remove_duplicate=False))
        return [named[part.at] for e in edits for part in e.group if part.at in named]

    def _cut_copy(self, edits: Sequence[Remove]) -> nn.Module:
        """The model as its overlays make it, cut without a proof; modules in the same modes."""
        return surgery.apply(self.present(), edits, example=self.example)

    @contextmanager
    def _zeroed(self, edits: Sequence[Remove]) -> Iterator[None]:
        """What the edits would remove is zero while this lasts."""
        held = [(p, p.detach().clone()) for p in self._touched(edits)]
        try:
            mask_removed(self.model, edits)
            yield
        finally:
            with torch.no_grad():
                for p, value in held:
                    p.copy_(value)

    def _means(self, sums: Mapping[str | None, float], images: int) -> dict[str | None, float]:
        """Over all images of all ranks that train together, so that they decide alike."""
        *totals, count = [*sums.values(), images]
        if world_size() > 1:
            values = torch.tensor([*totals, count], dtype=torch.float64, device=self.device)
            *totals, count = all_reduce_sum_(values).tolist()
        return {name: v / max(1, count) for name, v in zip(sums, totals, strict=True)}


@contextmanager
def _normalizing(norms: Sequence[Any]) -> Iterator[None]:
    """These BatchNorms normalize by each batch's own statistics, and remember nothing."""
    try:
        for n in norms:
            n.training, n.track_running_stats = True, False
        yield
    finally:
        for n in norms:
            n.training, n.track_running_stats = False, True
