"""A block learns what its layer gave, by itself, over calibration data: a short distillation.

For blocks that are no products of matrices, where least squares has no closed form. After Romero et
al. 2015, arXiv:1412.6550, for one layer; that the better of begin and end is kept is ours.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gracile.distribute.collective import average_gradients, broadcast_

STEPS, LR = 200, 0.01


def imitate(
    block: nn.Module,
    seen: Sequence[tuple[Tensor, Tensor]],
    *,
    steps: int = STEPS,
    lr: float = LR,
) -> tuple[float, float]:
    """Train a block, in place, to give these outputs for these inputs, in the mean square.

    Adam with a learning rate that falls to zero along a cosine; batch norms end with the statistics
    of all batches. Where that made it no better, only these statistics are counted.

    Args:
        block: of layers of torch.
        seen: batches (input, wanted output), taken in turn.
        steps: batches in all.
        lr: of the first step.

    Returns:
        Errors before and after, as shares of the wanted outputs' squares.
    """
    start = count_and_judge(block, seen)
    begun = {k: v.clone() for k, v in block.state_dict().items()}
    trained = [p for p in block.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    scale = max(float(torch.stack([y.square().mean() for _, y in seen]).mean()), 1e-12)
    block.train()
    with torch.enable_grad():
        for step in range(steps):
            x, y = seen[step % len(seen)]
            optimizer.zero_grad()
            ((block(x) - y).square().mean() / scale).backward()
            average_gradients(block)
            optimizer.step()
            falling.step()
    end = count_and_judge(block, seen)
    if not end < start:
        block.load_state_dict(begun)
    for tensor in block.state_dict().values():  # ranks may have seen other images
        broadcast_(tensor)
    return start, min(start, end)


@torch.no_grad()
def count_and_judge(block: nn.Module, seen: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Count the statistics of batch norms over these inputs; the relative error in eval mode."""
    norms = [m for m in block.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    momenta = [m.momentum for m in norms]
    block.train()
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # the average over all batches
    for x, _ in seen if norms else ():
        block(x)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
    block.eval()
    error = sum(float((block(x) - y).square().sum()) for x, y in seen)
    return error / max(sum(float(y.square().sum()) for _, y in seen), 1e-12)
