"""What every runtime offers: a loaded artifact that runs, shows its inside and can be timed."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np

from gracile import registry
from gracile.benchmark.artifact import CASCADE, Artifact
from gracile.errors import UserError

if TYPE_CHECKING:  # a device that only measures has no torch
    from torch import Tensor

Array = np.ndarray[Any, Any]
Inputs: TypeAlias = "Array | Tensor | Sequence[Array | Tensor]"
HINTS = ("f32", "bf16", "f16")


@dataclass(frozen=True)
class Kernel:
    """One step of a runtime's own, optimized program.

    Attributes:
        unit: id of the unit it works for; "" if it cannot be told.
        type: the runtime's name for it (`QLinearConv`, `Convolution jit_avx512_I8`).
        precision: "int8", "f32", "bf16" or "f16": the arithmetic it computes in.
    """

    unit: str
    type: str
    precision: str

    @property
    def is_integer(self) -> bool:
        """Whether it computes in integers."""
        return self.precision == "int8"

    @property
    def is_convolution(self) -> bool:
        """Whether it is a convolution, also a transposed or fused one."""
        return "conv" in self.type.lower() and "convert" not in self.type.lower()


@dataclass(frozen=True)
class CountedLayer:
    """A layer of a runtime's program whose time the runtime counts by itself.

    Attributes:
        name: what the runtime calls it.
        type: the runtime's name for its kernel.
        units: ids of the units it computes as one, in order; () if that cannot be told.
        fused: names of the file's operators that went into it; () if the runtime does not say.
    """

    name: str
    type: str
    units: tuple[str, ...] = ()
    fused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Counters:
    """A runtime's own counters: which layers it counts, and their times.

    Attributes:
        layers: in the order they run.
        times: number of inferences -> ms of each layer in each of them, (inferences, layers).
    """

    layers: tuple[CountedLayer, ...]
    times: Callable[[int], Array]


class Loaded(ABC):
    """An artifact in a runtime, with pinned threads and a stated precision.

    Args:
        artifact: what to load.
        threads: computing threads; all of the runtime's pools.
        hint: "f32", "bf16" or "f16": what float layers may compute in. Always set.
        batch: batch size that `time` uses; 1 if None.
        device: "CPU", or what the runtime calls another one.

    Raises:
        UserError: the artifact belongs to another runtime, or an argument is out of range.
        MissingExtra: the runtime is not installed.
    """

    name: ClassVar[str]

    def __init__(
        self,
        artifact: Artifact,
        *,
        threads: int = 1,
        hint: str = "f32",
        batch: int | None = None,
        device: str = "CPU",
    ):
        if artifact.runtime != self.name:
            raise UserError(
                f"{artifact.path} is made for '{artifact.runtime}', not for '{self.name}'."
            )
        if threads < 1:
            raise UserError(f"threads must be at least 1, got {threads}.")
        if batch is not None and batch < 1:
            raise UserError(f"batch must be at least 1, got {batch}.")
        if hint not in HINTS:
            raise UserError(f"the precision hint must be one of {', '.join(HINTS)}, got '{hint}'.")
        self.artifact, self.threads, self.hint = artifact, threads, hint
        self.batch = batch or 1
        self.device = f"{self.name}:{device}"

    @property
    def precision(self) -> str:
        """What it computes in: "f32", "int8" or "mixed"; that of the artifact."""
        return self.artifact.precision

    @property
    @abstractmethod
    def version(self) -> str:
        """The runtime's version."""

    @abstractmethod
    def run(self, inputs: Inputs) -> list[Array]:
        """The outputs for one batch of any size."""

    @abstractmethod
    def run_units(
        self, inputs: Inputs, feed: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """The tensor of every unit, in execution order.

        Args:
            inputs: one batch.
            feed: unit id -> tensor that the readers of this unit get instead of its own. With all
                units fed, each unit shows only its own error.
        """

    @abstractmethod
    def kernels(self) -> list[Kernel]:
        """The steps of the runtime's optimized program, read from the runtime."""

    @abstractmethod
    def _step(self, batch: int) -> Callable[[], Any]:
        """One inference on prepared inputs of this batch size, for timing."""

    def counters(self, batch: int | None = None) -> Counters:
        """The runtime's own counters of time, layer by layer, on fixed inputs.

        Raises:
            UserError: this runtime has none, or they do not say the same in every inference.
        """
        raise UserError(f"{self.name} has no counters of time for its layers; leave --layers out.")

    def streams(self, n: int, batch: int | None = None) -> list[Callable[[], Any]]:
        """One inference each, to be called at the same time from `n` threads of this process."""
        others = (
            type(self)(
                self.artifact,
                threads=self.threads,
                hint=self.hint,
                batch=self.batch,
                device=self.device.partition(":")[2],
            )
            for _ in range(n - 1)
        )
        return [one._step(batch or self.batch) for one in (self, *others)]

    def step(self, batch: int | None = None) -> Callable[[], Any]:
        """One inference on fixed inputs, to be called again and again; what `time` times."""
        return self._step(batch or self.batch)

    @property
    def size_bytes(self) -> int:
        """Size of the artifact on disk."""
        return self.artifact.size_bytes

    def time(self, n: int, batch: int | None = None) -> list[float]:
        """Latency in ms of each of `n` inferences, one after the other, on fixed inputs."""
        step = self._step(batch or self.batch)
        out = []
        for _ in range(n):
            start = perf_counter()
            step()
            out.append((perf_counter() - start) * 1e3)
        return out


def load(
    artifact: Artifact,
    *,
    threads: int = 1,
    hint: str = "f32",
    batch: int | None = None,
    device: str = "CPU",
    **options: Any,
) -> Loaded:
    """Load an artifact in the runtime it was made for; see `Loaded` for arguments and errors.

    Args:
        options: what only one runtime takes: ``module`` for "pytorch".
    """
    cls = runtime_class(artifact.runtime)
    if artifact.path.name == CASCADE:
        cls = import_module(f"{__package__}.cascade").Cascade
    loaded: Loaded = cls(
        artifact, threads=threads, hint=hint, batch=batch, device=device, **options
    )
    return loaded


def runtime_class(name: str) -> Any:
    """The class of a runtime. If a file here has its name, no other runtime is imported.

    Raises:
        UserError: no such runtime.
    """
    home = f"{__package__}.{name}"
    if name.isidentifier() and find_spec(home) is not None:
        import_module(home)
    found = registry.known("runtime", name) or registry.get("runtime", name)
    return found.obj


def parse_target(text: str) -> tuple[str, str]:
    """Split ``NAME[:DEVICE]`` as given on the command line; the name must be registered.

    >>> parse_target("openvino:GPU")
    ('openvino', 'GPU')

    Raises:
        UserError: no such runtime.
    """
    name, _, device = text.partition(":")
    registry.get("runtime", name)
    return name, device or "CPU"


def arrays(inputs: Inputs) -> list[Array]:
    """Any form of inputs as contiguous numpy arrays."""
    many = list(inputs) if isinstance(inputs, Sequence) else [inputs]
    return [
        np.asarray(x if isinstance(x, np.ndarray) else x.detach().cpu().numpy(), order="C")
        for x in many
    ]


def timing_input(shape: Sequence[int], dtype: Any) -> Array:
    """Inputs for timing: fixed standard normal floats, zeros for integers (valid as any index)."""
    if not np.issubdtype(dtype, np.floating):
        return np.zeros(shape, dtype)
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)
