"""Learning rates as closed forms f(t), under torch's scheduler names and arguments.

torch's schedulers multiply the rate they find in the optimizer, which goes wrong when surgery or an
exit adds parameter groups, or when a run is resumed in the middle. Here the rate is a function of
the position in training alone. Only `ReduceLROnPlateau` remembers anything.

Two arguments are ours: `interval: epoch | step` says what the epoch-wise classes count (default
epoch), and `metric` names what `ReduceLROnPlateau` watches. Where torch has no default but the
training length or the optimizer's rate is the natural one, it may be left out: `T_max`, `max_lr`
and `total_steps` of `OneCycleLR`. Two classes are Distiller's: `MultiStepMultiGammaLR`, and
`Spans`, which does what its learning-rate policies do.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, signature
from typing import Any

from gracile.core.rules import FLAG, TEXT, Rule, list_of, number, one_of, or_null, whole
from gracile.errors import BindError, UserError, nearest

# ------------------------------------------------------------------ curves: t counts from 0


def step_lr(t: int, base: float, *, step_size: int, gamma: float = 0.1) -> float:
    """base * gamma ^ floor(t / step_size).

    >>> step_lr(5, 1.0, step_size=2, gamma=0.5)
    0.25
    """
    return base * gamma ** (t // step_size)


def multi_step(t: int, base: float, *, milestones: Sequence[int], gamma: float = 0.1) -> float:
    """base * gamma ^ (number of milestones <= t); a milestone given twice counts twice."""
    return base * gamma ** bisect_right(sorted(milestones), t)


def multi_step_multi_gamma(
    t: int, base: float, *, milestones: Sequence[int], gammas: Sequence[float]
) -> float:
    """base * the gammas of all milestones <= t (Distiller); milestones rise.

    >>> multi_step_multi_gamma(5, 1.0, milestones=[2, 4, 6], gammas=[0.5, 0.1, 0.1])
    0.05
    """
    return base * math.prod(gammas[: bisect_right(milestones, t)])


def exponential(t: int, base: float, *, gamma: float) -> float:
    """base * gamma ^ t."""
    return base * gamma**t


def constant(t: int, base: float, *, factor: float = 1 / 3, total_iters: int = 5) -> float:
    """base * factor before `total_iters`, then base."""
    return base * factor if t < total_iters else base


def linear(
    t: int,
    base: float,
    *,
    start_factor: float = 1 / 3,
    end_factor: float = 1.0,
    total_iters: int = 5,
) -> float:
    """A straight line from base * start_factor to base * end_factor at `total_iters`."""
    done = min(t, total_iters) / total_iters
    return base * (start_factor + (end_factor - start_factor) * done)


def cosine(t: int, base: float, *, T_max: int, eta_min: float = 0.0) -> float:
    """Half a cosine from base to eta_min at T_max, and back again after it.

    Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5, without restarts.
    """
    return eta_min + (base - eta_min) * (1 + math.cos(math.pi * t / T_max)) / 2


def cosine_restarts(
    t: int, base: float, *, T_0: int, T_mult: int = 1, eta_min: float = 0.0
) -> float:
    """`cosine` that starts again after T_0, then T_0 * T_mult, ... (arXiv:1608.03983, eq. 5)."""
    length = T_0
    if T_mult == 1:
        t %= T_0
    while t >= length:
        t -= length
        length *= T_mult
    return cosine(t, base, T_max=length, eta_min=eta_min)


def polynomial(t: int, base: float, *, total_iters: int = 5, power: float = 1.0) -> float:
    """base * (1 - t / total_iters) ^ power; 0 after `total_iters`."""
    return float(base * (1 - min(t, total_iters) / total_iters) ** power)


def polynomial_drop(
    t: int, base: float, *, start: int, total_iters: int = 30, power: float = 1.0
) -> float:
    """base until `start`, from there `polynomial` (the last stage of NNCF's binarization)."""
    return polynomial(max(0, t - start), base, total_iters=total_iters, power=power)


def one_cycle(
    t: int,
    base: float,
    *,
    max_lr: float,
    total_steps: int,
    pct_start: float = 0.3,
    anneal_strategy: str = "cos",
    cycle_momentum: bool = True,
    base_momentum: float = 0.85,
    max_momentum: float = 0.95,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    three_phase: bool = False,
) -> tuple[float, float | None]:
    """Up to max_lr, then down to almost nothing; momentum goes the other way (arXiv:1708.07120).

    Returns:
        (rate, momentum); momentum is None if it is not cycled.
    """
    first = max_lr / div_factor
    low = first / final_div_factor
    top = pct_start * total_steps - 1
    phases = [(top, first, max_lr, max_momentum, base_momentum)]
    if three_phase:
        phases.append((2 * top, max_lr, first, base_momentum, max_momentum))
        phases.append((total_steps - 1, first, low, max_momentum, max_momentum))
    else:
        phases.append((total_steps - 1, max_lr, low, base_momentum, max_momentum))
    t = min(t, total_steps - 1)
    i = next(i for i, phase in enumerate(phases) if t <= phase[0])  # the last one takes every t
    start = phases[i - 1][0] if i else 0.0
    end, lr0, lr1, m0, m1 = phases[i]
    done = (t - start) / (end - start) if end > start else 1.0
    between = _cos_between if anneal_strategy == "cos" else _line_between
    return between(lr0, lr1, done), between(m0, m1, done) if cycle_momentum else None


def cyclic(
    t: int,
    base: float,
    *,
    base_lr: float,
    max_lr: float,
    step_size_up: int = 2000,
    step_size_down: int | None = None,
    mode: str = "triangular",
    gamma: float = 1.0,
    cycle_momentum: bool = True,
    base_momentum: float = 0.8,
    max_momentum: float = 0.9,
) -> tuple[float, float | None]:
    """A saw between base_lr and max_lr whose height may shrink (Smith 2017, arXiv:1506.01186).

    Returns:
        (rate, momentum); momentum is None if it is not cycled.
    """
    down = step_size_up if step_size_down is None else step_size_down
    cycle, x = divmod(t, step_size_up + down)
    height = x / step_size_up if x <= step_size_up else (step_size_up + down - x) / down
    if mode == "triangular2":
        height /= 2.0**cycle
    elif mode == "exp_range":
        height *= gamma**t
    momentum = max_momentum - (max_momentum - base_momentum) * height
    return base_lr + (max_lr - base_lr) * height, momentum if cycle_momentum else None


def _cos_between(start: float, end: float, done: float) -> float:
    return end + (start - end) / 2 * (math.cos(math.pi * done) + 1)


def _line_between(start: float, end: float, done: float) -> float:
    return start + (end - start) * done


# ------------------------------------------------------------------ schedules


class Schedule:
    """The rate at any position of training. `lr` and `momentum` may be asked in any order."""

    def __init__(self, value: Callable[[int], tuple[float, float | None]], *, per_epoch: bool):
        self._value, self._per_epoch = value, per_epoch

    def lr(self, epoch: int, step: int) -> float:
        """Rate for optimizer step `step`, counted from the start of training, in `epoch`."""
        return self._value(epoch if self._per_epoch else step)[0]

    def momentum(self, epoch: int, step: int) -> float | None:
        """Momentum (or beta1) for that step; None if this schedule leaves it alone."""
        return self._value(epoch if self._per_epoch else step)[1]

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """After each epoch, with its metrics."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; nothing, for a closed form."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""


class ReduceLROnPlateau(Schedule):
    """Multiply the rate by `factor` when a metric has not got better for `patience` epochs."""

    def __init__(
        self,
        base: float,
        *,
        mode: str = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: str = "rel",
        cooldown: int = 0,
        min_lr: float = 0.0,
        eps: float = 1e-8,
        metric: str | None = None,
    ):
        self.mode, self.factor, self.patience, self.cooldown = mode, factor, patience, cooldown
        self.threshold, self.threshold_mode = threshold, threshold_mode
        self.min_lr, self.eps = min_lr, eps
        self.metric = metric or ("val_loss" if mode == "min" else "val_top1")
        self._lr, self._bad, self._cooling = base, 0, 0
        self._best: float | None = None

    def lr(self, epoch: int, step: int) -> float:
        """The rate as it is now, wherever that is."""
        return self._lr

    def momentum(self, epoch: int, step: int) -> None:
        """Left alone."""

    def restart(self, lr: float) -> None:
        """Go on from another rate."""
        self._lr = lr

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """Judge the epoch.

        Raises:
            UserError: the metric it watches was not given.
        """
        if self.metric not in metrics:
            raise UserError(
                f"ReduceLROnPlateau watches '{self.metric}', which on_epoch_end() was not given."
                f"{nearest(self.metric, metrics)} Set train.lr.metric to a metric you pass."
            )
        value = float(metrics[self.metric])
        if self._better(value):
            self._best, self._bad = value, 0
        else:
            self._bad += 1
        if self._cooling > 0:
            self._cooling -= 1
            self._bad = 0
        if self._bad > self.patience:
            lower = max(self._lr * self.factor, self.min_lr)
            if self._lr - lower > self.eps:
                self._lr = lower
            self._cooling, self._bad = self.cooldown, 0

    def state_dict(self) -> dict[str, Any]:
        """Rate, best value and both counters."""
        return {"lr": self._lr, "best": self._best, "bad": self._bad, "cooling": self._cooling}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self._lr, self._best = state["lr"], state["best"]
        self._bad, self._cooling = state["bad"], state["cooling"]

    def _better(self, value: float) -> bool:
        if self._best is None:
            return not math.isnan(value)
        sign = -1 if self.mode == "min" else 1
        if self.threshold_mode == "rel":
            return sign * value > sign * self._best * (1 + sign * self.threshold)
        return sign * value > sign * (self._best + sign * self.threshold)


class Spans(Schedule):
    """Other schedules, each over some epochs, as Distiller's learning-rate policies drive them.

    After each epoch e of its span a schedule sets the rate: to its closed form at e + 1, counted
    from the start of training and of the first rate. So the rate jumps where a span begins late,
    and stands still between spans and after them. Of two that set it after the same epoch the later
    in the list counts. All classes count epochs here.

    Args:
        base: the rate until a span sets it.
        spans: (epochs, schedule); the epochs after which it sets the rate.
    """

    def __init__(self, base: float, *, spans: Sequence[tuple[range, Schedule]]):
        self._base, self._spans, self._ended = base, list(spans), 0

    def lr(self, epoch: int, step: int) -> float:
        """Rate in `epoch`."""
        e, schedule = self._latest(epoch)
        return self._base if schedule is None else schedule.lr(e + 1, e + 1)

    def momentum(self, epoch: int, step: int) -> float | None:
        """Momentum (or beta1) in `epoch`; None if it is left alone."""
        e, schedule = self._latest(epoch)
        return None if schedule is None else schedule.momentum(e + 1, e + 1)

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """Only `ReduceLROnPlateau` listens, within its span; it goes on from the present rate."""
        for epochs, schedule in self._spans:
            if isinstance(schedule, ReduceLROnPlateau) and self._ended in epochs:
                schedule.restart(self.lr(self._ended, self._ended))
                schedule.end_epoch(metrics)
        self._ended += 1

    def state_dict(self) -> dict[str, Any]:
        """Epochs that are over, and the state of each span's schedule."""
        return {"ended": self._ended, "spans": [s.state_dict() for _, s in self._spans]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self._ended = int(state["ended"])
        for (_, schedule), stored in zip(self._spans, state["spans"], strict=True):
            schedule.load_state_dict(stored)

    def _latest(self, epoch: int) -> tuple[int, Schedule | None]:
        """The last epoch before this one after which a rate was set, and by what."""
        found: tuple[int, Schedule | None] = (-1, None)
        for epochs, schedule in self._spans:
            past = range(epochs.start, min(epochs.stop, epoch), epochs.step)
            if past and past[-1] >= found[0]:
                found = past[-1], schedule
        return found


# ------------------------------------------------------------------ from a recipe


@dataclass(frozen=True)
class _Kind:
    """A scheduler class: what makes it, what it counts, which arguments may be left out."""

    fn: Callable[..., Any]
    counts: str  # "epoch" (may be set to "step"), "step", "metric", or "spans"
    filled: frozenset[str] = frozenset()
    extra: frozenset[str] = frozenset()
    rules: Mapping[str, Rule] | None = None


_UNIT_OPEN = number(0, 1, above=True, below=True)
_RULES: dict[str, Rule] = {
    **dict.fromkeys(("step_size", "T_max", "T_0", "T_mult", "total_iters"), whole(1)),
    **dict.fromkeys(("step_size_up", "total_steps", "epochs", "steps_per_epoch"), whole(1)),
    **dict.fromkeys(("patience", "cooldown"), whole(0)),
    **dict.fromkeys(("gamma", "max_lr", "div_factor", "final_div_factor"), number(0, above=True)),
    **dict.fromkeys(("eta_min", "base_lr", "min_lr", "eps", "threshold", "power"), number(0)),
    **dict.fromkeys(("factor", "end_factor", "pct_start"), number(0, 1)),
    **dict.fromkeys(("base_momentum", "max_momentum"), number(0, 1, below=True)),
    **dict.fromkeys(("cycle_momentum", "three_phase"), FLAG),
    "start_factor": number(0, 1, above=True),
    "milestones": list_of(whole(0)),
    "gammas": list_of(number(0, above=True)),
    "spans": list_of(Rule("{start, stop, schedule}", lambda v: isinstance(v, dict))),
    "step_size_down": or_null(whole(1)),
    "anneal_strategy": one_of("cos", "linear"),
    "threshold_mode": one_of("rel", "abs"),
    "interval": one_of("epoch", "step"),
    "metric": TEXT,
}
_KINDS: dict[str, _Kind] = {
    "StepLR": _Kind(step_lr, "epoch"),
    "MultiStepLR": _Kind(multi_step, "epoch"),
    "MultiStepMultiGammaLR": _Kind(multi_step_multi_gamma, "epoch"),
    "ExponentialLR": _Kind(exponential, "epoch"),
    "ConstantLR": _Kind(constant, "epoch"),
    "LinearLR": _Kind(linear, "epoch"),
    "CosineAnnealingLR": _Kind(cosine, "epoch", filled=frozenset({"T_max"})),
    "CosineAnnealingWarmRestarts": _Kind(cosine_restarts, "epoch"),
    "PolynomialLR": _Kind(polynomial, "epoch"),
    "PolynomialDropLR": _Kind(polynomial_drop, "epoch", rules={"start": whole(0)}),
    "OneCycleLR": _Kind(
        one_cycle,
        "step",
        filled=frozenset({"max_lr", "total_steps"}),
        extra=frozenset({"epochs", "steps_per_epoch"}),
    ),
    "CyclicLR": _Kind(
        cyclic, "step", rules={"mode": one_of("triangular", "triangular2", "exp_range")}
    ),
    "ReduceLROnPlateau": _Kind(
        ReduceLROnPlateau, "metric", rules={"mode": one_of("min", "max"), "factor": _UNIT_OPEN}
    ),
    "Spans": _Kind(Spans, "spans"),
}
_SPAN = {"start": whole(0), "stop": or_null(whole(1)), "every": whole(1)}


def problem(spec: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first thing wrong with ``{class: StepLR, step_size: 10}``: (key, sentence), or None.

    The sentence goes on after the key ("must be ..."); the key is "" if it is about the whole, and
    has dots where it is inside (`spans.0.schedule.gamma`).
    """
    name = spec.get("class")
    if not isinstance(name, str) or name not in _KINDS:
        guess = nearest(name, _KINDS) if isinstance(name, str) else nearest("", _KINDS)
        return "class", f"must be a scheduler of torch that gracile knows, got {name!r}.{guess}"
    kind, known = _KINDS[name], _arguments(name)
    for key, value in spec.items():
        if key == "class":
            continue
        if key not in known:
            return key, f"is not an argument of {name}.{nearest(key, known)}"
        rule = {**_RULES, **(kind.rules or {})}[key]
        if not rule.fits(value):
            return key, f"must be {rule.text}, got {value!r}. Change it or leave it out."
    for key, p in signature(kind.fn).parameters.items():
        needed = p.kind is Parameter.KEYWORD_ONLY and p.default is Parameter.empty
        if needed and key not in spec and key not in kind.filled:
            return "", f"needs '{key}' for {name}: {_RULES[key].text}. Add {key}: to it."
    if ("epochs" in spec) != ("steps_per_epoch" in spec):
        return "", "needs both of 'epochs' and 'steps_per_epoch', or neither."
    if len(spec.get("gammas", ())) != len(spec.get("milestones", ())) and "gammas" in spec:
        return "gammas", f"must be as many as milestones ({len(spec['milestones'])})."
    wrong = (_span_problem(i, span) for i, span in enumerate(spec.get("spans", ())))
    return next(filter(None, wrong), None)


def _span_problem(i: int, span: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first thing wrong with the i-th span of `Spans`, as in `problem`."""
    at = f"spans.{i}"
    for key, value in span.items():
        if key not in (*_SPAN, "schedule"):
            return (
                f"{at}.{key}",
                f"is not an argument of a span.{nearest(key, [*_SPAN, 'schedule'])}",
            )
        if key in _SPAN and not _SPAN[key].fits(value):
            return f"{at}.{key}", f"must be {_SPAN[key].text}, got {value!r}."
    schedule, stop = span.get("schedule"), span.get("stop")
    if not isinstance(schedule, dict) or schedule.get("class") == "Spans":
        return at, "needs 'schedule', one of the other classes. Write schedule: {class: StepLR}."
    if "start" not in span:
        return at, "needs 'start', the first epoch after which it sets the rate. Add start: 0."
    if stop is not None and stop <= span["start"]:
        return f"{at}.stop", f"must be more than start ({span['start']}), got {stop}."
    wrong = problem(schedule)
    return wrong and (".".join(filter(None, (at, "schedule", wrong[0]))), wrong[1])


def cycles_momentum(spec: Mapping[str, Any]) -> bool:
    """Whether a schedule moves the optimizer's momentum (or beta1) as well."""
    if spec.get("class") == "Spans":
        return any(cycles_momentum(span["schedule"]) for span in spec["spans"])
    return spec.get("class") in ("OneCycleLR", "CyclicLR") and spec.get("cycle_momentum", True)


def make(
    spec: Mapping[str, Any], *, base_lr: float, epochs: int, steps_per_epoch: int | None
) -> Schedule:
    """The schedule of a recipe's `train.lr` for a training length.

    Args:
        spec: ``{class: OneCycleLR, max_lr: 0.1}``: torch's class name and arguments.
        base_lr: the optimizer's rate.
        epochs: length of training.
        steps_per_epoch: optimizer steps per epoch, None if unknown.

    Raises:
        UserError: an unknown class or argument, or a value out of range.
        BindError: it counts steps and their number is unknown, or it ends before training does.

    >>> spec = {"class": "StepLR", "step_size": 1}
    >>> make(spec, base_lr=1.0, epochs=3, steps_per_epoch=None).lr(1, 1)
    0.1
    """
    wrong = problem(spec)
    if wrong is not None:
        raise UserError(".".join(filter(None, ("train.lr", wrong[0]))) + f" {wrong[1]}")
    name = spec["class"]
    kind = _KINDS[name]
    args = {k: v for k, v in spec.items() if k not in ("class", "interval")}
    if kind.counts == "metric":
        return ReduceLROnPlateau(base_lr, **args)
    if kind.counts == "spans":
        return Spans(base_lr, spans=[_span(v, base_lr, epochs) for v in args["spans"]])
    counts = spec.get("interval", kind.counts)
    if counts == "step" and steps_per_epoch is None:
        raise BindError(
            f"train.lr: {name} counts optimizer steps; pass steps_per_epoch to the Session"
            + ("." if kind.counts == "step" else ", or set interval: epoch.")
        )
    length = max(1, epochs * (steps_per_epoch or 1 if counts == "step" else 1))
    if name == "CosineAnnealingLR":
        args.setdefault("T_max", length)
    if name == "OneCycleLR":
        args = _one_cycle_arguments(args, base_lr, length)
    value = partial(_value, kind.fn, base_lr, args)
    return Schedule(value, per_epoch=counts == "epoch")


def _span(span: Mapping[str, Any], base_lr: float, epochs: int) -> tuple[range, Schedule]:
    stop = epochs if span.get("stop") is None else span["stop"]
    schedule = make(span["schedule"], base_lr=base_lr, epochs=min(stop, epochs), steps_per_epoch=1)
    return range(span["start"], stop, span.get("every", 1)), schedule


def _one_cycle_arguments(args: dict[str, Any], base_lr: float, length: int) -> dict[str, Any]:
    args = dict(args)
    given = args.pop("epochs", None), args.pop("steps_per_epoch", None)
    total = args.setdefault("total_steps", given[0] * given[1] if given[0] else length)
    if total < length:
        raise BindError(
            f"train.lr: OneCycleLR ends after {total} steps, training has {length}; "
            "leave total_steps, epochs and steps_per_epoch out to use the training length."
        )
    args.setdefault("max_lr", base_lr)
    return args


def _value(
    fn: Callable[..., Any], base: float, args: Mapping[str, Any], t: int
) -> tuple[float, float | None]:
    out = fn(t, base, **args)
    return out if isinstance(out, tuple) else (out, None)


def _arguments(name: str) -> list[str]:
    kind = _KINDS[name]
    own = [k for k, p in signature(kind.fn).parameters.items() if p.kind is Parameter.KEYWORD_ONLY]
    return [*own, *sorted(kind.extra), *(["interval"] if kind.counts == "epoch" else [])]
