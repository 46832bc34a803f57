"""A schedule of Distiller as checked values: which component, with which arguments, when.

Stricter than Distiller, which ignored unknown sections, policy arguments and mistimed keys:
whatever it would not have used is refused with its line, or told as a warning.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from gracile.errors import RecipeError, nearest
from gracile.recipe.distiller.grammar import (
    CLASSES,
    NAMES,
    POLICY_ARGS,
    SECTIONS,
    Choice,
    Fields,
    Named,
    Pair,
    Shape,
    of_kind,
)  # fmt: skip
from gracile.recipe.distiller.names import EVERY, is_pattern
from gracile.recipe.document import Document, Keys
from gracile.recipe.messages import show
from gracile.recipe.schema import MAX_EPOCHS

RANGE = ("starting_epoch", "ending_epoch", "frequency")


@dataclass(frozen=True)
class Component:
    """An entry of a section: a class and its arguments, all checked."""

    kind: str
    name: str
    cls: str
    args: Mapping[str, Any]
    keys: Keys


@dataclass(frozen=True)
class Policy:
    """When a component acts, and how.

    Attributes:
        component: what acts.
        args: of the policy, checked.
        epochs: all epochs in which it acts, rising.
        stop: the epoch after its last one, or the end of its range.
        every: the frequency; None where the epochs were listed.
        keys: where it is written.
    """

    component: Component
    args: Mapping[str, Any]
    epochs: tuple[int, ...]
    stop: int
    every: int | None
    keys: Keys

    @property
    def kind(self) -> str:
        """pruner, regularizer, quantizer, lr_scheduler, extension."""
        return self.component.kind

    @property
    def start(self) -> int:
        """Its first epoch."""
        return self.epochs[0]


@dataclass
class Schedule:
    """A whole schedule, and what there is to say about it.

    Attributes:
        components: in the file's order.
        policies: in the file's order.
        epochs: how long training is.
        strict: the recipe is for `compat: strict`, which keeps Distiller's defects.
        warnings: (code, sentence that begins with file:line).
    """

    document: Document
    components: list[Component] = field(default_factory=list)
    policies: list[Policy] = field(default_factory=list)
    epochs: int = 0
    strict: bool = False
    warnings: list[tuple[str, str]] = field(default_factory=list)

    def warn(self, code: str, keys: Keys, text: str) -> None:
        """Keep a warning about a place in the file; the same one is kept once."""
        warning = (code, f"{self.document.place(keys)}: {_dotted(keys)} {text}")
        if warning not in self.warnings:
            self.warnings.append(warning)

    def refuse(self, keys: Keys, text: str, at: Keys = ()) -> NoReturn:
        """Stop, because of a value; `at` is where the fault is, if it is inside that value.

        Raises:
            RecipeError: begins with `file:line:`.
        """
        raise RecipeError(f"{self.document.place(at or keys)}: {_dotted(keys)} {text}")


def read(document: Document) -> Schedule:
    """Check a whole schedule.

    Raises:
        RecipeError: it breaks the grammar; the first fault, with its line and the nearest name.
    """
    s = Schedule(document)
    data: dict[str, Any] = document.data
    _known(s, (), data, ("version", *SECTIONS, "policies"))
    for section, kind in SECTIONS.items():
        entries = _mapping(s, (section,), data.get(section) or {})
        s.components += [_component(s, (section, name), kind) for name in entries]
    quantizers = [c for c in s.components if c.kind == "quantizer"]
    if len(quantizers) > 1:
        s.refuse(quantizers[1].keys, "is a second quantizer. Keep one of the two.")
    ptq = any(c.cls == "PostTrainLinearQuantizer" for c in quantizers)
    policies = data.get("policies")
    if policies is None and not ptq:
        s.refuse((), "needs 'policies'. Add them: they say when a component acts.")
    if not isinstance(policies, list | None):
        s.refuse(("policies",), f"must be a list, got {show(policies)}. Begin each with '- '.")
    s.policies = [_policy(s, ("policies", i)) for i in range(len(policies or []))]
    used = {id(p.component) for p in s.policies}
    for c in s.components:
        if id(c) not in used and not (c.kind == "quantizer" and ptq):
            s.warn("unused", c.keys, "is used by no policy and left out.")
    return s


def _component(s: Schedule, keys: Keys, kind: str) -> Component:
    given = _mapping(s, keys, _at(s, keys))
    name = given.get("class")
    known = of_kind(kind)
    if name is None:
        s.refuse(keys, f"needs 'class', the name of a class.{nearest('', known)}")
    if not isinstance(name, str) or name not in CLASSES:
        s.refuse(
            (*keys, "class"),
            f"must be a class of Distiller, got {show(name)}.{nearest(str(name), known)}",
        )
    cls = CLASSES[name]
    if cls.kind != kind:
        right = next(section for section, k in SECTIONS.items() if k == cls.kind)
        s.refuse(keys, f"is a {cls.kind} ({name}). Move it to '{right}'.")
    args = {k: v for k, v in given.items() if k != "class"}
    for key, value in args.items():
        if key not in cls.args:
            s.refuse(keys, f"has no argument '{key}'.{nearest(key, cls.args)}", (*keys, key))
        _check(s, (*keys, key), value, cls.args[key])
    for key in cls.args:
        if key in cls.required and key not in args:
            s.refuse(keys, f"needs '{key}' for {name}. Add {key}: to it.")
    return Component(kind, str(keys[-1]), name, args, keys)


def _policy(s: Schedule, keys: Keys) -> Policy:
    given = _mapping(s, keys, _at(s, keys))
    kinds = list(SECTIONS.values())
    _known(s, keys, given, (*kinds, "epochs", *RANGE))
    found = [k for k in kinds if k in given]
    if len(found) != 1:
        two = f"has {' and '.join(found)}. Give each a policy of its own."
        s.refuse(keys, two if found else f"needs one of {', '.join(kinds)}.")
    kind, inside = found[0], (*keys, found[0])
    named = _mapping(s, inside, given[kind])
    _known(s, inside, named, ("instance_name", "args"))
    if "instance_name" not in named:
        s.refuse(inside, "needs 'instance_name'.")
    instance = named["instance_name"]
    mine = {c.name: c for c in s.components if c.kind == kind}
    if not isinstance(instance, str) or instance not in mine:
        s.refuse(
            (*inside, "instance_name"),
            f"must name a {kind} of this file, got {show(instance)}.{nearest(str(instance), mine)}",
        )
    args = _mapping(s, (*inside, "args"), named.get("args") or {})
    if kind not in POLICY_ARGS:
        if args:
            s.warn("ignored", (*inside, "args"), "has no meaning here, and had none in Distiller.")
    else:
        _known(s, (*inside, "args"), args, POLICY_ARGS[kind])
        for key, value in args.items():
            _check(s, (*inside, "args", key), value, POLICY_ARGS[kind][key])
    return Policy(mine[instance], args, *_timing(s, keys, given), keys)


def _timing(
    s: Schedule, keys: Keys, given: Mapping[str, Any]
) -> tuple[tuple[int, ...], int, int | None]:
    """Epochs, the end, and the frequency."""
    if "epochs" in given:
        for key in RANGE:
            if key in given:
                s.warn("ignored", (*keys, key), "does not count beside 'epochs'.")
        epochs = given["epochs"]
        rises = isinstance(epochs, list) and bool(epochs) and all(map(_is_epoch, epochs))
        if not rises or sorted(set(epochs)) != epochs:
            s.refuse(
                (*keys, "epochs"),
                f"must be a list of epochs that rise, got {show(epochs)}. Write [0, 10].",
            )
        return tuple(epochs), epochs[-1] + 1, None
    for key in RANGE:
        if key not in given:
            s.refuse(keys, f"needs '{key}', or epochs: [...]. Add {key}: to it.")
        if not _is_epoch(given[key]):
            s.refuse((*keys, key), f"must be a whole number >= 0, got {show(given[key])}.")
    start, stop, every = (given[key] for key in RANGE)
    if start >= stop:
        s.refuse(
            (*keys, "ending_epoch"), f"must be more than starting_epoch ({start}), got {stop}."
        )
    if not 0 < every <= stop - start:
        s.refuse(
            (*keys, "frequency"),
            f"must be in [1, {stop - start}], the length of the range, got {every}.",
        )
    return tuple(range(start, stop, every)), stop, every


def _is_epoch(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_EPOCHS


def _check(s: Schedule, keys: Keys, value: Any, shape: Shape) -> None:
    """Refuse a value that does not have its shape."""
    if isinstance(shape, Named):
        if shape.empty and value is None:
            return
        if not isinstance(value, dict) or not (value or shape.empty):
            s.refuse(keys, f"must be a mapping from {shape.what}, got {show(value)}.")
        for name, inner in value.items():
            if shape.what == Named.what and not (name == EVERY and shape.every):
                _literal(s, keys, name, (*keys, name))
            _check(s, (*keys, name), inner, shape.of)
    elif isinstance(shape, Fields):
        _known(s, keys, _mapping(s, keys, value), shape.known)
        for key, inner in value.items():
            _check(s, (*keys, key), inner, shape.known[key])
    elif isinstance(shape, Pair):
        if not isinstance(value, list) or len(value) != 2:
            s.refuse(keys, f"must be a list of two, got {show(value)}.")
        _check(s, (*keys, 0), value[0], shape.first)
        _check(s, (*keys, 1), value[1], shape.second)
    elif not shape.fits(value):
        known = shape.known if isinstance(shape, Choice) else ()
        guess = nearest(value, known) if isinstance(value, str) else ""
        s.refuse(keys, f"must be {shape.text}, got {show(value)}.{guess}")
    elif shape is NAMES:
        for name in [value] if isinstance(value, str) else value:
            _literal(s, keys, name, keys)


def _literal(s: Schedule, keys: Keys, name: str, at: Keys) -> None:
    if is_pattern(name):
        s.refuse(
            keys,
            f"names '{name}', but Distiller has no patterns: it meant nothing there. Write the "
            "names out, or change the converted recipe.",
            at,
        )


def _known(s: Schedule, keys: Keys, given: Mapping[str, Any], known: Iterable[str]) -> None:
    for key in given:
        if key not in known:
            s.refuse(keys, f"has no key '{key}'.{nearest(key, known)}", (*keys, key))


def _mapping(s: Schedule, keys: Keys, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        s.refuse(keys, f"must be a mapping, got {show(value)}.")
    return value


def _at(s: Schedule, keys: Keys) -> Any:
    value = s.document.data
    for key in keys:
        value = value[key]
    return value


def _dotted(keys: Keys) -> str:
    return ".".join(str(k) for k in keys) or "the schedule"
