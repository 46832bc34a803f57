"""Batches that are a function of (seed, epoch, batch): a resumed epoch repeats bit for bit.

Augmentation is drawn per place in the epoch, not per process, so the batches of two ranks together
are the batch of one, and a run that starts in mid-epoch sees what an uninterrupted one saw.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gracile.core.state import derive_seed
from gracile.data.bundle import DataBundle, ImageSet, Subset
from gracile.errors import UserError, nearest

PAD = 4  # pixels; He et al. 2015, arXiv:1512.03385, section 4.2
AUGMENTS = ("none", "standard", "shift")


class Loader:
    """Normalized batches of an ImageSet.

    Args:
        imageset: the images.
        batch_size: images in a batch, of this rank.
        mean, std: per channel, of pixels scaled to [0, 1].
        seed: decides order and augmentation.
        shuffle: a new order every epoch; else as stored.
        augment: "none"; "standard": crop at random out of the image with 4 black pixels around it
            and mirror every other image; "shift": crop only.
        drop_last: leave out the last batch if it is smaller; with `world` > 1 all ranks then have
            equally many batches, without it their numbers may differ by one.
        device: where the batches go.
        rank, world: this process takes every `world`-th image of the order, from the `rank`-th.

    Raises:
        UserError: no images, or an option out of its range.
    """

    def __init__(
        self,
        imageset: ImageSet,
        batch_size: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int = 0,
        shuffle: bool = False,
        augment: str = "none",
        drop_last: bool = False,
        device: str | torch.device = "cpu",
        rank: int = 0,
        world: int = 1,
    ):
        if len(imageset) == 0:
            raise UserError("this part of the data has no images; see the recipe's data section.")
        if batch_size < 1:
            raise UserError(f"batch_size must be >= 1, got {batch_size}.")
        if augment not in AUGMENTS:
            raise UserError(f"unknown augment '{augment}'.{nearest(augment, AUGMENTS)}")
        if not 0 <= rank < world:
            raise UserError(f"rank must be in 0..world-1, got rank {rank} of {world}.")
        if drop_last and len(imageset) < batch_size * world:
            raise UserError(
                f"{len(imageset)} images do not fill one batch of {batch_size * world}; "
                "choose a smaller batch_size."
            )
        self.imageset = imageset
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.augment = augment
        self.drop_last = drop_last
        self.device = torch.device(device)
        self.rank = rank
        self.world = world
        self._mean = torch.tensor(mean, dtype=torch.float32, device=self.device).view(-1, 1, 1)
        self._std = torch.tensor(std, dtype=torch.float32, device=self.device).view(-1, 1, 1)

    def __len__(self) -> int:
        """Batches in an epoch, of this rank."""
        n = len(self.imageset)
        if self.drop_last:
            return n // (self.batch_size * self.world)
        mine = len(range(self.rank, n, self.world))
        return -(-mine // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.batches(0)

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch: images float32 (n, C, H, W) and labels int64 (n,).

        Args:
            epoch: from 0; with `shuffle` or an augmentation each has its own batches.
            start: leave out so many batches; the rest are the same as without.
        """
        rows = self._order(epoch)[self.rank :: self.world]
        for batch in range(start, len(self)):
            mine = rows[batch * self.batch_size : (batch + 1) * self.batch_size]
            pixels = self.imageset.images(mine).to(self.device, non_blocking=True)
            if self.augment != "none":
                pixels = self._augmented(pixels, epoch, batch)
            labels = self.imageset.labels[mine].to(self.device, non_blocking=True)
            yield pixels.float().div_(255).sub_(self._mean).div_(self._std), labels

    def samples(self, epoch: int) -> list[Tensor] | None:
        """For each batch of an epoch the rows of its images; None if augmentation changes them."""
        if self.augment != "none":
            return None
        rows = self._order(epoch)[self.rank :: self.world]
        return list(rows.split(self.batch_size)[: len(self)])

    def _order(self, epoch: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(len(self.imageset))
        return torch.randperm(len(self.imageset), generator=self._generator("shuffle", epoch))

    def _augmented(self, pixels: Tensor, epoch: int, batch: int) -> Tensor:
        generator = self._generator("augment", epoch, batch)
        everyone = self.batch_size * self.world  # drawn for all ranks, so each knows its own
        offset = torch.randint(0, 2 * PAD + 1, (everyone, 2), generator=generator)
        mirror = torch.randint(0, 2, (everyone,), generator=generator).bool()
        mine = slice(self.rank, None, self.world)
        n = len(pixels)
        pixels = shifted(pixels, offset[mine][:n].to(self.device))
        if self.augment == "standard":
            flip = mirror[mine][:n].to(self.device)
            pixels = torch.where(flip[:, None, None, None], pixels.flip(3), pixels)
        return pixels

    def _generator(self, *purpose: object) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.seed, *purpose))


def shifted(pixels: Tensor, offset: Tensor) -> Tensor:
    """Crop each image out of itself with `PAD` zero pixels around it.

    Args:
        pixels: (n, C, H, W).
        offset: (n, 2) int64 in 0..2*PAD, rows and columns; PAD gives the image back.

    Returns:
        (n, C, H, W): pixel (i, j) of image k is pixel (i, j) + offset[k] of the padded one.
    """
    height, width = pixels.shape[2:]
    padded = F.pad(pixels, (PAD, PAD, PAD, PAD))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (n, C, 9, 9, H, W)
    each = torch.arange(len(pixels), device=pixels.device)
    return windows[each, :, offset[:, 0], offset[:, 1]]


def calibration_batches(
    bundle: DataBundle,
    count: int | str | None = None,
    batch_size: int = 50,
    *,
    device: str | torch.device = "cpu",
) -> Loader:
    """Batches to set ranges and statistics with: `bundle.calibration`, always in the same order.

    Args:
        bundle: the data.
        count: use the first `count` only; None, or rows as the recipe names them, means all.
        batch_size: images in a batch.
        device: where the batches go.

    Raises:
        UserError: the bundle has fewer calibration images although the data has more.
    """
    images = bundle.calibration
    if isinstance(count, int) and count != len(images):
        if count < 1:
            raise UserError(f"calibration needs at least 1 image, got {count}.")
        if len(images) < min(count, len(bundle.train)):
            raise UserError(
                f"calibration has {len(images)} images, {count} were asked: set data.calibration."
            )
        images = Subset(images, torch.arange(min(count, len(images))))
    return Loader(images, batch_size, mean=bundle.mean, std=bundle.std, device=device)
