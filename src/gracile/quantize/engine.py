"""Quantizers on a live model: lay them, let them observe, set their grids, emit the Edits.

What post-training quantization and quantization-aware training have in common. Weights carry an
overlay, activations a quantizer module on the captured graph; the two methods differ only in when
ranges are observed and when they stop moving.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from gracile.benchmark.processor import FULL_RANGE, sums_saturate
from gracile.core.method import Method, Options
from gracile.core.plan import Bits, Decompose
from gracile.errors import GracileError
from gracile.graph.capture import capture
from gracile.graph.decompose import decomposed
from gracile.nn.quantized import ActivationQuantizer
from gracile.nn.rounding import fake_quantize
from gracile.quantize.affine import (
    Scale,
    Zero,
    along,
    asymmetric_params,
    qrange,
    quantize,
    symmetric_params,
)
from gracile.quantize.apart import Which, note_whole, taken_apart
from gracile.quantize.edges import with_edges
from gracile.quantize.fake_quant.affine import affine
from gracile.quantize.observers.base import Observer
from gracile.quantize.patterns import WEIGHT_OPS
from gracile.quantize.placement import ActivationSpec, Placement, WeightSpec, place
from gracile.quantize.profile import load_profile
from gracile.quantize.ranges import Range
from gracile.quantize.requantize import accumulator_bits
from gracile.recipe.fields import Kernel, KernelRef, Selector, kernel

LAYER = "quantize"  # the overlay layer of weights
ACCUMULATOR_BITS = 32  # of every integer kernel here

Params = Callable[[Tensor, Tensor, WeightSpec | ActivationSpec], tuple[Tensor, Tensor]]


def params_of(
    low: Tensor,
    high: Tensor,
    spec: WeightSpec | ActivationSpec,
    scale: Scale = "float",
    zero: Zero = "nudge",
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a range on the grid a spec asks for."""
    if spec.symmetric:
        narrow = getattr(spec, "narrow", False)
        return symmetric_params(low, high, spec.bits, spec.signed, narrow, scale)
    return asymmetric_params(low, high, spec.bits, spec.signed, scale, zero)


class QuantizeOptions(Options):
    """Options that all methods of `quantize` share.

    Attributes:
        weights: which weights; default those of all convolution and linear layers. An operator
            whose weight is left out stays in float.
        bits: of activations and weights.
        weight_bits: of weights, where they differ.
        edges_bits: of the first and the last weights and of the activations these read, which most
            papers leave at 8; default as all others.
        half_range: 8-bit weights use 7 of their bits (-63..63), so that a sum of two products with
            8-bit activations fits 16 bits, in which x86 processors without VNNI add them; default
            where this machine's processor is one. Say true to ship to such a processor from
            another, false to have all levels whatever happens.
        activations: False quantizes weights only.
        symmetric: zero point 0 for activations that can be negative; default as the profile says.
        weight_symmetric: zero point 0 for weights; default as the profile says.
        per_channel: one scale per output channel of a weight; default as the profile says.
        weight_observer: range of a weight, computed afresh from the weight whenever it is needed.
        profile: which runtime's kernels decide where quantizers go; `auto` is the session's target.
        decompose: which attention and recurrent layers are taken apart into their operators, so
            that their products run in integers: `auto` attention, true recurrent layers and cells
            as well, false none, a selector those whose weights it means. Those of which no weight
            is in `weights` stay whole. A recurrent layer then computes as many steps as the
            example has, and no others.
        after: recipe entry whose decision this one replaces.
    """

    weights: Selector | None = None
    bits: int = Field(default=8, ge=2, le=16)
    weight_bits: int | None = Field(default=None, ge=2, le=16)
    edges_bits: int | None = Field(default=None, ge=2, le=16)
    half_range: bool | None = None
    activations: bool = True
    symmetric: bool | None = None
    weight_symmetric: bool | None = None
    per_channel: bool | None = None
    weight_observer: KernelRef("observer") = Field(  # type: ignore[valid-type]
        default_factory=lambda: kernel("observer", "min_max")
    )
    profile: str = "auto"
    decompose: Which = "auto"
    after: str | None = None

    @field_validator("observer", "weight_observer", check_fields=False)
    @classmethod
    def _can_be_made(cls, value: Any) -> Any:
        if isinstance(value, Kernel):
            value.fn()  # refuses options that are out of range
        return value

    @property
    def params(self) -> Params:
        """What makes a grid of a range."""
        return params_of


