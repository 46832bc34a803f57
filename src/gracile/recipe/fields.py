"""Types for a method's options that recipes share: selectors, kernels by name, levels over time.

A method writes `weights: Selector`, `criterion: KernelRef("criterion")`, `sparsity: Level`,
`strength: Amount` or `threshold: Threshold`; each reads its YAML forms, refuses wrong ones with the
rule, and writes itself back to YAML.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

from pydantic import GetPydanticSchema
from pydantic_core import core_schema

from gracile import registry
from gracile.core.address import compile_pattern
from gracile.core.kinds import check_options, kernel_options
from gracile.core.rules import is_number
from gracile.errors import UserError, nearest
from gracile.recipe.messages import FieldError, share, show, unknown_key


def plain_type(parse: Callable[[Any], Any], write: Callable[[Any], Any]) -> GetPydanticSchema:
    """A pydantic type that is one function to read and one to write."""
    schema = core_schema.no_info_plain_validator_function(
        parse, serialization=core_schema.plain_serializer_function_ser_schema(write)
    )
    return GetPydanticSchema(lambda _source, _handler: schema)


# ------------------------------------------------------------------ selectors


def read_selector(value: object) -> str | tuple[str, ...]:
    """A pattern, or a list of them, as CONTRACTS describe: name, glob, `re:`, `type:`, `!`.

    Raises:
        FieldError, BindError: no pattern, an empty one, or a broken regular expression.
    """
    if isinstance(value, str):
        return _pattern(value)
    if not isinstance(value, (list, tuple)):
        raise FieldError(
            f"must be a pattern or a list of them, got {show(value)}. "
            'Write a name, a glob, "re:..." or "type:Conv2d".'
        )
    if not value:
        raise FieldError('must name at least one pattern, got []. Write "**" for everything.')
    return tuple(_pattern(item) for item in value)


def _pattern(value: object) -> str:
    if not isinstance(value, str):
        raise FieldError(
            f"must be a text or a list of texts, got {show(value)}. Put it into quotes."
        )
    body = value.removeprefix("!")
    if not body.strip() or body in ("re:", "type:"):
        raise FieldError(f'must not be empty, got {show(value)}. Write "**" for everything.')
    compile_pattern(body)
    return value


Selector = Annotated[
    str | tuple[str, ...],
    plain_type(read_selector, lambda v: v if isinstance(v, str) else list(v)),
]


# ------------------------------------------------------------------ kernels by name


@dataclass(frozen=True)
class Kernel:
    """A registered function (or class) with the options a recipe gives it.

    Attributes:
        kind: which kind it is: criterion, ramp, observer, ...
        name: its registered name.
        options: keyword arguments from the recipe; the others keep their defaults.
    """

    kind: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fn(self) -> Callable[..., Any]:
        """The function with its options bound; for a class, a factory of its objects."""
        obj: Callable[..., Any] = registry.get(self.kind, self.name).obj
        return partial(obj, **self.options) if self.options else obj

    def plain(self) -> Any:
        """The YAML form: the name, or a mapping where there are options."""
        return {"name": self.name, **self.options} if self.options else self.name

    def __hash__(self) -> int:
        return hash((self.kind, json.dumps(self.plain(), sort_keys=True, default=str)))


def kernel(kind: str, name: str, /, **options: Any) -> Kernel:
    """A checked Kernel; for defaults of option fields and for Python callers.

    Raises:
        UserError: unknown name or option, or an option of the wrong type.
    """
    check_options(kind, name, options)
    return Kernel(kind, name, dict(options))


def read_kernel(kind: str, value: object) -> Kernel:
    """Read `name` or `{name: ..., option: ...}`.

    Raises:
        FieldError, UserError: another shape, or what `kernel` refuses.
    """
    if isinstance(value, Kernel) and value.kind == kind:
        return value
    if isinstance(value, str):
        return kernel(kind, value)
    if not isinstance(value, dict):
        raise FieldError(
            f"must be the name of a {kind}, got {show(value)}.{nearest('', registry.names(kind))}"
        )
    if not isinstance(value.get("name"), str):
        raise FieldError(f"needs 'name', the name of a {kind}.{nearest('', registry.names(kind))}")
    options = {k: v for k, v in value.items() if k != "name"}
    known = kernel_options(registry.get(kind, value["name"]).obj)
    for key in options:
        if key not in known:
            raise unknown_key(key, known)
    return kernel(kind, value["name"], **options)


def KernelRef(kind: str, *words: str) -> Any:
    """The annotation of an option that names a kernel of `kind`; its value is a `Kernel`.

    Args:
        kind: see `Kernel`.
        words: what else it may say; such a value stays a text.
    """
    return Annotated[
        Kernel | str,
        plain_type(
            lambda v: v if v in words else read_kernel(kind, v),
            lambda v: v if isinstance(v, str) else v.plain(),
        ),
    ]


# ------------------------------------------------------------------ levels over time


@dataclass(frozen=True)
class LevelValue:
    """A share in [0, 1) or an amount, fixed or moving from `initial` to `final` along a ramp.

    Attributes:
        initial: level at the first firing (progress 0), for ramps that start from it.
        final: level at the last firing (progress 1).
        ramp: how it moves; None for a fixed level.
    """

    final: float
    initial: float = 0.0
    ramp: Kernel | None = None

    def at(self, progress: float) -> float:
        """The level at progress in [0, 1].

        >>> read_level({"ramp": "linear", "initial": 0.0, "final": 0.5}).at(0.5)
        0.25
        """
        if self.ramp is None:
            return self.final
        return float(self.ramp.fn(progress, self.initial, self.final))

    def plain(self) -> Any:
        """The YAML form: a number, or the mapping."""
        if self.ramp is None:
            return self.final
        return {"ramp": self.ramp.plain(), "initial": self.initial, "final": self.final}


def read_level(value: object, wrong_with: Callable[[object], str | None] = share) -> LevelValue:
    """Read a number in [0, 1) or `{ramp, initial, final}`; `initial` is 0 if left out.

    Args:
        value: as in a recipe.
        wrong_with: says what is wrong with a number; None if it may be that.

    Raises:
        FieldError, UserError: out of range, an unknown key or ramp, a ramp that cannot go between
            these ends, or another shape.
    """
    if isinstance(value, LevelValue):
        return value
    if not isinstance(value, dict):
        if wrong := wrong_with(value):
            raise FieldError(wrong)
        return LevelValue(final=float(value))  # type: ignore[arg-type]
    known = ("ramp", "initial", "final")
    for key in value:
        if key not in known:
            raise unknown_key(key, known)
    for key in ("ramp", "final"):
        if key not in value:
            raise FieldError(f"needs '{key}'. Write {{ramp: cubic, initial: 0.1, final: 0.5}}.")
    ends = {k: value.get(k, 0.0) for k in ("initial", "final")}
    for key, end in ends.items():
        if wrong := wrong_with(end):
            raise FieldError(wrong, (key,))
    try:
        ramp = read_kernel("ramp", value["ramp"])
    except FieldError as e:
        raise FieldError(e.text, ("ramp", *e.keys), e.key) from None
    except UserError as e:
        raise FieldError(f"must be a known ramp: {e}", ("ramp",)) from None
    level = LevelValue(final=float(ends["final"]), initial=float(ends["initial"]), ramp=ramp)
    try:
        level.at(0.0)
    except UserError as e:
        raise FieldError(str(e), ("ramp",)) from None
    return level


Level = Annotated[LevelValue, plain_type(read_level, LevelValue.plain)]


def read_amount(value: object) -> LevelValue:
    """Read a number > 0 or `{ramp, initial, final}` with `initial` >= 0 and `final` > 0.

    Raises:
        FieldError, UserError: as `read_level`.
    """
    amount = read_level(value, _not_positive)
    if amount.final == 0:
        raise FieldError(
            "must be more than 0, got 0. Write a larger value.",
            () if amount.ramp is None else ("final",),
        )
    return amount


def _not_positive(value: object) -> str | None:
    if is_number(value) and value >= 0:  # type: ignore[operator]
        return None
    return f"must be a number, not below 0, got {show(value)}. Write such as 0.05."


Amount = Annotated[LevelValue, plain_type(read_amount, LevelValue.plain)]


def read_threshold(value: object) -> LevelValue:
    """Read a number of any sign or `{ramp, initial, final}` of such.

    Raises:
        FieldError, UserError: as `read_level`.
    """
    return read_level(value, _not_finite)


def _not_finite(value: object) -> str | None:
    if is_number(value) and math.isfinite(value):  # type: ignore[arg-type]
        return None
    return f"must be a number, got {show(value)}. Write such as 0 or -0.5."


Threshold = Annotated[LevelValue, plain_type(read_threshold, LevelValue.plain)]
