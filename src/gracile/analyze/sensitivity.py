"""How much each tensor matters: scores of the network with one tensor changed at a time.

Han et al. 2015, arXiv:1506.02626, section 3.1, scan layer after layer; the sums here are kept after
each part of the images, so that a killed scan goes on and an early look already has all tensors.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from torch import Tensor, fx

from gracile.core.csv_text import csv_text
from gracile.core.state import read_json, write_atomic, write_json
from gracile.errors import ResumeError, UserError
from gracile.graph.fork import Trial, swept

FORMAT = 1
NAME = "sensitivity.json"
KINDS = ("filter", "channel", "element", "bits")
COLUMNS = ("tensor", "level", "removed", "of", "top1", "top5", "loss", "drop", "images")
T = TypeVar("T")
Judge = Callable[[Tensor, Tensor], tuple[int, int | None, float]]  # hits, hits in five, sum of loss


@dataclass(frozen=True)
class Row:
    """The network with one tensor changed.

    Attributes:
        tensor: address of the weight; "" for the network as it is.
        level: share that was asked to go, or bits.
        removed: filters, channels or weights that are zero; 0 for bits.
        of: how many there are; 0 for bits.
        top1, top5: shares in [0, 1]; `top5` is None below 6 classes. loss: mean, in nats.
        images: scored.
    """

    tensor: str
    level: float
    removed: int
    of: int
    top1: float
    top5: float | None
    loss: float
    images: int


@dataclass(frozen=True)
class Sensitivity:
    """A whole scan.

    Attributes:
        by: filter, channel, element or bits.
        criterion: what ranked; None for bits.
        base: the network as it is.
        rows: tensor after tensor in the order of the network, levels as they were asked for.
        left_out: tensor -> why it was not scanned.
        seconds: how long it took, interruptions left out.
    """

    by: str
    criterion: str | None
    base: Row
    rows: tuple[Row, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def tensors(self) -> list[str]:
        """Those that were scanned, in order."""
        return list(dict.fromkeys(r.tensor for r in self.rows))

    def drop(self, row: Row) -> float:
        """Points of top-1 that the change costs; negative where it helped."""
        return 100 * (self.base.top1 - row.top1)

    def tolerated(self, max_drop: float) -> dict[str, float]:
        """Tensor -> the strongest level up to which no level costs more than `max_drop` points.

        Strong is a large share, or few bits. A tensor that tolerates no level has share 0, or 32
        bits. Each is judged alone: all of them together cost more.
        """
        out = {}
        for tensor in self.tensors:
            out[tensor] = 32.0 if self.by == "bits" else 0.0
            rows = [r for r in self.rows if r.tensor == tensor]
            for row in sorted(rows, key=lambda r: -r.level if self.by == "bits" else r.level):
                if self.drop(row) > max_drop + 1e-9:
                    break
                out[tensor] = row.level
        return out

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"format": FORMAT, **asdict(self), "left_out": dict(self.left_out)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Sensitivity":
        """Inverse of `to_dict`.

        Raises:
            UserError: not such an object.
        """
        try:
            values = {k: v for k, v in data.items() if k != "format"}
            base, rows = Row(**values.pop("base")), tuple(Row(**r) for r in values.pop("rows"))
            if data["format"] != FORMAT:
                raise KeyError("format")
            return cls(base=base, rows=rows, **values)
        except (KeyError, TypeError, AttributeError) as e:
            raise UserError(f"not a sensitivity scan ({e!r}).") from None

    def to_csv(self) -> str:
        """One line a row under `COLUMNS`, the network as it is first; `drop` is in points."""
        return csv_text(COLUMNS, (self._line(r) for r in (self.base, *self.rows)))

    def _line(self, r: Row) -> tuple[Any, ...]:
        top5 = "" if r.top5 is None else f"{r.top5:.6f}"
        numbers = (f"{r.top1:.6f}", top5, f"{r.loss:.6f}", f"{self.drop(r):.4f}", r.images)
        return (r.tensor, f"{r.level:g}", r.removed, r.of, *numbers)

    def save(self, folder: Path) -> None:
        """Write `sensitivity.json` and `sensitivity.csv`, each in one step."""
        write_json(folder / NAME, self.to_dict())
        write_atomic(folder / "sensitivity.csv", self.to_csv().encode())


def load_sensitivity(path: Path) -> Sensitivity:
    """Read `sensitivity.json`.

    Raises:
        UserError: no such file, or it is not one.
    """
    return read_json(path, Sensitivity.from_dict)


@dataclass
class Sums:
    """What was counted so far: (tensor, number of the level) -> [hits, hits in five, loss, images].

    Attributes:
        identity: what the counts are of; counting goes on only if it is the same.
        parts: batches that are done.
        five: whether hits in five are counted.
    """

    identity: Mapping[str, Any]
    values: dict[str, list[list[float]]]
    parts: int = 0
    five: bool = True
    seconds: float = 0.0

    def add(self, tensor: str, k: int, judged: tuple[int, int | None, float], n: int) -> None:
        """One more batch of n images."""
        hits, five, loss = judged
        self.five = five is not None
        line = self.values[tensor][k]
        for i, v in enumerate((hits, five or 0, loss, n)):
            line[i] += v

    def save(self, path: Path) -> None:
        """Keep it for `resumed`."""
        write_json(path, {"format": FORMAT, **asdict(self)})

    def row(self, tensor: str, k: int, level: float, removed: int, of: int) -> Row:
        """Means of one line."""
        hits, five, loss, n = self.values[tensor][k]
        top5 = five / n if self.five else None
        return Row(tensor, level, removed, of, hits / n, top5, loss / n, int(n))


def begin(
    identity: Mapping[str, Any], lengths: Mapping[str, int], state: Path | None, *, resume: bool
) -> Sums:
    """Counts at zero, or as they were left.

    Args:
        identity: everything the result depends on.
        lengths: tensor -> number of its levels.
        state: where counts are kept.
        resume: go on with what is there.

    Raises:
        ResumeError: what is there is of another scan; names what differs.
    """
    fresh = Sums(identity, {t: [[0.0] * 4 for _ in range(n)] for t, n in lengths.items()})
    if not resume or state is None or not state.exists():
        return fresh
    data = json.loads(state.read_text(encoding="utf-8"))
    for key, value in json.loads(json.dumps(dict(identity))).items():
        if data["identity"].get(key) != value:
            raise ResumeError(
                f"{state}: was begun with another {key}; choose another --out, or leave --resume "
                "out to begin anew."
            )
    data.pop("format")
    return Sums(**data)


def scan(
    modules: Sequence[fx.GraphModule],
    batches: Iterable[tuple[Tensor, Tensor]],
    trials: Mapping[str, Trial],
    judge: Judge,
    sums: Sums,
    *,
    rows: int,
    done: Callable[[], None],
) -> None:
    """Count what each change does; batch after batch, the counts of a batch at once.

    Args:
        modules: equal ones, see `graph.fork.swept`; each has a batch at the same time, so that
            their results come in the order of the batches.
        batches: inputs and labels, those of `sums.parts` first, which are passed over.
        trials: tensor -> its values.
        judge: (logits, labels) -> hits, hits in five, sum of the loss.
        sums: filled; under "" the network as it is.
        rows: samples that run at once in a module.
        done: called after each batch.
    """
    free: SimpleQueue[fx.GraphModule] = SimpleQueue()
    for module in modules:
        free.put(module)

    def judged(batch: tuple[Tensor, Tensor]) -> tuple[int, list[Any]]:
        x, y = batch
        module = free.get()
        try:
            outputs = swept(module, (x,), trials, rows=rows)
            return len(y), [(name or "", k, judge(out, y)) for name, k, out in outputs]
        finally:
            free.put(module)

    for n, found in _in_order(judged, islice(batches, sums.parts, None), len(modules)):
        for name, k, values in found:
            sums.add(name, k, values, n)
        sums.parts += 1
        done()


def _in_order(work: Callable[[Any], T], items: Iterable[Any], at_once: int) -> Iterator[T]:
    """Results in the order of the items, of which so many are worked on at the same time."""
    with ThreadPoolExecutor(at_once) as pool:
        waiting: deque[Future[T]] = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) == at_once:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
