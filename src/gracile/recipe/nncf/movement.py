"""Movement sparsity of NNCF (experimental, 2.4 to 2.19) as native entries."""

import math
from typing import Any

from gracile.recipe.document import Keys
from gracile.recipe.nncf.grammar import MovementSparsity, Structure
from gracile.recipe.nncf.sparsity import own_optimizer
from gracile.recipe.nncf.work import Work

BEGIN = 0.001  # share of the weights that the automatic first threshold hides
AXES = ("row", "column")


def movement(algorithm: MovementSparsity, keys: Keys, work: Work) -> None:
    """`prune: movement` with a threshold; with structured masking `prune: thin` at the end."""
    p, at = algorithm.params, (*keys, "params")
    start, end = f"{p.warmup_start_epoch:g}ep", f"{p.warmup_end_epoch:g}ep"
    ramp: Any = "cubic" if p.power == 3 else {"name": "polynomial", "power": p.power}
    first, last = p.init_importance_threshold, p.final_importance_threshold
    if first is not None and first >= last:
        work.tell(
            (*at, "init_importance_threshold"),
            f"is not below final_importance_threshold ({last:g}): less and less is masked.",
        )
    factor = p.importance_regularization_factor
    entry: dict[str, Any] = {
        "prune": "movement",
        "weights": work.weights(algorithm, keys, ("Linear",)),
        "parts": _parts(algorithm, keys, work) or None,
        "threshold": {"ramp": ramp, "initial": first or 0.0, "final": last},
        "initial_sparsity": BEGIN if first is None else None,
        "strength": {"ramp": ramp, "final": factor} if factor else None,
        "loss": "nncf",
        **own_optimizer(algorithm, "score", keys, work),
        "when": {"start": start, "stop": end, "every": "1it"},
    }
    if "score_lr" not in entry:
        work.tell(
            keys,
            "trains its scores with the script's optimizer, which the file does not name: here "
            "score_lr is 0.01 (Adam). Set score_lr and score_optimizer.",
        )
    work.tell(keys, "scores biases as well in NNCF; here a bias goes only with its whole unit.")
    freezes = p.warmup_end_epoch < work.epochs
    structured = freezes and p.enable_structured_masking
    if freezes:
        entry |= {"freeze": end, "structured": structured or None}
    else:
        work.tell(
            (*at, "warmup_end_epoch"),
            f"is not before the end of training, {work.epochs} epochs: masks stand still only "
            "then, and whole heads and units are not looked for.",
        )
    work.add(algorithm.algorithm, entry)
    if structured:
        work.add(f"{algorithm.algorithm}-thin", {"prune": "thin", "when": {"at": "end"}})


def epochs_of(algorithm: MovementSparsity) -> int:
    """The shortest training with an epoch after the warm-up."""
    return math.ceil(algorithm.params.warmup_end_epoch) + 1


def _parts(algorithm: MovementSparsity, keys: Keys, work: Work) -> list[dict[str, Any]]:
    """The structures that are not `fine`, each with its layers."""
    able = (
        None if work.layers is None else {p for p, x in work.layers.items() if x.kind == "Linear"}
    )
    validate = algorithm.validate_scopes
    ignored = work.paths(algorithm.ignored_scopes, (*keys, "ignored_scopes"), validate)
    targets = algorithm.target_scopes
    if targets is not None:
        chosen = set(work.paths(targets, (*keys, "target_scopes"), validate))
        able = chosen if able is None else able & chosen
    out: list[dict[str, Any]] = []
    taken: set[str] = set()
    for i, structure in enumerate(algorithm.sparse_structure_by_scopes):
        where = (*keys, "sparse_structure_by_scopes", i, "target_scopes")
        found = work.paths(structure.target_scopes, where, validate)
        found = [p for p in found if p not in ignored and (able is None or p in able)]
        twice = [p for p in found if p in taken]
        if twice:
            work.refuse(where, f"means '{twice[0]}', which has another structure already.")
        taken |= set(found)
        if not found:
            work.tell(where, "means no linear layer that is to be sparse; it is left out.")
        elif structure.mode != "fine":
            out.append({"weights": found, "granularity": _granularity(structure)})
    return out


def _granularity(structure: Structure) -> Any:
    if structure.axis is not None:
        return AXES[structure.axis]
    rows, columns = structure.sparse_factors or (1, 1)
    return {"name": "block", "filters": rows, "channels": columns}
