"""A pattern: a tiny model, an example, and what can be cut of it, worked out by hand."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Cut = tuple[int, int | None]  # (units, parameters that go with one unit; None: it depends)


@dataclass(frozen=True)
class Pattern:
    """One way in which networks handle channels.

    Attributes:
        name: of the pattern, unique.
        model: makes the model.
        example: makes each input.
        free: group id -> how many units can be cut, and how many parameters one of them takes
            along. Exact: no other group may be cut, unless `more`.
        kinds: (kind, units) of groups that can be cut where the id is not the point.
        protected: group id -> part of the reason.
        more: other groups may be cut as well.
        masked: zeros in the removed channels compute what the cut model does. Not so where
            statistics are taken over channels: a zero still counts there.
    """

    name: str
    model: Callable[[], nn.Module]
    example: Sequence[Callable[[], Tensor]]
    free: Mapping[str, Cut]
    kinds: Sequence[tuple[str, int]]
    protected: Mapping[str, str]
    more: bool
    masked: bool

    def build(self, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The model with random weights and statistics, nothing zero or one, and an example."""
        torch.manual_seed(seed)
        model = self.model()
        with torch.no_grad():
            for p in model.parameters():
                if (p == 0).all() or (p == 1).all():
                    p.uniform_(0.5, 1.5)
            for m in model.modules():
                if isinstance(getattr(m, "running_var", None), Tensor):
                    m.running_mean.normal_()
                    m.running_var.uniform_(0.5, 2)
        return model, tuple(make() for make in self.example)


ALL: dict[str, Pattern] = {}


def pattern(
    *example: tuple[int, ...] | Callable[[], Tensor],
    free: Mapping[str, Cut] | None = None,
    kinds: Sequence[tuple[str, int]] = (),
    protected: Mapping[str, str] | None = None,
    more: bool = False,
    masked: bool = True,
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a model class as a pattern; an example is a shape, or a function that makes one."""

    def add(cls: type[nn.Module]) -> type[nn.Module]:
        if cls.__name__ in ALL:
            raise ValueError(f"two patterns are called '{cls.__name__}'.")
        makers = [e if callable(e) else lambda shape=e: torch.randn(shape) for e in example]
        name = cls.__name__
        ALL[name] = Pattern(
            name, cls, makers, free or {}, kinds, protected or {}, more or bool(kinds), masked
        )
        return cls

    return add


def tokens(*shape: int, of: int) -> Callable[[], Tensor]:
    """Random token numbers below `of`."""
    return lambda: torch.randint(of, shape)
