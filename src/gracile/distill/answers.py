"""A teacher's answers kept for each image, so that its forward runs once and not every epoch.

Kept in half precision. Two numbers of each picture are kept with its answer: one that was changed
since (by augmentation) is refused, never answered wrongly.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gracile.errors import UserError

TOLERANCE = 1e-5  # of a picture's two numbers, relative to its size


class Answers:
    """Rows of half-precision answers by the number of the image."""

    def __init__(self) -> None:
        self.rows = torch.zeros(0, 0, dtype=torch.float16)
        self.prints = torch.zeros(0, 3, dtype=torch.float64)
        self.known = torch.zeros(0, dtype=torch.bool)

    def of(self, samples: Tensor, images: Tensor, ask: Callable[[], Tensor]) -> Tensor:
        """The answers to a mini-batch; asks for them if one is not kept yet.

        Args:
            samples: (N,) numbers of the images, from 0.
            images: (N, ...) the pictures.
            ask: gives (N, C) answers to them.

        Returns:
            (N, C) on the images' device, in float32: rounded to half precision the first time too,
            so that an image is answered the same in every epoch.

        Raises:
            UserError: an image is not the picture it was, or an answer exceeds half precision.
        """
        samples = samples.detach().cpu()
        if samples.shape != images.shape[:1] or samples.is_floating_point():
            raise UserError(
                f"samples must be {len(images)} whole numbers, got {tuple(samples.shape)} of "
                f"{samples.dtype}."
            )
        if len(samples) and int(samples.min()) < 0:
            raise UserError(f"samples must be numbers from 0, got {int(samples.min())}.")
        self._reach(int(samples.max()) + 1 if len(samples) else 0)
        prints = fingerprints(images)
        self._check(samples, prints)
        new = ~self.known[samples]
        if new.any():
            self._keep(samples[new], ask().detach().cpu()[new], prints[new])
        return self.rows[samples].to(images.device, torch.float32)

    def state_dict(self) -> dict[str, Any]:
        """All that is kept; `load_state_dict` is the inverse."""
        return {"rows": self.rows, "prints": self.prints, "known": self.known}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `state_dict`."""
        self.rows, self.prints = state["rows"].cpu(), state["prints"].cpu()
        self.known = state["known"].cpu()

    def _reach(self, count: int) -> None:
        have = len(self.known)
        if count <= have:
            return
        more = max(count, 2 * have) - have
        self.rows = torch.cat([self.rows, self.rows.new_zeros(more, self.rows.shape[1])])
        self.prints = torch.cat([self.prints, self.prints.new_zeros(more, 3)])
        self.known = torch.cat([self.known, self.known.new_zeros(more)])

    def _check(self, samples: Tensor, prints: Tensor) -> None:
        known = self.known[samples]
        was, now = self.prints[samples][known], prints[known]
        off = ((was - now).abs() > TOLERANCE * was[:, 2:].clamp_min(1e-9)).any(1)
        if off.any():
            k = int(samples[known][off][0])
            raise UserError(
                f"cache: image {k} is not the picture it was when its teacher's answer was kept: "
                "augmentation changes it. Set cache: false, or give images without augmentation."
            )

    def _keep(self, samples: Tensor, answers: Tensor, prints: Tensor) -> None:
        if answers.ndim != 2:
            raise UserError(f"cache: answers must be (N, C), got {tuple(answers.shape)}.")
        half = answers.half()
        if not half.isfinite().all():
            raise UserError("cache: an answer is beyond half precision; set cache: false.")
        if self.rows.shape[1] == 0:
            self.rows = self.rows.new_zeros(len(self.rows), answers.shape[1])
        self.rows[samples], self.prints[samples], self.known[samples] = half, prints, True


def fingerprints(images: Tensor) -> Tensor:
    """(N, 3) on the CPU: two weighted sums of each picture's numbers, and the sum of their sizes.

    A shift, a mirror or other noise changes the weighted sums.
    """
    flat = images.detach().flatten(1).double()
    place = torch.arange(flat.shape[1], device=flat.device, dtype=torch.float64)
    return torch.stack([flat @ place.cos(), flat @ (1.7 * place).sin(), flat.abs().sum(1)], 1).cpu()
