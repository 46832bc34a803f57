"""Quantization and binarization of NNCF as native entries."""

from collections.abc import Iterator
from typing import Any

from gracile.recipe.document import Keys
from gracile.recipe.nncf.grammar import (
    Binarization,
    Grid,
    Precision,
    Quantization,
    Range,
    Staged,
)
from gracile.recipe.nncf.scopes import call_of
from gracile.recipe.nncf.work import Work

Entry = dict[str, Any]

RATIO = 1.5  # NNCF's default of hawq: bit complexity with 8 bits / with those found
ROUNDS = 200  # its default of iter_number
FLOAT_BITS = 16  # of weights that wait for their epoch while activations are on a grid

# Set to this, a key means something that gracile does not have.
_LEFT_OUT = {
    ("quantize_inputs",): (False, "is decided by the runtime's profile here"),
    ("quantize_outputs",): (True, "is decided by the runtime's profile here"),
    ("overflow_fix",): (
        "first_layer_only",
        "is done for all layers or none: all, where the processor has no VNNI",
    ),
    ("compression_lr_multiplier",): (
        ...,
        "has nothing to multiply: `quantize: qat` does not train scales",
    ),
    ("quantizable_subgraph_patterns",): (..., "are the runtime's profile here"),
    ("scope_overrides", "activations"): (..., "is left out: activations are quantized alike"),
    ("weights", "signed"): (False, "is not there: weights are signed"),
    ("weights", "logarithm_scale"): (True, "has no effect: `quantize: qat` does not train scales"),
    ("activations", "signed"): (..., "follows from the operator here"),
    ("activations", "per_channel"): (True, "is not there: activations have one scale"),
    ("activations", "logarithm_scale"): (
        True,
        "has no effect: `quantize: qat` does not train scales",
    ),
    ("activations", "unified_scale_ops"): (..., "follow from the runtime's profile here"),
    ("activations", "ignored_scopes"): (..., "are left out: name operators in ignored_scopes"),
    ("activations", "target_scopes"): (..., "are left out: name operators in target_scopes"),
}


def quantization(algorithm: Quantization, keys: Keys, work: Work) -> None:
    """`quantize: qat`, without training `quantize: ptq`; further entries where scopes differ."""
    q, precision = algorithm, algorithm.initializer.precision
    where = (*keys, "initializer", "precision")
    if precision is not None and precision.type == "autoq":
        work.refuse(
            (*where, "type"),
            "is autoq, a search of bit widths by reinforcement learning that this version has not. "
            "Write hawq, or manual with bitwidth_per_scope.",
        )
    _tell(q, keys, work)
    method = "qat" if work.epochs else "ptq"
    entry: dict[str, Any] = {
        "quantize": method,
        "weights": _weights(q, keys, work),
        "bits": q.activations.bits or 8,
        **_grid(q.weights),
        **_precision(q, where, work),
        **_half_range(q),
        "symmetric": _even(q.activations.mode, q.preset == "performance"),
        **_observers(q.initializer.range, (*keys, "initializer", "range"), method, work),
    }
    if precision is not None and precision.type == "manual":
        entry["overrides"] = _by_hand(precision, (*where, "bitwidth_per_scope"), q, work)
    if entry.get("precision") is not None:
        del entry["weight_bits"]
    owner = _add(entry, q.params if work.epochs else None, work)
    for paths, override in _overrides(q, keys, work):
        at = {"when": work.methods[owner]["when"], "after": owner}
        more = {"quantize": method, "weights": paths, "activations": False, **override, **at}
        work.add(f"{q.algorithm}-{override['weight_bits']}bit", more)
    if q.params is not None:
        staged_training(q.params, (*keys, "params"), work, owner)


def binarization(algorithm: Binarization, keys: Keys, work: Work) -> None:
    """`quantize: binary`, weights of convolutions from one epoch on, activations from another."""
    p = algorithm.params
    owner = work.add(
        algorithm.algorithm,
        {
            "quantize": "binary",
            "weights": work.weights(algorithm, keys, kinds=("_ConvNd",)),
            "form": algorithm.mode,
            "activations_from": f"{p.activations_quant_start_epoch}ep",
            "when": {"start": f"{p.weights_quant_start_epoch}ep"},
        },
    )
    staged_training(p, (*keys, "params"), work, owner)


def epochs_of(params: Staged | None) -> int:
    """The shortest training in which all of it has begun; 0 if it needs none."""
    if params is None:
        return 0
    return 1 + max(params.activations_quant_start_epoch, params.weights_quant_start_epoch)


