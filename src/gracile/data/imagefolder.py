"""A folder of image files, one sub-folder a class: the layout of ImageNet."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from gracile import registry
from gracile.core.state import sha256
from gracile.data.bundle import ImageSet, Source
from gracile.data.encoded import EncodedImages
from gracile.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
SPLITS = ("train", "val", "test")


@registry.register("dataset", "imagefolder", source="the folder layout of ImageNet and torchvision")
def imagefolder(location: str, *, size: int | None = None, channels: int = 3) -> Source:
    """`imagefolder:DIR?size=224`: DIR/train/CLASS/*.jpg, DIR/val and DIR/test likewise.

    Images stay on disk and are decoded batch by batch. Without a test folder, val is for testing.

    Args:
        location: the folder.
        size: resize the short side to this and cut a square; default as stored, if all are alike.
        channels: 3, or 1 for gray.

    Raises:
        UserError: no such folder, no images, or a class that train does not have.
    """
    folder = Path(location)
    if not location or not folder.is_dir():
        raise UserError(f"data 'imagefolder:{location}': no such folder.")
    found = {s: list(_files(folder / s)) for s in SPLITS if (folder / s).is_dir()}
    found = {split: files for split, files in found.items() if files}
    if not found:
        raise UserError(
            f"{location}: no images; expected {location}/train/CLASS/*.png and {location}/test or "
            f"{location}/val."
        )
    first = next(iter(found))
    names = sorted({name for name, _, _ in found[first]})
    splits: dict[str, ImageSet] = {}
    for split, files in found.items():
        strange = sorted({name for name, _, _ in files} - set(names))
        if strange:
            raise UserError(f"{folder / split}: class '{strange[0]}' is not in {folder / first}.")
        splits[split] = _open(folder / split, files, names, size, channels)
    listing = [
        f"{split} {path.relative_to(folder)} {n}"
        for split, files in found.items()
        for _, path, n in files
    ]
    return Source(splits, tuple(names), sha256("\n".join(listing)))


def _files(folder: Path) -> Iterator[tuple[str, Path, int]]:
    """(class, file, size in bytes) of every image, in an order that does not depend on the disk."""
    for cls in sorted(p for p in folder.iterdir() if p.is_dir()):
        for place, folders, files in os.walk(cls):
            folders.sort()
            for name in sorted(files):
                if name.lower().endswith(SUFFIXES):
                    path = Path(place) / name
                    yield cls.name, path, path.stat().st_size


def _open(
    folder: Path,
    files: list[tuple[str, Path, int]],
    names: list[str],
    size: int | None,
    channels: int,
) -> EncodedImages:
    label = {name: k for k, name in enumerate(names)}
    paths = [path for _, path, _ in files]
    return EncodedImages(
        str(folder),
        lambda row: paths[row].read_bytes(),
        torch.tensor([label[name] for name, _, _ in files]),
        channels=channels,
        size=size,
        keep=False,
    )
