"""The one place that changes shapes: cut channels and blocks out of a model, proven first.

Taking layers apart changes no shape, but the graph, and goes the same way.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gracile.core.plan import Decompose, Exit, Factorize, Member, Remove, Replace, Skip
from gracile.errors import UserError, VerificationError, nearest
from gracile.graph import verify
from gracile.graph.capture import bare_copy, capture
from gracile.graph.decompose import decomposed, prove_decomposition
from gracile.graph.dependency import ChannelGroup, channel_groups, follow, size_of
from gracile.graph.exits import attached, prove_attached
from gracile.graph.factorize import Factors, factorized, prove_factorization
from gracile.graph.graph import Graph
from gracile.graph.labels import Labels
from gracile.graph.maps import place_maps
from gracile.graph.oprule import rule_of_module
from gracile.graph.replace import prove_replacement, replaced
from gracile.graph.reproduce import smallest
from gracile.graph.skip import leave_out, prove_skips

Inputs = Tensor | tuple[Tensor, ...]
Structural = Remove | Skip | Factorize | Replace | Decompose | Exit


@dataclass(frozen=True)
class SurgeryReport:
    """What a verified cut did.

    Attributes:
        edits: number of edits applied.
        params_before: parameters of the model before, in elements.
        params_after: and after.
        proof: how masked and sliced model were compared; None if there was nothing to cut.
    """

    edits: int
    params_before: int
    params_after: int
    proof: verify.Proof | None

    @property
    def removed(self) -> int:
        """Parameters that are gone, in elements."""
        return self.params_before - self.params_after


def remove_edits(
    groups: Sequence[ChannelGroup], gone: Mapping[str, Collection[int]], by: str
) -> list[Remove]:
    """One `remove` edit for each group that loses units.

    Two groups may have a tensor in common (a layer that reads a concatenation); each edit counts in
    that tensor as the earlier ones left it.

    Args:
        groups: of the model as it is.
        gone: group id -> its units that go.
        by: the recipe's name of the entry that decided.

    Raises:
        UserError: no such group or unit, a protected group, or nothing would be left of a tensor.
    """
    known = {g.id: g for g in groups}
    for id, units in gone.items():
        if id not in known:
            raise UserError(f"no channel group '{id}' to cut.{nearest(id, known)}")
        _check_units(known[id], units)
    left: dict[tuple[str, int], Labels] = {}
    edits = []
    for group in groups:
        units = set(gone.get(group.id, ()))
        if not units:
            continue
        gone_here = np.zeros(len(group.units), dtype=bool)
        gone_here[list(units)] = True
        members = []
        same: dict[bytes, tuple[int, ...]] = {}  # most members of a group keep the same indices
        for axis, layout in group.layout.items():
            goes = gone_here[layout] & (layout >= 0)
            if not goes.any():
                continue
            before = left.get(axis, np.arange(len(layout)))
            keep = np.flatnonzero(~goes[before])
            if not len(keep):
                raise UserError(
                    f"cutting {len(units)} unit(s) of '{group.id}' would leave nothing of "
                    f"'{axis[0]}' along dim {axis[1]}; keep at least one of its indices."
                )
            kept = same.setdefault(keep.tobytes(), tuple(keep.tolist()))
            members.append(Member.trusted(at=axis[0], dim=axis[1], of=len(before), keep=kept))
            left[axis] = before[keep]
        edits.append(Remove(by=by, group=tuple(members)))
    return edits


def apply_removes(
    model: nn.Module,
    edits: Sequence[Remove],
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Cut in place, without a proof: parameters, buffers, counts, gradients, optimizer state.

    Parameter objects stay the same (their data is replaced), so optimizers, tied names and a
    GraphModule that shares them stay valid. Gradients are dropped. All edits are checked before the
    first one is made.

    Args:
        model: changed in place; a plain module or a GraphModule.
        edits: in order; each counts in the model as the earlier ones left it.
        optimizer: its state tensors of a cut parameter's shape are cut along.

    Raises:
        UserError: the edits do not fit this model.
    """
    check_fit(model, edits)
    owners = _owners(model)
    with torch.no_grad():
        for edit in edits:
            touched: dict[nn.Module, dict[tuple[str, int], tuple[int, ...]]] = {}
            keeps: dict[tuple[int, ...], Tensor] = {}
            for member in edit.group:
                if member.keep not in keeps:
                    keeps[member.keep] = torch.tensor(member.keep)
                cut = _cut(model, member, keeps[member.keep], optimizer)
                for module, role in owners.get(cut, ()):
                    touched.setdefault(module, {})[role, member.dim] = member.keep
            for module, kept in touched.items():
                rule = rule_of_module(module)
                if rule is not None:
                    rule.resize(module, kept)


