"""Sparsity of NNCF as native entries: magnitude, regularization-based (RB), constant."""

import math
from typing import Any

from gracile.recipe.document import Keys
from gracile.recipe.nncf.grammar import (
    ConstSparsity,
    MagnitudeSparsity,
    MovementSparsity,
    RbSparsity,
    SparsityParams,
)
from gracile.recipe.nncf.work import Work

STEP, EPS = 0.05, 0.03  # of the adaptive schedule; no key sets them


def magnitude(algorithm: MagnitudeSparsity, keys: Keys, work: Work) -> None:
    """`prune: gradual`, and a second entry that ranks anew until the masks freeze."""
    p, at = algorithm.params, (*keys, "params")
    if p.schedule == "adaptive":
        work.refuse(
            (*at, "schedule"), "is for rb_sparsity only: it follows a learned level. Take another."
        )
    entry = {
        "prune": "gradual",
        "weights": work.weights(algorithm, keys),
        "criterion": "normed" if p.weight_importance == "normed_abs" else "l1",
        "scope": _scope(p),
        "scores_from": "dense",
    }
    last, level = _level(p, algorithm.sparsity_init, "polynomial", at, work)
    every = _every(p, "polynomial")
    when, end = _when(p, last, every)
    freeze = min(p.sparsity_freeze_epoch, work.epochs)
    id = algorithm.algorithm
    if work.adaptive or freeze <= last + (every == "1ep"):
        work.add(id, {**entry, "sparsity": level, "when": when})
        return
    if "at" in when:  # the level is reached at once; only the ranking goes on
        when = {"start": "0ep", "stop": f"{freeze}ep", "every": every}
        work.add(id, {**entry, "sparsity": _final(level), "when": when})
        return
    work.add(id, {**entry, "sparsity": level, "lifetime": "span", "when": when})
    hold = {"start": end, "stop": f"{freeze}ep", "every": every}
    work.add(f"{id}-hold", {**entry, "sparsity": _final(level), "when": hold})


def regularized(algorithm: RbSparsity, keys: Keys, work: Work) -> None:
    """`prune: gates`, with the loss of NNCF's code and the script's optimizer for the gates."""
    p, at = algorithm.params, (*keys, "params")
    entry: dict[str, Any] = {
        "prune": "gates",
        "weights": work.weights(algorithm, keys),
        "loss": "released",
        "scope": _scope(p),
        **own_optimizer(algorithm, "gate", keys, work),
    }
    if p.schedule == "adaptive":
        entry |= {
            "sparsity": p.sparsity_target,
            "schedule": {
                "name": "adaptive",
                "initial": algorithm.sparsity_init,
                "step": STEP,
                "patience": p.patience,
                "tolerance": EPS,
            },
            "when": {"start": "0ep", "every": "1ep"},
        }
        if p.sparsity_freeze_epoch < work.epochs:
            entry["when"]["stop"] = entry["freeze"] = f"{p.sparsity_freeze_epoch}ep"
    else:
        last, level = _level(p, algorithm.sparsity_init, "exponential", at, work)
        when, _ = _when(p, last, _every(p, "exponential"))
        entry |= {"sparsity": level, "when": when}
        if last < p.sparsity_freeze_epoch < work.epochs:
            entry["freeze"] = f"{p.sparsity_freeze_epoch}ep"
    work.add(algorithm.algorithm, entry)


def constant(algorithm: ConstSparsity, keys: Keys, work: Work) -> None:
    """`prune: keep_zeros`."""
    weights = work.weights(algorithm, keys)
    work.add(algorithm.algorithm, {"prune": "keep_zeros", "weights": weights})


def epochs_of(algorithm: MagnitudeSparsity | RbSparsity) -> int:
    """The shortest training in which the schedule comes to its end."""
    p = algorithm.params
    if p.schedule == "multistep":
        end = max(p.multistep_steps, default=0) + 1
    elif p.schedule == "adaptive":
        end = math.ceil((p.sparsity_target - algorithm.sparsity_init) / STEP) * p.patience + 1
    else:
        end = p.sparsity_target_epoch + 1
    given = "sparsity_freeze_epoch" in p.model_fields_set
    return max(end, p.sparsity_freeze_epoch + 1 if given else 0)


