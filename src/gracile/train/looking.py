"""What a method may see of the network on calibration data: outputs of operators, gradients."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gracile.core.method import Method
from gracile.core.overlay import Overlays
from gracile.distribute.collective import all_reduce_mean_
from gracile.errors import BindError
from gracile.graph.capture import bare_copy, capture
from gracile.graph.graph import Graph
from gracile.graph.walk import Walk, operate
from gracile.nn.quantized import ActivationQuantizer
from gracile.train.evaluate import predict_module


class Looking:
    """The part of a Session that runs calibration data through the network.

    Attributes:
        calibration: batches, or None; loss_of: (outputs, labels) -> loss, or None.
        val: makes the validation batches, or None.
        teacher: the model as it came, or None where no method needs it.
    """

    model: nn.Module
    teacher: nn.Module | None
    example: Any
    calibration: Iterable[Any] | None
    val: Callable[[], Iterable[tuple[Tensor, Tensor]]] | None
    loss_of: Callable[[Any, Tensor], Tensor] | None
    overlays: Overlays
    device: torch.device
    name: str
    changed: bool
    _graph: Graph | None

    @property
    def graph(self) -> Graph:
        """The captured graph of the model as it is now."""
        if self._graph is None:
            self._graph = capture(self.model, self.example)
        return self._graph

    @cached_property
    def teacher_graph(self) -> Graph:
        """The captured graph of the teacher, the model as it came."""
        assert self.teacher is not None
        return capture(self.teacher, self.example)

    @property
    def running_norms(self) -> list[_BatchNorm]:
        """Every BatchNorm of the model that keeps running statistics."""
        found = (m for m in self.model.modules() if isinstance(m, _BatchNorm))
        return [m for m in found if m.track_running_stats]

    def calibrate(self, m: Method, training: Iterable[nn.Module] = ()) -> None:
        """Run the calibration batches without gradient, calling `m.on_calibrate(self)` after each.

        Args:
            m: who asks.
            training: modules that are in train mode for it; all others are in eval mode.

        Raises:
            BindError: the session has no calibration data.
        """
        with self._evaluating(m), torch.no_grad():
            for module in training:
                module.training = True
            for x, _ in batches(self.calibration, self.device):
                self.model(*x)
                m.on_calibrate(self)
        self.changed = True

    def count_statistics(self, m: Method) -> None:
        """Replace BatchNorm's running means and variances by averages over the calibration batches.

        Only BatchNorm runs in train mode for it. Does nothing where there is none.

        Raises:
            BindError: the session has no calibration data.
        """
        norms = self.running_norms
        if not norms:
            return
        momenta = [n.momentum for n in norms]
        try:
            for n in norms:
                n.reset_running_stats()
                n.momentum = None  # a plain average
            self.calibrate(m, training=norms)
            for n in norms:  # ranks that train together may have seen different images
                for statistic in (n.running_mean, n.running_var):
                    assert statistic is not None
                    all_reduce_mean_(statistic)
        finally:
            for n, momentum in zip(norms, momenta, strict=True):
                n.momentum = momentum

    def look(
        self, m: Method, ids: Collection[str], *, unquantized: bool = False
    ) -> Iterator[Mapping[str, Any]]:
        """Outputs of operators, batch by batch of the calibration data, in eval mode.

        Args:
            m: who asks.
            ids: nodes of `graph`.
            unquantized: of the network as it is without its grids.

        Raises:
            BindError: there is no calibration data, or the forward cannot be followed.
        """
        self._followed(m)
        with self._evaluating(m):
            graph, overlays = self.graph, self.overlays
            if unquantized:
                copy = self.unquantized()
                graph, overlays = capture(copy, self.example), Overlays(copy)
            for x, _ in batches(self.calibration, self.device):
                yield outputs(graph, overlays, ids, x)

    def operate(self, id: str, x: Tensor) -> Any:
        """What an operator of the model, overlays laid, makes of another input than its own."""
        assert self.graph.module is not None
        with self.overlays.laid(self.graph.module):
            return operate(self.graph, id, x)

    @contextmanager
    def walk(
        self,
        m: Method,
        before: Callable[[str], None],
        beside: Literal["teacher", "present", "unquantized"] = "teacher",
    ) -> Iterator[tuple[Walk, Walk]]:
        """Two networks side by side, run operator by operator on all calibration data.

        Args:
            m: who asks; it may change a layer in `before`.
            before: called with the id of each of the model's operators before it runs.
            beside: the other network: the teacher, or the model as it is at present, with its
                grids or without.

        Raises:
            BindError: there is no calibration data, or the forward cannot be followed.
        """
        self._followed(m)
        with self._evaluating(m):
            given = [x for x, _ in batches(self.calibration, self.device)]
            module = self.graph.module
            if beside == "teacher":
                other = self.teacher_graph
            else:
                made = self.present() if beside == "present" else self.unquantized()
                other = capture(made.eval(), self.example)
            assert module is not None
            assert other.module is not None
            laid = partial(self.overlays.laid, module)
            other.module.eval()
            yield Walk(self.graph, given, laid, before), Walk(other, given)

    def present(self, upto: str | None = None) -> nn.Module:
        """A copy of the model as its overlays (up to one layer) make it; modes stay."""
        copy = bare_copy(self.model)
        with torch.no_grad():
            for address in self.overlays.addresses():
                copy.get_parameter(address).copy_(self.overlays.effective(address, upto))
        return copy

    def unquantized(self) -> nn.Module:
        """A copy of the model as it is without grids on weights and activations; modes stay."""
        copy = self.present(upto="share")
        for q in copy.modules():
            if isinstance(q, ActivationQuantizer):
                q.mode = "off"
        return copy

    def logits(
        self,
        m: Method,
        images: int = 0,
        *,
        of: Literal["present", "unquantized", "teacher"] = "present",
    ) -> tuple[Tensor, Tensor]:
        """What the network gives on validation data, in eval mode, and the labels; on the CPU.

        Args:
            m: who asks.
            images: the first so many; 0 is all of them.
            of: the network as it is, that without its grids, or the teacher.

        Raises:
            BindError: there is no validation data.
        """
        if self.val is None:
            raise BindError(f"'{m.id}' needs validation data: Session(..., val=<function>).")
        model = self.model if of == "present" else self.teacher
        if of == "unquantized":
            model = self.unquantized()
        assert model is not None
        return predict_module(model, _first(self.val(), images, self.device))

    def _followed(self, m: Method) -> None:
        if self.graph.module is None:
            raise BindError(
                f"'{m.id}' looks into the network, and the forward of {self.name} cannot be "
                f"followed: {self.graph.reason}"
            )

    def gradients(self, m: Method) -> Iterator[None]:
        """Loss gradients of the calibration batches, one after the other, in every `.grad`.

        In eval mode, so that BatchNorm keeps its statistics; the gradients of training are put
        back afterwards.

        Raises:
            BindError: there is no labelled calibration data, or no loss (see `Session`).
        """
        loss = self._loss(
            m, "ranks by gradients before any were made in training", ", or let it fire later"
        )
        with self._evaluating(m), own_gradients(self.model), torch.enable_grad():
            for x, y in self._labelled(m):
                self.model.zero_grad()
                loss(self.model(*x), y).backward()
                yield

    def losses(self, m: Method, *, at_a_time: int | None = None) -> Iterator[tuple[Tensor, int]]:
        """Mean loss of each calibration batch, to be differentiated, and its number of images.

        In eval mode. Unlike `gradients`, it leaves every `.grad` alone and lets the caller take
        derivatives of any order.

        Args:
            m: who asks.
            at_a_time: images at a time; default a batch as it comes.

        Raises:
            BindError: there is no labelled calibration data, or no loss (see `Session`).
        """
        loss = self._loss(m, "wants derivatives of the loss")
        with self._evaluating(m), torch.enable_grad():
            for x, y in self._labelled(m):
                size = at_a_time or len(y)
                for *inputs, labels in zip(*(t.split(size) for t in (*x, y)), strict=True):
                    yield loss(self.model(*inputs), labels), len(labels)

    def _loss(self, m: Method, does: str, instead: str = "") -> Callable[[Any, Tensor], Tensor]:
        """The session's loss; without one, refuse what `m` does, with what else can be done."""
        if self.loss_of is None:
            raise BindError(
                f"'{m.id}' {does}: give "
                "Session(..., loss_of=torch.nn.functional.cross_entropy) and labelled "
                f"calibration batches{instead}."
            )
        return self.loss_of

    def _labelled(self, m: Method) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        for x, y in batches(self.calibration, self.device):
            if y is None:
                raise BindError(f"'{m.id}' needs calibration batches with labels.")
            yield x, y

    @contextmanager
    def _evaluating(self, m: Method) -> Iterator[None]:
        if self.calibration is None:
            raise BindError(
                f"'{m.id}' needs calibration data: Session(..., calibration=batches) or "
                "finish(calibration=batches)."
            )
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def own_gradients(model: nn.Module) -> Iterator[None]:
    """Whatever gradients this makes, those of training are put back afterwards."""
    held = {p: p.grad for p in model.parameters()}
    try:
        yield
    finally:
        for p, grad in held.items():
            p.grad = grad