def prepared(model: nn.Module, example: Inputs, graph: Graph | None = None) -> nn.Module:
    """The model with channel maps in the place of calls that have channel counts written in them.

    A GraphModule that shares modules and parameters with the model, all names unchanged; the model
    itself where its forward has none.

    Args:
        model: not changed.
        example: input batch (a tuple for several inputs).
        graph: as captured from the model as it is now; default: captured here.
    """
    graph = graph or capture(model, example)
    found = follow(model, graph).flow.maps
    if found:
        return place_maps(graph, found)
    return graph.module if graph.how == "export" and graph.module is not None else model


def apply(
    model: nn.Module,
    edits: Sequence[Structural],
    *,
    example: Inputs,
    optimizer: torch.optim.Optimizer | None = None,
    graph: Graph | None = None,
    factors: Factors | None = None,
) -> nn.Module:
    """Cut without a proof, as for a Plan that was proven when it was made.

    Args:
        model: changed in place.
        edits: in order.
        example: an input batch.
        optimizer: see `apply_removes` and `factorized`.
        graph: see `prepared`.
        factors: the weights of layers that are factorized or replaced; None leaves them zero, to be
            loaded.

    Returns:
        What computes from now on: the model, changed in place, or a GraphModule that shares its
        modules and parameters (see `prepared`).

    Raises:
        UserError: the edits do not fit this model.
    """
    for run in _runs(edits):
        here = graph or capture(model, example)
        model = _cut_run(model, run, example, here, optimizer, factors)
        graph = None
    return model


def verified_apply(
    model: nn.Module,
    edits: Sequence[Structural],
    *,
    examples: Sequence[Inputs],
    optimizer: torch.optim.Optimizer | None = None,
    graph: Graph | None = None,
    reproduce: bool = True,
    factors: Factors | None = None,
) -> tuple[nn.Module, SurgeryReport]:
    """Cut, but only after a proof on copies that the cut model computes what the masked one does.

    Args:
        model: its tensors are changed in place if the proof holds, else left as they were. It
            keeps blocks that are left out; what is returned has them no more.
        edits: in order; nothing is changed unless all of them are proven.
        examples: input batches (a tuple each for several inputs); all are compared in eval mode,
            and together in train mode with the normalization statistics after one step.
        optimizer: see `apply_removes`.
        graph: see `prepared`.
        reproduce: look for the smallest part of a failing cut that fails too, with at most
            `reproduce.PROOFS` more proofs.
        factors: path of a layer -> its new tensors, for each `factorize` and `replace` edit.

    Returns:
        What computes from now on (see `apply`), and what was done.

    Raises:
        UserError: the edits do not fit this model, or there is no example.
        VerificationError: the models differ; names the first differing operator. Its `edits` are
            the smallest cut of this model that was seen to fail.
    """
    before = sum(p.numel() for p in model.parameters())
    if not edits:
        return model, SurgeryReport(0, before, before, None)
    if not examples:
        raise UserError("a verified cut needs at least one example input, got none.")
    graph = graph or capture(model, examples[0])
    runs, trial, here, proofs = _runs(edits), model, graph, []
    for k, run in enumerate(runs):
        proofs.append(_proven(trial, run, examples, here, reproduce, factors or {}))
        if k + 1 < len(runs):  # the next one is proven on what this one leaves
            trial = bare_copy(model) if k == 0 else trial
            trial = apply(trial, run, example=examples[0], factors=factors)
            here = capture(trial, examples[0])
    ready = apply(
        model, edits, example=examples[0], optimizer=optimizer, graph=graph, factors=factors
    )
    after = sum(p.numel() for p in ready.parameters())
    proof = max(proofs, key=lambda p: p.max_error)
    return ready, SurgeryReport(len(edits), before, after, proof)


def _runs(edits: Sequence[Structural]) -> list[list[Structural]]:
    """Edits that follow each other and are of one kind."""
    for e in edits:
        if not isinstance(e, Structural):
            raise UserError(
                "surgery makes 'remove', 'skip', 'factorize', 'replace', 'decompose' and 'exit' "
                f"edits, not '{e.kind}'."
            )
    return [list(run) for _, run in groupby(edits, key=lambda e: e.kind)]


def _proven(
    model: nn.Module,
    run: Sequence[Structural],
    examples: Sequence[Inputs],
    graph: Graph,
    reproduce: bool,
    factors: Factors,
) -> verify.Proof:
    removes = [e for e in run if isinstance(e, Remove)]
    apart = [e for e in run if isinstance(e, Decompose)]
    if apart:
        return prove_decomposition(apart, examples, graph)
    if smaller := [e for e in run if isinstance(e, Factorize)]:
        return prove_factorization(model, smaller, factors, examples)
    if others := [e for e in run if isinstance(e, Replace)]:
        return prove_replacement(model, others, factors, examples)
    if exits := [e for e in run if isinstance(e, Exit)]:
        return prove_attached(model, exits, examples)
    if not removes:
        return prove_skips(model, [e for e in run if isinstance(e, Skip)], examples, graph)
    ready = prepared(model, examples[0], graph)
    check_fit(ready, removes)

    def prove(part: Sequence[Remove]) -> verify.Proof:
        return verify.prove(bare_copy(ready), part, examples, apply_removes, graph)

    try:
        return prove(removes)
    except VerificationError as e:
        raise smallest(e, prove, channel_groups(model, graph)) if reproduce else e from None