def staged_training(p: Staged, keys: Keys, work: Work, owner: str) -> None:
    """The optimizer that NNCF's sample makes of these parameters: Adam (binarization, staged)."""
    work.train.setdefault(
        "optimizer", {"class": "Adam", "lr": p.base_lr, "weight_decay": p.base_wd}
    )
    if p.batch_multiplier > 1:
        work.train["accumulate"] = p.batch_multiplier
    if p.lr_poly_drop_start_epoch == 0:
        length = p.lr_poly_drop_duration_epochs
        work.train.setdefault("lr", {"class": "PolynomialLR", "total_iters": length})
    elif p.lr_poly_drop_start_epoch is not None:
        drop = {"start": p.lr_poly_drop_start_epoch, "total_iters": p.lr_poly_drop_duration_epochs}
        work.train.setdefault("lr", {"class": "PolynomialDropLR", **drop})
    ends = p.disable_wd_start_epoch
    if ends is not None and ends < work.epochs:
        work.methods[owner]["decay_until"] = f"{ends}ep"
    elif ends is not None:
        work.tell((*keys, "disable_wd_start_epoch"), "is not before the end: left out.")


# ------------------------------------------------------------------ parts of an entry


def _weights(q: Quantization, keys: Keys, work: Work) -> list[str] | None:
    ignored = [*q.ignored_scopes, *q.weights.ignored_scopes]
    target = q.target_scopes if q.weights.target_scopes is None else q.weights.target_scopes
    if not ignored and target is None:
        return None
    scoped = q.model_copy(update={"ignored_scopes": ignored, "target_scopes": target})
    return work.weights(scoped, keys)


def _half_range(q: Quantization) -> dict[str, Any]:
    """What the file says of it; NNCF's own default is left to the processor at hand."""
    if q.overflow_fix == "disable" or q.disable_saturation_fix:
        return {"half_range": False}
    said = "overflow_fix" in q.model_fields_set and q.overflow_fix == "enable"
    return {"half_range": True} if said else {}


def _even(mode: str | None, default: bool) -> bool:
    return default if mode is None else mode == "symmetric"


def _grid(grid: Grid, default: Grid | None = None) -> dict[str, Any]:
    """The options of a weight's grid; what is not set is that of `default`."""
    default = default or grid
    return {
        "weight_bits": grid.bits or default.bits or 8,
        "weight_symmetric": _even(grid.mode or default.mode, True),
        "per_channel": default.per_channel if grid.per_channel is None else grid.per_channel,
    }


def _add(entry: dict[str, Any], params: Staged | None, work: Work) -> str:
    """Add the entry, in two stages if weights and activations begin apart; who owns the weights."""
    if not work.epochs:
        return work.add("quantization", {**entry, "when": {"at": "end"}})
    weights = params.weights_quant_start_epoch if params else 0
    both = params.activations_quant_start_epoch if params else 0
    if "precision" in entry:  # weights and activations are chosen together
        weights = both = max(weights, both)
    kept = ("quantize", "weights", "half_range", *_grid(Grid()))
    on_weights = {k: entry[k] for k in kept if k in entry}
    own, others = _parted(entry.get("overrides"))
    later = {
        **on_weights,
        "overrides": own,
        "activations": False,
        "when": {"start": f"{weights}ep"},
    }
    if weights < both:
        first = work.add("quantization-weights", later)
        return work.add("quantization", {**entry, "when": {"start": f"{both}ep"}, "after": first})
    wait = {"weight_bits": FLOAT_BITS, "overrides": others} if weights > both else {}
    first = work.add("quantization", {**entry, **wait, "when": {"start": f"{both}ep"}})
    return work.add("quantization-weights", {**later, "after": first}) if wait else first


def _parted(overrides: list[Entry] | None) -> tuple[list[Entry] | None, list[Entry] | None]:
    """Overrides of weights, and of activations."""
    weights = [o for o in overrides or () if "weights" in o]
    others = [o for o in overrides or () if "weights" not in o]
    return weights or None, others or None


def _overrides(q: Quantization, keys: Keys, work: Work) -> Iterator[tuple[list[str], Any]]:
    """(module paths, options of their weights) where these differ from the rest."""
    for scope, override in q.scope_overrides.weights.items():
        at = (*keys, "scope_overrides", "weights", scope)
        paths = work.paths([scope], at, q.validate_scopes)
        if paths:
            yield paths, _grid(override, q.weights)
        if override.initializer is not None:
            work.tell((*at, "initializer"), "is left out: ranges are found alike everywhere.")


