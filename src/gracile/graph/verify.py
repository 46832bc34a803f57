"""The proof of a cut: the sliced model computes what the masked model computes.

"Masked" means: everything that belongs to a removed unit is zero, in the weights that make it, in
the weights that read it (as they are computed, where the forward computes them), and in
normalization scales and shifts. Statistics are those of the kept channels, dropout is off.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from gracile.core.plan import Remove
from gracile.errors import GracileError, UserError, VerificationError
from gracile.graph.capture import as_inputs, capture, quiet, repeatable
from gracile.graph.dependency import Following, follow
from gracile.graph.graph import Graph
from gracile.graph.labels import Axes, Flow, Labels, Several, Value
from gracile.graph.oprule import rule_of_module, rule_of_op
from gracile.graph.reproduce import Operator, operator
from gracile.graph.trace import CannotTrace, trace
from gracile.nn.by_mode import ByMode
from gracile.nn.exits import Choice

Inputs = Tensor | tuple[Tensor, ...]
Axis = tuple[str, int]

# Largest allowed difference, as a share of the largest magnitude in the tensor compared.
# float64: slicing only changes the order of sums (about 1e-16 each); training-mode BatchNorm can
# amplify that by 1/sqrt(eps) = 316 a layer where a channel is nearly constant. A wrong slice is off
# by the size of the values themselves.
# float32, for models that do not run in float64: the same with 6e-8 a sum.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3}
NOTHING = 1e-12  # a tensor smaller than this everywhere counts as zero


@dataclass(frozen=True)
class Proof:
    """How masked and sliced model were compared.

    Attributes:
        dtype: the arithmetic of the comparison: float64 where the model runs in it.
        max_error: largest difference found, as a share of the tensor's largest magnitude.
        tolerance: what would have been too much.
        checks: "eval" and, where the model runs in train mode on these examples, "train".
    """

    dtype: str
    max_error: float
    tolerance: float
    checks: tuple[str, ...]


class _Different(Exception):
    """Masked and sliced model differ; not yet known where."""

    def __init__(self, what: str, inputs: tuple[Tensor, ...], training: bool):
        super().__init__(what)
        self.inputs, self.training = inputs, training


def prove(
    model: nn.Module,
    edits: Sequence[Remove],
    examples: Sequence[Inputs],
    cut: Callable[[nn.Module, Sequence[Remove]], None],
    graph: Graph | None = None,
) -> Proof:
    """Compare the masked with the sliced model on all examples.

    Parameters that are zero as a whole (a zero-initialized last BatchNorm) are filled first, in
    both: they would hide everything that lies before them.

    Args:
        model: a copy that may be changed.
        edits: the cut.
        examples: input batches.
        cut: makes the cut in place.
        graph: as captured before the cut; spares looking for statistics where none lose channels.

    Raises:
        UserError: the model does not run on an example.
        VerificationError: the models differ, or the model makes no finite numbers.
    """
    _fill_zero_parameters(model)
    dtype, model, inputs = to_compare(model, examples)
    masked, sliced = copy.deepcopy(model), model
    mask_removed(masked, edits)
    cut(sliced, edits)
    if graph is None or losing_statistics(graph, follow(model, graph), edits):
        masked = kept_statistics(masked, sliced, edits, inputs[0])
    try:
        worst, checks = _compare(masked, sliced, edits, inputs, dtype)
    except _Different as e:
        where, at = first_difference(masked, sliced, edits, e.inputs, e.training, TOLERANCE[dtype])
        cuts = ", ".join(dict.fromkeys(f"'{edit.group[0].at}'" for edit in edits))
        raise VerificationError(
            f"cutting {cuts} changed what the model computes in "
            f"{'train' if e.training else 'eval'} mode: {where} ({e}). "
            "The model was left as it was; protect these channels.",
            edits,
            at,
        ) from None
    return Proof(str(dtype).removeprefix("torch."), worst, TOLERANCE[dtype], checks)


def removed_indices(edits: Sequence[Remove]) -> dict[Axis, list[int]]:
    """(address, dim) -> indices that all edits together remove, counted before the first edit."""
    left: dict[Axis, list[int]] = {}
    sizes: dict[Axis, int] = {}
    for edit in edits:
        for m in edit.group:
            before = left.get((m.at, m.dim), list(range(m.of)))
            sizes.setdefault((m.at, m.dim), m.of)
            left[m.at, m.dim] = [before[k] for k in m.keep]
    return {axis: sorted(set(range(sizes[axis])) - set(kept)) for axis, kept in left.items()}


@torch.no_grad()
def mask_removed(model: nn.Module, edits: Sequence[Remove]) -> None:
    """Set all that the edits would remove from parameters to zero, in place."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for (at, dim), gone in removed_indices(edits).items():
        if at in parameters:
            p = parameters[at]
            p.index_fill_(dim, torch.tensor(gone, device=p.device, dtype=torch.long), 0)


