"""The proof of a cut: the sliced model computes what the masked model computes.

"Masked" means: everything that belongs to a removed unit is zero, in the weights that make it, in
the weights that read it, and in normalization scales and shifts. Statistics are those of the kept
channels, dropout is off.
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
from gracile.graph.channels import Channels, Flow
from gracile.graph.dependency import follow
from gracile.graph.trace import CannotTrace, trace

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
) -> Proof:
    """Compare the masked with the sliced model on all examples.

    Parameters that are zero as a whole (a zero-initialized last BatchNorm) are filled first, in
    both: they would hide everything that lies before them.

    Args:
        model: a copy that may be changed.
        edits: the cut.
        examples: input batches.
        cut: makes the cut in place.

    Raises:
        UserError: the model does not run on an example.
        VerificationError: the models differ, or the model makes no finite numbers.
    """
    _fill_zero_parameters(model)
    _no_dropout(model)
    inputs = [as_inputs(x) for x in examples]
    dtype = torch.float64 if _runs_in_double(model, inputs[0]) else torch.float32
    if dtype is torch.float64:
        model, inputs = model.double(), [_double(x) for x in inputs]
    masked, sliced = copy.deepcopy(model), model
    mask_removed(masked, edits)
    cut(sliced, edits)
    try:
        worst, checks = _compare(masked, sliced, edits, inputs, dtype)
    except _Different as e:
        where = first_difference(masked, sliced, edits, e.inputs, e.training, TOLERANCE[dtype])
        cuts = ", ".join(dict.fromkeys(f"'{edit.group[0].at}'" for edit in edits))
        raise VerificationError(
            f"cutting {cuts} changed what the model computes in "
            f"{'train' if e.training else 'eval'} mode: {where} ({e}). "
            "The model was left as it was; protect these channels."
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
) -> str:
    """Say which operator is the first whose kept channels differ between the two models."""
    unknown = "the operator could not be found"
    try:
        graph = capture(masked, inputs)
        if graph.module is None:
            return f"{unknown} because the graph was captured by '{graph.how}'"
        found, twin = follow(masked, graph), trace(sliced)
    except (GracileError, CannotTrace) as e:
        return f"{unknown} ({e})"
    left, right = (_outputs(m, inputs, training) for m in (graph.module, twin))
    gone = _gone_units(found.flow, edits)
    for node in graph:
        name = f"the first differing operator is '{node.id}' ({node.op})"
        if node.id not in right:
            return name + ", which does not run any more"
        a, b, value = left[node.id], right[node.id], found.values[node.id]
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            continue
        if isinstance(value, Channels):
            keep = [i for i, x in enumerate(value.atoms) if found.flow.find(x) not in gone]
            a = a.index_select(value.dim, torch.tensor(keep, device=a.device, dtype=torch.long))
        elif node.op == "param":
            continue
        if a.shape != b.shape:
            return f"{name}, whose shape is {tuple(b.shape)} instead of {tuple(a.shape)}"
        if not difference(a, b) <= tolerance:
            return name
    return "no single operator differs"


def _gone_units(flow: Flow, edits: Sequence[Remove]) -> set[int]:
    """Units that the edits remove; of one with writers, what happens to these decides."""
    gone, has_writer = {True: set[int](), False: set[int]()}, set[int]()
    for axis in flow.writes:
        has_writer.update(flow.find(a) for a in flow.axes[axis])
    for axis, indices in removed_indices(edits).items():
        atoms = flow.axes.get(axis, ())
        gone[axis in flow.writes].update(flow.find(atoms[i]) for i in indices if atoms)
    return gone[True] | (gone[False] - has_writer)


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
    batch = _training_batch(masked, inputs)
    if batch is None:
        return worst, ("eval",)
    worst = max(worst, _same_outputs(masked, sliced, batch, True, tolerance))
    worst = max(worst, _same_buffers(masked, sliced, edits, batch, tolerance))
    return worst, ("eval", "train")


def _same_outputs(
    masked: nn.Module,
    sliced: nn.Module,
    inputs: tuple[Tensor, ...],
    training: bool,
    tolerance: float,
) -> float:
    expected = pytree.tree_leaves(_forward(masked, inputs, training))
    if not all(_some_finite(v) for v in expected):
        raise VerificationError(
            "the cut cannot be verified: the model's output has no finite number for an example. "
            "Check the weights (has the training diverged?) and the example."
        )
    try:
        got = pytree.tree_leaves(_forward(sliced, inputs, training))
    except Exception as e:
        text = str(e).strip().split("\n")[0]
        raise _Different(f"{type(e).__name__}: {text}", inputs, training) from e
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


def _same_buffers(
    masked: nn.Module,
    sliced: nn.Module,
    edits: Sequence[Remove],
    inputs: tuple[Tensor, ...],
    tolerance: float,
) -> float:
    gone, worst = removed_indices(edits), 0.0
    after = dict(sliced.named_buffers())
    for name, a in masked.named_buffers():
        for (at, dim), lost in gone.items():
            if at == name:
                keep = [i for i in range(a.shape[dim]) if i not in set(lost)]
                a = a.index_select(dim, torch.tensor(keep, device=a.device))
        b = after[name]
        error = difference(a, b) if a.shape == b.shape else float("inf")
        if not error <= tolerance:
            raise _Different(f"buffer '{name}' differs after one step", inputs, True)
        worst = max(worst, error)
    return worst


def _some_finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.numel() == 0 or bool(value.isfinite().any())


def _training_batch(
    model: nn.Module, inputs: Sequence[tuple[Tensor, ...]]
) -> tuple[Tensor, ...] | None:
    """A batch on which the model runs in train mode: all examples together, at least two samples.

    A batch of one is doubled with its own shifted copy, because BatchNorm after global pooling
    refuses a single value per channel. None if it runs on nothing.
    """
    for batch in (_together(inputs), inputs[0]):
        try:
            _forward(copy.deepcopy(model), batch, True)
        except Exception:
            continue
        return batch
    return None


def _together(inputs: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    alike = [x for x in inputs if [t.shape[1:] for t in x] == [t.shape[1:] for t in inputs[0]]]
    batch = tuple(torch.cat(parts) for parts in zip(*alike, strict=True))
    if any(t.shape[0] == 1 for t in batch):
        return tuple(torch.cat([t, t.roll(1, dims=-1) if t.ndim > 1 else t]) for t in batch)
    return batch


def _runs_in_double(model: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    if any(t.device.type == "mps" for t in (*inputs, *model.parameters())):
        return False
    try:
        _forward(copy.deepcopy(model).double(), _double(inputs), False)
    except Exception:
        try:
            _forward(model, inputs, False)
        except Exception as e:
            shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
            text = str(e).strip().split("\n")[0]
            raise UserError(
                f"{type(model).__name__} does not run on the example of shape {shapes}: {text}"
            ) from e
        return False
    return True


def _double(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


@torch.no_grad()
def _forward(model: nn.Module, inputs: tuple[Tensor, ...], training: bool) -> Any:
    model.train(training)
    with repeatable(), quiet(model), _NoDropout():
        return model(*(x.clone() for x in inputs))


def _outputs(
    module: fx.GraphModule, inputs: tuple[Tensor, ...], training: bool
) -> Mapping[str, Any]:
    """Node id -> its output, as far as the graph runs."""
    _no_dropout(module)
    module.train(training)
    keeper = _Keeper(module)
    try:
        with torch.no_grad(), repeatable(), quiet(module), _NoDropout():
            keeper.run(*(x.clone() for x in inputs))
    except Exception:
        return keeper.seen
    return keeper.seen


class _Keeper(fx.Interpreter):
    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.seen: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        self.seen[n.meta["id"]] = out.clone() if isinstance(out, Tensor) else out
        return out


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
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0


@torch.no_grad()
def _fill_zero_parameters(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.is_floating_point() and p.numel() and not p.any():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float32)
            p.copy_((0.1 * noise).to(p.device, p.dtype))
