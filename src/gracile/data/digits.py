"""Handwritten digits that come with scikit-learn: a real data set without a download.

Alpaydin and Kaynak 1998, UCI "Optical Recognition of Handwritten Digits", its 1,797 test images.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from gracile import registry
from gracile.core.state import sha256
from gracile.data.bundle import Source, TensorImages
from gracile.data.splits import stratified
from gracile.errors import MissingExtra, UserError

TEST_IMAGES = 360
SPLIT_SEED = 1998  # constant: the test images are the same for every recipe
SIDE = 32


@registry.register("dataset", "digits", source="UCI optdigits, as in sklearn.datasets.load_digits")
def digits(location: str) -> Source:
    """1,797 digits of 8x8 pixels, scaled up to 32x32 RGB; 360, stratified, are the test split.

    Raises:
        UserError: something follows the name.
        MissingExtra: scikit-learn is not installed.
    """
    if location:
        raise UserError(f"data 'digits:{location}': digits takes no location.")
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingExtra("the data set 'digits'", "digits") from None
    found = load_digits()
    labels = torch.from_numpy(found.target).long()
    pixels = _enlarge(torch.from_numpy(found.images))
    test = stratified(labels, TEST_IMAGES, torch.Generator().manual_seed(SPLIT_SEED))
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[test] = False
    return Source(
        splits={
            "train": TensorImages(pixels[rest], labels[rest]),
            "test": TensorImages(pixels[test], labels[test]),
        },
        class_names=tuple(str(n) for n in found.target_names),
        sha=sha256(found.images.tobytes() + found.target.tobytes()),
        augmentation="shift",  # a mirrored digit is no digit
    )


def _enlarge(images: Tensor) -> Tensor:
    scaled = images[:, None].float() * (255 / 16)  # (N, 8, 8) in 0..16 -> (N, 1, 8, 8) in 0..255
    large = F.interpolate(scaled, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return large.round().to(torch.uint8).repeat(1, 3, 1, 1)
