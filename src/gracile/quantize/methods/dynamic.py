"""Dynamic quantization: weights as integers, ranges of activations found as the network runs."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from gracile.core.method import method
from gracile.core.plan import Bits
from gracile.core.schedule import When
from gracile.errors import BindError
from gracile.graph.dependency import canonical_addresses
from gracile.graph.instrument import INPUT, SUFFIX
from gracile.nn.quantized import ActivationQuantizer
from gracile.quantize.engine import QuantizeOptions, Quantizer
from gracile.quantize.patterns import WEIGHT_OPS
from gracile.quantize.placement import Placement, Skipped, refuse_unwritable
from gracile.quantize.profile import Profile

BITS = 8  # of what a layer reads, in DynamicQuantizeLinear


class DynamicOptions(QuantizeOptions):
    """Options of `quantize: dynamic`, added to `QuantizeOptions`.

    Of these `bits`, `activations`, `symmetric`, `edges_bits` and `precision` do not count: what a
    layer reads has 8 bits, a zero point, and the range of that very tensor.

    Attributes:
        weight_bits: of weights, at most 8; fewer are stored in 8 all the same.
        when: one instant; default after training.
    """

    weight_bits: int | None = Field(default=None, ge=2, le=8)
    when: When = Field(default_factory=lambda: When(at="end"))

    @model_validator(mode="after")
    def _at_run_time(self) -> Self:
        if not self.when.once:
            raise ValueError("dynamic acts once; write when: {at: end} or {at: 2ep}")
        if not self.activations:
            raise ValueError(
                "activations: false leaves nothing dynamic; write quantize: ptq with it"
            )
        if self.bits != BITS:
            raise ValueError(
                "what a layer reads has 8 bits at run time; for weights write weight_bits"
            )
        for name in ("symmetric", "edges_bits", "precision"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name} does not count here: ranges are found at run time, for 8 bits. Leave "
                    "it out, or write quantize: ptq"
                )
        for o in self.overrides or ():
            for_both = o.bits is not None and not o.is_float
            if o.on_activations or for_both or max(o.widths, default=BITS) > BITS:
                raise ValueError(
                    "overrides can give layers weight_bits of at most 8 here, or bits: float"
                )
        return self


@method(
    "quantize",
    "dynamic",
    source="ONNX operator DynamicQuantizeLinear; Krishnamoorthi 2018, arXiv:1806.08342, section 3",
)
class Dynamic(Quantizer):
    """Put weights on integer grids, and what they are multiplied with on that of its own range."""

    Options = DynamicOptions
    needs = frozenset({"graph"})
    static: ClassVar[bool] = False

    def on_attach(self, s: Any) -> None:
        refuse_unwritable(s.graph, "quantize only weights: quantize: ptq with activations: false")
        super().on_attach(s)

    def claims(self, s: Any) -> Iterable[tuple[str, str]]:
        assert self.placement is not None
        reads = (("bits:input", id) for id in self.placement.operators)
        return [*super().claims(s), *reads]

    def on_fire(self, s: Any, progress: float) -> None:
        self.lay(s)
        self.fix_weights(s)
        self.quantize()

    def lay(self, s: Any, placement: Placement | None = None) -> None:
        """Put overlays on the weights and quantizers (in mode "off") before their layers."""
        super().lay(s, placement)
        assert self.placement is not None
        new: dict[str, ActivationQuantizer] = {}
        for id in self.placement.operators:
            node = s.graph.nodes.get(id + INPUT + SUFFIX)
            if node is None or node.module is None:
                q = new[id] = ActivationQuantizer(BITS, dynamic=True).to(s.device)
            else:
                q = s.model.get_submodule(node.module)
            q.mode, q.__dict__["by"] = "off", self.id
            self.quantizers[id] = q
        if new:
            s.instrument(before=new)

    def on_surgery(self, s: Any, edits: Iterable[Any]) -> None:
        super().on_surgery(s, edits)
        mine = set(self._operators(s))
        for id, q in self.quantizers.items():
            if id not in mine:
                q.mode = "off"

    def edits(self, s: Any) -> list[Bits]:
        """One Bits edit per weight, and one per layer that reads it."""
        return [
            *super().edits(s),
            *(
                Bits(
                    by=self.id,
                    at=id,
                    role="input",
                    bits=BITS,
                    signed=False,
                    symmetric=False,
                    dynamic=True,
                    key=f"{id}.input",
                )
                for id in self._operators(s)
            ),
        ]

    # --- inside

    def _profile(self, s: Any) -> Profile:
        profile = super()._profile(s)
        if not profile.ops_dynamic:
            why = profile.notes_dynamic.get("linear", "none was measured")
            raise BindError(
                f"'{self.id}': profile '{profile.name}' has no layers that quantize what they read "
                f"as they run: {why}. Write quantize: ptq, which finds ranges on calibration data, "
                "or profile: onnxruntime."
            )
        return profile.dynamic

    def _placed(self, s: Any) -> Placement:
        placement = super()._placed(s)
        if self.options.weights is not None:
            return placement
        notes, profile = self._profile(s).notes, self._profile(s).name
        floats = tuple(
            Skipped(n.id, f"profile '{profile}' has no dynamic kernel for it: {notes[n.op]}")
            for n in s.graph.of_op(*WEIGHT_OPS)
            if n.op in notes
        )
        return replace(placement, skipped=(*placement.skipped, *floats))

    def _operators(self, s: Any) -> Iterator[str]:
        """Ids of the layers whose weight is on a grid of this method still."""
        if self.placement is None or not self.laid:
            return
        first = canonical_addresses(s.model)
        for id in self.placement.operators:
            node = s.graph.nodes.get(id)
            weight = None if node is None else node.params.get("weight")
            if weight is not None and self._owns(s, first.get(weight, weight)):
                yield id
