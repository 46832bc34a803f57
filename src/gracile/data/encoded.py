"""Images stored as PNG or JPEG: decoded when first asked for, kept or not."""

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gracile.data.progress import slow_progress
from gracile.errors import UserError

GRAY_MODES = ("1", "L", "LA")


class EncodedImages:
    """A set whose rows are image files in memory or on disk. All must end with one shape.

    Args:
        name: for messages, e.g. "train.parquet".
        read: row number -> the encoded bytes.
        labels: (N,) int64.
        channels: 1 or 3; None for what the first image has.
        size: resize the short side to this and cut a square from the middle; None for as stored.
        keep: keep decoded pixels in memory; otherwise every request decodes anew, in threads.
    """

    def __init__(
        self,
        name: str,
        read: Callable[[int], bytes],
        labels: Tensor,
        *,
        channels: int | None = None,
        size: int | None = None,
        keep: bool,
    ):
        if channels not in (None, 1, 3):
            raise UserError(f"data option 'channels' must be 1 or 3, got {channels}.")
        if size is not None and (not isinstance(size, int) or size < 1):
            raise UserError(f"data option 'size' must be a positive number of pixels, got {size}.")
        self.name = name
        self.labels = labels.long()
        self._read: Callable[[int], bytes] | None = read
        self._channels = channels
        self._size = size
        self._keep = keep
        self._shape: tuple[int, ...] | None = None
        self._pixels = torch.empty(0, dtype=torch.uint8)
        self._have = torch.zeros(len(self.labels), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, rows: Tensor | Sequence[int]) -> Tensor:
        """The pixels of some rows.

        Raises:
            UserError: an image cannot be decoded, or has another shape than the first.
        """
        rows = torch.as_tensor(rows, dtype=torch.long)
        if self._shape is None:
            self._shape = tuple(self._first().shape)
        if self._keep:
            self._fill(rows)
            return self._pixels[rows]
        out = np.empty((len(rows), *self._shape), dtype=np.uint8)
        with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock
            for k, pixels in enumerate(pool.map(self._decode, rows.tolist())):
                out[k] = pixels
        return torch.from_numpy(out)

    def _first(self) -> NDArray[np.uint8]:
        if self._channels is None:
            self._channels = 1 if self._open(0).mode in GRAY_MODES else 3
        return self._decode(0)

    def _fill(self, rows: Tensor) -> None:
        if not len(self._pixels) and self._shape is not None:
            self._pixels = torch.empty(len(self), *self._shape, dtype=torch.uint8)
        missing = rows[~self._have[rows]].unique().tolist()
        for row in slow_progress(missing, f"decoding {self.name}"):
            self._pixels[row] = torch.from_numpy(self._decode(row))
        self._have[rows] = True
        if self._have.all():
            self._read = None  # the encoded bytes are not needed any more

    def _open(self, row: int) -> Any:
        from PIL import Image, UnidentifiedImageError

        if self._read is None:
            raise RuntimeError(f"{self.name}: row {row} was decoded and released.")
        try:
            image = Image.open(io.BytesIO(self._read(row)))
            image.load()
        except (UnidentifiedImageError, OSError, SyntaxError) as e:
            raise UserError(f"{self.name}: row {row} is not a readable image: {e}.") from None
        return image

    def _decode(self, row: int) -> NDArray[np.uint8]:
        image = self._open(row)
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # else Pillow warns
        image = image.convert("L" if self._channels == 1 else "RGB")
        if self._size is not None:
            image = _square(image, self._size)
        pixels = np.array(image, dtype=np.uint8)
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        if self._shape is not None and pixels.shape != self._shape:
            raise UserError(
                f"{self.name}: images differ in shape: row 0 is {self._shape}, row {row} is "
                f"{pixels.shape}; add ?size=PIXELS."
            )
        return pixels


def _square(image: Any, size: int) -> Any:
    from PIL import Image

    width, height = image.size
    short = min(width, height)
    width, height = round(width * size / short), round(height * size / short)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
