"""CIFAR-10 through Hugging Face `datasets`, which downloads it once and keeps it.

Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images".
"""

import json
from typing import Any

from gracile import registry
from gracile.core.state import sha256
from gracile.data.bundle import ImageSet, Source
from gracile.data.encoded import EncodedImages
from gracile.data.parquet import check_labels, check_names
from gracile.errors import MissingExtra, UserError

REPOSITORY = "uoft-cs/cifar10"


@registry.register("dataset", "cifar10", source="Krizhevsky 2009; Hugging Face uoft-cs/cifar10")
def cifar10(location: str) -> Source:
    """50,000 training and 10,000 test images of 32x32 pixels in 10 classes.

    Raises:
        UserError: something follows the name, or the download fails.
        MissingExtra: `datasets` is not installed.
    """
    if location:
        raise UserError(f"data 'cifar10:{location}': for files of your own write parquet:DIR.")
    try:
        import datasets
    except ImportError:
        raise MissingExtra("the data set 'cifar10'", "hf") from None
    try:
        found = datasets.load_dataset(REPOSITORY)
    except Exception as e:
        raise UserError(
            f"cannot get '{REPOSITORY}' from Hugging Face ({type(e).__name__}: {_first_line(e)}); "
            "with the files on disk write parquet:DIR."
        ) from e
    parts = {split: found[split] for split in ("train", "test")}
    splits: dict[str, ImageSet] = {split: _images(split, part) for split, part in parts.items()}
    names = tuple(parts["train"].features["label"].names)
    facts = {s: [len(p), p._fingerprint] for s, p in parts.items()}
    return Source(splits, check_names(names, splits, "cifar10"), sha256(json.dumps(facts)))


def _images(split: str, part: Any) -> EncodedImages:
    import datasets

    encoded = part.cast_column("img", datasets.Image(decode=False))

    def read(row: int) -> bytes:
        data: bytes = encoded[row]["img"]["bytes"]
        return data

    labels = check_labels(part["label"][:], f"cifar10 {split}")
    return EncodedImages(f"cifar10 {split}", read, labels, channels=3, keep=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n", 1)[0]
