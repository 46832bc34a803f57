"""A folder of parquet files with encoded images, the layout of the Hugging Face data sets."""

import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gracile import registry
from gracile.core.state import sha256
from gracile.data.bundle import ImageSet, Source
from gracile.data.encoded import EncodedImages
from gracile.errors import MissingExtra, UserError

IMAGE_COLUMNS = ("img", "image")
SPLITS = ("train", "val", "test")


@registry.register("dataset", "parquet", source="Hugging Face image data sets, as parquet files")
def parquet(
    location: str,
    *,
    image: str = "",
    label: str = "label",
    channels: int | None = None,
    size: int | None = None,
) -> Source:
    """`parquet:DIR`: train, val and test.parquet, those there are, decoded into memory.

    Args:
        location: the folder.
        image: column of the images, PNG or JPEG, plain bytes or a struct with the field `bytes`;
            default `img` or `image`.
        label: column of the class numbers.
        channels: 1 or 3; default what the first image has.
        size: resize the short side to this and cut a square; default as stored.

    Raises:
        UserError: no such folder or file, another layout, or labels that are no class numbers.
        MissingExtra: pyarrow is not installed.
    """
    folder = Path(location)
    if not location or not folder.is_dir():
        raise UserError(f"data 'parquet:{location}': no such folder.")
    files = {s: folder / f"{s}.parquet" for s in SPLITS if (folder / f"{s}.parquet").is_file()}
    if not files:
        raise UserError(f"{location}: has none of train.parquet, val.parquet, test.parquet.")
    splits: dict[str, ImageSet] = {}
    names: tuple[str, ...] = ()
    for split, file in files.items():
        schema, count = _schema(file)
        if count == 0:
            continue
        column = _image_column(file, schema.names, image)
        labels = _labels(file, schema.names, label)
        names = names or class_names(schema.metadata, label)
        splits[split] = EncodedImages(
            str(file),
            _reader(file, column),
            labels,
            channels=channels,
            size=size,
            keep=True,
        )
    return Source(splits, check_names(names, splits, location), _sha(files))


def check_names(names: tuple[str, ...], splits: dict[str, ImageSet], where: str) -> tuple[str, ...]:
    """Class names that cover all labels; the numbers themselves where a data set names none.

    Raises:
        UserError: a label is beyond the names.
    """
    most = max((int(s.labels.max()) + 1 for s in splits.values()), default=0)
    if not names:
        return tuple(str(n) for n in range(most))
    if most > len(names):
        raise UserError(f"{where}: label {most - 1} has no name: {len(names)} classes are named.")
    return names


def class_names(metadata: dict[bytes, bytes] | None, label: str) -> tuple[str, ...]:
    """The names Hugging Face writes into a file's schema; empty where there are none."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(n) for n in features[label]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def check_labels(values: Any, where: str) -> Tensor:
    """Class numbers as (N,) int64.

    Raises:
        UserError: one is missing, negative or no integer.
    """
    try:
        labels = torch.tensor(values)
    except (TypeError, ValueError, RuntimeError):
        labels = torch.tensor([0.5])
    if labels.is_floating_point() or labels.dtype == torch.bool or int(labels.min()) < 0:
        raise UserError(f"{where}: labels must be integers >= 0, one a row.")
    return labels.long()


def _schema(file: Path) -> tuple[Any, int]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise MissingExtra(f"reading {file.name}", "parquet") from None
    try:
        with ParquetFile(file) as opened:
            return opened.schema_arrow, opened.metadata.num_rows
    except (pyarrow.ArrowInvalid, OSError) as e:
        raise UserError(f"{file}: not a parquet file ({e}).") from None


def _image_column(file: Path, columns: list[str], asked: str) -> str:
    for name in (asked,) if asked else IMAGE_COLUMNS:
        if name in columns:
            return name
    wanted = f"'{asked}'" if asked else "'img' or 'image'"
    raise UserError(
        f"{file}: no column {wanted} for the images; it has {', '.join(columns)}. "
        "Add ?image=COLUMN."
    )


def _labels(file: Path, columns: list[str], name: str) -> Tensor:
    from pyarrow.parquet import read_table

    if name not in columns:
        raise UserError(
            f"{file}: no column '{name}' for the labels; it has {', '.join(columns)}. "
            "Add ?label=COLUMN."
        )
    return check_labels(
        read_table(file, columns=[name])[name].to_pylist(), f"{file}, column '{name}'"
    )


def _reader(file: Path, column: str) -> Callable[[int], bytes]:
    @cache  # the encoded bytes stay only as long as the reader does
    def encoded() -> Any:
        import pyarrow.compute as pc
        from pyarrow import types
        from pyarrow.parquet import read_table

        values = read_table(file, columns=[column])[column]
        return pc.struct_field(values, "bytes") if types.is_struct(values.type) else values

    def read(row: int) -> bytes:
        data = encoded()[row].as_py()
        if not isinstance(data, bytes):
            raise UserError(f"{file}: row {row} of column '{column}' holds no image bytes.")
        return data

    return read


def _sha(files: dict[str, Path]) -> str:
    hashes = []
    for split, file in sorted(files.items()):
        with open(file, "rb") as opened:
            hashes.append([split, hashlib.file_digest(opened, "sha256").hexdigest()])
    return sha256(json.dumps(hashes))