def outputs(
    graph: Graph, overlays: Overlays, ids: Collection[str], inputs: tuple[Tensor, ...]
) -> Mapping[str, Any]:
    """Node id -> its output, for one batch in the mode the model is in, without gradient."""
    assert graph.module is not None
    seen = _Seen(graph.module, ids)
    with torch.no_grad(), overlays.laid(graph.module):
        seen.run(*inputs)
    return seen.found


class _Seen(fx.Interpreter):
    """Runs a graph up to the last operator asked for."""

    def __init__(self, module: fx.GraphModule, ids: Collection[str]):
        super().__init__(module)
        self.ids, self.found = set(ids), {}  # type: ignore[var-annotated]

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; keep its output if it was asked for."""
        if len(self.found) == len(self.ids) and n.op != "output":
            return None
        out = super().run_node(n) if n.op != "output" else None
        if n.meta["id"] in self.ids:
            self.found[n.meta["id"]] = out.clone() if isinstance(out, Tensor) else out
        return out


def _first(
    items: Iterable[tuple[Tensor, Tensor]], images: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    seen = 0
    for x, y in items:
        left = images - seen if images else len(y)
        yield x[:left].to(device), y[:left]
        seen += len(y)
        if 0 < images <= seen:
            return


def batches(items: Any, device: torch.device) -> Iterator[tuple[tuple[Tensor, ...], Any]]:
    """(inputs, labels or None) of calibration items: a tensor, or (input, labels)."""
    for item in items:
        x, y = item if isinstance(item, (tuple, list)) and len(item) == 2 else (item, None)
        x = x[0] if isinstance(x, (tuple, list)) else x
        yield (x.to(device),), None if y is None else y.to(device)