class ObservedOptions(QuantizeOptions):
    """Options of methods whose grids are those of observed ranges, added to `QuantizeOptions`.

    Attributes:
        scale: power_of_two rounds scales up to one, for kernels that only shift. A BatchNorm that
            is folded at export multiplies its weight's scales; those of activations stay.
        zero: how 0.0 gets onto an asymmetric grid: nudge moves an end of the range by up to half a
            step, tune widens the range so that neither end moves inwards (NNCF).
    """

    scale: Scale = "float"
    zero: Zero = "nudge"

    @property
    def params(self) -> Params:
        """What makes a grid of a range, as these options say."""
        return partial(params_of, scale=self.scale, zero=self.zero)


class WeightGrid:
    """The overlay that puts one weight on its grid.

    The scale is computed from the weight at every call, so it follows training and surgery, until
    `fix` keeps it. Rounding passes gradients straight through; the scale gets none.
    """

    def __init__(
        self,
        spec: WeightSpec,
        make_observer: Callable[[], Observer],
        make_params: Params = params_of,
    ):
        self.spec, self.make_observer, self.make_params = spec, make_observer, make_params
        self.qmin, self.qmax = qrange(spec.bits, spec.signed, spec.narrow)
        self.scale: Tensor | None = None
        self.zero_point: Tensor | None = None

    def params(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point: the kept ones, else those of this weight."""
        if self.scale is not None and self.zero_point is not None:
            return self.scale, self.zero_point
        observer = observer_for(self.spec, self.make_observer)
        observer.observe(weight.detach())
        return self.make_params(*observer.range(), self.spec)

    def __call__(self, weight: Tensor) -> Tensor:
        """The weight as the integer kernels will see it."""
        scale, zero_point = self.params(weight)
        return affine(weight, scale, zero_point, self.qmin, self.qmax, self.spec.axis)

    def integers(self, weight: Tensor) -> Tensor:
        """The weight on its grid, as integers less their zero point."""
        scale, zero_point = self.params(weight)
        q = quantize(weight, scale, zero_point, self.qmin, self.qmax, self.spec.axis)
        return q - along(zero_point, q, self.spec.axis)

    def fix(self, weight: Tensor) -> None:
        """Keep this weight's scale and zero point from now on."""
        self.scale, self.zero_point = self.params(weight)

    def keep(self, index: Tensor) -> None:
        """Output channels were removed: only these are left."""
        if self.scale is not None and self.zero_point is not None:
            self.scale, self.zero_point = self.scale[index], self.zero_point[index]


class Quantizer(Method):
    """Base of both methods: placement, grids, edits and state. Subclasses decide about time."""

    def __init__(self, id: str, options: Any):
        super().__init__(id, options)
        self.placement: Placement | None = None
        self.grids: dict[str, WeightGrid] = {}
        self.quantizers: dict[str, ActivationQuantizer] = {}
        self.found: dict[str, Range] = {}  # of activations that are observed, by id
        self.laid = False

    # --- hooks that both methods share

    def on_attach(self, s: Any) -> None:
        self.session = s
        self.placement = self._place(s)

    def claims(self, s: Any) -> Iterable[tuple[str, str]]:
        assert self.placement is not None
        return [
            *(("bits:weight", w.address) for w in self.placement.weights),
            *((f"bits:{a.role}", a.id) for a in self.placement.activations),
        ]

    def on_surgery(self, s: Any, edits: Iterable[Any]) -> None:
        for address in [a for a in self.grids if not _exists(s, a)]:
            del self.grids[address]
            s.warn(
                "quantize.gone", f"'{address}' was replaced; '{self.id}' no longer quantizes it."
            )
        for edit in edits:
            for part in getattr(edit, "group", ()):
                grid = self.grids.get(part.at)
                if grid is not None and part.dim == grid.spec.axis:
                    grid.keep(torch.tensor(part.keep))

    def on_detach(self, s: Any) -> Iterable[Bits]:
        """Keep all scales and say what is on which grid."""
        self.fix_weights(s)
        self.settle()
        self._warn_of_sums(s)
        return self.edits(s)

    # --- the parts subclasses put in order

    def lay(self, s: Any, placement: Placement | None = None) -> None:
        """Put overlays on the weights and quantizers (in mode "off") on the graph."""
        if placement is None:
            if apart := self._apart(s):
                s.apply(apart)
            placement = self._place(s)
            for name, why, reason in placement.skipped:
                s.note(name, "precision", "float", reason, why, self.id)
            if self.options.decompose == "auto":
                note_whole(s, self.id)
        self.placement = placement
        for spec in placement.weights:
            self.grids[spec.address] = self._grid(spec)
            s.overlays.set(spec.address, LAYER, self.grids[spec.address])
        new: dict[str, nn.Module] = {}
        for a in placement.activations:
            existing = self._existing(s, a)
            q = existing or ActivationQuantizer()
            q.bits, q.signed, q.symmetric, q.narrow = a.bits, a.signed, a.symmetric, False
            q.mode, q.observer = "off", self._observer(a) if a.observed else None
            q.rule = fake_quantize
            q.__dict__["by"] = self.id
            self.quantizers[a.id] = q
            if existing is None:
                new[a.id] = q.to(s.device)
        if new:
            s.instrument(new)
        self.laid = True

    def observe(self, s: Any) -> None:
        """Run the calibration data past the observers and set all activation grids.

        The weights are on their grids already, so the ranges are those of the deployed network.
        """
        for q in self.quantizers.values():
            q.mode = "observe" if q.observer is not None else "off"
        if self.quantizers:
            s.calibrate(self)
        self.refresh()
        self.quantize()

    def quantize(self) -> None:
        """From now on activations are rounded to their grids."""
        for q in self.quantizers.values():
            q.mode = "quantize"

    def refresh(self) -> None:
        """Set scales and zero points of all activations from what their observers have seen."""
        assert self.placement is not None
        self.set_ranges({a.id: self._range(a) for a in self.placement.activations if a.observed})

    def set_ranges(self, found: Mapping[str, Range]) -> None:
        """Set scales and zero points of all activations from the ranges of those observed."""
        self.found = dict(found)
        for members in self._sharing().values():
            scale, zero_point = self._params(members)
            for a in members:
                self.quantizers[a.id].scale.copy_(scale)
                self.quantizers[a.id].zero_point.copy_(zero_point)

    def settle(self) -> None:
        """Take the observers away: activation ranges no longer move."""
        for q in self.quantizers.values():
            q.observer = None

    def fix_weights(self, s: Any) -> None:
        """Keep the scale of every weight as it is now."""
        for address, grid in self.grids.items():
            if grid.scale is None:
                with torch.no_grad():
                    grid.fix(s.overlays.effective(address, upto="share").detach())

    def edits(self, s: Any) -> list[Bits]:
        """One Bits edit per weight and activation that is still this method's."""
        if self.placement is None or not self.laid:
            return []
        weights = [w for w in self.placement.weights if self._owns(s, w.address)]
        outputs = [a for a in self.placement.activations if self._owns(s, a)]
        return [
            *(
                Bits(
                    by=self.id,
                    at=w.address,
                    role="weight",
                    bits=w.bits,
                    signed=w.signed,
                    symmetric=w.symmetric,
                    axis=w.axis,
                    narrow=w.narrow,
                    key=f"{w.address}.weight",
                )
                for w in weights
            ),
            *(
                Bits(
                    by=self.id,
                    at=a.id,
                    role=a.role,
                    bits=a.bits,
                    signed=a.signed,
                    symmetric=a.symmetric,
                    key=f"{a.id}.{a.role}",
                )
                for a in outputs
            ),
        ]

    def ranges(self) -> dict[str, Range]:
        """What every activation spans that was observed and is still this method's, by id."""
        if self.placement is None or not self.laid:
            return {}
        mine = (a for a in self.placement.activations if a.id in self.found)
        return {a.id: self.found[a.id] for a in mine if self._owns(self.session, a)}

    def tensors(self) -> dict[str, Tensor]:
        """`<key>.scale` and `<key>.zero_point` of every Edit, once the grids are set."""
        out: dict[str, Tensor] = {}
        for edit in self.edits(self.session):
            holder = self.grids[edit.at] if edit.role == "weight" else self.quantizers[edit.at]
            if holder.scale is None or holder.zero_point is None:
                raise GracileError(f"'{self.id}': the scale of '{edit.at}' is not set yet.")
            out[f"{edit.key}.scale"] = holder.scale
            out[f"{edit.key}.zero_point"] = holder.zero_point
        return out

    # --- state

    def state_dict(self) -> dict[str, Any]:
        if not self.laid or self.placement is None:
            return {"laid": False}
        return {
            "laid": True,
            "placement": self.placement.to_dict(),
            "weights": {
                a: {"scale": g.scale.clone(), "zero_point": g.zero_point.clone()}
                for a, g in self.grids.items()
                if g.scale is not None and g.zero_point is not None
            },
            "activations": {
                id: {"scale": q.scale.clone(), "zero_point": q.zero_point.clone(), "mode": q.mode}
                for id, q in self.quantizers.items()
            },
            "observers": {
                id: q.observer.state_dict()
                for id, q in self.quantizers.items()
                if q.observer is not None
            },
            "ranges": {id: list(r) for id, r in self.found.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state["laid"]:
            return
        s = self.session
        placement = Placement.from_dict(state["placement"])
        self.lay(s, placement)
        specs = {a.id: a for a in placement.activations}
        self.found = {id: Range(*r) for id, r in state["ranges"].items()}
        for address, values in state["weights"].items():
            grid = self.grids[address]
            grid.scale = values["scale"].to(s.device)
            grid.zero_point = values["zero_point"].to(s.device)
        for id, values in state["activations"].items():
            q = self.quantizers[id]
            q.scale.copy_(values["scale"])
            q.zero_point.copy_(values["zero_point"])
            q.mode = values["mode"]
            q.observer = self._observer(specs[id]) if id in state["observers"] else None
            if q.observer is not None:
                stored = state["observers"][id]
                q.observer.load_state_dict({k: v.to(s.device) for k, v in stored.items()})

    # --- inside

    def _place(self, s: Any) -> Placement:
        o = self.options
        profile = load_profile(s.profile if o.profile == "auto" else o.profile)
        graph = s.graph
        if apart := self._apart(s):
            module = decomposed(graph, apart, s.example)
            graph = capture(module, s.example, check=False)
        if o.weights is not None:
            weights = s.tensors(o.weights)
        else:
            readers = graph.of_op(*(op for op in WEIGHT_OPS if op in profile.ops_integer))
            every = dict(s.model.named_parameters(remove_duplicate=False))  # tied names as well
            read = {id(every[a]) for n in readers if (a := n.params.get("weight")) in every}
            weights = [n for n, p in s.model.named_parameters() if id(p) in read]
        placement = place(
            graph,
            profile,
            weights=weights,
            activations=o.activations,
            bits=o.bits,
            weight_bits=self._weight_bits(o.weight_bits or o.bits),
            symmetric=o.symmetric,
            weight_symmetric=o.weight_symmetric,
            per_channel=o.per_channel,
        )
        if o.edges_bits is None:
            return placement
        return with_edges(placement, graph, o.edges_bits, self._weight_bits(o.edges_bits))

    def _apart(self, s: Any) -> list[Decompose]:
        o = self.options
        return taken_apart(s, o.decompose, o.weights, self.id)

    def _weight_bits(self, bits: int) -> int:
        """Bits of weights, one less of 8 where sums of pairs must fit 16 bits."""
        o = self.options
        if bits != FULL_RANGE:
            return bits
        alone = not o.activations and o.after is None  # weights alone are multiplied in float
        half = sums_saturate() and not alone if o.half_range is None else o.half_range
        return FULL_RANGE - 1 if half else FULL_RANGE

    def _grid(self, spec: WeightSpec) -> WeightGrid:
        """The overlay of one weight."""
        return WeightGrid(spec, self.options.weight_observer.fn, self.options.params)

    def _sharing(self) -> dict[str, list[ActivationSpec]]:
        """Activations by the id of the one whose scale they take."""
        assert self.placement is not None
        groups: dict[str, list[ActivationSpec]] = {}
        for a in self.placement.activations:
            groups.setdefault(a.shares_scale_with or a.id, []).append(a)
        return groups

    def _params(self, members: list[ActivationSpec]) -> tuple[Tensor, Tensor]:
        """Scale and zero point of activations that share them, as observed."""
        ranges = [self.found[a.id] for a in members if a.observed]
        low = torch.tensor(min(r.low for r in ranges))
        high = torch.tensor(max(r.high for r in ranges))
        made: tuple[Tensor, Tensor] = self.options.params(low, high, members[0])
        return made

    def _observer(self, a: ActivationSpec) -> Observer:
        return observer_for(a, self.options.observer.fn)

    def _warn_of_sums(self, s: Any) -> None:
        """Tell of layers whose sums could outgrow the accumulator."""
        widest = max((q.bits for q in self.quantizers.values()), default=0)
        large = {
            address: grid
            for address, grid in self.grids.items()
            if grid.spec.bits + widest + math.log2(s.parameter(address).numel()) > ACCUMULATOR_BITS
        }
        for node in s.graph.of_op(*WEIGHT_OPS) if large and widest else ():
            grid = large.get(node.params.get("weight", ""))
            source = s.graph.nodes.get(node.inputs[0])
            if grid is None or source is None or source.op != "quantize":
                continue
            q = s.model.get_submodule(source.module)
            zero_point = int(q.zero_point)
            weight = s.overlays.effective(grid.spec.address, upto="share").detach()
            ends = q.qmin - zero_point, q.qmax - zero_point
            bits = accumulator_bits(grid.integers(weight), *ends, _summed_apart(node))
            if bits > ACCUMULATOR_BITS:
                s.warn(
                    "quantize.accumulator",
                    f"the sums of '{node.id}' need {bits} bits in the worst case, integer kernels "
                    f"have {ACCUMULATOR_BITS}; take fewer bits for its weight or its input.",
                )

    def _existing(self, s: Any, a: ActivationSpec) -> ActivationQuantizer | None:
        node = s.graph.nodes.get(f"{a.id}.quantize")
        if node is None or node.module is None:
            return None
        module: ActivationQuantizer = s.model.get_submodule(node.module)
        return module

    def _range(self, a: ActivationSpec) -> Range:
        try:
            self.quantizers[a.id].observer.sync()
            low, high = self.quantizers[a.id].observer.range()
        except GracileError as e:
            raise GracileError(f"'{self.id}': the range of '{a.id}': {e}") from None
        o = self.options.observer
        found = Range(float(low), float(high), o.name if isinstance(o, Kernel) else str(o))
        return found.above_zero() if a.nonnegative else found

    def _owns(self, s: Any, what: str | ActivationSpec) -> bool:
        if isinstance(what, str):
            grid = self.grids.get(what)
            return grid is not None and s.overlays.get(what, LAYER) is grid
        q = self.quantizers[what.id]
        return q.__dict__.get("by") == self.id


def observer_for(
    spec: WeightSpec | ActivationSpec, make_observer: Callable[[], Observer]
) -> Observer:
    """A new observer that knows the grid its range is for."""
    made = make_observer()
    made.axis = getattr(spec, "axis", None)
    made.bits, made.signed, made.symmetric = spec.bits, spec.signed, spec.symmetric
    made.narrow = getattr(spec, "narrow", False)
    return made


def _summed_apart(node: Any) -> int:
    """Axis of a weight over which its layer does not sum."""
    return 1 if node.op == "conv_transpose" else 0


def _exists(s: Any, address: str) -> bool:
    names: Mapping[str, Any] = dict(s.model.named_parameters())
    return address in names
