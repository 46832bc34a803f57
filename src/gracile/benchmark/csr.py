"""Linear layers with many zeros that are faster as CSR (compressed sparse rows).

It keeps the values that are not zero, the column of each, and where each row
begins. On a CPU torch multiplies them by a routine of MKL.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NEVER = 1.1
# (inputs and outputs, rows) -> share of zeros from which the 95 % interval of the speed-up lay
# above 1, one thread, by benchmarks/csr.py.
FASTER_FROM: Mapping[tuple[int, int], float] = {
    (256, 1): NEVER, (256, 8): NEVER, (256, 32): 0.9, (256, 128): 0.95,
    (1024, 1): 0.95, (1024, 8): 0.8, (1024, 32): 0.8, (1024, 128): 0.9,
}  # fmt: skip
WIDTHS = tuple(sorted({w for w, _ in FASTER_FROM}))
ROWS = tuple(sorted({r for _, r in FASTER_FROM}))


def faster_as_csr(rows: int, inputs: int, outputs: int, sparsity: float) -> bool:
    """Whether a linear layer was measured to be faster as CSR.

    Between two measured sizes or numbers of rows both must say so; smaller layers than the smallest
    that was measured stay dense.

    Args:
        rows: of the layer's input: the batch, times what else is in front of the inputs.
        inputs, outputs: of the layer.
        sparsity: share of zeros in its weight.

    >>> faster_as_csr(32, 1024, 1024, 0.95)
    True
    """
    width = max((w for w in WIDTHS if w <= min(inputs, outputs)), default=None)
    if width is None:
        return False
    below = max((r for r in ROWS if r <= rows), default=ROWS[0])
    above = min((r for r in ROWS if r >= rows), default=ROWS[-1])
    return sparsity >= max(FASTER_FROM[width, below], FASTER_FROM[width, above])


class CsrLinear(nn.Module):
    """A linear layer that multiplies by CSR where that is faster for the rows it gets.

    Args:
        layer: whose weights are taken, as they are now.
        always: also where the table says that it is slower.
    """

    def __init__(self, layer: nn.Linear, always: bool = False):
        super().__init__()
        self.always = always
        weight = layer.weight.detach()
        self.sparsity = 1 - int(weight.count_nonzero()) / max(1, weight.numel())
        self.dense, self.bias = weight, None if layer.bias is None else layer.bias.detach()
        self.csr = csr_of(weight)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, for inputs (..., inputs)."""
        outputs, inputs = self.dense.shape
        rows = x.numel() // inputs
        if not self.always and not faster_as_csr(rows, inputs, outputs, self.sparsity):
            return F.linear(x, self.dense, self.bias)
        columns = x.reshape(rows, inputs).t()  # CSR stands on the left of a product
        if self.bias is None:
            product = self.csr @ columns
        else:
            product = torch.addmm(self.bias[:, None], self.csr, columns)
        return product.t().reshape(*x.shape[:-1], outputs)


def with_csr_layers(module: nn.Module) -> int:
    """Replace, in place, the linear layers that are faster as CSR for some number of rows.

    Returns:
        How many there are.
    """
    found = 0
    for name, layer in list(module.named_modules()):
        if type(layer) is not nn.Linear:
            continue
        sparse, size = CsrLinear(layer), (layer.in_features, layer.out_features)
        if any(faster_as_csr(r, *size, sparse.sparsity) for r in ROWS):
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, sparse)
            found += 1
    return found


def csr_of(weight: Tensor) -> Tensor:
    """A matrix as CSR, with 32-bit indices, which MKL takes as they are."""
    with _beta():
        found = weight.to_sparse_csr()
        crow, col = found.crow_indices().int(), found.col_indices().int()
        return torch.sparse_csr_tensor(
            crow, col, found.values(), weight.shape, check_invariants=False
        )


@contextmanager
def _beta() -> Iterator[None]:
    """torch says once in a process that its CSR tensors are young."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        yield
