"""Which consecutive layers stand for one: sizes and costs, known without any weight.

A factorized layer becomes a sequence of standard layers. What the sequence is follows from the
scheme, the layer and the ranks alone, so a saved model is built again from its plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from gracile.errors import UserError
from gracile.nn.maps import Take

Size = tuple[int, ...]
OF_NO_CONV = {"inputs", "outputs", "kernel", "lookup", "padding_idx"}
CONVS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d}


@dataclass(frozen=True)
class Layer:
    """A linear layer or a convolution over one or two axes, without its weights.

    Attributes:
        inputs, outputs: channels.
        kernel: its size along each axis; () is a linear layer.
        stride, padding, dilation: along each axis; () is 1, 0, 1 everywhere.
        groups: of the convolution.
        bias: whether it adds one.
        padding_mode: as torch names it.
        lookup: an embedding: a linear layer of inputs that are numbers of rows, not vectors with
            a single 1 in them; its weight is (inputs, outputs).
        padding_idx: the row of a lookup that is not trained, if there is one.

    Raises:
        UserError: there is no such layer.

    >>> Layer(480, 48, (5, 5), padding=(2, 2)).macs((14, 14))
    112896000
    """

    inputs: int
    outputs: int
    kernel: Size = ()
    stride: Size = ()
    padding: Size = ()
    dilation: Size = ()
    groups: int = 1
    bias: bool = False
    padding_mode: str = "zeros"
    lookup: bool = False
    padding_idx: int | None = None

    def __post_init__(self) -> None:
        n = len(self.kernel)
        if n and n not in CONVS:
            raise UserError(f"a layer to factorize has one or two axes, got kernel {self.kernel}.")
        for name, usual in (("stride", 1), ("padding", 0), ("dilation", 1)):
            value = getattr(self, name) or (usual,) * n
            if len(value) != n or min(value, default=usual) < usual:
                raise UserError(f"{name} must be {n} numbers >= {usual}, got {value}.")
            object.__setattr__(self, name, tuple(value))
        if min(self.inputs, self.outputs, self.groups, *self.kernel) < 1:
            raise UserError(f"channels, kernel and groups must be >= 1, got {self}.")
        if self.inputs % self.groups or self.outputs % self.groups or (self.groups > 1 and not n):
            raise UserError(
                f"groups must divide the channels of a convolution, got {self.inputs} inputs, "
                f"{self.outputs} outputs and {self.groups} groups."
            )

    @property
    def weight_shape(self) -> Size:
        """Of its weight: (outputs, inputs / groups, *kernel); (inputs, outputs) of a lookup."""
        if self.lookup:
            return (self.inputs, self.outputs)
        return (self.outputs, self.inputs // self.groups, *self.kernel)

    @property
    def area(self) -> int:
        """Elements of the kernel; 1 for a linear layer."""
        return prod(self.kernel)

    @property
    def params(self) -> int:
        """Weights and biases."""
        return prod(self.weight_shape) + self.bias * self.outputs

    def output_size(self, size: Size) -> Size:
        """Pixels along each axis of the output; a linear layer leaves them as they are.

        Raises:
            UserError: as many numbers as axes are needed, and the kernel must fit.
        """
        if not self.kernel:
            return tuple(size)
        if len(size) != len(self.kernel):
            raise UserError(f"the size of the input needs {len(self.kernel)} numbers, got {size}.")
        axes = zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        out = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)
        if min(out) < 1:
            raise UserError(f"a kernel {self.kernel} does not fit into an input of {size}.")
        return out

    def macs(self, size: Size) -> int:
        """Multiply-adds of one sample whose input has this many pixels along each axis.

        For a linear layer, `size` is () or the numbers of positions it is applied at. A lookup
        needs none.
        """
        if self.lookup:
            return 0
        return prod(self.weight_shape) * prod(self.output_size(size))

    def like(
        self,
        inputs: int,
        outputs: int,
        *,
        axes: Sequence[int] = (),
        groups: int = 1,
        bias: bool = False,
    ) -> "Layer":
        """A layer that looks along these axes as this one does, and is pointwise in the others.

        >>> Layer(8, 8, (3, 5), stride=(2, 1)).like(8, 4, axes=[0]).kernel
        (3, 1)
        """

        def taken(values: Size, usual: int) -> Size:
            return tuple(v if i in axes else usual for i, v in enumerate(values))

        return Layer(
            inputs,
            outputs,
            taken(self.kernel, 1),
            taken(self.stride, 1),
            taken(self.padding, 0),
            taken(self.dilation, 1),
            groups,
            bias,
            self.padding_mode,
        )

    @property
    def axes(self) -> tuple[int, ...]:
        """All its spatial axes."""
        return tuple(range(len(self.kernel)))


@dataclass(frozen=True)
class Reorder:
    """Channels in another order; which one is known with the weights (an int64 tensor)."""

    channels: int


@dataclass(frozen=True)
class Shuffle:
    """Channels of `groups` equal groups, dealt out in turn (`nn.ChannelShuffle`)."""

    channels: int
    groups: int


Step = Layer | Reorder | Shuffle


@dataclass(frozen=True)
class Chain:
    """The steps that stand for a layer, in the order they run."""

    steps: tuple[Step, ...]

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The steps that compute."""
        return tuple(s for s in self.steps if isinstance(s, Layer))

    @property
    def shapes(self) -> tuple[Size, ...]:
        """Of each factor: one for each step that has a tensor."""
        return tuple(
            s.weight_shape if isinstance(s, Layer) else (s.channels,)
            for s in self.steps
            if not isinstance(s, Shuffle)
        )

    @property
    def params(self) -> int:
        """Weights and biases of all layers; an order is none."""
        return sum(layer.params for layer in self.layers)

    def macs(self, size: Size) -> int:
        """Multiply-adds of one sample whose input has this many pixels along each axis."""
        total = 0
        for layer in self.layers:
            total += layer.macs(size)
            size = layer.output_size(size)
        return total

    def output_size(self, size: Size) -> Size:
        """Pixels along each axis of the output."""
        for layer in self.layers:
            size = layer.output_size(size)
        return size


