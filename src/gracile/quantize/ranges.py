"""Ranges of activations in a file: what one calibration saw, for the next quantization.

Ours is JSON: `{"format": 1, "ranges": {"<operator>": {"low", "high", "observer"}}}`. Distiller's
statistics files (YAML) are read as well; they hold enough for the clipping modes it had.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from gracile.core.state import write_json
from gracile.errors import UserError, nearest
from gracile.quantize.observers.aciq import GAUSS, LAPLACE, clip_factor
from gracile.recipe.distiller.names import plain_name
from gracile.recipe.fields import Kernel

FORMAT = 1
NAME = "ranges.json"  # in a run directory
MAX_BYTES = 8 << 20


class Range(NamedTuple):
    """What an activation spans.

    Attributes:
        low, high: its ends, before the grid puts zero into them.
        observer: registered name of what found it; "file" if that is not known.
    """

    low: float
    high: float
    observer: str = "file"

    def above_zero(self) -> "Range":
        """The same from zero on: of what cannot be negative."""
        return Range(0.0, max(self.high, 0.0), self.observer)


class Wanted(NamedTuple):
    """An activation that needs a range.

    Attributes:
        id: its operator.
        read_by: for the model's input, the module that reads it: where Distiller noted it.
        bits: of its grid.
        nonnegative: whether it cannot be below zero.
        symmetric: whether its zero point is 0.
    """

    id: str
    read_by: str | None
    bits: int
    nonnegative: bool
    symmetric: bool


def save_ranges(path: Path, ranges: Mapping[str, Range]) -> None:
    """Write ours, in one step."""
    write_json(path, {"format": FORMAT, "ranges": {k: r._asdict() for k, r in ranges.items()}})


def find_ranges(name: str, recipe: str) -> Path:
    """The file that a recipe's `ranges` means: relative to the recipe's folder.

    A run directory has the recipe and the ranges that were used, but not the file: there it is
    `ranges.json`.

    Args:
        name: as in the recipe.
        recipe: where the recipe was read from; `<python>` stands for the working directory.

    Raises:
        UserError: no such file.
    """
    folder = Path() if recipe.startswith("<") else Path(recipe).parent
    path = folder / name
    if of_a_run(folder / NAME):
        return folder / NAME
    if not path.is_file():
        raise UserError(f"ranges: {path}: no such file; it is looked for beside the recipe.")
    return path


def of_a_run(path: Path) -> bool:
    """Whether this is the file that a run left in its directory."""
    return path.name == NAME and path.is_file() and (path.parent / "state" / "run.json").is_file()


def load_ranges(
    path: Path, wanted: list[Wanted], observer: Kernel, *, cut: bool = False
) -> dict[str, Range]:
    """The ranges of a file, for these activations.

    Args:
        path: `.yaml` or `.yml` is a statistics file of Distiller, anything else ours.
        wanted: every one gets its range.
        observer: for Distiller's files: which of their statistics make up a range (min_max,
            mean_extremes, three_sigma with spread std, or aciq).
        cut: the model may have been cut since, so that the file may have more than it has.

    Raises:
        UserError: not such a file, a range that is none, an activation it lacks, or (ours) one that
            the model has not.
    """
    data = _read(path)
    if path.suffix in (".yaml", ".yml"):
        return _of_distiller(path, data, wanted, observer)
    if data.get("format") != FORMAT or not isinstance(data.get("ranges"), dict):
        raise UserError(
            f"{path}: not a file of ranges: it needs format: {FORMAT} and ranges; see {NAME} in a "
            "run directory."
        )
    ids = [w.id for w in wanted]
    unknown = [k for k in data["ranges"] if k not in ids]
    if unknown and not cut:
        raise UserError(
            f"{path}: has a range of '{unknown[0]}', which is no quantized activation of this "
            f"model.{nearest(unknown[0], ids)} Leave 'ranges' out to calibrate."
        )
    _complete(path, ids, data["ranges"])
    return {id: _range(path, id, data["ranges"][id]) for id in ids}


def _read(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: must not be larger than 8 MiB; is this the right file?")
    try:
        text = path.read_text("utf-8")
        found = yaml.safe_load(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
    except (ValueError, yaml.YAMLError, RecursionError) as e:
        raise UserError(f"{path}: cannot be read: {str(e).splitlines()[0]}.") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: must hold a mapping, got {type(found).__name__}.")
    return found


def _range(path: Path, id: str, found: Any) -> Range:
    low, high = (_number(path, id, found, key) for key in ("low", "high"))
    if low > high:
        raise UserError(f"{path}: '{id}' must have low <= high, got {low:g} and {high:g}.")
    return Range(low, high, str(found.get("observer", "file")))


def _number(path: Path, id: str, found: Any, key: str) -> float:
    value = found.get(key) if isinstance(found, dict) else None
    if isinstance(value, bool):
        value = None
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{path}: '{id}' must have a finite number '{key}', got {value!r}.")
    return number


def _complete(path: Path, ids: list[str], there: Mapping[str, Any]) -> None:
    missing = [id for id in ids if id not in there]
    if missing:
        more = f" (and of {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(
            f"{path}: lacks the range of '{missing[0]}'{more}."
            f"{nearest(missing[0], map(str, there))} Leave 'ranges' out to calibrate."
        )


# ------------------------------------------------------------------ Distiller


def _of_distiller(
    path: Path, data: Mapping[str, Any], wanted: list[Wanted], observer: Kernel
) -> dict[str, Range]:
    """`<module>: {inputs: {0: STATS}, output: STATS}`; STATS are numbers about one tensor."""
    modules = {plain_name(str(k)): v for k, v in data.items() if isinstance(v, dict)}
    stats: dict[str, Any] = {}
    for w in wanted:
        if w.id in modules:
            stats[w.id] = modules[w.id].get("output")
        elif w.read_by in modules:
            inputs = modules[w.read_by].get("inputs")
            stats[w.id] = inputs.get(0) if isinstance(inputs, dict) else None
    _complete(path, [w.id for w in wanted], stats)
    rule = _RULES.get(observer.name)
    if rule is None or (observer.name == "three_sigma" and _option(observer, "spread") != "std"):
        raise UserError(
            f"{path}: a statistics file of Distiller has nothing for the observer "
            f"'{observer.name}'; take min_max, mean_extremes, aciq, or "
            "{name: three_sigma, spread: std}."
        )
    out = {}
    for w in wanted:
        number: Callable[[str], float] = lambda key, w=w: _number(path, w.id, stats[w.id], key)  # type: ignore[misc]  # noqa: E731
        low, high = rule(number, w, observer)
        least, most = number("min"), number("max")
        out[w.id] = Range(min(max(low, least), most), max(min(high, most), least), observer.name)
    return out


def _sigmas(number: Callable[[str], float], w: Wanted, o: Kernel) -> tuple[float, float]:
    n = float(_option(o, "n"))
    return number("mean") - n * number("std"), number("mean") + n * number("std")


def _analytical(number: Callable[[str], float], w: Wanted, o: Kernel) -> tuple[float, float]:
    """Of a ReLU, Distiller's file has the spread of all values; its mean stays the middle."""
    distribution = _option(o, "distribution")
    distribution = LAPLACE if distribution == "best" else distribution
    clip = clip_factor(w.bits + w.nonnegative, distribution)
    clip *= number("std" if distribution == GAUSS else "b")
    middle = 0.0 if w.symmetric else number("mean")
    return middle - clip, middle + clip


def _option(o: Kernel, key: str) -> Any:
    return getattr(o.fn(), key)


_RULES: dict[str, Callable[..., tuple[float, float]]] = {
    "min_max": lambda number, w, o: (number("min"), number("max")),
    "mean_extremes": lambda number, w, o: (number("avg_min"), number("avg_max")),
    "three_sigma": _sigmas,
    "aciq": _analytical,
}
