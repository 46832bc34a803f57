"""The optimizers a recipe may name: torch.optim's classes and which of their arguments make sense.

A list, not an import: recipes are checked without torch, and only what stands here is ever made.
Arguments that choose an implementation (foreach, fused, ...) or turn the sign (maximize) are left
out.
"""

from collections.abc import Mapping
from typing import Any

from gracile.core.rules import FLAG, Rule, list_of, number, or_null
from gracile.errors import nearest

_BELOW_1 = number(0, 1, below=True)
_BETAS = list_of(_BELOW_1, 2)
_DECAY = {"weight_decay": number(0)}
_ADAM = {**_DECAY, "betas": _BETAS, "eps": number(0)}

OPTIMIZERS: dict[str, dict[str, Rule]] = {
    "SGD": {**_DECAY, "momentum": number(0), "dampening": number(), "nesterov": FLAG},
    "Adam": {**_ADAM, "amsgrad": FLAG},
    "AdamW": {**_ADAM, "amsgrad": FLAG},
    "NAdam": {**_ADAM, "momentum_decay": number(0), "decoupled_weight_decay": FLAG},
    "RAdam": {**_ADAM, "decoupled_weight_decay": FLAG},
    "Adamax": _ADAM,
    "Adagrad": {
        **_DECAY,
        "lr_decay": number(0),
        "initial_accumulator_value": number(0),
        "eps": number(0),
    },
    "Adadelta": {**_DECAY, "rho": number(0, 1), "eps": number(0)},
    "RMSprop": {
        **_DECAY,
        "alpha": number(0),
        "eps": number(0),
        "momentum": number(0),
        "centered": FLAG,
    },
    "ASGD": {**_DECAY, "lambd": number(0), "alpha": number(0), "t0": number(0)},
    "Rprop": {
        "etas": list_of(number(0, above=True), 2),
        "step_sizes": list_of(number(0, above=True), 2),
    },
    "Adafactor": {
        **_DECAY,
        "beta2_decay": number(high=0),
        "eps": list_of(or_null(number(0)), 2),
        "d": number(1),
    },
}


def problem(name: object, arguments: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first thing wrong with an optimizer: (key, sentence that goes on after it), or None."""
    if not isinstance(name, str) or name not in OPTIMIZERS:
        guess = nearest(name if isinstance(name, str) else "", OPTIMIZERS)
        return (
            "class",
            f"must be an optimizer of torch.optim that gracile knows, got {name!r}.{guess}",
        )
    known = OPTIMIZERS[name]
    for key, value in arguments.items():
        if key not in known:
            return key, f"is not an argument of {name}.{nearest(key, ['lr', *known])}"
        if not known[key].fits(value):
            return key, f"must be {known[key].text}, got {value!r}. Change it or leave it out."
    if arguments.get("nesterov") and (not arguments.get("momentum") or arguments.get("dampening")):
        return "nesterov", "needs momentum > 0 and no dampening. Set momentum: 0.9."
    if name == "Rprop" and "etas" in arguments:
        low, high = arguments["etas"]
        if not low < 1 < high:
            return (
                "etas",
                f"must be below and above 1, got {arguments['etas']!r}. Write [0.5, 1.2].",
            )
    return None


def has_momentum(name: str) -> bool:
    """Whether a class has a momentum (or beta1) that a schedule can cycle."""
    return bool({"momentum", "betas"} & set(OPTIMIZERS[name]))
