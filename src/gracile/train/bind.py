"""Binding: a Recipe meets a model and a training length; what cannot work is refused.

After binding every selector has matched, every timing fires, every need is met and no two entries
decide about the same thing. Nothing has been trained yet. Messages begin with the place of the
recipe entry, `file:line`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from gracile import registry
from gracile.core.method import Method
from gracile.core.schedule import Calendar, Timetable, timetable
from gracile.errors import BindError, PlanConflict, RecipeError, UserError, nearest
from gracile.recipe.schema import Recipe


def build_methods(recipe: Recipe) -> list[Method]:
    """One Method object per recipe entry, in recipe order."""
    out = []
    for id, entry in recipe.methods.items():
        cls = registry.get("method", f"{entry.verb}/{entry.method}").obj
        out.append(cls(id, entry.options))
    return out


def place(recipe: Recipe, *keys: str) -> str:
    """Where a value is written (or what encloses it): `file:line`, `--set ...`, or `<python>`."""
    for n in range(len(keys), 0, -1):
        if keys[:n] in recipe.places:
            return recipe.places[keys[:n]]
    return recipe.path


@contextmanager
def at_entry(recipe: Recipe, id: str) -> Iterator[None]:
    """Name the entry a UserError is about: its message gets `file:line: 'id': ` in front."""
    try:
        yield
    except RecipeError:
        raise  # has its place
    except UserError as e:
        text = str(e) if str(e).startswith(f"'{id}'") else f"'{id}': {e}"
        raise type(e)(f"{place(recipe, 'methods', id)}: {text}") from None


@contextmanager
def at_train(recipe: Recipe, key: str) -> Iterator[None]:
    """Name the value of the train section a UserError is about: `file:line: ` goes in front."""
    try:
        yield
    except UserError as e:
        raise type(e)(f"{place(recipe, 'train', key)}: {e}") from None


def check_transfer(recipe: Recipe) -> None:
    """Refuse images without labels where not every answer comes from a teacher.

    Raises:
        BindError: with the place of `data.transfer`, and what the recipe has to say besides.
    """
    if recipe.data.transfer is None:
        return
    entries = recipe.methods.values()
    taught = [e for e in entries if (e.verb, e.method) == ("distill", "kd")]
    problem = None
    if recipe.train.epochs == 0:
        problem = "and train.epochs is 0: nothing is trained. Set train: {epochs: N}."
    elif not any(e.options.alpha == 0 and e.options.when is None for e in taught):
        problem = (
            "so a teacher has to answer all through training: write {distill: kd, alpha: 0} "
            "without 'when', or leave transfer out."
        )
    else:
        losses = [e.options.loss.name for e in taught]
        asking = [x for x in losses if "labels" in registry.get("kd_loss", x).meta["needs"]]
        if asking:
            problem = f"and loss '{asking[0]}' needs labels. Take loss: soft."
    if problem is not None:
        where = place(recipe, "data", "transfer")
        raise BindError(f"{where}: data.transfer: its images have no labels, {problem}")


def check_needs(
    methods: list[Method],
    recipe: Recipe,
    *,
    epochs: int,
    calibration: bool,
    teacher: bool,
    validation: bool,
) -> None:
    """Refuse methods whose needs this session cannot meet.

    Raises:
        BindError: names the method, what it needs and how to give it.
    """
    for m in methods:
        with at_entry(recipe, m.id):
            if "train" in m.needs and epochs == 0:
                raise BindError(
                    f"'{m.id}' ({m.verb}: {m.kind_name}) acts during training, but train.epochs is "
                    "0; set train: {epochs: N}."
                )
            if "calibration" in m.needs and not calibration:
                raise BindError(
                    f"'{m.id}' ({m.verb}: {m.kind_name}) needs calibration data: pass "
                    "calibration=<batches> to Session, or set data: {calibration: 300}."
                )
            if "validation" in m.needs and not validation:
                raise BindError(
                    f"'{m.id}' ({m.verb}: {m.kind_name}) goes by the accuracy on validation data: "
                    "pass val=<function that makes labelled batches> to Session, or val=<loader> "
                    "to compress."
                )
            if "teacher" in m.needs and not teacher:
                raise BindError(f"'{m.id}' needs a teacher, and this session was made without one.")


def timetables(methods: list[Method], recipe: Recipe, calendar: Calendar) -> dict[str, Timetable]:
    """All firings of all methods.

    Raises:
        BindError: a method never fires within this training; names its place.
    """
    out: dict[str, Timetable] = {}
    for m in methods:
        when = m.options.timing
        if when is not None:
            with at_entry(recipe, m.id):
                out[m.id] = timetable(when, calendar, strict=recipe.compat == "strict")
    return out


def check_claims(methods: list[Method], s: Any, recipe: Recipe) -> None:
    """Refuse two methods that decide about the same thing, unless one says `after: <other>`.

    Raises:
        PlanConflict: names both entries with their lines.
        BindError: an `after` that names no earlier entry.
    """
    owner: dict[tuple[str, str], Method] = {}
    earlier: list[str] = []
    for m in methods:
        after = getattr(m.options, "after", None)
        if after is not None and after not in earlier:
            raise BindError(
                f"{place(recipe, 'methods', m.id)}: '{m.id}': after must name an entry before it, "
                f"got '{after}'.{nearest(after, earlier) or ' There is none; leave it out.'}"
            )
        earlier.append(m.id)
        for target in m.claims(s):
            other = owner.get(target)
            if other is not None and after != other.id:
                raise PlanConflict(
                    f"{place(recipe, 'methods', m.id)}: {_entry(other.id, recipe)} and "
                    f"{_entry(m.id, recipe)} both set {target[0].split(':')[0]} of '{target[1]}'; "
                    "keep one."
                )
            owner[target] = m


def check_company(methods: list[Method], s: Any, recipe: Recipe) -> None:
    """Refuse entries that would get into each other's way later, in training or at its end.

    Raises:
        BindError: operators go or are replaced when activations are quantized already, or weights
            are masked whose values cannot be zero. Names both entries and the way out.
    """
    for m in methods:
        last = s.moment(m, "last") if m.rewires else None
        for q in methods:
            begins = q.rounds_from(s)
            if last is not None and begins is not None and begins < last:
                raise BindError(
                    f"{place(recipe, 'methods', m.id)}: {_entry(m.id, recipe)} changes operators "
                    f"after {_entry(q.id, recipe)} has quantized activations. Let '{m.id}' fire "
                    f"before '{q.id}' begins, or let '{q.id}' begin later."
                )
    for q in methods:
        never = set(q.nonzero(s))
        for m in methods if never else ():
            if _cut_away(m, q, methods, s):
                continue
            both = [a for a in m.masked(s) if a in never]
            if both:
                raise BindError(
                    f"{place(recipe, 'methods', q.id)}: {_entry(m.id, recipe)} masks '{both[0]}', "
                    f"and the values that {_entry(q.id, recipe)} gives it have no zero. Use "
                    "quantize: share with keep_zeros: true, cut the channels (prune: thin), or "
                    "leave the weight out of one of the two."
                )


def _cut_away(m: Method, q: Method, methods: list[Method], s: Any) -> bool:
    """Whether what one entry masks is removed before another begins; elements never are."""
    masked, begins = s.moment(m, "last"), s.moment(q, "first")
    granularity = getattr(m.options, "granularity", None)
    if granularity is None or granularity.name == "element" or None in (masked, begins):
        return False
    cuts = [s.moment(c, "last") for c in methods if c.cuts_masked]
    return any(c is not None and masked < c < begins for c in cuts)


def _entry(id: str, recipe: Recipe) -> str:
    line = recipe.lines.get(id)
    return f"'{id}'" + (f" (line {line})" if line else "")


def class_names(model: nn.Module) -> dict[str, list[str]]:
    """Module path -> its class name and those of its bases, for `type:` selectors."""
    stop = (nn.Module, object)
    return {
        path: [c.__name__ for c in type(m).__mro__ if c not in stop]
        for path, m in model.named_modules()
    }
