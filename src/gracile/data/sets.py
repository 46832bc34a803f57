"""From what a user writes for data (`digits`, `parquet:DIR`, ...) to a DataBundle for one run."""

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

from gracile import registry
from gracile.core.kinds import check_options
from gracile.core.state import sha256
from gracile.data.bundle import DataBundle, ImageSet, Source, Subset, Unlabelled
from gracile.data.splits import Part, choose
from gracile.errors import UserError

# Mean and standard deviation of ImageNet's pixels in [0, 1]; for gray, averaged over the channels.
MEAN = {3: (0.485, 0.456, 0.406), 1: (0.449,)}
STD = {3: (0.229, 0.224, 0.225), 1: (0.226,)}


def open_data(
    spec: str, *, recipe_data: Mapping[str, Any] | None = None, seed: int = 0
) -> DataBundle:
    """Open a data set and divide it as the recipe says.

    Args:
        spec: a registered name, its location and options: `digits`, `cifar10`, `parquet:DIR`,
            `imagefolder:DIR?size=224`.
        recipe_data: the recipe's `data` section: `train`, `val`, `test`, `calibration` (see
            `splits.choose`), `transfer` (another data set, whose training images are used without
            their labels), `mean`, `std` (per channel, of pixels in [0, 1]; default ImageNet's).
        seed: of the recipe; decides which rows an automatic split takes.

    Raises:
        UserError: no such data set, file or option; a value of the wrong form.
        BindError: rows that do not exist or have two uses.
        MissingExtra: the package that reads this data is not installed.

    >>> bundle = open_data("digits", recipe_data={"val": 200, "test": "test[:100]"})
    >>> len(bundle.train), len(bundle.val), len(bundle.test), bundle.shape
    (1237, 200, 100, (3, 32, 32))
    """
    name, source, options = _open(spec)
    data = dict(recipe_data or {})
    parts = choose({s: images.labels for s, images in source.splits.items()}, data, seed)
    shape = _shape(spec, source.splits)
    transfer = _transfer(data["transfer"], source, shape) if data.get("transfer") else None
    return DataBundle(
        name=name,
        spec=spec,
        train=_subset(source, parts["train"]),
        val=_subset(source, parts["val"]),
        test=_subset(source, parts["test"]),
        calibration=_subset(source, parts["calibration"]),
        classes=len(source.class_names),
        class_names=source.class_names,
        shape=shape,
        mean=_per_channel("mean", data.get("mean"), MEAN[shape[0]]),
        std=_per_channel("std", data.get("std"), STD[shape[0]]),
        sha=_sha(source, parts, options, transfer),
        notes={use: part.note for use, part in parts.items()} | _transfer_note(data, transfer),
        augmentation=(transfer or source).augmentation,
        transfer=Unlabelled(_training_images(transfer)) if transfer else None,
    )


def list_data() -> list[registry.Entry]:
    """All registered data sets, sorted by name."""
    return list(registry.entries("dataset"))


def _open(spec: str) -> tuple[str, Source, dict[str, Any]]:
    place, mark, query = spec.partition("?")
    name, _, location = place.partition(":")
    entry = registry.get("dataset", name)
    try:
        pairs = parse_qsl(query, strict_parsing=True, keep_blank_values=True) if mark else []
    except ValueError:
        raise UserError(f"data '{spec}': options are written ?key=value&key=value.") from None
    options: dict[str, Any] = {k: int(v) if v.isdecimal() else v for k, v in pairs}
    check_options("dataset", name, options)
    return name, entry.obj(location, **options), options


def _subset(source: Source, part: Part) -> ImageSet:
    base = source.splits.get(part.base) or next(iter(source.splits.values()))  # part is empty then
    return Subset(base, part.rows)


def _shape(spec: str, splits: Mapping[str, ImageSet]) -> tuple[int, int, int]:
    shapes = {split: tuple(images.images([0]).shape[1:]) for split, images in splits.items()}
    (first, shape), *others = shapes.items()
    for split, other in others:
        if other != shape:
            raise UserError(
                f"data '{spec}': images of {first} are {shape}, of {split} {other} "
                "(channels, height, width); add ?size=PIXELS or ?channels=3."
            )
    channels, height, width = shape
    return channels, height, width


def _per_channel(key: str, value: Any, default: tuple[float, ...]) -> tuple[float, ...]:
    if value is None:
        return default
    numbers = list(value) if isinstance(value, (list, tuple)) else [value] * len(default)
    fits = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in numbers)
    if not fits or len(numbers) != len(default) or (key == "std" and min(numbers) <= 0):
        rule = "positive numbers" if key == "std" else "numbers"
        raise UserError(
            f"recipe: data.{key} must be {len(default)} {rule}, one a channel: {value!r}."
        )
    return tuple(float(v) for v in numbers)


def _transfer(spec: str, source: Source, shape: tuple[int, ...]) -> Source:
    """The transfer set, which must not hold the rows that are tested on."""
    try:
        found = _open(spec)[1]
    except UserError as e:
        raise type(e)(f"recipe: data.transfer: {e}") from None
    if found.sha == source.sha:
        raise UserError(
            f"recipe: data.transfer: '{spec}' is the data set of the run itself. Name another, or "
            "leave transfer out: the training rows can teach without their labels as well "
            "(distill: kd, alpha: 0)."
        )
    theirs = _shape(spec, found.splits)
    if theirs != shape:
        raise UserError(
            f"recipe: data.transfer: images of '{spec}' are {theirs}, of the data {shape} "
            "(channels, height, width); add ?size=PIXELS or ?channels=3."
        )
    return found


def _training_images(source: Source) -> ImageSet:
    return source.splits.get("train") or next(iter(source.splits.values()))


def _transfer_note(data: Mapping[str, Any], transfer: Source | None) -> dict[str, str]:
    if transfer is None:
        return {}
    count = len(_training_images(transfer))
    return {"transfer": f"{data['transfer']}, {count} images without labels, in the place of train"}


def _sha(
    source: Source, parts: Mapping[str, Part], options: Mapping[str, Any], transfer: Source | None
) -> str:
    rows = {use: [p.base, sha256(p.rows.numpy().tobytes())] for use, p in sorted(parts.items())}
    identity = [source.sha, options, rows, *([transfer.sha] if transfer else [])]
    return sha256(json.dumps(identity, sort_keys=True))
