"""Which rows are for training, validation, testing and calibration; never two uses of one row.

Decided from the labels and the recipe's `data` section alone, before any pixel is read.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gracile.core.state import derive_seed
from gracile.errors import BindError, UserError, nearest

KEYS = ("train", "val", "test", "calibration", "transfer", "mean", "std")
AUTO_VAL = 0.1  # share of the training rows
CALIBRATION = 300
ROWS = re.compile(r"(train|val|test)(?:\[(-?\d*):(-?\d*)\])?")


@dataclass(frozen=True)
class Part:
    """Rows of one split on disk.

    Attributes:
        base: "train", "val" or "test".
        rows: (n,) int64.
        note: the same for people.
    """

    base: str
    rows: Tensor
    note: str


def choose(labels: Mapping[str, Tensor], data: Mapping[str, Any], seed: int) -> dict[str, Part]:
    """Divide the rows as the recipe says.

    Args:
        labels: class of every row, for each split there is.
        data: the recipe's `data` section; None and a missing key mean the default:
            `train`, `test`: all rows of that split ("test[:5000]" for some);
            `val` "auto": the set's own val split, else a stratified 10 % of train; a share or a
            count to cut from train; or rows, "test[5000:]";
            `calibration` 300: so many training rows; or rows.
        seed: of the recipe.

    Returns:
        `train`, `val`, `test` (disjoint) and `calibration` (in drawing order, disjoint from test).
        Rows named for val or test leave the training rows, unless those are named as well.

    Raises:
        BindError: rows that do not exist, that have two uses, or a part that cannot be made.
        UserError: an unknown key or a value of the wrong form.
    """
    for key in data:
        if key not in KEYS:
            raise UserError(f"recipe: data has no key '{key}'.{nearest(key, KEYS)}")
    given = {k: v for k, v in data.items() if v is not None and k in KEYS}
    named = {
        key: _rows(f"data.{key}", given[key], labels)
        for key in ("train", "val", "test", "calibration")
        if isinstance(given.get(key), str) and given[key] != "auto"
    }
    for key in ("train", "test"):
        if key in given and key not in named:
            raise UserError(f"recipe: data.{key} must be rows like '{key}[:5000]': {given[key]!r}.")
    test = named.get("test") or _whole(_test_split(labels), labels)
    pool = named.get("train") or _without(_whole("train", labels), test, named.get("val"))
    val = named.get("val")
    if val is None and _own_val(labels, given, test):
        val = _whole("val", labels)
    if val is not None:
        _refuse_overlap("val", val, "test", test)
        _refuse_overlap("val", val, "train", pool)
    _refuse_overlap("test", test, "train", pool)
    if val is None:
        val, pool = _cut(given.get("val", "auto"), pool, labels, seed)
    calibration = named.get("calibration") or _calibration(
        given.get("calibration", CALIBRATION), pool, seed
    )
    _refuse_overlap("calibration", calibration, "test", test)
    return {"train": pool, "val": val, "test": test, "calibration": calibration}


def stratified(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw rows so that every class has its share, rounded by largest remainder.

    Args:
        labels: (N,) classes.
        count: rows to draw, at most N.
        generator: of the draw.

    Returns:
        (count,) increasing row numbers.

    >>> rows = stratified(torch.tensor([0, 0, 0, 0, 1, 1]), 3, torch.Generator().manual_seed(0))
    >>> [int((rows < 4).sum()), int((rows >= 4).sum())]
    [2, 1]
    """
    classes, sizes = labels.unique(return_counts=True)
    share = sizes.double() * count / max(1, len(labels))
    quota = share.floor().long()
    order = (share - quota).argsort(descending=True, stable=True)
    quota[order[: count - int(quota.sum())]] += 1
    picked = []
    for c, n in zip(classes, quota, strict=True):
        rows = (labels == c).nonzero().flatten()
        picked.append(rows[torch.randperm(len(rows), generator=generator)[: int(n)]])
    return torch.cat(picked).sort().values if picked else torch.empty(0, dtype=torch.long)