def first_difference(
    masked: nn.Module,
    sliced: nn.Module,
    edits: Sequence[Remove],
    inputs: tuple[Tensor, ...],
    training: bool,
    tolerance: float,
) -> tuple[str, Operator | None]:
    """Say which operator is the first whose kept channels differ between the two models."""
    unknown = "the operator could not be found"
    try:
        if isinstance(masked, _Masked):
            graph, found, module = masked.graph, masked.found, masked.module
        else:
            graph = capture(masked, inputs)
            if graph.module is None:
                return f"{unknown} because the graph was captured by '{graph.how}'", None
            found, module = follow(masked, graph), graph.module
        twin = trace(sliced)
    except (GracileError, CannotTrace) as e:
        return f"{unknown} ({e})", None
    home = masked if isinstance(masked, _Masked) else None
    left = _outputs(module, inputs, training, home)
    right = _outputs(twin, inputs, training)
    gone = gone_units(found.flow, edits)
    for node in graph:
        name = f"the first differing operator is '{node.id}' ({node.op})"
        if node.id not in right or node.id not in left:
            return f"{name}, which does not run any more", operator(graph, node.id)
        a, b, value = left[node.id], right[node.id], found.values[node.id]
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or node.op == "param":
            continue
        a = _kept_of(a, _kept(value, found.flow, gone))
        if a.shape != b.shape:
            shapes = f"whose shape is {tuple(b.shape)} instead of {tuple(a.shape)}"
            return f"{name}, {shapes}", operator(graph, node.id)
        if not difference(a, b) <= tolerance:
            return name, operator(graph, node.id)
    return "no single operator differs", None


def kept_statistics(
    masked: nn.Module, sliced: nn.Module, edits: Sequence[Remove], inputs: tuple[Tensor, ...]
) -> nn.Module:
    """The masked model, with statistics over channels taken over those that are kept.

    Where no such operator loses channels, or the forward cannot be followed: the model as it is.
    """
    graph = capture(masked, inputs)
    if graph.module is None:
        return masked
    found = follow(masked, graph)
    special = losing_statistics(graph, found, edits)
    if not special:
        return masked
    return _Masked(graph, trace(sliced), found, gone_units(found.flow, edits), special)


def losing_statistics(graph: Graph, found: Following, edits: Sequence[Remove]) -> set[str]:
    """Operators that take statistics over channels of which some go, or make weights of them."""
    noted = found.flow.statistics
    takers = [n.id for n in graph if n.id in noted or rule_of_op(n.op).statistic]
    if not takers:
        return set()
    gone = gone_units(found.flow, edits)
    return {id for id in takers if _loses(id, graph, found, gone)}


def gone_units(flow: Flow, edits: Sequence[Remove]) -> set[int]:
    """Units that the edits remove: those that lose every index they have, of writers if any."""
    lost = {axis: set(indices) for axis, indices in removed_indices(edits).items()}
    left: dict[bool, set[int]] = {True: set(), False: set()}  # by whether a weight writes it
    seen: dict[bool, set[int]] = {True: set(), False: set()}
    for axis, labels in flow.axes.items():
        gone = lost.get(axis, set())
        writes = axis in flow.writes
        for i, label in enumerate(flow.find(labels).tolist()):
            for unit in flow.atoms(label):
                seen[writes].add(unit)
                if i not in gone:
                    left[writes].add(unit)
    return {u for u in seen[True] | seen[False] if u not in left[u in seen[True]]}


