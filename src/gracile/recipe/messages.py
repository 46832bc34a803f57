"""From pydantic's errors to one sentence: place, dotted path, rule, value, way out."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from annotated_types import Ge, Gt, Interval, Le, Lt
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from gracile.core.rules import is_number
from gracile.errors import RecipeError, nearest
from gracile.recipe.document import Document, Keys, scalar

LONGEST = 600  # characters of a message; a value in it may be as large as the file


class FieldError(ValueError):
    """A rule broken inside a value that one validator reads as a whole.

    Args:
        text: goes on after the path ("must be ...", "has no ..."), or is a sentence of its own.
        keys: where inside the value.
        key: an offending key there, if the sentence is about the mapping that holds it.
    """

    def __init__(self, text: str, keys: Keys = (), key: str | None = None):
        super().__init__(text)
        self.text, self.keys, self.key = text, keys, key


class EntryError(ValueError):
    """A method entry whose options break their own model."""

    def __init__(self, error: ValidationError, model: type[BaseModel]):
        super().__init__(str(error))
        self.error, self.model = error, model


@dataclass(frozen=True)
class Complaint:
    """One broken rule: the sentence's subject, its text, and where the fault is written."""

    keys: Keys
    text: str
    at: Keys
    missing: bool = False
    wants: str | None = None  # the rule alone, after "must be"
    got: str = ""
    hint: str = ""


def unknown_key(key: str, known: Iterable[str], keys: Keys = ()) -> FieldError:
    """A key that does not exist, with the nearest that does."""
    return FieldError(f"has no key '{key}'.{nearest(key, known)}", keys, key)


def share(value: object) -> str | None:
    """What is wrong with a share in [0, 1), or None.

    >>> share(1.2)
    'must be in [0, 1), got 1.2. For 20 % write 0.2.'
    """
    if is_number(value) and 0 <= value < 1:  # type: ignore[operator]
        return None
    if not is_number(value):
        return f"must be a number in [0, 1), got {show(value)}.{_number_hint(value)}"
    return f"must be in [0, 1), got {show(value)}." + (_percent(value) or " 0 changes nothing.")


def show(value: object) -> str:
    """A value as the recipe writes it, not longer than 60 characters."""
    if value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    else:
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def dotted(keys: Keys, data: Any) -> str:
    """A path as people write it; a method's options go by its verb: `prune.filters.sparsity`."""
    parts = [str(k) for k in keys]
    if len(parts) > 1 and parts[0] == "methods":
        entry = data["methods"].get(keys[1]) if isinstance(data.get("methods"), dict) else None
        verb = next(iter(verbs_of(entry)), None) if isinstance(entry, dict) else None
        parts[0] = verb or "methods"
    return ".".join(parts) or "the recipe"


def verbs_of(entry: Mapping[str, Any]) -> list[str]:
    """Which keys of a method entry are verbs of registered methods."""
    from gracile import registry

    known = {name.split("/")[0] for name in registry.names("method")}
    return [key for key in entry if key in known]


def refuse(error: ValidationError, document: Document, model: type[BaseModel]) -> RecipeError:
    """The one message for everything pydantic found: the first real fault, in file order.

    A missing key comes last, because a misspelt one nearby explains it.
    """
    complaints = _complaints(error, model, document.data)
    order = {keys: i for i, keys in enumerate(document.places)}

    def rank(c: Complaint) -> tuple[bool, int]:
        known = [order[c.at[:n]] for n in range(len(c.at), -1, -1) if c.at[:n] in order]
        return c.missing, known[0] if known else 0

    first = min(complaints, key=rank)
    deeper = [c for c in complaints if len(c.keys) > len(first.keys) and not c.missing]
    first = next((c for c in deeper if c.keys[: len(first.keys)] == first.keys), first)
    path = dotted(first.keys, document.data)
    joint = " " if first.text.startswith(("must ", "has ", "needs ", "is ")) else ": "
    return RecipeError(f"{document.place(first.at)}: {_sentence(path + joint + first.text)}")


