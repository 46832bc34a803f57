"""Weights that are places in a small table: the table, the codes, and the overlay they make.

One form for both methods. Han et al. 2016, arXiv:1510.00149, section 3: a number for each code. Wu
et al. 2016, arXiv:1512.06473, section 3: a short vector along the input channels for each code, and
a table for each stretch of these.
"""

from typing import Any

import torch
from torch import Tensor, nn


def restore(codebook: Tensor, codes: Tensor, columns: Tensor | None = None) -> Tensor:
    """The weight that a codebook and its codes stand for.

    Args:
        codebook: (K,) numbers; or (S, K, d): for each of S stretches of input channels K vectors.
        codes: integers in 0..K-1: of the weight's shape; or (O, S, ...), a stretch for each input
            channel's d.
        columns: (I,) which of the S*d input channels there are; None is all.

    Returns:
        The weight, (O, I, ...), of the codebook's dtype. A number's gradient is the sum of those of
        all weights that share it (Han et al. 2016, eq. 3).

    >>> restore(torch.tensor([-1.0, 2.0]), torch.tensor([[0, 1], [1, 1]]))
    tensor([[-1.,  2.],
            [ 2.,  2.]])
    >>> restore(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[0], [1]]))
    tensor([[1., 2.],
            [3., 4.]])
    """
    if codebook.dim() == 1:
        return codebook.index_select(0, codes.long().flatten()).reshape(codes.shape)
    stretches, words, size = codebook.shape
    first = words * torch.arange(stretches, device=codes.device)
    places = codes.long() + first.reshape(-1, *[1] * (codes.dim() - 2))
    vectors = codebook.reshape(-1, size).index_select(0, places.flatten())
    weight = vectors.reshape(*codes.shape, size).movedim(-1, 2).flatten(1, 2)
    return weight if columns is None else weight.index_select(1, columns.long())


def stretched(weight: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Cut a weight into vectors along its input channels.

    The last stretch is filled with zeros where the channels do not come out even.

    Args:
        weight: (O, I, ...).
        size: input channels in a vector, d.

    Returns:
        (O, S, d, ...), and the (I,) columns `restore` wants.
    """
    inputs = weight.shape[1]
    short = -inputs % size
    fill = weight.new_zeros(weight.shape[0], short, *weight.shape[2:])
    whole = torch.cat([weight, fill], 1)
    parts = whole.reshape(weight.shape[0], -1, size, *weight.shape[2:])
    return parts, torch.arange(inputs, device=weight.device)


def narrowed(codes: Tensor, levels: int) -> Tensor:
    """Codes in the smallest integer type that holds them."""
    return codes.to(torch.uint8 if levels <= 256 else torch.int32)


class Shared:
    """One weight's codebook and codes; called with the weight, it is its overlay.

    Args:
        codebook: see `restore`.
        codes: see `restore`.
        columns: see `restore`.
        zeros: the codebook's first entry is 0 and stays so: for weights that are zero, and for
            those that a mask hides later.

    Attributes:
        values: what is trained: the codebook, without that entry.
        codes: int64.
    """

    def __init__(
        self, codebook: Tensor, codes: Tensor, columns: Tensor | None = None, *, zeros: bool = False
    ):
        self.values = nn.Parameter(codebook[int(zeros) :].detach().clone())
        self.codes, self.columns, self.zeros = codes.long(), columns, zeros

    @property
    def codebook(self) -> Tensor:
        """See `restore`; with its gradient."""
        if not self.zeros:
            return self.values
        return torch.cat([self.values.new_zeros(1), self.values])

    @property
    def levels(self) -> int:
        """Entries to choose from, the zero included."""
        return int(self.values.shape[-2 if self.values.dim() == 3 else 0]) + int(self.zeros)

    @property
    def bucket(self) -> int | None:
        """Weights between the ends of which the levels lie; None: they are values themselves."""
        return None

    @property
    def block(self) -> int:
        """Weights that one code stands for."""
        return int(self.values.shape[-1]) if self.values.dim() == 3 else 1

    def described(self) -> str:
        """For people: how many values there are."""
        if self.values.dim() == 1:
            return f"{self.levels} values"
        stretches, words, size = self.values.shape
        return f"{stretches} x {words} vectors of {size}"

    def __call__(self, weight: Tensor) -> Tensor:
        """The weight as the forward is to see it; of the stored one only zeros count."""
        value = restore(self.codebook, self.codes, self.columns).to(weight.dtype)
        return torch.where(weight == 0, 0, value) if self.zeros else value

    def hide(self, keep: Tensor) -> None:
        """A mask came later: what it hides is of code 0, which is zero."""
        self.codes = torch.where(keep.to(self.codes.device), self.codes, 0)

    def settle(self, weight: Tensor) -> None:
        """Keep what follows the weight; here that is nothing, the codes stand still anyway."""

    def drop_zero(self) -> None:
        """Where no weight is zero after all, the codebook needs no entry for it."""
        if self.zeros and len(self.values) > 1 and bool((self.codes > 0).all()):
            self.codes, self.zeros = self.codes - 1, False

    def cut(self, dim: int, index: Tensor) -> None:
        """Follow a cut of the weight; the codebook stays whole."""
        if dim == 1 and self.columns is not None:
            self.columns = self.columns.index_select(0, index)
        else:
            self.codes = self.codes.index_select(dim, index)

    def round_(self, dtype: torch.dtype) -> None:
        """Round the entries to what a narrower type holds."""
        with torch.no_grad():
            self.values.copy_(self.values.to(dtype))

    def state(self) -> dict[str, Any]:
        """What a resumed run makes it of."""
        return {**self.tensors(), "zeros": self.zeros}

    def tensors(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """What a file holds: `codebook`, `codes` and, for vectors, `columns`."""
        out = {
            "codebook": self.codebook.detach().to(dtype),
            "codes": narrowed(self.codes, self.levels),
        }
        if self.columns is not None:
            out["columns"] = self.columns.to(torch.int32)
        return out
