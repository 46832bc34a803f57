"""Binary networks: weights of one bit, and activations of one bit where such weights read them."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from gracile.core.method import method
from gracile.core.plan import Bits
from gracile.core.schedule import TimeField
from gracile.errors import BindError
from gracile.graph.graph import Node
from gracile.nn.binary import Binarizer
from gracile.quantize.binary import (
    CHANNELS,
    BinaryGrid,
    Gradient,
    ScaleThreshold,
    binary_spec,
    input_axis,
)
from gracile.quantize.grid import WeightGrid
from gracile.quantize.learned import LearnedQuantizer, LearningOptions
from gracile.quantize.placement import Placement, Skipped, WeightSpec
from gracile.recipe.fields import KernelRef, Selector, kernel

AXES = {"filter": 0, "input_channel": 1, "tensor": None}
READS = "input"  # role of what a layer reads
KERNELS = "one bit in OpenVINO on a CPU; other runtimes compute the same with 8 bits or in float"


class BinaryOptions(LearningOptions):
    """Options of `quantize: binary`, added to `LearningOptions`.

    Attributes:
        weights: which weights; default those of all convolutions but the first and the last layer
            and those with kernels of one place, which XNOR-Net leaves in float.
        form: xnor, sign(w) mean |w| for each filter, or dorefa, for the whole tensor.
        scale: what shares a scale, where it is not what `form` says.
        gradient: of weights; straight, or with XNOR-Net's factors.
        activations: False leaves what these layers read as it is.
        activations_from: when that is put on one bit; default when weights are. Either may be
            first.
        observer: the first scale of an activation is the upper end of this range.
        range_lr: learning rate of scales and thresholds; no schedule changes it.
        range_optimizer: adam, or sgd (momentum 0.9).
    """

    weights: Selector | None = None
    form: Literal["xnor", "dorefa"] = "xnor"
    scale: Literal["filter", "input_channel", "tensor"] | None = None
    gradient: Gradient = "straight"
    activations: bool = True
    activations_from: TimeField | None = None
    observer: KernelRef("observer") = Field(  # type: ignore[valid-type]
        default_factory=lambda: kernel("observer", "percentile", q=99.9)
    )
    range_lr: float | None = Field(default=1e-3, gt=0)
    range_optimizer: Literal["sgd", "adam"] = "adam"

    @property
    def axis(self) -> int | None:
        """Of a weight, kept by its scales."""
        return AXES[self.scale or ("filter" if self.form == "xnor" else "tensor")]


@method(
    "quantize",
    "binary",
    source="Kozlov et al. 2020, arXiv:2002.08679, section 3.2 (NNCF), with the weights of Rastegari"
    " et al. 2016, arXiv:1603.05279 (XNOR-Net) or Zhou et al. 2016, arXiv:1606.06160 (DoReFa)",
)
class Binary(LearnedQuantizer):
    """Train with weights that are a sign and a scale, and activations that are there or not.

    Weights follow the float ones, which stay and are trained. What a binary layer reads has a
    quantizer of its own on the way to it: a shortcut that reads the same goes on in float.
    """

    Options = BinaryOptions
    freezes = (*LearnedQuantizer.freezes, "activations_from")

    def __init__(self, id: str, options: Any):
        super().__init__(id, options)
        self.quantizers: dict[str, Binarizer] = {}  # type: ignore[assignment]  # by reading node

    # --- hooks

    def on_attach(self, s: Any) -> None:
        super().on_attach(s)
        if self.options.activations and s.graph.module is None:
            raise BindError(
                f"'{self.id}': activations of one bit need a graph that can be rewritten: "
                f"{s.graph.reason} Change the forward, or set activations: false."
            )

    def claims(self, s: Any) -> Iterable[tuple[str, str]]:
        reads = self._readers(s) if self.options.activations else {}
        return [*super().claims(s), *(("bits:input", id) for id in reads)]

    def rounds_from(self, s: Any) -> tuple[int, ...] | None:
        o = self.options
        begins = s.calendar.minibatch(o.activations_from or o.start)
        return (*s.calendar.instant(begins), len(s.methods)) if o.activations else None

    def on_fire(self, s: Any, progress: float) -> None:
        self.lay(s)

    def on_batch_start(self, s: Any) -> None:
        o = self.options
        begins = s.calendar.minibatch(o.activations_from or o.start)
        if o.activations and not self.quantizers and s.now >= begins:
            self._read_bits(s)
        super().on_batch_start(s)

    def on_detach(self, s: Any) -> Iterable[Bits]:
        edits: list[Bits] = list(super().on_detach(s))
        weights = [e.at for e in edits if e.role == "weight"]
        lost = [a for a in weights if s.mask(a) is not None and not bool(s.mask(a).all())]
        if lost:
            s.warn(
                "zeros-lost",
                f"'{self.id}' has no level for 0, so what was pruned of {lost[0]} is not zero any "
                "more. Cut whole channels (prune: thin) before, or leave these weights out.",
            )
        for address in weights if self.quantizers else ():
            s.note(address, "precision", None, None, KERNELS, self.id)
        return edits

    # --- the parts

    def edits(self, s: Any) -> list[Bits]:
        """Those of the weights, and one for what each of them reads."""
        out: list[Bits] = super().edits(s)
        return out + [
            Bits(
                by=self.id,
                at=id,
                role="input",
                bits=1,
                signed=False,
                symmetric=True,
                key=f"{id}.{READS}",
            )
            for id in self.quantizers
        ]

    def tensors(self) -> dict[str, Tensor]:
        """The scales and zero points of all edits, and thresholds."""
        thresholds = {f"{id}.{READS}.threshold": q.threshold for id, q in self.quantizers.items()}
        return {**super().tensors(), **thresholds}

    # --- state

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "reads": list(self.quantizers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["reads"]:
            self._insert(self.session)
        super().load_state_dict(state)

    # --- inside

    @property
    def _begun(self) -> bool:
        return self.laid or bool(self.quantizers)

    def _place(self, s: Any) -> Placement:
        readers = self._layers(s)
        chosen = self._chosen(s, readers)
        unread = [a for a in chosen if a not in readers]
        skipped = tuple(Skipped(a, "no convolution or linear layer reads it") for a in unread)
        weights = [binary_spec(a, self.options.axis) for a in chosen if a in readers]
        if not weights:
            raise BindError(
                f"'{self.id}': there is no weight to put on one bit. The first and the last layer "
                "and kernels of one place are left out unless 'weights' names them."
            )
        return Placement(tuple(weights), (), skipped)

    def _layers(self, s: Any) -> dict[str, list[Node]]:
        """Weight -> the convolutions and linear layers that read it, tied names once."""
        names = {id(p): n for n, p in s.model.named_parameters()}
        every = dict(s.model.named_parameters(remove_duplicate=False))
        out: dict[str, list[Node]] = {}
        for node in s.graph.of_op(*CHANNELS):
            address = node.params.get("weight")
            if address in every:
                out.setdefault(names[id(every[address])], []).append(node)
        return out

    def _chosen(self, s: Any, readers: dict[str, list[Node]]) -> list[str]:
        if self.options.weights is not None:
            named: list[str] = s.tensors(self.options.weights)
            return named
        order = list(readers)
        inner = order[1:-1]
        return [a for a in inner if readers[a][0].op == "conv" and s.parameter(a)[0, 0].numel() > 1]

    def _readers(self, s: Any) -> dict[str, tuple[Node, str]]:
        """Node that reads a binary weight -> the node and the weight."""
        assert self.placement is not None
        layers = self._layers(s)
        return {
            n.id: (n, w.address) for w in self.placement.weights for n in layers.get(w.address, ())
        }

    def _grid(self, spec: WeightSpec) -> WeightGrid:
        return BinaryGrid(spec, self.options.gradient)

    def _read_bits(self, s: Any) -> None:
        """From now on these layers read bits; scales begin as the calibration data says."""
        self._insert(s)
        for q in self.quantizers.values():
            q.mode, q.observer = "observe", self.options.observer.fn()
        s.calibrate(self)
        for id, q in self.quantizers.items():
            q.observer.sync()
            high = q.observer.range()[1].to(s.device)
            self.learned[f"{id}.{READS}"].start(torch.where(high > 0, high, 1.0), q.zero_point)
            q.mode, q.observer = "quantize", None
        self._show()
        self._make_optimizer(s)

    def _insert(self, s: Any) -> None:
        """Put quantizers on the way to the layers, and what is learned of them."""
        for id, (node, address) in self._readers(s).items():
            groups = int(node.attrs.get("groups", 1))
            channels = s.parameter(address).shape[1] * groups
            q = Binarizer(channels, CHANNELS[node.op]).to(s.device)
            q.mode = "quantize"
            q.__dict__["by"] = self.id
            learned = ScaleThreshold(channels, q.dim)
            learned.start(q.scale, q.zero_point)
            self.learned[f"{id}.{READS}"] = q.learned = learned
            self.quantizers[id] = q
        s.instrument({}, self.quantizers)

    def _kept(self, edits: Iterable[Any]) -> Iterator[tuple[str, Tensor]]:
        yield from super()._kept(edits)
        s = self.session
        readers = self._readers(s) if self.quantizers else {}
        for edit in edits:
            for part in getattr(edit, "group", ()):
                for id, (node, address) in readers.items():
                    if part.at == address and part.dim == self._input_axis(s, node, address):
                        yield f"{id}.{READS}", torch.tensor(part.keep)

    def _input_axis(self, s: Any, node: Node, address: str) -> int:
        axis = input_axis(dict(node.attrs), s.parameter(address))
        if axis is None:
            raise BindError(
                f"'{self.id}': '{node.id}' reads its channels in groups, and thresholds cannot "
                "follow a cut of these. Cut before activations_from, or leave the layer out."
            )
        return axis

    def _cut_learned(self, edits: Iterable[Any]) -> None:
        for key, index in self._kept(edits):
            learned = self.learned.get(key)
            if isinstance(learned, ScaleThreshold):
                learned.cut(index)
        for id, q in self.quantizers.items():
            q.threshold = self.learned[f"{id}.{READS}"].fixed()[1]

    def _start_activations(self) -> None:
        """Nothing: they begin with `_insert`."""

    def _show(self) -> None:
        for id, q in self.quantizers.items():
            scale, level = self.learned[f"{id}.{READS}"].fixed()
            q.scale.copy_(scale)
            q.threshold.copy_(level)

    def _freeze(self, s: Any) -> None:
        super()._freeze(s)
        for q in self.quantizers.values():
            q.learned = None