def kept_after(found: Following, id: str, edits: Sequence[Remove]) -> list[Tensor | None]:
    """For each dim of an operator's output the indices that stay; None where all do.

    Args:
        found: of the model before the edits.
        id: of the operator.
        edits: all of them, each counting in the model as those before it left it.
    """
    value = found.values.get(id)
    if not isinstance(value, Axes) or not edits:
        return []
    kept = _kept(value, found.flow, gone_units(found.flow, edits))
    return [None if k is None else k[1] for k in kept]


def _loses(id: str, graph: Graph, found: Following, gone: set[int]) -> bool:
    kept = [_kept(found.values[i], found.flow, gone) for i in (id, *graph[id].inputs)]
    return any(k is not None for k in pytree.tree_leaves(kept))


def _kept(value: Value, flow: Flow, gone: set[int]) -> list[Any]:
    """For each dim its size and the indices that stay; None for all. Of several values a list."""
    if isinstance(value, Several):
        return [_kept(v, flow, gone) for v in value.values]
    if not isinstance(value, Axes):
        return []
    return [None if v is None else _kept_indices(v, flow, gone) for v in value.dims]


def _kept_indices(labels: Labels, flow: Flow, gone: set[int]) -> tuple[int, Tensor] | None:
    keep = [
        i for i, x in enumerate(flow.find(labels).tolist()) if not gone.intersection(flow.atoms(x))
    ]
    n = len(labels)
    return None if len(keep) == n else (n, torch.tensor(keep, dtype=torch.long))


def _kept_of(x: Any, kept: Sequence[Any]) -> Any:
    if isinstance(x, (tuple, list)) and kept:
        return tuple(_kept_of(*pair) for pair in zip(x, kept, strict=True))
    for dim, keep in enumerate(kept):
        if keep is not None:
            x = x.index_select(dim, keep[1].to(x.device))
    return x


def _among_zeros(x: Any, kept: Sequence[Any]) -> Any:
    """Inverse of `_kept_of`: zeros where something was removed."""
    if isinstance(x, (tuple, list)) and kept:
        return tuple(_among_zeros(*pair) for pair in zip(x, kept, strict=True))
    for dim, keep in enumerate(kept):
        if keep is not None:
            size = list(x.shape)
            size[dim] = keep[0]
            x = x.new_zeros(size).index_copy(dim, keep[1].to(x.device), x)
    return x


