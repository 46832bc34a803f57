"""Quantizers of Distiller as `quantize` entries.

Where quantizers stand is decided by the profile of the target runtime, not by the types of
modules. Overrides choose which weights are quantized, and with how many bits; those of activations
are told as warnings, because Distiller's stand behind modules and ours where the profile says.
"""

import re
from collections.abc import Mapping
from typing import Any

from gracile import registry
from gracile.recipe.distiller.names import plain_name
from gracile.recipe.distiller.read import Component, Policy, Schedule
from gracile.recipe.distiller.timing import Entry
from gracile.recipe.document import Keys

METHODS = {
    "PostTrainLinearQuantizer": "ptq",
    "QuantAwareTrainRangeLinearQuantizer": "qat",
    "NCFQuantAwareTrainQuantizer": "qat",
    "DorefaQuantizer": "dorefa",
    "WRPNQuantizer": "wrpn",
    "PACTQuantizer": "pact",
}
FLOAT = 32  # bits from which on Distiller's grid is no grid
_EXACT = re.compile(r"[\w.-]+")
_UNTOLD = {  # value that changes nothing -> what is lost otherwise
    "bits_accum": (32, "accumulators have 32 bits in the runtimes."),
    "scale_approx_mult_bits": (None, "scales are the runtime's own."),
    "quantize_inputs": (True, "the profile decides about the model's input."),
    "num_bits_inputs": (None, "the model's input has the bits of activations."),
}


def convert(s: Schedule, c: Component, p: Policy | None) -> list[Entry]:
    """The entries of a quantizer; p is None where no policy uses it.

    Raises:
        RecipeError: arguments that recipes cannot tell.
    """
    if c.args.get("fp16") or c.args.get("fpq_module") is not None:
        key = "fp16" if c.args.get("fp16") else "fpq_module"
        s.refuse((*c.keys, key), "has no counterpart: layers stay in float32, or are integer.")
    for key, (plain, lost) in _UNTOLD.items():
        if c.args.get(key, plain) != plain:
            s.warn("ignored", (*c.keys, key), f"does not count: {lost}")
    if c.args.get("bits_bias") not in (None, FLOAT):
        s.warn("ignored", (*c.keys, "bits_bias"), "does not count: biases are 32-bit integers.")
    method = METHODS[c.cls]
    if f"quantize/{method}" not in registry.names("method"):
        s.warn("no-method", c.keys, f"becomes 'quantize: {method}', unknown to this version.")
    if method == "ptq":
        if p is not None:
            s.warn("fixed", p.keys, "quantizes after training, whatever the epochs are.")
        return _entries(s, c, {**_ranges(s, c), "when": {"at": "end"}})
    assert p is not None
    if p.start > 0:
        s.warn("fixed", p.keys, "quantizes from the start, as Distiller's constructor did.")
    if p.stop < s.epochs:
        s.warn("approximated", p.keys, "quantizes to the end of training.")
    decay = c.args.get("ema_decay", 0.999)
    observer = {"observer": {"name": "moving_average", "momentum": float(decay)}}
    return _entries(s, c, {**(observer if method == "qat" else {}), "when": {"start": "0ep"}})


def _entries(s: Schedule, c: Component, more: Entry) -> list[Entry]:
    """The entry; weights of other widths, and those left in float, are its overrides."""
    trained = c.cls != "PostTrainLinearQuantizer"
    default = FLOAT if trained else 8
    act = _bits(s, c, (*c.keys, "bits_activations"), c.args.get("bits_activations", default))
    name = "bits_weights" if trained else "bits_parameters"
    weight = _bits(s, c, (*c.keys, name), c.args.get(name, default))
    widths, act = _widths(s, c, act, weight)
    first = next((b for b in widths if b is not None), None)
    if weight is None and first is None:
        s.refuse(c.keys, "quantizes no weights, which recipes cannot tell. Give bits of weights.")
    entry: Entry = {"quantize": METHODS[c.cls]}
    if weight is None:  # only what overrides name
        weight = first
        named = [n for bits, found in widths.items() if bits is not None for n in found]
        entry["weights"] = [_joined(named)]
        widths.pop(None, None)
    if act is None:
        entry |= {"bits": weight, "activations": False}
    else:
        entry |= {"bits": act, **({"weight_bits": weight} if weight != act else {})}
    overrides = [
        {
            "weights": _joined(found),
            **({"bits": "float"} if bits is None else {"weight_bits": bits}),
        }
        for bits, found in widths.items()
        if bits != weight
    ]
    if overrides:
        entry["overrides"] = overrides
    return [entry | _grid(c, strict=s.strict) | more]


