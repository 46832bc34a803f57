"""Quantizers on a live model: lay them, let them observe, set their grids, emit the Edits.

What post-training quantization and quantization-aware training have in common. Weights carry an
overlay, activations a quantizer module on the captured graph; the two methods differ only in when
ranges are observed and when they stop moving.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from gracile.benchmark.processor import FULL_RANGE, sums_saturate
from gracile.core.method import Options
from gracile.core.plan import Bits, Decompose
from gracile.errors import BindError, GracileError
from gracile.graph.capture import capture
from gracile.graph.decompose import decomposed
from gracile.graph.dependency import canonical_addresses
from gracile.graph.graph import Graph, Node
from gracile.nn.quantized import ActivationQuantizer
from gracile.nn.rounding import fake_quantize
from gracile.quantize.affine import (
    Scale,
    Zero,
)
from gracile.quantize.apart import Which, note_whole, taken_apart
from gracile.quantize.bits import BitMap, read_by, with_bits
from gracile.quantize.choosing import Choosing
from gracile.quantize.edges import edges
from gracile.quantize.grid import (
    FoldedGrid,
    Params,
    WeightGrid,
    norm_factor,
    norms_behind,
    observer_for,
    params_of,
)
from gracile.quantize.groups import GroupedGrid, grouped
from gracile.quantize.observers.base import Observer
from gracile.quantize.overrides import Override, bits_of, left_float
from gracile.quantize.patterns import WEIGHT_OPS
from gracile.quantize.placement import ActivationSpec, Placement, Skipped, WeightSpec, place
from gracile.quantize.precision import Precision
from gracile.quantize.profile import Profile, load_profile
from gracile.quantize.ranges import Range
from gracile.quantize.requantize import accumulator_bits
from gracile.recipe.fields import Kernel, KernelRef, Selector, kernel

LAYER = "quantize"  # the overlay layer of weights
ACCUMULATOR_BITS = 32  # of every integer kernel here


class QuantizeOptions(Options):
    """Options that all methods of `quantize` share.

    Attributes:
        weights: which weights; default those of all convolution and linear layers. An operator
            whose weight is left out stays in float.
        bits: of activations and weights.
        weight_bits: of weights, where they differ.
        edges_bits: of the first and the last weights and of the activations these read, which most
            papers leave at 8; default as all others.
        overrides: other bits for some layers or activations, see `Override`; of several on one, and
            of `edges_bits`, the last counts.
        precision: bits of weights (and of what their layers read) chosen so that the loss suffers
            least within a limit, when the quantizers are laid, see `Precision`. What `edges_bits`
            and `overrides` say stays.
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

    least_bits: ClassVar[int] = 2
    on_noise: ClassVar[Mapping[str, Any]] = {"precision": None}  # bits chosen for noise say nothing

    weights: Selector | None = None
    bits: int = Field(default=8, ge=2, le=16)
    weight_bits: int | None = Field(default=None, ge=2, le=16)
    edges_bits: int | None = Field(default=None, ge=2, le=16)
    overrides: tuple[Override, ...] | None = None
    precision: Precision | None = None
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

    @model_validator(mode="after")
    def _bits_fit(self) -> Self:
        for o in self.overrides or ():
            if o.on_activations and not self.activations:
                raise ValueError(
                    "overrides give activations bits, and activations is false; leave one out"
                )
        p = self.precision
        given = [b for o in self.overrides or () for b in o.widths]
        given += [w for w, _ in p.choices(self.bits)] if p is not None else []
        if min(given, default=self.least_bits) < self.least_bits:
            raise ValueError(f"{min(given)} bit is too few here; write {self.least_bits} or more")
        if p is not None and self.weight_bits is not None:
            raise ValueError("weight_bits and precision both choose bits of weights; keep one")
        if p is not None and not self.activations and (p.pairs or p.limit.bit_operations):
            raise ValueError(
                "precision speaks of activations, and activations is false; write bits of weights "
                "alone and a limit of size, mac_bits or latency"
            )
        return self

    @property
    def least_of_weights(self) -> int:
        """The fewest bits that any weight may get."""
        if self.precision is not None:
            usual = [w for w, _ in self.precision.choices(self.bits)]
        else:
            usual = [self.weight_bits or self.bits]
        single = [o for o in self.overrides or () if o.weights is not None and not o.is_float]
        given = [o.weight_bits or o.bits for o in single if o.weight_bits or o.bits]
        return min([*usual, *(int(b) for b in given if b is not None)])

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
        group_size: a scale (and zero point) for each so many inputs in a row of one output, in the
            place of one for the whole output, with `activations: false`: no integer kernel takes
            such weights. Inputs of a convolution are its input channels times the places of its
            kernel. A weight of which they are no whole groups has one scale for each output.
        fold_bn: with one scale for a weight, it is that of the weight with the BatchNorm behind it
            folded in by its running statistics, as a runtime stores it. With a scale for each
            channel it would be the same grid.
    """

    scale: Scale = "float"
    zero: Zero = "nudge"
    fold_bn: bool = False
    group_size: int | None = Field(default=None, ge=2)

    @model_validator(mode="after")
    def _groups_fit(self) -> Self:
        if self.group_size is None:
            return self
        if self.activations:
            raise ValueError(
                "group_size is for weights alone, as no integer kernel takes a scale for each "
                "group; write activations: false"
            )
        if self.per_channel is False or self.fold_bn:
            raise ValueError("group_size and one scale for a weight exclude each other; keep one")
        if self.precision is not None:
            raise ValueError(
                "precision does not count the scales of groups; leave out group_size, or give "
                "single weights their bits by overrides"
            )
        return self

    @model_validator(mode="after")
    def _foldable(self) -> Self:
        if self.fold_bn and (self.per_channel is not False or self.weight_symmetric is False):
            raise ValueError(
                "fold_bn is for symmetric weights with one scale: with one for each channel the "
                "grid is the same either way; write per_channel: false, or leave it out"
            )
        return self

    @property
    def params(self) -> Params:
        """What makes a grid of a range, as these options say."""
        return partial(params_of, scale=self.scale, zero=self.zero)


@dataclass(frozen=True)
class Placed:
    """What was quantized before operators were reverted.

    Attributes:
        grids: address -> the overlay of a weight.
        scales: id of an activation -> scale and zero point.
    """

    placement: Placement
    grids: dict[str, WeightGrid]
    scales: dict[str, tuple[Tensor, Tensor]]


class Quantizer(Choosing):
    """Base of both methods: placement, grids, edits and state. Subclasses decide about time."""

    def __init__(self, id: str, options: Any):
        super().__init__(id, options)
        self.grids: dict[str, WeightGrid] = {}
        self.quantizers: dict[str, ActivationQuantizer] = {}
        self.found: dict[str, Range] = {}  # of activations that are observed, by id
        self._seen: tuple[Graph, Graph] | None = None  # the session's graph, and taken apart
        self.norms: dict[str, Node] = {}  # weight -> the BatchNorm its grid has folded in
        self.ungrouped: dict[str, str] = {}  # weights that have no groups though asked for -> why
        self.floats: dict[str, str] = {}  # operators that were reverted -> why
        self.placed: Placed | None = None  # before any was
        self.laid = False

    static: ClassVar[bool] = True  # whether activations have grids of ranges seen before

    # --- hooks that both methods share

    def on_attach(self, s: Any) -> None:
        self.session = s
        self.placement = self._place(s)
        self.refuse_impossible_precision(s)

    def claims(self, s: Any) -> Iterable[tuple[str, str]]:
        assert self.placement is not None
        return [
            *(("bits:weight", w.address) for w in self.placement.weights),
            *((f"bits:{a.role}", a.id) for a in self.placement.activations),
        ]

    def rounds_from(self, s: Any) -> tuple[int, ...] | None:
        return s.moment(self, "first") if self.options.activations else None  # type: ignore[no-any-return]

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
                elif isinstance(grid, GroupedGrid):
                    grid.keep_inputs(part.keep, part.of)
        self._refuse_torn_groups(s)

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
            self.choose_precision(s)
            placement = self._place(s)
            self._note(s, placement)
            for address, why in self.ungrouped.items():
                why = f"{why}; a scale for each output channel"
                s.note(address, "precision", None, None, why, self.id)
            if getattr(self.options, "decompose", False) == "auto":
                note_whole(s, self.id)
        self.placement = placement
        for spec in placement.weights:
            self.grids[spec.address] = self._grid(spec)
            s.overlays.set(spec.address, LAYER, self.grids[spec.address])
        new: dict[str, nn.Module] = {}
        for a in placement.activations:
            existing = self._existing(s, a)
            q = existing or ActivationQuantizer()
            q.bits, q.signed, q.symmetric, q.narrow = a.bits, a.signed, a.symmetric, a.narrow
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
        for members in self.sharing().values():
            scale, zero_point = self._params(members)
            for a in members:
                self.quantizers[a.id].scale.copy_(scale)
                self.quantizers[a.id].zero_point.copy_(zero_point)

    def sharing(self) -> dict[str, list[ActivationSpec]]:
        """Activations by the id of the one whose scale they take."""
        assert self.placement is not None
        groups: dict[str, list[ActivationSpec]] = {}
        for a in self.placement.activations:
            groups.setdefault(a.leader, []).append(a)
        return groups

    def revert(self, s: Any, floats: Mapping[str, str]) -> None:
        """Compute these operators in float from now on, and all others in integers again.

        Grids of what is quantized before and after stay as they are. Observers must be settled.

        Args:
            s: the session.
            floats: ids of `placement.operators` as first placed -> why.
        """
        if self.placed is None:
            assert self.placement is not None
            self.placed = Placed(
                self.placement,
                dict(self.grids),
                {id: (q.scale.clone(), q.zero_point.clone()) for id, q in self.quantizers.items()},
            )
        self.floats = dict(floats)
        for address in self.grids:
            s.overlays.remove(address, LAYER)
        for q in self.quantizers.values():
            q.mode, q.__dict__["by"] = "off", None
        self.grids, self.quantizers = {}, {}
        first = self.placed.placement
        weights = {w.address: w for w in first.weights}
        specs = {a.id: a for a in first.activations}
        try:
            placement = self._place(s)
            placement = replace(  # what is first or last now had other bits before
                placement,
                weights=tuple(weights[w.address] for w in placement.weights),
                activations=tuple(replace(a, bits=specs[a.id].bits) for a in placement.activations),
            )
        except BindError:  # no weight is left to quantize
            gone = tuple(Skipped(id, why, "sensitive") for id, why in floats.items())
            placement = Placement((), (), gone)
        self.lay(s, placement)
        for address in self.grids:
            self.grids[address] = self.placed.grids[address]
            s.overlays.set(address, LAYER, self.grids[address])
        for members in self.sharing().values():
            same = all(a == specs[a.id] for a in members)
            found = self.placed.scales[members[0].id] if same else self._params(members)
            for a in members:
                self.quantizers[a.id].scale.copy_(found[0])
                self.quantizers[a.id].zero_point.copy_(found[1])
        self.settle()
        self.quantize()

    def tell_reverted(self, s: Any) -> None:
        """Write into the ledger what is float now and was not when first placed."""
        if self.placed is not None and self.placement is not None:
            told = set(self.placed.placement.skipped)
            new = tuple(k for k in self.placement.skipped if k not in told)
            self._note(s, replace(self.placement, skipped=new))

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
                    group=w.group,
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
                    narrow=a.narrow,
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
            if edit.dynamic:
                continue
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
            "floats": dict(self.floats),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state["laid"]:
            return
        s = self.session
        placement, self.floats = Placement.from_dict(state["placement"]), dict(state["floats"])
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

    def rounded(self, weight: Tensor, spec: WeightSpec) -> Tensor:
        return self._grid(spec)(weight)

    def _note(self, s: Any, placement: Placement) -> None:
        for name, why, reason in placement.skipped:
            s.note(name, "precision", "float", reason, why, self.id)

    def _place(self, s: Any) -> Placement:
        placement = self._placed(s)
        bits = self.chosen | self._fixed(s, placement)
        placement = with_bits(placement, bits, self._weight_bits)
        size = getattr(self.options, "group_size", None)
        if size is not None:
            shapes = {w.address: s.parameter(w.address).shape for w in placement.weights}
            same = canonical_addresses(s.model)
            placement, self.ungrouped = grouped(placement, self._graph(s), shapes, size, same)
            return placement
        if not getattr(self.options, "fold_bn", False):
            return placement
        self.norms = norms_behind(self._graph(s))
        weights = (replace(w, axis=0) if w.address in self.norms else w for w in placement.weights)
        return replace(placement, weights=tuple(weights))

    def _fixed(self, s: Any, placement: Placement) -> BitMap:
        """Bits that the recipe gives single layers and activations."""
        o, fixed = self.options, BitMap()
        if o.edges_bits is not None:
            fixed = edges(placement, self._graph(s), o.edges_bits)
        if o.overrides is not None:
            reads = read_by(placement, self._graph(s), canonical_addresses(s.model))
            fixed = fixed | bits_of(o.overrides, s.tensors, placement, reads)
        return fixed

    def _profile(self, s: Any) -> Profile:
        """What the runtime that this is for computes in integers."""
        return load_profile(s.profile if self.options.profile == "auto" else self.options.profile)

    def _placed(self, s: Any) -> Placement:
        """All quantizers, with the same bits everywhere."""
        o = self.options
        profile, graph = self._profile(s), self._graph(s)
        if o.weights is not None:
            weights = s.tensors(o.weights)
        else:
            readers = graph.of_op(*(op for op in WEIGHT_OPS if op in profile.ops_integer))
            every = dict(s.model.named_parameters(remove_duplicate=False))  # tied names as well
            read = {id(every[a]) for n in readers if (a := n.params.get("weight")) in every}
            weights = [n for n, p in s.model.named_parameters() if id(p) in read]
        if o.overrides is not None:
            stay = left_float(o.overrides, s.tensors)
            weights = [n for n in weights if n not in stay]
        return place(
            graph,
            profile,
            weights=weights,
            activations=o.activations and self.static,
            bits=o.bits,
            weight_bits=self._weight_bits(o.weight_bits or o.bits),
            symmetric=o.symmetric,
            weight_symmetric=o.weight_symmetric,
            per_channel=o.per_channel,
            floats=self.floats,
        )

    def _graph(self, s: Any) -> Graph:
        """The session's graph as it will be: what is to be taken apart is."""
        if self._seen is None or self._seen[0] is not s.graph:
            graph: Graph = s.graph
            if apart := self._apart(s):
                graph = capture(decomposed(graph, apart, s.example), s.example, check=False)
            self._seen = s.graph, graph
        return self._seen[1]

    def _apart(self, s: Any) -> list[Decompose]:
        o = self.options
        return taken_apart(s, getattr(o, "decompose", False), o.weights, self.id)

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
        if spec.group is not None:
            return GroupedGrid(spec, self.options.weight_observer.fn, self.options.params)
        if spec.address in self.norms:
            factor = partial(norm_factor, self.session, self.norms[spec.address])
            return FoldedGrid(spec, self.options.weight_observer.fn, self.options.params, factor)
        return WeightGrid(spec, self.options.weight_observer.fn, self.options.params)

    def _refuse_torn_groups(self, s: Any) -> None:
        for address, grid in self.grids.items():
            inputs = s.parameter(address).shape[1:].numel()
            if isinstance(grid, GroupedGrid) and inputs % grid.size:
                raise BindError(
                    f"'{self.id}': {inputs} inputs of '{address}' are left after a cut, which are "
                    f"no whole groups of {grid.size}. Cut before '{self.id}' lays its grids, or by "
                    "whole groups (multiple_of of the pruning entry), or leave this weight out."
                )

    def _params(self, members: list[ActivationSpec]) -> tuple[Tensor, Tensor]:
        """Scale and zero point of activations that share them, as observed."""
        ranges = [self.found[a.id] for a in members if a.observed]
        ranges = [r.above_zero() for r in ranges] if members[0].nonnegative else ranges
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


def _summed_apart(node: Any) -> int:
    """Axis of a weight over which its layer does not sum."""
    return 1 if node.op == "conv_transpose" else 0


def _exists(s: Any, address: str) -> bool:
    names: Mapping[str, Any] = dict(s.model.named_parameters())
    return address in names
