"""Pruners of Distiller, each with one of its policies, as entries of a recipe."""

from collections.abc import Callable, Mapping
from typing import Any

from gracile.recipe.distiller.grammar import BY_FILTER
from gracile.recipe.distiller.names import by_value, listed
from gracile.recipe.distiller.read import Policy, Schedule
from gracile.recipe.distiller.timing import Entry, masking, pruning_times, rising_level

GRANULARITIES = {  # group types where structures are told by a threshold or a penalty
    "2D": "kernel", "Rows": "row", "Cols": "column", "3D": "filter", "Filters": "filter",
    "Channels": "channel", "4D": "layer",
}  # fmt: skip
RANKED = {"3D": "filter", "Filters": "filter", "Channels": "channel", "Rows": "column"}
CRITERIA: dict[str, Any] = {
    "L1Ranked": "l1", "L2Ranked": "l2", "ActivationAPoZ": "apoz",
    "ActivationMean": "mean_activation", "GradientRanked": "taylor", "RandomRanked": "random",
    "FMReconstruction": "l1",
}  # fmt: skip
AS_THERE: dict[str, Any] = {  # under compat: strict
    "ActivationMean": {"name": "mean_activation", "highest_first": True},
    "GradientRanked": "signed_taylor",
}
FIXED = {
    "ActivationMean": "prunes the filters that fire least; Distiller pruned those that fire most.",
    "GradientRanked": "ranks by the size of gradient * weight; Distiller's score kept its sign.",
}


def convert(s: Schedule, p: Policy) -> list[Entry]:
    """The entries of one policy of a pruner.

    Raises:
        RecipeError: a combination of arguments that recipes cannot tell.
    """
    cls = p.component.cls
    if "levels" in p.args and cls != "SparsityLevelParameterPruner":
        s.refuse((*p.keys, "pruner", "args", "levels"), f"has no meaning for {cls}. Remove it.")
    if p.args.get("fold_batchnorm"):
        s.warn(
            "approximated",
            (*p.keys, "pruner", "args", "fold_batchnorm"),
            "is left out: filters are ranked without the scale of their BatchNorm.",
        )
    return _CLASSES[cls](s, p)


def _entry(
    s: Schedule,
    p: Policy,
    method: str,
    weights: list[str],
    options: Mapping[str, Any],
    *,
    spans: bool = False,
    masked_by_default: str = "frozen",
) -> Entry:
    masked, lifetime = masking(s, p)
    more = {} if masked == masked_by_default else {"masked": masked}
    more |= {} if lifetime == "run" else {"lifetime": lifetime}
    spans = spans or masked != "frozen" or lifetime == "span"
    when = pruning_times(s, p, spans=spans)
    return {"prune": method, "weights": _short(weights), **options, **more, "when": when}


def _short(names: list[str]) -> str | list[str]:
    return names[0] if len(names) == 1 else names


# ------------------------------------------------------------------ thresholds


def _magnitude(s: Schedule, p: Policy) -> list[Entry]:
    thresholds = p.component.args["thresholds"]
    if "*" not in thresholds:
        keys = (*p.component.keys, "thresholds")
        s.refuse(keys, "needs '*', the threshold of all other parameters.")
    return [_threshold(s, p, names, t, {}) for t, names in by_value(thresholds)]


def _sensitivity(s: Schedule, p: Policy) -> list[Entry]:
    found = by_value(p.component.args["sensitivities"])
    return [_threshold(s, p, names, t, {"relative_to": "std"}) for t, names in found]


def _structures(s: Schedule, p: Policy) -> list[Entry]:
    regimes, criteria = p.component.args["reg_regims"], p.component.args["threshold_criteria"]
    out = []
    for (t, group), names in by_value({n: tuple(v) for n, v in regimes.items()}):
        how = {"granularity": GRANULARITIES[group], "reduce": criteria.lower()}
        out.append(_threshold(s, p, names, t, how))
    return out


def _threshold(
    s: Schedule, p: Policy, names: list[str], threshold: float, options: Mapping[str, Any]
) -> Entry:
    if threshold == 0:  # what is not above 0 is what is 0
        return _entry(s, p, "keep_zeros", names, {})
    return _entry(s, p, "threshold", names, {"threshold": float(threshold), **options})


def _splicing(s: Schedule, p: Policy) -> list[Entry]:
    args, growth = p.component.args, float(p.component.args.get("sensitivity_multiplier", 0))
    low, high = float(args["low_thresh_mult"]), float(args["hi_thresh_mult"])
    if high < low:
        keys = (*p.component.keys, "hi_thresh_mult")
        s.refuse(keys, f"must not be below low_thresh_mult ({low:g}), got {high:g}.")
    more = {"low_mult": low, "high_mult": high, **({"growth": growth} if growth else {})}
    return [
        _entry(s, p, "splicing", names, {"sensitivity": float(value), **more},
               spans=growth > 0, masked_by_default="trained")
        for value, names in by_value(args["sensitivities"])
    ]  # fmt: skip


def _baidu(s: Schedule, p: Policy) -> list[Entry]:
    args, policy = p.component.args, (*p.keys, "pruner", "args")
    if p.every is None:
        s.refuse((*p.keys, "epochs"), "must be a range for BaiduRNNPruner: its slopes need an end.")
    if p.args.get("mini_batch_pruning_frequency"):
        keys = (*policy, "mini_batch_pruning_frequency")
        s.refuse(keys, "is not told for BaiduRNNPruner, which counts epochs. Remove it.")
    if args["ramp_epoch_offset"] > p.stop - p.start:
        s.refuse(
            (*p.component.keys, "ramp_epoch_offset"),
            f"must lie within the policy's {p.stop - p.start} epochs, got "
            f"{args['ramp_epoch_offset']}.",
        )
    options = {
        "q": float(args["q"]),
        "ramp_at": f"{args['ramp_epoch_offset']}ep",
        "ramp_slope": float(args["ramp_slope_mult"]),
    }
    return [_entry(s, p, "rnn", listed(args["weights"]), options, spans=True)]


