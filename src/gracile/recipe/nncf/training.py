"""What the sample scripts of NNCF keep at the root of a configuration: how a model is trained."""

from typing import Any

from gracile.errors import nearest
from gracile.recipe.document import Keys
from gracile.recipe.messages import show
from gracile.recipe.nncf.work import Work

CLASSES = {"adam": "Adam", "sgd": "SGD"}
SCHEDULES = ("multistep", "step", "plateau", "poly", "exponential")
_KEYS = (
    *("type", "base_lr", "weight_decay", "optimizer_params", "parameter_groups", "schedule_type"),
    *("schedule_params", "scheduler_params", "steps", "step", "gamma"),
)


def training(foreign: dict[str, Any], sparse: bool, work: Work) -> None:
    """`batch_size` and `optimizer` as the recipe's `train`.

    Args:
        foreign: the script's keys.
        sparse: whether rb_sparsity is asked for, which turns the default weight decay off.
        work: `train` is filled in.
    """
    if "batch_size" in foreign:
        work.train["batch_size"] = foreign["batch_size"]
    if "optimizer" not in foreign:
        return
    given, at = foreign["optimizer"], ("optimizer",)
    if not isinstance(given, dict):
        work.refuse(at, f'must be a mapping, got {show(given)}. Write {{"type": "Adam", ...}}.')
    for key in given:
        if key not in _KEYS:
            work.refuse((*at, key), f"is not known.{nearest(key, _KEYS)}")
    kind = _word(given, "type", "adam", CLASSES, work)
    work.train["optimizer"] = {
        "class": CLASSES[kind],
        "lr": given.get("base_lr", 1e-4),
        "weight_decay": given.get("weight_decay", 0.0 if sparse else 1e-4),
        **given.get("optimizer_params", {"momentum": 0.9} if kind == "sgd" else {}),
    }
    if "parameter_groups" in given:
        work.tell((*at, "parameter_groups"), "are left out: all parameters have one rate.")
    work.train["lr"] = _schedule(given, at, work)


def _schedule(given: dict[str, Any], at: Keys, work: Work) -> dict[str, Any]:
    kind = _word(given, "schedule_type", "step", SCHEDULES, work)
    more = given.get("schedule_params", given.get("scheduler_params", {}))
    gamma = given.get("gamma", 0.1)
    if kind == "multistep":
        if "steps" not in given:
            work.refuse(at, "needs 'steps' for the schedule multistep. Add them.")
        return {"class": "MultiStepLR", "milestones": given["steps"], "gamma": gamma, **more}
    if kind == "step":
        return {"class": "StepLR", "step_size": given.get("step", 30), "gamma": gamma, **more}
    if kind == "exponential":
        return {"class": "ExponentialLR", "gamma": gamma}
    if kind == "poly":
        power = more.get("power", 0.9)
        return {"class": "PolynomialLR", "total_iters": max(1, work.epochs), "power": power}
    more = more or {"threshold": 0.1}
    # NNCF's samples count accuracy in percent, val_top1 is a share
    scaled = {k: v / 100 if k == "threshold" else v for k, v in more.items()}
    abs_max = {"mode": "max", "threshold_mode": "abs"}
    return {"class": "ReduceLROnPlateau", "factor": gamma, **abs_max, **scaled}


def _word(given: dict[str, Any], key: str, default: str, known: Any, work: Work) -> str:
    word = given.get(key, default)
    if not isinstance(word, str) or word.lower() not in known:
        near = nearest(str(word).lower(), known)
        work.refuse(("optimizer", key), f"must be a known one, got {show(word)}.{near}")
    return word.lower()
