"""What the rest of gracile sees of a data set: its parts, its normalization, its identity."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class ImageSet(Protocol):
    """Labelled images of one shape, by row."""

    @property
    def labels(self) -> Tensor:
        """(N,) int64, the class of each row."""
        ...

    def __len__(self) -> int: ...

    def images(self, rows: Tensor | Sequence[int]) -> Tensor:
        """The pixels of some rows, uint8 (n, C, H, W), in the order asked for."""
        ...


class TensorImages:
    """Images that are in memory already.

    Args:
        pixels: uint8 (N, C, H, W).
        labels: (N,) int64.
    """

    def __init__(self, pixels: Tensor, labels: Tensor):
        if pixels.dtype != torch.uint8 or pixels.dim() != 4 or len(pixels) != len(labels):
            raise ValueError(
                "pixels must be uint8 (N, C, H, W) with one label each, got "
                f"{pixels.dtype} {tuple(pixels.shape)} and {len(labels)} labels."
            )
        self.pixels = pixels
        self.labels = labels.long()

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, rows: Tensor | Sequence[int]) -> Tensor:
        """The pixels of some rows."""
        return self.pixels[torch.as_tensor(rows, dtype=torch.long)]


class Subset:
    """Some rows of another set, in this order.

    Args:
        base: the set.
        rows: (n,) row numbers in it.
    """

    def __init__(self, base: ImageSet, rows: Tensor):
        self.base = base
        self.rows = rows.long()
        self.labels = base.labels[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, rows: Tensor | Sequence[int]) -> Tensor:
        """The pixels of some rows."""
        return self.base.images(self.rows[torch.as_tensor(rows, dtype=torch.long)])


class Unlabelled:
    """The images of another set, all of class 0.

    Args:
        base: the set.
    """

    def __init__(self, base: ImageSet):
        self.base = base
        self.labels = torch.zeros(len(base), dtype=torch.long)

    def __len__(self) -> int:
        return len(self.base)

    def images(self, rows: Tensor | Sequence[int]) -> Tensor:
        """The pixels of some rows."""
        return self.base.images(rows)


@dataclass(frozen=True)
class Source:
    """What a registered data set returns: its splits as they are on disk.

    Attributes:
        splits: `train`, `val`, `test`, those there are.
        class_names: by label.
        sha: hash of the content.
        augmentation: the Loader's `augment` that suits these images when they are trained on.
    """

    splits: Mapping[str, ImageSet]
    class_names: tuple[str, ...]
    sha: str
    augmentation: str = "standard"


@dataclass(frozen=True)
class DataBundle:
    """A data set made ready for one run.

    Attributes:
        name: of the source, e.g. "parquet".
        spec: what the user wrote.
        train, val, test: disjoint; one may be empty where the set has no such images.
        calibration: images to set ranges and statistics with, in drawing order.
        classes: how many.
        class_names: by label.
        shape: (C, H, W) of every image.
        mean, std: per channel, of pixels scaled to [0, 1].
        sha: hash of the content and of the choice of rows.
        notes: which rows each part is, for the report: ``{"test": "test rows 5000-9999"}``.
        augmentation: the Loader's `augment` that suits the images that are trained on.
        transfer: images without labels to train on in the place of `train`, if there are.
    """

    name: str
    spec: str
    train: ImageSet
    val: ImageSet
    test: ImageSet
    calibration: ImageSet
    classes: int
    class_names: tuple[str, ...]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sha: str
    notes: Mapping[str, str] = field(default_factory=dict)
    augmentation: str = "standard"
    transfer: ImageSet | None = None