class _Masked(nn.Module):
    """Runs a masked graph; operators that take statistics see only what is kept."""

    def __init__(
        self,
        graph: Graph,
        sliced: fx.GraphModule,
        found: Following,
        gone: set[int],
        special: set[str],
    ):
        super().__init__()
        assert graph.module is not None
        self.module, self.special = graph.module, special
        self.graph, self.found = graph, found
        self.__dict__["_sliced"] = sliced  # not a part of this model
        self.twins = {n.meta["id"]: n for n in sliced.graph.nodes}
        self.kept = {id: _kept(v, found.flow, gone) for id, v in found.values.items()}

    def forward(self, *inputs: Any) -> Any:
        """As the graph, statistics over kept channels."""
        return _Statistics(self).run(*inputs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Any:
        """Under the names they have in the model."""
        return self.module.named_buffers(*args, **kwargs)


class _Statistics(fx.Interpreter):
    def __init__(self, home: _Masked):
        super().__init__(home.module)
        self.home = home
        self.sizes: dict[fx.Node, Any] = {}  # of what is kept

    def run_node(self, n: fx.Node) -> Any:
        id = n.meta["id"]
        if id in self.home.special:
            return _among_zeros(self._sliced(n), self.home.kept[id])
        out = super().run_node(n)
        if self.home.graph[id].op == "size":
            self.sizes[n] = self._sliced(n)
        return out

    def _sliced(self, n: fx.Node) -> Any:
        """What the sliced model's operator makes of what is kept."""
        twin = self.home.twins[n.meta["id"]]
        mine = dict(zip(twin.all_input_nodes, n.all_input_nodes, strict=True))

        def kept(node: fx.Node) -> Any:
            here = mine[node]
            if here in self.sizes:
                return self.sizes[here]
            return _kept_of(self.env[here], self.home.kept[here.meta["id"]])

        args, kwargs = fx.node.map_arg((twin.args, dict(twin.kwargs)), kept)
        target: Any = twin.target
        if n.op == "call_module":
            return self.home.__dict__["_sliced"].get_submodule(target)(*args, **kwargs)
        if n.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference as a share of a's largest magnitude; infinite where only one is finite."""
    if a.numel() == 0:
        return 0.0
    a, b = a.detach().double(), b.detach().double()
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return float("inf")
    gap = torch.where(finite, (a - b).abs(), 0).max().item()
    scale = torch.where(finite, a.abs(), 0).max().item()
    return 0.0 if max(gap, scale) < NOTHING else gap / max(scale, NOTHING)


def _compare(
    masked: nn.Module,
    sliced: nn.Module,
    edits: Sequence[Remove],
    inputs: Sequence[tuple[Tensor, ...]],
    dtype: torch.dtype,
) -> tuple[float, tuple[str, ...]]:
    tolerance, worst = TOLERANCE[dtype], 0.0
    for x in inputs:
        worst = max(worst, _same_outputs(masked, sliced, x, False, tolerance))
    for batch in (_together(inputs), inputs[0]):
        expected = _in_train_mode(masked, batch)
        if expected is not None:
            error = _same_outputs(masked, sliced, batch, True, tolerance, expected)
            worst = max(worst, error, _same_buffers(masked, sliced, edits, batch, tolerance))
            return worst, ("eval", "train")
    return worst, ("eval",)


def _in_train_mode(model: nn.Module, batch: tuple[Tensor, ...]) -> list[Any] | None:
    """The outputs after one step in train mode; None, and no trace, where it does not run."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    try:
        return pytree.tree_leaves(_forward(model, batch, True))
    except Exception:
        for name, b in model.named_buffers():
            b.copy_(buffers[name])
        return None


def _same_outputs(
    masked: nn.Module,
    sliced: nn.Module,
    inputs: tuple[Tensor, ...],
    training: bool,
    tolerance: float,
    expected: list[Any] | None = None,
) -> float:
    if expected is None:
        expected = _ran(masked, inputs, training)
    if not all(_some_finite(v) for v in expected):
        raise VerificationError(
            "the cut cannot be verified: the model's output has no finite number for an example. "
            "Check the weights (has the training diverged?) and the example."
        )
    got = _ran(sliced, inputs, training)
    worst = 0.0
    for a, b in zip(expected, got, strict=True):
        if not isinstance(a, Tensor):
            continue
        if a.shape != b.shape:
            shapes = f"the output has shape {tuple(b.shape)} instead of {tuple(a.shape)}"
            raise _Different(shapes, inputs, training)
        error = difference(a, b)
        if not error <= tolerance:
            text = f"the output differs by {error:.1e} of its magnitude, allowed is {tolerance:g}"
            raise _Different(text, inputs, training)
        worst = max(worst, error)
    return worst


def _ran(model: nn.Module, inputs: tuple[Tensor, ...], training: bool) -> list[Any]:
    """The outputs; statistics of the kept channels may fail in the masked model as well."""
    try:
        return pytree.tree_leaves(_forward(model, inputs, training))
    except Exception as e:
        text = str(e).strip().split("\n")[0]
        raise _Different(f"{type(e).__name__}: {text}", inputs, training) from e


def _same_buffers(
    masked: nn.Module,
    sliced: nn.Module,
    edits: Sequence[Remove],
    inputs: tuple[Tensor, ...],
    tolerance: float,
) -> float:
    gone, worst = removed_indices(edits), 0.0
    before = dict(masked.named_buffers(remove_duplicate=False))
    for name, b in sliced.named_buffers():
        a = before[name]
        for dim in [d for at, d in gone if at == name]:
            keep = torch.ones(a.shape[dim], dtype=torch.bool)
            keep[gone[name, dim]] = False
            a = a.index_select(dim, keep.nonzero().flatten().to(a.device))
        error = difference(a, b) if a.shape == b.shape else float("inf")
        if not error <= tolerance:
            raise _Different(f"buffer '{name}' differs after one step", inputs, True)
        worst = max(worst, error)
    return worst


def _some_finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.numel() == 0 or bool(value.isfinite().any())


def _together(inputs: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """All examples as one batch for train mode, at least two samples.

    A batch of one is doubled with its own shifted copy, because BatchNorm after global pooling
    refuses a single value per channel.
    """
    alike = [x for x in inputs if [t.shape[1:] for t in x] == [t.shape[1:] for t in inputs[0]]]
    batch = tuple(torch.cat(parts) for parts in zip(*alike, strict=True))
    if any(t.shape[0] == 1 for t in batch):
        return tuple(torch.cat([t, t.roll(1, dims=-1) if t.ndim > 1 else t]) for t in batch)
    return batch


def to_compare(
    model: nn.Module, examples: Sequence[Inputs]
) -> tuple[torch.dtype, nn.Module, list[tuple[Tensor, ...]]]:
    """The arithmetic of a proof, float64 where the model runs in it, and model and inputs in it.

    Args:
        model: a copy that may be changed; its dropouts are turned off.
        examples: input batches.

    Raises:
        UserError: the model does not run on an example.
    """
    _no_dropout(model)
    for module in model.modules():
        if isinstance(module, Choice):
            module.mixed = True  # the answers of all exits are compared
    inputs = [as_inputs(x) for x in examples]
    double = _in_double(model, inputs[0])
    if double is None:
        return torch.float32, model, inputs
    return torch.float64, double, [_double(x) for x in inputs]


def _in_double(model: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module | None:
    """A copy in float64; None where the model does not run in it."""
    if any(t.device.type == "mps" for t in (*inputs, *model.parameters())):
        return None
    try:
        double = copy.deepcopy(model).double()
        _forward(double, _double(inputs), False)
        return double
    except Exception:
        try:
            _forward(model, inputs, False)
        except Exception as e:
            shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
            text = str(e).strip().split("\n")[0]
            raise UserError(
                f"{type(model).__name__} does not run on the example of shape {shapes}: {text}"
            ) from e
        return None


def _double(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


@torch.no_grad()
def _forward(model: nn.Module, inputs: tuple[Tensor, ...], training: bool) -> Any:
    model.train(training)
    with repeatable(), quiet(model), _NoDropout():
        return model(*(x.clone() for x in inputs))


def _outputs(
    module: fx.GraphModule,
    inputs: tuple[Tensor, ...],
    training: bool,
    home: _Masked | None = None,
) -> Mapping[str, Any]:
    """Node id -> its output, as far as the graph runs."""
    _no_dropout(module)
    module.train(training)
    keeper = _Keeper(module) if home is None else _StatisticsKeeper(home)
    try:
        with torch.no_grad(), repeatable(), quiet(module), _NoDropout():
            keeper.run(*(x.clone() for x in inputs))
    except Exception:
        return keeper.seen
    return keeper.seen


class _Keeper(fx.Interpreter):
    def __init__(self, home: Any):
        super().__init__(home)
        self.seen: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        self.seen[n.meta["id"]] = out.clone() if isinstance(out, Tensor) else out
        return out


class _StatisticsKeeper(_Keeper, _Statistics):
    """As `_Statistics` runs, with what each operator gave."""


class _NoDropout(TorchFunctionMode):
    """Functional dropout passes its input on."""

    _PASS = (
        F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout,
        F.feature_alpha_dropout, torch.dropout, torch.alpha_dropout, torch.feature_dropout,
        torch.feature_alpha_dropout,
    )  # fmt: skip

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._PASS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            else:
                kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


def _no_dropout(model: nn.Module) -> None:
    """Set every dropout rate to 0, in place; also inside attention and recurrent layers."""
    module: Any
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
            continue
        if isinstance(module, ByMode) and isinstance(module.values[True], float):
            module.values = {True: module.values[False], False: module.values[False]}
        rule = rule_of_module(module)
        for name in ("dropout", "drop_prob", *(("p",) if rule and rule.op == "dropout" else ())):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


@torch.no_grad()
def _fill_zero_parameters(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.is_floating_point() and p.numel() and not p.any():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float32)
            p.copy_((0.1 * noise).to(p.device, p.dtype))