def _complaints(error: ValidationError, model: type[BaseModel], data: Any) -> list[Complaint]:
    out: list[Complaint] = []
    branches: dict[Keys, list[Complaint]] = {}  # of a union: all complain at one place
    for e in error.errors(include_url=False):
        keys = _in_data(e["loc"], data)
        for c in _one(e, keys, model, data):
            in_union = c.wants is not None and c.keys == keys and len(e["loc"]) > len(keys)
            (branches.setdefault(keys, []) if in_union else out).append(c)
    for keys, cs in branches.items():
        wants = " or ".join(str(c.wants) for c in cs)
        hint = " Write one of these." if len(cs) > 1 else cs[0].hint
        out.append(_wanted(keys, wants, cs[0].got, hint))
    return out


def _one(e: Any, keys: Keys, model: type[BaseModel], data: Any) -> list[Complaint]:
    kind, value, ctx = e["type"], e["input"], e.get("ctx", {})
    cause = ctx.get("error")
    if isinstance(cause, FieldError):
        about = (*keys, *cause.keys)
        return [Complaint(about, cause.text, (*about, *filter(None, (cause.key,))))]
    if isinstance(cause, EntryError):
        inner = _complaints(cause.error, cause.model, value)
        return [replace(c, keys=(*keys, *c.keys), at=(*keys, *c.at)) for c in inner]
    if kind == "extra_forbidden":
        known = _known(model, keys[:-1])
        return [
            Complaint(keys[:-1], f"has no key '{keys[-1]}'.{nearest(str(keys[-1]), known)}", keys)
        ]
    if kind == "missing":
        key = e["loc"][-1]
        example = " Begin the file with recipe: 1." if key == "recipe" else f" Add {key}: to it."
        return [Complaint(keys, f"needs '{key}'.{example}", keys, missing=True)]
    if kind == "value_error":
        return [Complaint(keys, str(cause), keys)]
    wants, hint = _rule(kind, ctx, model, keys, value)
    return [_wanted(keys, wants, show(value), hint)]


def _wanted(keys: Keys, wants: str, got: str, hint: str) -> Complaint:
    text = f"must be {wants}, got {got}.{hint}"
    return Complaint(keys, text, keys, wants=wants, got=got, hint=hint)


def _rule(
    kind: str, ctx: Mapping[str, Any], model: type[BaseModel], keys: Keys, value: Any
) -> tuple[str, str]:
    """(what the value must be, the way out)."""
    if kind in ("int_type", "int_parsing", "int_from_float", "int_parsing_size"):
        return "a whole number", _number_hint(value) or " Write it without quotes or decimals."
    if kind in ("float_type", "float_parsing"):
        return "a number", _number_hint(value) or " Write it without quotes, such as 0.5."
    if kind in ("bool_type", "bool_parsing"):
        return "true or false", " Write one of these two words."
    if kind == "string_type":
        return "a text", " Put it into quotes."
    if kind == "literal_error" or kind == "enum":
        return str(ctx["expected"]), _guess(value, str(ctx["expected"]))
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        bounds = _bounds(_field(model, keys))
        high = bounds.lt if bounds.lt is not None else bounds.le
        rule, way_out = _interval(bounds, ctx)
        return rule, (_percent(value) if high == 1 else "") or way_out
    if kind in ("list_type", "tuple_type", "set_type", "frozen_set_type"):
        return "a list", " Write [a, b]."
    if kind in ("model_type", "model_attributes_type", "dict_type", "mapping_type"):
        known = list(_known(model, keys))
        inside = ", ".join(f"{k}: ..." for k in known[:4]) or "key: value"
        return "a mapping", f" Write {{{inside}}}."
    if kind in ("too_short", "string_too_short"):
        return f"at least {ctx['min_length']} long", " Add to it."
    if kind in ("too_long", "string_too_long"):
        return f"at most {ctx['max_length']} long", " Shorten it."
    return (
        f"valid ({kind.replace('_', ' ')}: {ctx or 'see its documentation'})",
        " Change the value.",
    )


