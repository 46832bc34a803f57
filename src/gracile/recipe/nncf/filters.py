"""Filter pruning of NNCF as native entries."""

from typing import Any

from gracile.recipe.document import Keys
from gracile.recipe.nncf.grammar import FilterPruning
from gracile.recipe.nncf.scopes import Layer
from gracile.recipe.nncf.work import Work

CRITERIA = {"L1": "l1", "L2": "l2", "geometric_median": "geometric_median"}
REACHED = 0.75  # of the target, at an eighth of the way: exponential_with_bias
EVOLUTION = {"population": 64, "samples": 16, "mutate": 0.1, "sigma": 1.0, "ft_lr": 0.01}
JUDGED_BY = 512  # images of the calibration data that a candidate's loss is of


def filters(algorithm: FilterPruning, keys: Keys, work: Work) -> None:
    """`prune: gradual` with filters and `prune: thin`; for a target in FLOPs `prune: structure`.

    NNCF masks filters and leaves the cut to the runtime; here `thin` cuts after training. A learned
    ranking is `prune: legr`, whatever the target.
    """
    p, at = algorithm.params, (*keys, "params")
    learned = p.interlayer_ranking_type == "learned_ranking"
    if not p.prune_batch_norms:
        work.tell((*at, "prune_batch_norms"), "is always true here: a filter goes with its norm.")
    if "zero_grad" in p.model_fields_set and not p.zero_grad:
        work.tell((*at, "zero_grad"), "is always true here: masked filters stand still.")
    level, when = _level(algorithm, at, work)
    kept = _kept(algorithm, keys, work)
    scope = "global" if p.all_weights else "layer"
    if learned or p.pruning_flops_target is not None:
        if algorithm.target_scopes is not None:
            where = (*keys, "target_scopes")
            other = "learned_ranking" if learned else "pruning_flops_target"
            work.refuse(where, f"cannot go with {other}. Name the rest as ignored.")
        entry: dict[str, Any] = (
            _learned_ranking(algorithm, at, work)
            if learned
            else {"prune": "structure", "scope": scope}
        )
        entry |= {"target": "channels" if p.pruning_flops_target is None else "macs"}
        entry |= {"ratio": level, "criterion": _criterion(algorithm), "ignore": kept or None}
        work.add(algorithm.algorithm, {**entry, "when": when})
        return
    entry = {
        "prune": "gradual",
        "weights": work.weights(algorithm, keys, ("_ConvNd",), lambda path, _: path in kept),
        "criterion": _criterion(algorithm),
        "granularity": "filter",
        "scope": scope,
        "scores_from": "dense",
        "sparsity": level,
    }
    if p.all_weights:
        _rank_layers_together(entry, at, work)
    work.add(algorithm.algorithm, {**entry, "when": when})
    work.add(f"{algorithm.algorithm}-thin", {"prune": "thin", "when": {"at": "end"}})


def epochs_of(algorithm: FilterPruning) -> int:
    """The shortest training in which the schedule comes to its end."""
    p = algorithm.params
    return p.num_init_steps + (1 if p.schedule == "baseline" else p.pruning_steps)


def _learned_ranking(algorithm: FilterPruning, at: Keys, work: Work) -> dict[str, Any]:
    """`prune: legr` with NNCF's numbers; what NNCF does not make of them is told."""
    p, search = algorithm.params, algorithm.params.legr_params
    where = (*at, "interlayer_ranking_type")
    if p.pruning_flops_target is None or not p.all_weights:
        work.tell(
            where,
            "is learned_ranking: NNCF uses what it has learned only with all_weights: true and "
            "pruning_flops_target; here it always counts, over all layers.",
        )
    if p.load_ranking_coeffs_path is not None:
        work.tell(
            (*at, "load_ranking_coeffs_path"),
            "names layers as NNCF does and is not read: the ranking is learned anew. To give one, "
            "write 'coefficients' into the recipe.",
        )
    if p.save_ranking_coeffs_path is not None:
        work.tell((*at, "save_ranking_coeffs_path"), "is left out: the ledger has what is learned.")
    if "random_seed" in search.model_fields_set:
        work.tell((*at, "legr_params", "random_seed"), "is the recipe's 'seed' here.")
    work.tell(
        where,
        f"tries {search.generations} candidates, each after {search.train_steps} mini-batches of "
        "training on the calibration data: lower generations and ft_batches where that takes too "
        "long.",
    )
    work.samples.append(JUDGED_BY)
    return {
        "prune": "legr",
        "start": "none",
        "generations": search.generations,
        "learn_at": search.max_pruning,
        "ft_batches": search.train_steps,
        **EVOLUTION,
    }


def _rank_layers_together(entry: dict[str, Any], at: Keys, work: Work) -> None:
    """NNCF divides each layer's weights by their norm first; so does criterion normed, in L1."""
    if entry["criterion"] == "geometric_median":
        work.tell((*at, "all_weights"), "ranks layers by distances that are not normalized here.")
        return
    if entry["criterion"] == "l2":
        work.tell((*at, "all_weights"), "ranks layers by L1 norms of normalized filters here.")
    entry["criterion"] = "normed"


def _criterion(algorithm: FilterPruning) -> str:
    return CRITERIA[algorithm.params.weight_importance or algorithm.params.filter_importance]


def _level(algorithm: FilterPruning, at: Keys, work: Work) -> tuple[Any, dict[str, str]]:
    p, start = algorithm.params, algorithm.params.num_init_steps
    final = p.pruning_target if p.pruning_flops_target is None else p.pruning_flops_target
    if p.schedule == "baseline" or p.pruning_steps == 1:
        return final, {"at": f"{start}ep"}
    initial, stop = algorithm.pruning_init, start + p.pruning_steps
    if stop > work.epochs:
        work.tell(
            at,
            f"reaches its target at epoch {stop - 1}, after the {work.epochs} epochs of training: "
            "NNCF stops on the way, here the last epoch reaches it.",
        )
    ramp: Any = p.schedule
    if ramp == "exponential_with_bias" and initial > 0 and final > initial:
        ramp = {"name": ramp, "reach": (REACHED * final - initial) / (final - initial)}
    when = {"start": f"{start}ep", "stop": f"{stop}ep", "every": "1ep"}
    return {"ramp": ramp, "initial": initial, "final": final}, when


def _kept(algorithm: FilterPruning, keys: Keys, work: Work) -> list[str]:
    """Paths of convolutions that are not to be pruned."""
    p, at = algorithm.params, (*keys, "params")
    where = (*keys, "ignored_scopes")
    out = work.paths(algorithm.ignored_scopes, where, algorithm.validate_scopes)
    if work.layers is None:
        for key in ("prune_first_conv", "prune_downsample_convs"):
            if not getattr(p, key):
                work.tell(
                    (*at, key),
                    "is false, and which layers that means needs the model. Pass --model MODEL, or "
                    "name them in ignored_scopes.",
                )
        return out
    found = {path: x for path, x in work.layers.items() if x.kind == "_ConvNd"}
    if not p.prune_first_conv:
        out += list(found)[:1]  # in the order of registration
    if not p.prune_downsample_convs:
        out += [path for path, layer in found.items() if _shrinks(layer)]
    return [path for path in found if path in out]


def _shrinks(layer: Layer) -> bool:
    return any(s > 1 for s in layer.strides)
