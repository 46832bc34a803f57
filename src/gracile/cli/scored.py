"""What commands that look at a trained network on real images begin with."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gracile.core.state import derive_seed, sha256
from gracile.data.bundle import Subset
from gracile.data.loader import Loader
from gracile.data.sets import open_data
from gracile.errors import UserError
from gracile.models.spec import load_weights, resolve

PARTS = ("train", "val", "test", "calibration")
BATCH = 64


@dataclass(frozen=True)
class Scored:
    """A network and images for it.

    Attributes:
        model: in eval mode, with its weights.
        loader: batches of images and labels, always the same.
        shape: of one image.
        what: which images, for people.
        sha: of the data and the choice of images.
    """

    model: nn.Module
    loader: Loader
    shape: tuple[int, int, int]
    what: str
    sha: str

    @property
    def example(self) -> Tensor:
        """Two images of zeros."""
        return torch.zeros(2, *self.shape)


def opened(model: str, weights: Path | None, data: str, split: str, images: int) -> Scored:
    """Open both; of the split so many images, drawn once and for all (as many as there are).

    Args:
        model, weights, data: as on the command line.
        split: train, val, test, calibration, or rows of the set's own splits: `test[5000:]`.
        images: how many; 0 for all.

    Raises:
        UserError: no such model, weights, data or rows.
    """
    named = split in PARTS
    bundle = open_data(data, recipe_data={} if named else {"test": split})
    part = getattr(bundle, split if named else "test")
    if len(part) == 0:
        raise UserError(f"--split {split}: {data} has no such images.")
    rows = torch.arange(len(part))
    if 0 < images < len(part):
        rng = torch.Generator().manual_seed(derive_seed(0, "images", split))
        rows = torch.randperm(len(part), generator=rng)[:images].sort().values
    net = resolve(model, num_classes=bundle.classes).model.eval()
    if weights is not None:
        load_weights(net, weights)
    loader = Loader(Subset(part, rows), BATCH, mean=bundle.mean, std=bundle.std)
    sha = sha256(f"{bundle.sha} {split} {sha256(rows.numpy().tobytes())}")
    return Scored(net, loader, bundle.shape, f"{data}, {split}", sha)