def _bits(s: Schedule, c: Component, keys: Keys, bits: int | None) -> int | None:
    """Bits of a grid, None for none."""
    if bits is None or bits >= FLOAT:
        return None
    low = 1 if METHODS[c.cls] in ("dorefa", "pact") else 2  # their weights may have two values
    if not low <= bits <= 16:
        s.refuse(keys, f"must be in [{low}, 16], or {FLOAT} for none, got {bits}.")
    return bits


def _widths(
    s: Schedule, c: Component, act: int | None, weight: int | None
) -> tuple[dict[int | None, list[str]], int | None]:
    """Bits of weights that overrides give -> their patterns; and the bits of activations.

    None is float. The first pattern that fits counts, exact names before all, so no two of them
    fit one name; what only speaks of activations is passed over.
    """
    overrides: Mapping[str, Mapping[str, Any]] = c.args.get("overrides") or {}
    base = (*c.keys, "overrides")
    chosen: dict[int | None, list[str]] = {}  # bits -> patterns
    for name in sorted(overrides, key=lambda n: not _EXACT.fullmatch(n)):
        given, keys = overrides[name], (*base, name)
        try:
            re.compile(name)
        except re.error as e:
            s.refuse(keys, f"is no regular expression: {e}. Correct it.")
        rest = [k for k in given if k not in ("bits_weights", "bits_activations")]
        acts = given.get("bits_activations", act)
        if rest or ("bits_weights" not in given and acts != act) or acts not in (act, None):
            what = ", ".join(rest) or "activations"
            s.warn(
                "approximated",
                keys,
                f"speaks of {what}: where quantizers stand is decided by the runtime's profile; "
                "for bits of one of these write overrides: [{activations: ..., bits: ...}].",
            )
        if act is None and acts is not None:
            act = _bits(s, c, (*keys, "bits_activations"), acts)
        if "bits_weights" in given:
            bits = _bits(s, c, (*keys, "bits_weights"), given["bits_weights"])
            before = [n for b, found in chosen.items() if b != bits for n in found]
            chosen.setdefault(bits, []).append(_pattern(name, before))
    return chosen, act


def _pattern(name: str, before: list[str]) -> str:
    """The regular expression of an override; what fits one of those before it has its own."""
    if _EXACT.fullmatch(name):
        return re.escape(plain_name(name))
    return rf"(?!(?:{'|'.join(before)})\.weight$)(?:{name})" if before else name


def _joined(patterns: list[str]) -> str:
    return rf"re:(?:{'|'.join(patterns)})\.weight"


def _grid(c: Component, *, strict: bool) -> Entry:
    if METHODS[c.cls] not in ("ptq", "qat"):
        return _own(c)
    mode = c.args.get("mode", "SYMMETRIC")
    parts = mode if isinstance(mode, dict) else dict.fromkeys(("activations", "weights"), mode)
    even = {k: v.upper().startswith("SYMMETRIC") for k, v in parts.items()}
    if strict and METHODS[c.cls] == "qat":  # there any mode of training is asymmetric unsigned
        even = dict.fromkeys(even, False)
    return {
        "symmetric": even["activations"],
        "weight_symmetric": even["weights"],
        "per_channel": c.args.get("per_channel_wts", False),
    }


def _own(c: Component) -> Entry:
    """What only one method has."""
    if c.cls != "PACTQuantizer":
        return {}
    decay = c.args.get("act_clip_decay")
    clip = {"clip_init": float(c.args.get("act_clip_init_val", 8.0))}
    return clip if decay is None else {**clip, "clip_decay": float(decay)}


def _ranges(s: Schedule, c: Component) -> Entry:
    """How ranges are found: the observers of the clipping mode, a statistics file."""
    observer = _observer(s, c)
    entry: Entry = {"observer": observer}
    if c.args.get("also_clip_weights") and observer not in ("min_max", "mean_extremes"):
        entry["weight_observer"] = observer
    stats = c.args.get("model_activation_stats")
    if stats is not None:
        entry["ranges"] = stats
        s.warn(
            "beside-recipe",
            (*c.keys, "model_activation_stats"),
            "is looked for beside the recipe; Distiller looked in the folder it was started in.",
        )
    return entry


def _observer(s: Schedule, c: Component) -> str | dict[str, Any]:
    match c.args.get("clip_acts", "NONE").upper():
        case "AVG":
            return "mean_extremes"
        case "N_STD":
            n = c.args.get("clip_n_stds")
            if n is None:
                s.refuse((*c.keys, "clip_acts"), "is N_STD and needs clip_n_stds. Write such as 3.")
            return {"name": "three_sigma", "n": float(n), "spread": "std"}
        case "GAUSS" | "LAPLACE" as mode:
            return {"name": "aciq", "distribution": mode.lower()}
    return "min_max"
