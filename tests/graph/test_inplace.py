"""Writing in place changes no result, and nothing that somebody else reads."""

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from gracile.graph.inplace import write_in_place


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.relu = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm(self.first(x)))
        y = self.second(y) + x
        return self.relu(y).mean((2, 3))


class ReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.cat([torch.relu(y), y], 1)


class OfInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


class OfView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y[:, :2].relu() + y[:, 2:]


def in_place(model: nn.Module) -> tuple[fx.GraphModule, int]:
    """The rewritten network, and how many of its operators write in place."""
    module = fx.symbolic_trace(model.eval())
    write_in_place(module)
    return module, sum(str(n.target) in ("add_", "relu_") for n in module.graph.nodes)


@pytest.mark.parametrize(
    ("kind", "rewritten"), [(Block, 3), (ReadTwice, 0), (OfInput, 0), (OfView, 0)]
)
def test_same_results(kind: type[nn.Module], rewritten: int) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(2, 4, 5, 5)
    given = x.clone()
    with torch.no_grad():
        expected = model.eval()(x)
        module, found = in_place(model)
        assert found == rewritten
        assert torch.equal(module(x), expected)
    assert torch.equal(x, given)


def test_a_larger_second_operand_is_an_error_not_a_wrong_result() -> None:
    class Wider(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor, more: Tensor) -> Tensor:
            return self.conv(x) + more

    module, found = in_place(Wider())
    assert found == 1
    with torch.no_grad(), pytest.raises(RuntimeError):
        module(torch.zeros(1, 4, 2, 2), torch.zeros(3, 4, 2, 2))