def _by_hand(p: Precision, keys: Keys, q: Quantization, work: Work) -> list[Entry] | None:
    """`bitwidth_per_scope` as overrides: of weights, and of what an operator gives."""
    out: list[Entry] = []
    for bits, scope in p.bitwidth_per_scope:
        wanted = q.weights.bits or 8
        if not scope.endswith("|OUTPUT") and "|INPUT" not in scope:
            paths = work.paths([scope], keys, q.validate_scopes) if bits != wanted else []
            if paths:
                out.append({"weights": paths, "weight_bits": bits})
        elif bits != (q.activations.bits or 8):
            path = call_of(scope) if scope.endswith("|OUTPUT") else None
            if path is None:
                work.tell(
                    keys,
                    f"gives '{scope}' {bits} bits: left out, as its place here cannot be told. "
                    "Write overrides: [{activations: ..., bits: ...}].",
                )
            else:
                out.append({"activations": path, "bits": bits})
    return out or None


def _precision(q: Quantization, keys: Keys, work: Work) -> Entry:
    """`hawq` as the option `precision`: pairs of equal bits within a share of bit complexity."""
    p = q.initializer.precision
    if p is None or p.type != "hawq":
        return {}
    wrong = [b for b in p.bits if not 2 <= b <= 16]
    if wrong or not p.bits:
        work.refuse((*keys, "bits"), f"must be in [2, 16], got {p.bits}. Write [4, 8].")
    if p.bitwidth_per_scope:
        work.tell((*keys, "bitwidth_per_scope"), "counts with type manual alone.")
    if p.traces_per_layer_path is not None:
        work.tell((*keys, "traces_per_layer_path"), "is left out: traces are computed.")
    work.tell(
        keys,
        "becomes an integer program over all assignments, where NNCF tries those in which a weight "
        "of smaller trace never has more bits; the runtime's profile says which bits have kernels.",
    )
    ratio = RATIO if p.compression_ratio is None else p.compression_ratio
    if ratio <= 0:
        work.refuse((*keys, "compression_ratio"), f"must be above 0, got {ratio}. Write 1.5.")
    starts = q.params
    if starts and starts.activations_quant_start_epoch != starts.weights_quant_start_epoch:
        work.tell(keys, "chooses for weights and activations, which begin at the later epoch.")
    work.samples.append(p.num_data_points)
    return {
        "precision": {
            "bits": [[b, b] for b in dict.fromkeys(p.bits)],
            "limit": {"mac_bits": 1 / ratio},
            "sensitivity": "hessian",
            "samples": p.num_data_points,
            "rounds": p.iter_number or ROUNDS,
            "tolerance": p.tolerance,
        }
    }


def _observers(ranges: list[Range], keys: Keys, method: str, work: Work) -> dict[str, Any]:
    for r in ranges:
        if r.ignored_scopes or r.target_scopes:
            work.tell(keys, "has scopes of their own for some ranges: left out.")
    plain = [r for r in ranges if not (r.ignored_scopes or r.target_scopes)] or [Range()]
    work.samples += [r.num_init_samples for r in plain]
    out = {}
    for group, option in (("activations", "observer"), ("weights", "weight_observer")):
        mine = [r for r in plain if r.target_quantizer_group in (None, group)] or [Range()]
        out[option] = _observer(mine[-1], group, method, keys, work)
    return out


def _observer(r: Range, group: str, method: str, keys: Keys, work: Work) -> Any:
    """A native observer; None for the method's own."""
    if "percentile" in r.type:
        low, high = 100 - r.params.min_percentile, r.params.max_percentile
        if abs(low - high) > 1e-9:
            work.tell(keys, "has other percentiles below than above: the wider one counts here.")
        of_samples = r.type == "mean_percentile" and group == "activations"
        return {"name": "mean_percentile" if of_samples else "percentile", "q": max(low, high)}
    if r.type == "threesigma":
        return "three_sigma"
    if group == "weights" or method == "qat":
        return None
    return "min_max" if r.type == "min_max" else "mean_extremes"


def _tell(q: Quantization, keys: Keys, work: Work) -> None:
    if work.epochs:
        work.tell(
            keys,
            "trains ranges in NNCF; here those of activations follow the batches. "
            "`quantize: learned` trains them.",
        )
    for path, (different, text) in _LEFT_OUT.items():
        holder: Any = q
        for key in path[:-1]:
            holder = getattr(holder, key)
        value = getattr(holder, path[-1])
        if path[-1] in holder.model_fields_set and (value == different or different is ...):
            work.tell((*keys, *path), f"{text}.")
