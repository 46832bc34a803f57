"""A network with exits as a cascade: a batch runs stage by stage, without those that have left."""

import torch
from torch import Tensor, nn

from gracile.analyze.cost import cost
from gracile.errors import UserError
from gracile.graph.capture import capture
from gracile.graph.stages import as_tuple, input_names, stages
from gracile.nn.exits import HOME, choice_of, entropy


class Cascade(nn.Module):
    """Computes what a network with exits does in eval mode, and skips what is not needed.

    Where an exit is sure, the rest of the batch is gathered, runs on, and its answers are put back
    in their places. Modules and parameters are shared with the network.

    Args:
        model: with exits, as `Session.finish` returned it.
        example: an input batch of at least 2 samples.

    Raises:
        UserError: the model has no exits.
    """

    def __init__(self, model: nn.Module, example: Tensor | tuple[Tensor, ...]):
        super().__init__()
        self._stages = stages(model, example)
        self._inputs = input_names(self._stages)
        choice = choice_of(model)
        assert choice is not None
        self.choice = choice
        self.parts = nn.ModuleList(s.module for s in self._stages)

    def forward(self, *inputs: Tensor) -> Tensor:
        """(N, C) answers, each of the first exit that is sure."""
        return self.answer(*inputs)[0]

    def answer(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Answers (N, C), and the number of the exit (N,) that gave each; K is the end."""
        if len(inputs) != len(self._inputs):
            raise UserError(f"the cascade has {len(self._inputs)} inputs, got {len(inputs)}.")
        known: dict[str, Tensor] = dict(zip(self._inputs, inputs, strict=True))
        n = len(inputs[0])
        left = torch.arange(n, device=inputs[0].device)
        out: Tensor | None = None
        taken = left.clone()
        for k, stage in enumerate(self._stages):
            made = as_tuple(stage.module(*(known[name] for name in stage.reads)))
            if out is None:
                out = made[0].new_zeros(n, made[0].shape[1])
            known |= dict(zip(stage.makes, made, strict=True))
            if k + 1 == len(self._stages):
                out[left], taken[left] = made[0], k
                break
            sure = entropy(made[0], self.choice.temperatures[k]) < self.choice.thresholds[k]
            out[left[sure]], taken[left[sure]] = made[0][sure], k
            left = left[~sure]
            if not len(left):
                break
            known = {name: x[~sure] for name, x in known.items()}
        assert out is not None
        return out, taken


def exit_macs(model: nn.Module, example: Tensor | tuple[Tensor, ...]) -> tuple[list[int], int]:
    """What an input costs that leaves at each exit, and at the end; and what without exits.

    In multiply-adds; heads on the way are included.

    Raises:
        UserError: the model has no exits.
    """
    graph = capture(model, example)
    rows = {row.id: row.macs for row in cost(model, graph)}
    each = [sum(rows.get(id, 0) for id in s.nodes) for s in stages(model, example)]
    until = [sum(each[: k + 1]) for k in range(len(each))]
    heads = sum(macs for id, macs in rows.items() if id.startswith(f"{HOME}."))
    return until, until[-1] - heads