def _interval(b: Interval, ctx: Mapping[str, Any]) -> tuple[str, str]:
    low, high = (b.gt if b.gt is not None else b.ge), (b.lt if b.lt is not None else b.le)
    if low is not None and high is not None:
        left, right = "(" if b.gt is not None else "[", ")" if b.lt is not None else "]"
        inside = f"{left}{_short(low)}, {_short(high)}{right}"
        return f"in {inside}", " Write a value between the two."
    words = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
    sign = next(k for k in words if k in ctx)
    more = "larger" if sign in ("gt", "ge") else "smaller"
    return f"{words[sign]} {_short(ctx[sign])}", f" Write a {more} value, or leave it out."


def _short(bound: Any) -> str:
    return str(int(bound)) if float(bound).is_integer() else str(bound)


def _percent(value: Any) -> str:
    if not is_number(value) or not 1 < value <= 100:
        return ""
    percent = value if value >= 2 else 20
    return f" For {percent:g} % write {percent / 100:g}."


def _number_hint(value: Any) -> str:
    if not isinstance(value, str):
        return ""
    text = value.strip()
    try:
        if text.endswith("%") and is_number(scalar(text[:-1].strip())):
            return f" For {text[:-1].strip()} % write {float(text[:-1]) / 100:g}."
        return f" Write {text} without quotes." if is_number(scalar(text)) else ""
    except ValueError:
        return ""


def _guess(value: Any, expected: str) -> str:
    known = [w.strip("'") for w in expected.replace(" or ", ", ").split(", ")]
    guess = nearest(value, known) if isinstance(value, str) else ""
    if guess.startswith(" Nearest"):
        return guess
    return f" Write {known[0]}." if len(known) == 1 else " Write one of these."


def _in_data(loc: Sequence[str | int], data: Any) -> Keys:
    """The part of pydantic's location that is keys of the data; union branches drop out."""
    keys: list[str | int] = []
    for part in loc:
        in_dict = isinstance(data, dict) and part in data
        in_list = isinstance(data, (list, tuple)) and isinstance(part, int) and part < len(data)
        if in_dict or in_list:
            data = data[part]
            keys.append(part)
    return tuple(keys)


def _field(model: Any, keys: Keys) -> FieldInfo | None:
    """The field a path of keys means, following nested models."""
    found: FieldInfo | None = None
    for key in keys:
        fields = _fields(model)
        if key not in fields:
            return found if isinstance(key, int) else None
        found = fields[str(key)]
        model = _model_in(found.annotation)
    return found


def _known(model: type[BaseModel], keys: Keys) -> Iterable[str]:
    found = _field(model, keys)
    return _fields(_model_in(found.annotation) if found is not None else None if keys else model)


def _fields(model: Any) -> dict[str, FieldInfo]:
    if model is None:
        return {}
    return {f.alias or name: f for name, f in model.model_fields.items()}


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model of `Model`, `Model | None` or `Annotated[Model, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inside = (_model_in(a) for a in getattr(annotation, "__args__", ()))
    return next((m for m in inside if m is not None), None)


def _bounds(found: FieldInfo | None) -> Interval:
    ends: dict[str, Any] = {}
    for m in found.metadata if found is not None else ():
        for cls, name in ((Gt, "gt"), (Ge, "ge"), (Lt, "lt"), (Le, "le")):
            if isinstance(m, cls):
                ends[name] = getattr(m, name)
    return Interval(**ends)


def _sentence(text: str) -> str:
    if len(text) > LONGEST:
        text = text[: LONGEST // 2] + " ... " + text[-LONGEST // 2 :]
    return text if text.endswith((".", "!", "?")) else text + "."