# ------------------------------------------------------------------ levels


def _levels(s: Schedule, p: Policy) -> list[Entry]:
    levels = p.args.get("levels", p.component.args["levels"])
    return [
        _entry(s, p, "gradual", names, {"sparsity": float(level)})
        for level, names in by_value(levels)
        if level > 0
    ]


def _gradual(s: Schedule, p: Policy) -> list[Entry]:
    names = listed(p.component.args["weights"])
    return [_entry(s, p, "gradual", names, {"sparsity": rising_level(s, p)})]


def _ranked(s: Schedule, p: Policy) -> list[Entry]:
    args, cls = p.component.args, p.component.cls
    kind = next(k for k in CRITERIA if cls.startswith(k))
    criteria = CRITERIA | AS_THERE if s.strict else CRITERIA
    if kind in FIXED and not s.strict:
        s.warn("fixed", p.component.keys, FIXED[kind])
    options = {"sparsity": _level(s, p), "criterion": criteria[kind]}
    options |= _structure(s, p, leader=True)
    noise = args.get("noise", args.get("ranking_noise", 0))
    if noise and args["group_type"] == "Blocks":
        s.warn("ignored", (*p.component.keys, "noise"), "does not count for blocks.")
    elif noise:
        options["noise"] = float(noise)
    if args.get("group_size", 1) > 1:
        options["multiple_of"] = args["group_size"]
    return [_entry(s, p, "gradual", listed(args["weights"]), options)]


def _reconstruction(s: Schedule, p: Policy) -> list[Entry]:
    entries = _ranked(s, p)
    fit = {"recover": "reconstruct", "weights": entries[0]["weights"], "residual": False}
    return [*entries, {**fit, "when": entries[0]["when"]}]


def _level(s: Schedule, p: Policy) -> Any:
    args = p.component.args
    return float(args["desired_sparsity"]) if "desired_sparsity" in args else rising_level(s, p)


def _structure(s: Schedule, p: Policy, *, leader: bool) -> Entry:
    """`granularity`, and `rank_by` for a leader."""
    args, keys = p.component.args, p.component.keys
    group, shape = args["group_type"], args.get("kwargs")
    if (group == "Blocks") != (shape is not None):
        s.refuse(keys, "needs both of group_type: Blocks and kwargs: {block_shape: ...}.")
    out: Entry = {"granularity": RANKED.get(group)}
    if shape is not None:
        filters, channels, *_ = shape["block_shape"]
        out = {"granularity": {"name": "block", "filters": filters, "channels": channels}}
    if args.get("group_dependency"):
        at = (*keys, "group_dependency")
        if not leader or out["granularity"] not in ("filter", "channel"):
            s.refuse(at, "has no counterpart here: each tensor has its own. Remove it.")
        first = listed(args["weights"])[0]
        s.warn(
            "leader",
            at,
            f"leads what is tied to '{first}' in the network; other layers follow the first of "
            "those they are tied to.",
        )
        out["rank_by"] = "listed"
    return out


# ------------------------------------------------------------------ at random


def _drop(s: Schedule, p: Policy) -> list[Entry]:
    args = p.component.args
    if "sparsity_range" in args:
        low, high = (float(v) for v in args["sparsity_range"])
        if low > high:
            keys = (*p.component.keys, "sparsity_range")
            s.refuse(keys, f"must be [lowest, highest], got [{low:g}, {high:g}]. Swap them.")
        options: Entry = {"range": [low, high], "choose": "l1"}
    else:
        options = {"sparsity": _level(s, p)}
    options |= _structure(s, p, leader=False)
    if "sparsity_range" in args:
        options["rescale"] = False
    masked, lifetime = masking(s, p)
    if masked == "reset" or lifetime == "run":
        s.warn(
            "approximated",
            p.keys,
            "zeroes filters for good in Distiller; here they come back with their weights.",
        )
    options |= {"masked": "trained"} if masked != "frozen" else {}
    options |= {} if lifetime == "batch" else {"lifetime": "span"}
    when = pruning_times(s, p, spans=True)
    return [{"prune": "drop", "weights": _short(listed(args["weights"])), **options, "when": when}]


def _by_filter(name: str) -> Callable[[Schedule, Policy], list[Entry]]:
    return _drop if name.startswith("Bernoulli") else _ranked


_CLASSES: dict[str, Callable[[Schedule, Policy], list[Entry]]] = {
    "MagnitudeParameterPruner": _magnitude,
    "SparsityLevelParameterPruner": _levels,
    "SensitivityPruner": _sensitivity,
    "SplicingPruner": _splicing,
    "StructureParameterPruner": _structures,
    "AutomatedGradualPruner": _gradual,
    "BaiduRNNPruner": _baidu,
    "RandomLevelStructureParameterPruner": _drop,
    "FMReconstructionChannelPruner": _reconstruction,
    **{
        f"{n}RankedStructureParameterPruner{a}": _ranked for n in ("L1", "L2") for a in ("", "_AGP")
    },
    **{f"{name}{a}": _by_filter(name) for name in BY_FILTER for a in ("", "_AGP")},
}