class Order(Take):
    """A `Take` whose order is part of the state dict, as no plan names it."""

    def get_extra_state(self) -> Tensor:
        """The order, int64."""
        return torch.tensor(self.source)

    def set_extra_state(self, state: Tensor) -> None:
        """Inverse of `get_extra_state`."""
        self.source = [int(i) for i in state]


def layer_of(module: nn.Module) -> Layer:
    """The description of a linear layer or a convolution.

    Args:
        module: `nn.Linear`, `nn.Conv1d`, `nn.Conv2d` or `nn.Embedding`.

    Raises:
        UserError: it is something else, "same" padding is uneven, which no chain can have, or an
            embedding changes its rows or their gradients by rules of its own.
    """
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
            raise UserError(
                "an embedding with max_norm, scale_grad_by_freq or sparse gradients cannot be "
                "factorized: they are about its rows, which factors do not have."
            )
        return Layer(
            module.num_embeddings, module.embedding_dim, lookup=True, padding_idx=module.padding_idx
        )
    if isinstance(module, nn.Linear):
        return Layer(module.in_features, module.out_features, bias=module.bias is not None)
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        raise UserError(
            "only Linear, Conv1d, Conv2d and Embedding can be factorized, got "
            f"{type(module).__name__}."
        )
    spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    padding = module.padding
    if isinstance(padding, str):
        if padding == "same" and any(n % 2 for n in spans):
            raise UserError(
                f"padding 'same' of kernel {module.kernel_size} is uneven and cannot be shared "
                "among factors; pad in a layer of its own."
            )
        padding = tuple(n // 2 if padding == "same" else 0 for n in spans)
    return Layer(
        module.in_channels,
        module.out_channels,
        tuple(module.kernel_size),
        tuple(module.stride),
        tuple(padding),
        tuple(module.dilation),
        module.groups,
        module.bias is not None,
        module.padding_mode,
    )


def build(
    chain: Chain,
    factors: Sequence[Tensor] | None = None,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> nn.Sequential:
    """The chain as a module; no random number is drawn.

    Args:
        chain: what to build.
        factors: one for each of `chain.shapes`, copied; None leaves weights zero, to be loaded,
            and channels in order. Orders are no part of a state dict: give those (`factors_of`).
        bias: (outputs,) of the last layer; None is zeros where the chain has a bias.
        dtype: of what is left zero; that of the factors, or torch's default.

    Raises:
        UserError: a factor is missing, has another shape, or there is a bias but no place for it.
    """
    last = chain.layers[-1]
    if bias is not None and (not last.bias or tuple(bias.shape) != (last.outputs,)):
        place = f"({last.outputs},)" if last.bias else "none"
        raise UserError(f"the chain takes {place} as bias, got {tuple(bias.shape)}.")
    if factors is None:
        factors = _empty(chain, dtype)
    found = tuple(tuple(f.shape) for f in factors)
    if found != chain.shapes:
        raise UserError(f"the factors must have shapes {chain.shapes}, got {found}.")
    rest = iter(factors)
    made = [_module(s, None if isinstance(s, Shuffle) else next(rest)) for s in chain.steps]
    if bias is not None:
        at = max(i for i, s in enumerate(chain.steps) if isinstance(s, Layer))
        made[at].bias = nn.Parameter(_placed(bias.detach().clone(), made[at + 1 :]))
    return nn.Sequential(*made)


def factors_of(net: nn.Sequential) -> tuple[Tensor, ...]:
    """The factors a chain was built with, as they are now: weights, and orders of channels.

    Args:
        net: what `build` made.
    """
    out = []
    for module in net:
        if isinstance(module, Take):
            out.append(torch.tensor(module.source))
        elif not isinstance(module, nn.ChannelShuffle):
            weight: Tensor = module.weight  # type: ignore[assignment]
            out.append(weight.detach())
    return tuple(out)


def drawn(chain: Chain, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Random factors for a chain, scaled so that what it gives is as large as what it reads.

    Args:
        chain: whose shapes they have; orders of channels are kept as they are.
        generator: draws them.
    """
    out = []
    for factor in _empty(chain, None):
        if factor.is_floating_point():
            factor.normal_(generator=generator).div_(max(1, factor[0].numel()) ** 0.5)
        out.append(factor)
    return tuple(out)


def _placed(bias: Tensor, after: Sequence[nn.Module]) -> Tensor:
    """A bias before the channels are put into another order."""
    for module in reversed(after):
        if isinstance(module, Take):
            before = torch.empty_like(bias)
            before[module.source] = bias
            bias = before
        elif isinstance(module, nn.ChannelShuffle):
            bias = bias.unflatten(0, (-1, module.groups)).T.flatten()
    return bias


def _empty(chain: Chain, dtype: torch.dtype | None) -> list[Tensor]:
    out: list[Tensor] = []
    for step in chain.steps:
        if isinstance(step, Layer):
            out.append(torch.zeros(step.weight_shape, dtype=dtype))
        elif isinstance(step, Reorder):
            out.append(torch.arange(step.channels))
    return out


def _module(step: Step, factor: Tensor | None) -> nn.Module:
    if isinstance(step, Shuffle):
        return nn.ChannelShuffle(step.groups)
    assert factor is not None
    if isinstance(step, Reorder):
        return Order(factor.tolist(), step.channels, 1)
    made: nn.Module
    if step.lookup:
        made = nn.Embedding(step.inputs, step.outputs, step.padding_idx, device="meta")
    elif not step.kernel:  # on the meta device nothing is drawn
        made = nn.Linear(step.inputs, step.outputs, bias=step.bias, device="meta")
    else:
        names = {f.name for f in fields(Layer)} - OF_NO_CONV
        options: dict[str, Any] = {name: getattr(step, name) for name in names}
        conv = CONVS[len(step.kernel)]
        made = conv(step.inputs, step.outputs, step.kernel, device="meta", **options)
    made.weight = nn.Parameter(factor.detach().clone(memory_format=torch.contiguous_format))
    if step.bias:
        made.bias = nn.Parameter(factor.new_zeros(step.outputs))
    return made