def _every(p: SparsityParams, default: str) -> str:
    """How often the level is set; only one schedule knows steps."""
    polynomial = (p.schedule or default) == "polynomial"
    return "1it" if p.update_per_optimizer_step and polynomial else "1ep"


def _scope(p: SparsityParams) -> str:
    return "global" if p.sparsity_level_setting_mode == "global" else "layer"


def _level(
    p: SparsityParams, initial: float, default: str, at: Keys, work: Work
) -> tuple[int, Any]:
    """(the epoch that reaches the last level, the native level over time)."""
    ramp: Any = p.schedule or default
    last, final = p.sparsity_target_epoch, p.sparsity_target
    if ramp == "multistep":
        steps, levels = _stairs(p, at, work)
        last, initial, final = steps[-1], levels[0], levels[-1]
        shares = [s / last for s in steps] if last else []
        ramp = {"name": "multistep", "steps": shares, "levels": levels[1:-1]}
    elif ramp == "polynomial":
        ramp = {"name": "polynomial", "power": p.power} | ({} if p.concave else {"concave": False})
    if last >= work.epochs:
        work.tell(
            at,
            f"reaches its last level at epoch {last}, after the {work.epochs} epochs of training: "
            "NNCF stops on the way, here the last epoch reaches it.",
        )
    if p.sparsity_freeze_epoch <= last and "sparsity_freeze_epoch" in p.model_fields_set:
        work.tell(
            (*at, "sparsity_freeze_epoch"),
            f"is not after epoch {last}, which reaches the last level: NNCF stops on the way, here "
            "the level is reached.",
        )
    return last, {"ramp": ramp, "initial": initial, "final": final} if last else final


def _stairs(p: SparsityParams, at: Keys, work: Work) -> tuple[list[int], list[float]]:
    """Steps and levels of a multistep schedule; what a step at epoch 0 replaces is left out."""
    steps, levels = sorted(p.multistep_steps), p.multistep_sparsity_levels
    where = (*at, "multistep_sparsity_levels")
    if len(levels) != len(steps) + 1:
        work.refuse(
            where,
            f"must have one level more than there are steps, {len(steps) + 1}, got {len(levels)}. "
            "The first one is the level of the start.",
        )
    if levels not in (sorted(levels), sorted(levels, reverse=True)):
        work.refuse(where, f"must rise (or fall), got {levels}. Order them.")
    skip = steps.count(0)
    return steps[skip:] or [0], levels[skip:]


def _final(level: Any) -> float:
    return float(level["final"] if isinstance(level, dict) else level)


def _when(p: SparsityParams, last: int, every: str) -> tuple[dict[str, str], str]:
    """(the firings from the start to the last level, the time after them)."""
    if last == 0:
        return {"at": "0ep"}, "0ep"
    end = f"{last + 1}ep"
    if every == "1it":
        end = f"{last * p.steps_per_epoch + 1}it" if p.steps_per_epoch else f"{last}ep"
    return {"start": "0ep", "stop": end, "every": every}, end


def own_optimizer(
    algorithm: RbSparsity | MovementSparsity, what: str, keys: Keys, work: Work
) -> dict[str, Any]:
    """NNCF trains gates and scores with the script's optimizer; gracile gives them their own.

    Args:
        algorithm: for its learning rate multiplier.
        what: `gate` or `score`: begin of the option's names, and the word for messages.
        keys: of the algorithm.
        work: the conversion.
    """
    times = algorithm.compression_lr_multiplier
    given = work.train.get("optimizer")
    out: dict[str, Any] = {}
    if given is not None:
        kind = "sgd" if given["class"] == "SGD" else "adam"
        out = {f"{what}_optimizer": kind, f"{what}_lr": given["lr"]}
        if "lr" in work.train:
            work.tell(keys, f"trains its {what}s at a constant rate here; train.lr is not theirs.")
        if given.get("momentum"):
            work.tell(keys, f"trains its {what}s without momentum here.")
    if times is not None and out.get(f"{what}_optimizer") == "sgd":
        out[f"{what}_lr"] *= times
    elif times is not None:
        where = (*keys, "compression_lr_multiplier")
        work.tell(where, "multiplies gradients, which Adam divides by their size: left out.")
    return out
