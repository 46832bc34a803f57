"""Undo: a finished run's Plan on the original network without some of its edits.

The idea is ours. What is exact, and what is not:

- A `bits` edit undone: the weight is float again as it was before it was rounded; exact.
- A `mask` edit undone: the values that lay under the mask; exact.
- A `remove` edit undone: what is there in the run keeps its value, what comes back has the
  original's. Exact if nothing was trained; otherwise the two were not trained together. What comes
  back is masked and rounded like the rest of its tensor, with a scale of its own per channel.
- A `decompose` edit undone: the layer is whole again; what is quantized inside goes with it.
- A `skip` edit undone: the block has the original's values, as with `remove`.
- A `factorize` edit undone: the layer is whole again, with the original's weight and bias; what was
  done to its factors (cuts, masks, grids) must go with it.
- Later edits take the same original channels (whole units) as before; this is proven as any cut is.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gracile.core.plan import Add, Bits, Factorize, Mask, Plan, Remove, Skip
from gracile.core.replan import Maps, pick, without
from gracile.errors import UserError, VerificationError
from gracile.graph import surgery
from gracile.graph.additions import structural, units_of
from gracile.graph.depth import covers
from gracile.graph.expand import merged
from gracile.graph.surgery import verified_apply
from gracile.graph.verify import Proof
from gracile.nn.chain import drawn, layer_of
from gracile.nn.schemes import chain_of
from gracile.quantize.affine import asymmetric_params, symmetric_params
from gracile.quantize.groups import in_groups
from gracile.train.finished import Finished, named_tensors, settled, value_edits


@dataclass(frozen=True)
class Undone:
    """A run without some of its edits.

    Attributes:
        model: computes it, in eval mode.
        plan: the edits that are left, numbered anew.
        tensors: what the Plan's keys name.
        dropped: the edits that were left out, as they stood.
        proof: of the new cuts; None if no cut changed.
        warnings: (code, text): where it is not exact.
    """

    model: nn.Module
    plan: Plan
    tensors: dict[str, Tensor]
    dropped: list[Any]
    proof: Proof | None
    warnings: list[tuple[str, str]]


def undo(run: Finished, steps: Sequence[str]) -> Undone:
    """Replay a run's Plan without some edits.

    Args:
        run: see `open_run`.
        steps: numbers, ids or recipe entries.

    Raises:
        UserError: no such edit, or float values that the run has lost.
        VerificationError: what is left of the cuts would change what the network computes.
    """
    drop = {k for step in steps for k in pick(run.plan, step)}
    dropped = [run.plan.edits[k] for k in sorted(drop)]
    anew = any(isinstance(e, (Remove, Add, Skip, Factorize)) for e in dropped)
    original = run.original()
    _check_apart(dropped, [e for k, e in enumerate(run.plan) if k not in drop])
    _check_factors(dropped, run.plan, drop)
    plan = without(run.plan, drop, units_of(original, run.example))
    _check_masks(dropped, plan)

    keys = _keyed(run, run.plan)
    present = {n: _present(run, n, plan, dropped) for n in run.stored if n not in keys}
    tensors = _keyed(run, plan)
    proof, grown = None, []
    if anew:
        try:
            cut, report = verified_apply(
                original,
                structural(plan),
                examples=[run.example],
                factors=_stand_ins(run, structural(plan)),
            )
        except (UserError, VerificationError) as error:
            if isinstance(error, VerificationError) and not any(e.kind == "skip" for e in dropped):
                raise
            raise VerificationError(
                f"without {', '.join(steps)} the other cuts make no valid network: {error} Leave "
                "out the later steps on the same channels as well."
            ) from error
        proof, now, wanted = report.proof, run.plan.to_original(), plan.to_original()
        for name, fresh in named_tensors(cut).items():
            if fresh.shape == present.setdefault(name, fresh).shape:
                continue
            lossy = value_edits(plan, name)
            for e in lossy:
                _check_groups(e, fresh, tensors)
                _grow_key(e, tensors, fresh, now, wanted)
            present[name] = merged(name, fresh, wanted, present[name], now)
            if lossy:
                present[name] = settled(present[name], lossy, tensors)
                grown.append(name)
    model = run.quantized(run.build(plan, present), plan, tensors)
    return Undone(model, plan, tensors, dropped, proof, _warnings(run, dropped, plan, grown))


def _present(run: Finished, name: str, plan: Plan, dropped: Sequence[Any]) -> Tensor:
    """A tensor in the run's structure, with the value edits that are left."""
    if not value_edits(dropped, name):
        return run.stored[name]
    return settled(run.floats(name), value_edits(plan, name), run.stored)


def _check_masks(dropped: Iterable[Any], plan: Plan) -> None:
    left = {e.key: e for e in plan.of_kind("mask")}
    for e in dropped:
        if e.kind == "mask" and e.key in left:
            raise UserError(
                f"edit {e.id}: the masks of '{e.by}' and '{left[e.key].by}' on '{e.at}' are stored "
                "as one, where both keep; undo both."
            )


def _check_apart(dropped: Iterable[Any], left: Sequence[Any]) -> None:
    """What happened inside a layer that comes back whole goes with it."""
    for e in dropped:
        if e.kind not in ("decompose", "factorize"):
            continue
        for other in left:
            at = _touched_in(other, e.at)
            if other.kind == "bits" and at is not None:
                raise UserError(
                    f"edit {e.id}: operators of '{e.at}' are quantized, '{at}' the first; undo all "
                    f"of '{other.by}'."
                )
            if e.kind == "factorize" and at is not None and at not in _whole(e):
                raise UserError(
                    f"edit {e.id}: the factors of '{e.at}' were changed by {other.id} "
                    f"({other.kind}), '{at}' the first; undo all of '{other.by}' as well."
                )


