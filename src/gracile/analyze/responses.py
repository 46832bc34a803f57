"""What a layer reads and what it should give, over calibration data, as normal equations.

For methods that change a layer's weight so that its responses stay (least squares, codebooks):
whatever they minimize is a function of the Gram matrix of the inputs and their products with the
outputs, so that no activations are kept.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from gracile.distribute.collective import all_reduce_sum_
from gracile.graph.graph import Node

LAYERS = ("conv", "linear")


def is_followed(node: Node) -> bool:
    """Whether what each output reads can be laid out in rows: linear, or 2-D, zeros around it."""
    if node.op not in LAYERS or not node.inputs or "weight" not in node.params:
        return False
    if node.op == "linear":
        return True
    a = node.attrs
    numbers = (a.get("padding"), a.get("stride"), a.get("dilation"))
    return (
        len(a.get("kernel_size", ())) == 2
        and a.get("padding_mode", "zeros") == "zeros"
        and not any(isinstance(v, str) for v in numbers)
    )


class Responses:
    """The sums of one layer, gathered batch by batch; G groups, P inputs of an output, O outputs.

    Args:
        weight: as it is now.
        node: of the layer, one that `is_followed`.
        bias: a last input that is always 1.

    Attributes:
        now: (G, P, O/G) the weight, in float64; with `bias` one row more, 0.
        gram: (G, P, P) sum of x x^T.
        right: (G, P, O/G) sum of x y^T.
    """

    def __init__(self, weight: Tensor, node: Node, *, bias: bool):
        self.node, self.bias, self.shape = node, bias, weight.shape
        self.groups = node.attrs.get("groups", 1) if node.op == "conv" else 1
        per = weight.shape[0] // self.groups
        flat = weight.reshape(self.groups, per, -1).transpose(1, 2).double()  # (G, P, O/G)
        self.now = torch.cat([flat, flat.new_zeros(self.groups, int(bias), per)], 1)
        size = self.now.shape[1]
        self.gram = flat.new_zeros(self.groups, size, size)
        self.right = flat.new_zeros(self.now.shape)

    def see(self, x: Tensor, y: Tensor, points: int, rng: torch.Generator) -> None:
        """Add a batch: what the layer reads and what it should give.

        Args:
            x: input of the layer.
            y: wanted output.
            points: positions of each image that are used; 0 is all.
            rng: draws them.
        """
        rows = self._inputs(x)  # (N, positions, G, P)
        if self.node.op == "conv":
            wanted = y.flatten(2).transpose(1, 2)
        else:
            wanted = y.reshape(len(y), -1, y.shape[-1])
        if points and points < rows.shape[1]:
            chosen = torch.randperm(rows.shape[1], generator=rng)[:points].to(rows.device)
            rows, wanted = rows.index_select(1, chosen), wanted.index_select(1, chosen)
        rows = rows.flatten(0, 1).transpose(0, 1)  # (G, n, P)
        wanted = wanted.reshape(-1, self.groups, wanted.shape[-1] // self.groups).transpose(0, 1)
        if self.bias:
            rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2)
        self.gram += (rows.transpose(1, 2) @ rows).double()
        self.right += (rows.transpose(1, 2) @ wanted).double()

    def share(self) -> None:
        """Sum over ranks that train together, each of which may have seen other images."""
        all_reduce_sum_(self.gram)
        all_reduce_sum_(self.right)

    def _inputs(self, x: Tensor) -> Tensor:
        """(N, positions, G, P): what each output position reads."""
        if self.node.op == "linear":
            return x.reshape(len(x), -1, 1, x.shape[-1])
        a = self.node.attrs
        columns = F.unfold(x, a["kernel_size"], a["dilation"], a["padding"], a["stride"])
        positions: Tensor = columns.transpose(1, 2)
        return positions.reshape(*positions.shape[:2], self.groups, -1)