def _rows(key: str, text: str, labels: Mapping[str, Tensor]) -> Part:
    match = ROWS.fullmatch(text.replace(" ", ""))
    if match is None:
        raise UserError(
            f"recipe: {key} must be like 'test[5000:]' or 'train[:1000]', got '{text}'."
        )
    base, first, last = match.groups()
    if base not in labels:
        raise BindError(f"recipe: {key}: this data has no {base} split.{nearest(base, labels)}")
    total = len(labels[base])
    for bound in (first, last):
        if bound and not -total <= int(bound) <= total:
            raise BindError(
                f"recipe: {key}: '{text}' is out of range: {base} has {total} rows. Take "
                "others, or other data (on the command line --data)."
            )
    start, stop, _ = slice(_number(first), _number(last)).indices(total)
    if stop <= start:
        raise BindError(f"recipe: {key}: '{text}' has no rows: {base} has {total}.")
    return _part(base, torch.arange(start, stop), total)


def _number(text: str | None) -> int | None:
    return int(text) if text and text != "-" else None


def _part(base: str, rows: Tensor, total: int, how: str = "") -> Part:
    n = len(rows)
    if n == 0:
        return Part(base, rows, "none")
    if n == int(rows[-1]) - int(rows[0]) + 1:
        note = f"{base} rows {int(rows[0])}-{int(rows[-1])}" + (" (all)" if n == total else "")
    else:
        note = f"{n} of the {total} {base} rows"
    return Part(base, rows, note + how)


def _whole(base: str, labels: Mapping[str, Tensor]) -> Part:
    total = len(labels.get(base, ()))
    return _part(base, torch.arange(total), total)


def _test_split(labels: Mapping[str, Tensor]) -> str:
    for base in ("test", "val"):
        if base in labels:
            return base
    raise BindError(
        "recipe: this data has neither a test nor a val split; name test rows, for example "
        "data.test: 'train[-1000:]'."
    )


def _own_val(labels: Mapping[str, Tensor], given: Mapping[str, Any], test: Part) -> bool:
    return given.get("val", "auto") == "auto" and "val" in labels and test.base != "val"


def _without(part: Part, *others: Part | None) -> Part:
    keep = torch.ones(len(part.rows), dtype=torch.bool)
    for other in others:
        if other is not None and other.base == part.base:
            keep &= ~torch.isin(part.rows, other.rows)
    return _part(part.base, part.rows[keep], len(part.rows))


def _cut(asked: Any, pool: Part, labels: Mapping[str, Tensor], seed: int) -> tuple[Part, Part]:
    n = len(pool.rows)
    if asked == "auto":
        count = max(1, round(AUTO_VAL * n)) if n > 1 else 0
    elif isinstance(asked, bool) or not isinstance(asked, (int, float)):
        raise UserError(
            "recipe: data.val must be auto, a share, a count or rows like 'test[5000:]', "
            f"got {asked!r}."
        )
    else:
        count = round(asked * n) if isinstance(asked, float) else asked
        if asked <= 0 or (isinstance(asked, float) and asked >= 1) or not 0 < count < n:
            raise BindError(
                f"recipe: data.val: cannot cut {asked} from {n} training rows; give a share in "
                "(0, 1) or a count that leaves some."
            )
    if count == 0:
        return Part("train", torch.empty(0, dtype=torch.long), "none"), pool
    generator = torch.Generator().manual_seed(derive_seed(seed, "val split"))
    picked = stratified(labels[pool.base][pool.rows], count, generator)
    total = len(labels[pool.base])
    val = _part(pool.base, pool.rows[picked], total, f" (stratified, seed {seed})")
    left = torch.ones(n, dtype=torch.bool)
    left[picked] = False
    return val, _part(pool.base, pool.rows[left], total)


def _calibration(asked: Any, pool: Part, seed: int) -> Part:
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < 1:
        raise UserError(
            "recipe: data.calibration must be a count of training images or rows like "
            f"'test[5000:5300]', got {asked!r}."
        )
    n = len(pool.rows)
    generator = torch.Generator().manual_seed(derive_seed(seed, "calibration"))
    rows = pool.rows[torch.randperm(n, generator=generator)[:asked]]
    note = f"{len(rows)} of the {n} training images, drawn with seed {seed}" if n else "none"
    if 0 < n < asked:
        note += f" ({asked} were asked)"
    return Part(pool.base, rows, note)


def _refuse_overlap(a: str, part: Part, b: str, other: Part) -> None:
    if part.base != other.base:
        return
    both = int(torch.isin(part.rows, other.rows).sum())
    if both:
        raise BindError(
            f"recipe: data.{a} ({part.note}) and data.{b} ({other.note}) share {both} rows; "
            f"name disjoint rows for both, for example {b}: '{other.base}[:1000]' and "
            f"{a}: '{part.base}[1000:]'."
        )
