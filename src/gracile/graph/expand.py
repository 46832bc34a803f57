"""The way back: channels that were cut are added again, with the original network's values.

The idea is ours: where a network stands is told by the original indices that it still has, so the
original cut to the wanted indices says what the larger network looks like (counts, channel maps,
values), and only the indices that are there now keep their present values.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gracile.core.plan import Add, Axis, Plan, Remove
from gracile.core.replan import Maps, changes, widths
from gracile.errors import UserError, VerificationError
from gracile.graph import verify
from gracile.graph.additions import additions, cuts
from gracile.graph.capture import bare_copy
from gracile.graph.dependency import size_of
from gracile.graph.oprule import rule_of_module
from gracile.graph.surgery import Inputs, apply_removes, prepared, replace_data


@dataclass(frozen=True)
class Expansion:
    """What `expand` did.

    Attributes:
        edits: the `add` edits, in the order they were made.
        plan: the Plan with them at its end.
        tensors: `<key>.<at>.<dim>`: the slices at the added places, in the expanded model.
        proof: how the larger model, masked at the added places, and the smaller were compared.
        params_before: parameters of the model before, in elements.
        params_after: and after.
    """

    edits: list[Any]
    plan: Plan
    tensors: dict[str, Tensor]
    proof: verify.Proof
    params_before: int
    params_after: int


def expand(
    model: nn.Module,
    plan: Plan,
    what: str | Sequence[str] | float,
    originals: nn.Module,
    *,
    examples: Sequence[Inputs],
    optimizer: torch.optim.Optimizer | None = None,
    by: str = "expand",
) -> Expansion:
    """Add channels back that a Plan removed; weights at the added indices are the original's.

    What is there keeps its values (of a fine-tuned network the fine-tuned ones), so the result is
    the original bit for bit only if nothing was trained and everything comes back.

    Args:
        model: what the Plan led to, changed in place; parameter objects stay.
        plan: from the original to `model`.
        what: ids (or recipe entries) of `remove` edits to take back; or a share in (0, 1] of the
            removed units of every group: those come back first whose filters have the largest
            sum of absolute values in the original.
        originals: the original network with its weights; not changed.
        examples: input batches for the proof: the larger model, masked, equals the smaller.
        optimizer: its state tensors of a parameter's shape grow along; new indices get zeros.
        by: stands in the edits.

    Raises:
        UserError: no such edit, nothing to add, or the Plan does not fit the models.
        VerificationError: the larger model computes something else; `model` is as it was.
    """
    if not examples:
        raise UserError("expanding is proven on at least one example input, got none.")
    originals = prepared(originals, examples[0])
    edits = additions(plan, what, originals, examples[0], by=by)
    if not edits:
        raise UserError("there is nothing to add back: these channels are there.")
    before = _numel(model)
    larger = bare_copy(model)
    apply_adds(larger, plan, edits, originals)
    try:
        proof = verify.prove(larger, inverse(edits), examples, apply_removes)
    except UserError as e:
        raise VerificationError(
            f"adding {what} back makes no valid network: {e} The model was left as it was; add the "
            "later edits on the same channels back as well."
        ) from e
    apply_adds(model, plan, edits, originals, optimizer=optimizer)
    longer = plan.extended(edits)
    added = _added(model, edits, longer.to_original())
    return Expansion(longer.edits[len(plan) :], longer, added, proof, before, _numel(model))


def apply_adds(
    model: nn.Module,
    plan: Plan,
    edits: Sequence[Add],
    originals: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Add in place, without a proof: parameters, buffers, counts, channel maps, optimizer state.

    Args:
        model: where `plan` led to; a plain module or a GraphModule.
        plan: tells which original indices every tensor has.
        edits: in order, after the Plan's.
        originals: the original network (`surgery.prepared`, where the Plan cut channel maps); its
            values fill the added places.
        optimizer: see `expand`.

    Raises:
        UserError: the Plan or the edits do not fit the model or the original.
    """
    now, longer = plan.to_original(), plan.extended(edits)
    wanted = longer.to_original()
    _check_sizes(model, now, "the model")
    _check_sizes(originals, widths(changes(longer)), "the original")
    reference = bare_copy(originals)
    apply_removes(reference, cuts(longer))
    touched = {(m.at, m.dim) for edit in edits for m in edit.group}
    tensors = _tensors(reference)
    with torch.no_grad():
        for at in dict.fromkeys(at for at, _ in touched):
            if at in tensors:
                _grow(model, at, tensors[at].detach(), now, wanted, optimizer)
        for path in dict.fromkeys(path for at, _ in touched for path in _owners(model, at)):
            _copy_counts(model.get_submodule(path), path, reference)


