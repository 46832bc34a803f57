"""The networks of the pipeline benchmark: nine of torchvision, a UNet and an LSTM language model.

Random weights, small inputs. BatchNorm sees a few batches in train mode first, so that activations
have the spread that calibration meets in a trained network.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SIDE = 64
BATCH = 8
WORDS, TOKENS = 200, 16
WARM_UP = 5  # batches


@dataclass(frozen=True)
class Network:
    """One row.

    Attributes:
        name: of the row.
        package: what must be installed to build it.
        build: makes it, in eval mode, its normalization warmed up.
        inputs: makes a batch.
        quantize: whether the integer half of the pipeline is asked of it.
    """

    name: str
    package: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    quantize: bool = True


def networks() -> dict[str, Network]:
    """Name -> network, in the order of the table."""
    listed = [
        Network(name, "torchvision", lambda n=name: settled(_torchvision(n), images), images)
        for name in (
            "resnet50", "mobilenet_v2", "efficientnet_b0", "convnext_tiny", "vit_b_16", "swin_t",
            "densenet121", "shufflenet_v2_x1_0", "googlenet",
        )
    ]  # fmt: skip
    listed.append(Network("unet", "torch", lambda: settled(UNet(), images), images))
    listed.append(Network("lstm", "torch", lambda: LanguageModel().eval(), tokens, quantize=False))
    return {n.name: n for n in listed}


def images() -> Tensor:
    """Standard normal images."""
    return torch.randn(BATCH, 3, SIDE, SIDE)


def tokens() -> Tensor:
    """Random words."""
    return torch.randint(WORDS, (BATCH, TOKENS))


@torch.no_grad()
def settled(model: nn.Module, inputs: Callable[[], Tensor]) -> nn.Module:
    """The model in eval mode, after a few batches in train mode for its running statistics."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None  # a plain mean over the batches
    model.train()
    for _ in range(WARM_UP if norms else 0):
        model(inputs())
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def _torchvision(name: str) -> nn.Module:
    from benchmarks.torchvision_shim import torchvision

    options = {"image_size": SIDE} if name.startswith("vit") else {}
    if name == "googlenet":  # its auxiliary heads are for training and want larger images
        options |= {"init_weights": True, "aux_logits": False}
    model: nn.Module = torchvision().models.get_model(name, weights=None, **options)
    return model


class _Double(nn.Sequential):
    def __init__(self, narrow: int, wide: int):
        super().__init__(
            nn.Conv2d(narrow, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(),
            nn.Conv2d(wide, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(),
        )  # fmt: skip


class UNet(nn.Module):
    """Ronneberger et al. 2015, arXiv:1505.04597, padded, with BatchNorm, at a quarter of the width.

    Args:
        classes: channels of the output.
        width: channels of the first level.
        depth: levels below the first.
    """

    def __init__(self, classes: int = 8, width: int = 16, depth: int = 3):
        super().__init__()
        widths = [width * 2**k for k in range(depth + 1)]
        self.down = nn.ModuleList([_Double(3, width), *(_Double(a, 2 * a) for a in widths[:-1])])
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList([nn.ConvTranspose2d(2 * a, a, 2, 2) for a in widths[-2::-1]])
        self.merge = nn.ModuleList([_Double(2 * a, a) for a in widths[-2::-1]])
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, classes, H, W); H and W multiples of 2 ** depth."""
        skips = []
        for k, block in enumerate(self.down):
            x = block(x if k == 0 else self.pool(x))
            skips.append(x)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([skips.pop(), up(x)], dim=1))
        return self.head(x)


class LanguageModel(nn.Module):
    """Embedding, two LSTM layers, next-word logits; the output layer has weights of its own."""

    def __init__(self, words: int = WORDS, width: int = 64, hidden: int = 96):
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.lstm = nn.LSTM(width, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, words)

    def forward(self, words: Tensor) -> Tensor:
        """(N, T) -> (N, T, words)."""
        states, _ = self.lstm(self.embedding(words))
        return self.head(states)
