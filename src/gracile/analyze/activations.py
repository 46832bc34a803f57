"""What flows through a network, tensor by tensor: statistics, histograms, and their files."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gracile.core.csv_text import csv_text
from gracile.core.state import read_json, write_atomic, write_json
from gracile.errors import UserError

FORMAT = 1
PERCENTILES = (0.1, 1.0, 5.0, 25.0, 50.0, 75.0, 95.0, 99.0, 99.9)
COLUMNS = (
    "tensor", "op", "shape", "values", "min", "max", "mean", "std", "avg_min", "avg_max", "b",
    "zeros", "dead", *(f"p{q:g}" for q in PERCENTILES),
)  # fmt: skip


@dataclass(frozen=True)
class Histogram:
    """Counts of the values that are not exactly zero.

    Attributes:
        start: left edge of the first bin; step: width of a bin.
        counts: values in each.
    """

    start: float
    step: float
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Channels:
    """One number a channel, over images and positions.

    Attributes:
        zeros: share of values that are exactly zero (APoZ where the operator is a ReLU; Hu et al.
            2016, arXiv:1607.03250, eq. 1).
        mean: mean value; l1: mean magnitude.
    """

    zeros: tuple[float, ...]
    mean: tuple[float, ...]
    l1: tuple[float, ...]

    @property
    def dead(self) -> int:
        """Channels that were zero for every image."""
        return sum(z == 1 for z in self.zeros)


@dataclass(frozen=True)
class Statistics:
    """One activation over all images.

    Attributes:
        tensor: id of the operator that makes it; op: what that is; inputs: ids of what it reads.
        shape: of one image's.
        values: how many were seen.
        min, max, mean, std: of all of them.
        avg_min, avg_max: mean over the images of each one's smallest and largest value.
        b: mean of |x - mean|, the scale of a Laplace distribution; to half a bin, at most 1/4096
            of the largest magnitude.
        zeros: share that is exactly zero.
        percentiles: those of `PERCENTILES`, to one bin.
        histogram: coarser than what the percentiles are from.
        channels: along dim 1 of 2, 4 or 5 dims, else None.
    """

    tensor: str
    op: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    values: int
    min: float
    max: float
    mean: float
    std: float
    avg_min: float
    avg_max: float
    b: float
    zeros: float
    percentiles: tuple[float, ...]
    histogram: Histogram
    channels: Channels | None = None


@dataclass(frozen=True)
class Activations:
    """All activations of a network.

    Attributes:
        rows: in the order they are made.
        images: how many were run.
        left_out: id -> why there are no figures.
    """

    rows: tuple[Statistics, ...]
    images: int
    left_out: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, tensor: str) -> Statistics:
        return {r.tensor: r for r in self.rows}[tensor]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"format": FORMAT, **asdict(self), "left_out": dict(self.left_out)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Activations":
        """Inverse of `to_dict`.

        Raises:
            UserError: not such an object.
        """
        try:
            if data["format"] != FORMAT:
                raise KeyError("format")
            rows = tuple(_statistics(r) for r in data["rows"])
            return cls(rows, int(data["images"]), dict(data["left_out"]))
        except (KeyError, TypeError, AttributeError) as e:
            raise UserError(f"not statistics of activations ({e!r}).") from None

    def to_csv(self) -> str:
        """One line a tensor under `COLUMNS`; `dead` counts channels that are always zero."""
        return csv_text(COLUMNS, map(_line, self.rows))

    def to_distiller(self) -> str:
        """Distiller's statistics file (YAML): `<module>: {inputs: {0: STATS}, output: STATS}`.

        Its quantizers calibrated from it, as `quantize: ptq` does with `ranges: FILE.yaml`.
        """
        known = {r.tensor: r for r in self.rows}
        data = {
            r.tensor: {
                "inputs": {
                    k: _distiller(known[i], self.images)
                    for k, i in enumerate(r.inputs)
                    if i in known
                },
                "output": _distiller(r, self.images),
            }
            for r in self.rows
            if r.op != "input"
        }
        return yaml.safe_dump(data, sort_keys=False)

    def save(self, folder: Path) -> None:
        """Write `activations.json`, `.csv` and `.yaml` (Distiller's form), each in one step."""
        write_json(folder / "activations.json", self.to_dict())
        write_atomic(folder / "activations.csv", self.to_csv().encode())
        write_atomic(folder / "activations.yaml", self.to_distiller().encode())


def load_activations(path: Path) -> Activations:
    """Read `activations.json`.

    Raises:
        UserError: no such file, or it is not one.
    """
    return read_json(path, Activations.from_dict)


def _statistics(data: Mapping[str, Any]) -> Statistics:
    values = dict(data)
    h, c = values.pop("histogram"), values.pop("channels")
    for key in ("inputs", "shape", "percentiles"):
        values[key] = tuple(values[key])
    return Statistics(
        **values,
        histogram=Histogram(h["start"], h["step"], tuple(h["counts"])),
        channels=None if c is None else Channels(**{k: tuple(v) for k, v in c.items()}),
    )


def _line(r: Statistics) -> tuple[Any, ...]:
    numbers = (r.min, r.max, r.mean, r.std, r.avg_min, r.avg_max, r.b, r.zeros)
    return (
        *(r.tensor, r.op, "x".join(str(n) for n in r.shape), r.values),
        *(f"{v:.7g}" for v in numbers),
        "" if r.channels is None else r.channels.dead,
        *(f"{v:.7g}" for v in r.percentiles),
    )


def _distiller(r: Statistics, images: int) -> dict[str, Any]:
    keys = ("min", "max", "avg_min", "avg_max", "mean", "std", "b")
    numbers = {key: float(getattr(r, key)) for key in keys}
    return {**numbers, "shape": str((images, *r.shape)), "total_numel": r.values}