def _check_factors(dropped: Iterable[Any], plan: Plan, drop: Collection[int]) -> None:
    """Factors stay only as they are: what a cut took from them has no values to come back with."""
    for f in (e for k, e in enumerate(plan) if e.kind == "factorize" and k not in drop):
        for e in dropped:
            at = _touched_in(e, f.at) if isinstance(e, (Remove, Add, Skip)) else None
            if at is not None:
                raise UserError(
                    f"edit {e.id}: what it took of '{at}' has no values to come back with, as "
                    f"'{f.at}' was factorized by '{f.by}'; undo {f.id} as well."
                )


def _touched_in(edit: Any, home: str) -> str | None:
    """The first address in a layer that an edit is about; None if it is about others."""
    if isinstance(edit, Skip):
        inside = (g for g in edit.gone if g.startswith(f"{home}."))
        return home if covers(edit.gone, home) else next(inside, None)
    if isinstance(edit, (Remove, Add)):
        addresses = [m.at for m in edit.group]
    else:
        addresses = [edit.at] if hasattr(edit, "at") else []
    return next((a for a in addresses if a.startswith(f"{home}.")), None)


def _whole(e: Factorize) -> tuple[str, str]:
    """What the layer itself has, cut before it was factorized."""
    return f"{e.at}.weight", f"{e.at}.bias"


def _stand_ins(run: Finished, edits: Sequence[Any]) -> dict[str, tuple[Tensor, ...]]:
    """Random factors of the right shapes: where they sit is proven, not what they are."""
    rng, model, out = torch.Generator().manual_seed(0), run.original(), {}
    last = max((k for k, e in enumerate(edits) if isinstance(e, Factorize)), default=-1)
    for e in edits[: last + 1]:
        if isinstance(e, Factorize):
            chain = chain_of(e.scheme, layer_of(model.get_submodule(e.at)), e.ranks)
            out[e.at] = drawn(chain, rng)
        model = surgery.apply(model, [e], example=run.example)
    return out


def _check_groups(e: Mask | Bits, fresh: Tensor, tensors: dict[str, Tensor]) -> None:
    if isinstance(e, Bits) and e.group is not None:
        had = tensors[f"{e.key}.scale"].shape[1] * e.group
        if fresh.shape[1:].numel() != had:
            raise UserError(
                f"edit {e.id}: '{e.at}' has a scale for each {e.group} of {had} inputs, and other "
                f"inputs come back between them; undo '{e.by}' as well."
            )


def _keyed(run: Finished, plan: Plan) -> dict[str, Tensor]:
    """What the keys of a Plan name, of the tensors a run stored."""
    names = [e.key for e in plan.of_kind("mask")]
    parts = ("scale", "zero_point", "threshold")
    names += [f"{e.key}.{part}" for e in plan.of_kind("bits") for part in parts]
    return {name: run.stored[name] for name in names if name in run.stored}


def _grow_key(
    e: Mask | Bits, tensors: dict[str, Tensor], fresh: Tensor, now: Maps, wanted: Maps
) -> None:
    """Let a mask, or the scales of a grid, cover the restored places: kept, with a range of own."""
    if isinstance(e, Mask):
        everything = torch.ones(fresh.shape, dtype=torch.bool)
        tensors[e.key] = merged(e.at, everything, wanted, tensors[e.key], now)
    elif e.axis is not None:
        if e.group is None:
            rows = fresh.transpose(0, e.axis).flatten(1)
        else:
            rows = in_groups(fresh, e.group)
        low, high = rows.amin(1), rows.amax(1)
        new = (
            symmetric_params(low, high, e.bits, e.signed, e.narrow)
            if e.symmetric
            else asymmetric_params(low, high, e.bits, e.signed)
        )
        axis = e.at, e.axis
        here, target = (
            {(e.at, 0): maps[axis]} if axis in maps else Maps() for maps in (now, wanted)
        )
        for part, values in zip(("scale", "zero_point"), new, strict=True):
            key = f"{e.key}.{part}"
            values = values if e.group is None else values.reshape(len(fresh), -1)
            tensors[key] = merged(e.at, values, target, tensors[key], here)


def _warnings(
    run: Finished, dropped: Sequence[Any], plan: Plan, grown: Collection[str]
) -> list[tuple[str, str]]:
    out = []
    if any(isinstance(e, (Remove, Skip, Factorize)) for e in dropped):
        if run.trained and run.pretrained:
            out.append(
                ("mixed", "what comes back has its original values, which were not trained with "
                 "the rest; train a little before judging it.")
            )  # fmt: skip
        elif run.trained:
            out.append(
                ("random", "the run began from random weights: what comes back has its initial "
                 "values and is worth nothing before it is trained.")
            )  # fmt: skip
        if any(e.role in ("input", "output") for e in plan.of_kind("bits")):
            out.append(
                ("ranges", "the ranges of the activations were seen on the smaller network and "
                 "may clip what comes back; quantize again.")
            )  # fmt: skip
    after = [id for id, e in run.at.job.recipe.methods.items() if e.verb == "recover"]
    if dropped and after:
        out.append(
            ("recovered", f"'{after[0]}' fitted weights, biases or statistics to the network with "
             "these steps; what it changed stays as it is.")
        )  # fmt: skip
    if grown:
        out.append(
            ("rounded", f"what comes back in {len(grown)} tensor(s), '{next(iter(grown))}' the "
             "first, is masked and rounded like the rest of them.")
        )  # fmt: skip
    return out