def _cut_run(
    model: nn.Module,
    run: Sequence[Structural],
    example: Inputs,
    graph: Graph,
    optimizer: torch.optim.Optimizer | None,
    factors: Factors | None,
) -> nn.Module:
    removes = [e for e in run if isinstance(e, Remove)]
    if apart := [e for e in run if isinstance(e, Decompose)]:
        return decomposed(graph, apart, example)
    if smaller := [e for e in run if isinstance(e, Factorize)]:
        return factorized(model, smaller, factors, optimizer=optimizer)
    if others := [e for e in run if isinstance(e, Replace)]:
        return replaced(model, others, factors, optimizer=optimizer)
    if exits := [e for e in run if isinstance(e, Exit)]:
        return attached(graph, exits, optimizer=optimizer)
    if not removes:
        skips = [e for e in run if isinstance(e, Skip)]
        return leave_out(model, skips, graph, optimizer=optimizer)
    ready = prepared(model, example, graph)
    apply_removes(ready, removes, optimizer=optimizer)
    return ready


def check_fit(model: nn.Module, edits: Iterable[Remove]) -> None:
    """Refuse edits that were made for another model, before anything is touched.

    Raises:
        UserError: names the edit, the tensor and both sizes.
    """
    sizes: dict[tuple[str, int], int] = {}
    for k, edit in enumerate(edits):
        name = edit.id or f"number {k}"
        for m in edit.group:
            size = sizes.get((m.at, m.dim), size_of(model, m.at, m.dim))
            if size is None:
                addresses = [*dict(model.named_parameters()), *dict(model.named_buffers())]
                raise UserError(
                    f"edit {name}: '{m.at}' with a dim {m.dim} is not in {type(model).__name__}."
                    f"{nearest(m.at, addresses)}"
                )
            if size != m.of:
                raise UserError(
                    f"edit {name}: '{m.at}' has {size} indices along dim {m.dim}, the edit was "
                    f"made for {m.of}. Apply the plan to the model it was made for, in order."
                )
            sizes[m.at, m.dim] = len(m.keep)


def _check_units(group: ChannelGroup, units: Collection[int]) -> None:
    if units and group.protected is not None:
        raise UserError(f"channel group '{group.id}' is protected: {group.protected}.")
    wrong = [u for u in units if not 0 <= u < len(group.units)]
    if wrong:
        raise UserError(
            f"channel group '{group.id}' has units 0..{len(group.units) - 1}, got {wrong[0]}."
        )


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """id of a parameter or buffer -> the modules that own it, under which name."""
    out: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for role, owned in (*module._parameters.items(), *module._buffers.items()):
            out.setdefault(id(owned), []).append((module, role))
    return out


def _cut(model: nn.Module, m: Member, keep: Tensor, optimizer: torch.optim.Optimizer | None) -> int:
    """Slice one tensor or channel map; return the tensor's id, 0 for a map."""
    path, _, name = m.at.rpartition(".")
    home = model.get_submodule(path)
    tensor: Tensor | None = home._parameters.get(name)
    if tensor is None:
        tensor = home._buffers.get(name)
    if tensor is None:
        rule = rule_of_module(home)
        if rule is None:
            raise UserError(f"'{m.at}' is neither a tensor nor a channel map of {type(home)}.")
        rule.cut_attribute(home, name, m.dim, m.keep)
        return 0
    keep = keep.to(tensor.device)
    if optimizer is not None:
        _cut_state(optimizer, tensor, m.dim, keep)
    tensor.grad = None
    replace_data(tensor, tensor.data.index_select(m.dim, keep))
    return id(tensor)


def replace_data(tensor: Tensor, data: Tensor) -> None:
    """Give a tensor other data, of another shape, in place.

    Args:
        tensor: a parameter or buffer.
        data: of its type.
    """
    # A loss that is still referenced keeps the parameter's gradient accumulator alive, which
    # remembers the old shape and refuses the next backward. A change of type makes torch drop it.
    other = torch.float32 if data.dtype == torch.float64 else torch.float64
    if tensor.requires_grad:
        tensor.data = torch.empty(0, dtype=other, device=data.device)
    tensor.data = data


def _cut_state(optimizer: Any, parameter: Tensor, dim: int, keep: Tensor) -> None:
    for key, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            optimizer.state[parameter][key] = value.index_select(dim, keep.to(value.device))