def inverse(edits: Sequence[Add]) -> list[Remove]:
    """The cuts that take additions back, in their order."""
    return [Remove(by=edit.by, group=edit.group) for edit in reversed(edits)]


def merged(
    at: str, fresh: Tensor, wanted: Maps, present: Tensor, now: Mapping[Axis, Sequence[int]]
) -> Tensor:
    """A tensor of `fresh`'s shape: present values at the indices that both have, else fresh ones.

    Args:
        at: the tensor's address.
        fresh: values at the wanted indices.
        wanted: axis -> original index of every index of `fresh`; an axis not in it is whole.
        present: values at the present indices.
        now: the same for `present`.
    """
    to, of = [], []
    for dim in range(fresh.ndim):
        there = now.get((at, dim), range(present.shape[dim]))
        target = wanted.get((at, dim), range(fresh.shape[dim]))
        place = {i: k for k, i in enumerate(there)}
        common = [(k, place[i]) for k, i in enumerate(target) if i in place]
        shape = [-1 if d == dim else 1 for d in range(fresh.ndim)]
        to.append(torch.tensor([k for k, _ in common]).reshape(shape))
        of.append(torch.tensor([k for _, k in common]).reshape(shape))
    out = fresh.to(device=present.device, dtype=present.dtype, copy=True)
    if fresh.ndim == 0:
        return out.copy_(present)
    out[tuple(to)] = present[tuple(of)]
    return out


def _grow(
    model: nn.Module,
    at: str,
    fresh: Tensor,
    now: Maps,
    wanted: Maps,
    optimizer: torch.optim.Optimizer | None,
) -> None:
    tensor = _tensors(model)[at]
    if optimizer is not None:
        state = optimizer.state.get(tensor, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == tensor.shape:
                zeros = torch.zeros(fresh.shape, dtype=value.dtype, device=value.device)
                state[key] = merged(at, zeros, wanted, value, now)
    data = merged(at, fresh, wanted, tensor.detach(), now)
    tensor.grad = None
    replace_data(tensor, data)


def _owners(model: nn.Module, at: str) -> list[str]:
    """Paths of the modules that hold a tensor and count its channels, or of the channel map."""
    tensor = _tensors(model).get(at)
    if tensor is None:
        return [at.rpartition(".")[0]]
    return [
        path
        for path, module in model.named_modules()
        if rule_of_module(module) is not None
        and any(t is tensor for t in (*module._parameters.values(), *module._buffers.values()))
    ]


def _copy_counts(module: nn.Module, path: str, reference: nn.Module) -> None:
    """Whole numbers and channel maps of a module, as they are in the original cut to this width."""
    try:
        twin = vars(reference.get_submodule(path))
    except AttributeError:
        raise UserError(
            f"the original has no module '{path}' to take channel counts from; expand the network "
            "the plan was made for."
        ) from None
    for name, value in vars(module).items():
        number = isinstance(value, (int, list, tuple)) and not isinstance(value, bool)
        if number and not name.startswith("_") and name in twin:
            setattr(module, name, copy.copy(twin[name]))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _check_sizes(model: nn.Module, maps: Maps, what: str) -> None:
    for (at, dim), there in maps.items():
        size = size_of(model, at, dim)
        if size != len(there):
            raise UserError(
                f"{what} has {'no' if size is None else size} indices of '{at}' along dim {dim}, "
                f"the plan says {len(there)}; give the plan that led to this model."
            )


def _added(model: nn.Module, edits: Sequence[Add], maps: Maps) -> dict[str, Tensor]:
    tensors, out = _tensors(model), {}
    for edit in edits:
        for m, origin in zip(edit.group, edit.origin, strict=True):
            if m.at in tensors:
                tensor = tensors[m.at].detach()
                places = torch.tensor([maps[m.at, m.dim].index(i) for i in origin])
                slices = tensor.index_select(m.dim, places.to(tensor.device))
                out[f"{edit.key}.{m.at}.{m.dim}"] = slices.cpu()
    return out


def _numel(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
