"""A unit: one step of a runtime's own program, described so that it can be built again alone."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from typing import Any

from gracile.benchmark.processor import cpu_name
from gracile.benchmark.runtimes.base import Loaded
from gracile.errors import UserError


@dataclass(frozen=True)
class Setting:
    """Under which conditions a time holds; times of different settings are never mixed.

    Attributes:
        runtime, version: as `Loaded` names them.
        device: the processor.
        threads: computing threads.
        batch: batch size.
        hint: what float layers may compute in.
    """

    runtime: str
    version: str
    device: str
    threads: int = 1
    batch: int = 1
    hint: str = "f32"

    @classmethod
    def of(cls, loaded: Loaded, batch: int | None = None) -> "Setting":
        """The setting a loaded artifact is timed in, on this machine."""
        device = loaded.device.partition(":")[2]
        name = cpu_name() if device == "CPU" else device
        size = batch or loaded.batch
        return cls(loaded.name, loaded.version, name, loaded.threads, size, loaded.hint)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def differences(self, other: "Setting") -> list[str]:
        """What differs, as text: "threads 1, not 2"."""
        mine, theirs = asdict(self), asdict(other)
        return [f"{k} {mine[k]}, not {theirs[k]}" for k in mine if mine[k] != theirs[k]]


@dataclass(frozen=True)
class Unit:
    """What a runtime executes as one.

    Attributes:
        kind: "conv", "depthwise", "linear", "add", ... or the runtime's own name of an operator.
        widths: the channel counts that pruning changes: (in, out) of a layer with weights,
            (channels,) where both sides have the same; () where a unit is only known as it is.
        facts: everything else the time depends on, as canonical JSON: kernel, stride, groups,
            spatial size, precision, what is fused. In shapes, "i", "o" and "c" stand for widths.
    """

    kind: str
    widths: tuple[int, ...]
    facts: str

    @classmethod
    def of(cls, kind: str, widths: tuple[int, ...], facts: Mapping[str, Any]) -> "Unit":
        """A unit from plain values."""
        return cls(kind, widths, json.dumps(facts, sort_keys=True, separators=(",", ":")))

    @property
    def family(self) -> tuple[str, str]:
        """What units have in common that differ in their widths only."""
        return self.kind, self.facts

    @cached_property
    def detail(self) -> dict[str, Any]:
        """The facts, as values."""
        found: dict[str, Any] = json.loads(self.facts)
        return found

    @property
    def precision(self) -> str:
        """The arithmetic it computes in."""
        return str(self.detail.get("precision", "f32"))

    @property
    def weights(self) -> int:
        """Numbers it holds and reads each time: weights, biases, constants."""
        inputs = [i for i in self.detail.get("inputs", ()) if i.get("constant")]
        if inputs:
            return sum(prod(self.dims(i["shape"])) for i in inputs if "shape" in i)
        held = self.kind in ("conv", "depthwise", "linear")
        return prod(self.widths) * prod(self.detail.get("kernel", ())) if held else 0

    def at(self, widths: tuple[int, ...]) -> "Unit":
        """The same unit with other widths."""
        return Unit(self.kind, widths, self.facts)

    def dims(self, shape: list[Any]) -> list[int]:
        """A shape of the facts in numbers."""
        return [self._named[d] if isinstance(d, str) else int(d) for d in shape]

    @cached_property
    def _named(self) -> dict[str, int]:
        if len(self.widths) == 1:
            return {"c": self.widths[0]}
        return dict(zip("io", self.widths, strict=False))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"kind": self.kind, "widths": list(self.widths), "facts": self.detail}

    @classmethod
    def from_dict(cls, data: Any) -> "Unit":
        """Inverse of `to_dict`.

        Raises:
            UserError: something is missing or of another type.
        """
        try:
            kind, widths, facts = data["kind"], data["widths"], data["facts"]
            if not (isinstance(kind, str) and isinstance(facts, dict) and len(widths) <= 2):
                raise ValueError("kind, widths or facts")
            if any(type(w) is not int or w < 1 for w in widths):
                raise ValueError(f"widths {widths}")
            return cls.of(kind, tuple(widths), facts)
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(f"not a unit: {e}.") from None

    def __str__(self) -> str:
        shown = {k: v for k, v in self.detail.items() if k not in ("inputs", "attributes")}
        words = " ".join(f"{k}={_short(v)}" for k, v in shown.items())
        return f"{self.kind}{'x'.join(str(w) for w in self.widths) and ' '}" + (
            f"{' -> '.join(str(w) for w in self.widths)} {words}".strip()
        )


def volume(unit: Unit) -> int:
    """Multiplications of a layer but for its spatial size; channels of others: what to scale by."""
    return prod(unit.widths)


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "x".join(_short(v) for v in value)
    return str(value)
