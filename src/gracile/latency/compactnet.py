"""Latency tables in CompactNet's text form: platforms that nobody has on the desk, simulated.

Source: Liu et al. 2019, CompactNet, arXiv:1905.11669; the tables published with it. MobileNetV2 in
18 stages; block n of the file is a matrix whose entry [out - 1, in - 1] is the time of stage n with
so many filters and input channels, in ms. A network's latency is the plain sum over its stages.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gracile.core.record import Record
from gracile.errors import UserError

Matrix = npt.NDArray[np.float64]
# Width of each stage in the unmodified network; stage n reads what stage n - 1 writes.
UNMODIFIED = (32, 16, 24, 24, 32, 32, 32, 64, 64, 64, 64, 96, 96, 96, 160, 160, 160, 320)
# Stages whose widths residual additions tie together; stage 0 is never trimmed.
GROUPS = ((1,), (2, 3), (4, 5, 6), (7, 8, 9, 10), (11, 12, 13), (14, 15, 16), (17,))
FLOORS = (10, 12, 16, 12, 16, 24, 44)  # least widths of the groups that the paper searched
MAX_BYTES = 64 << 20
NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")


@dataclass(frozen=True)
class CompactNetTable:
    """The times of all stages of MobileNetV2 on one platform.

    Attributes:
        name: of the platform; the file's name unless given.
        stages: one matrix a stage, (out, in), ms.
    """

    name: str
    stages: tuple[Matrix, ...]

    def stage_ms(self, n: int, out: int, into: int) -> float:
        """One stage, ms.

        Raises:
            UserError: the table does not reach so far.
        """
        rows, columns = self.stages[n].shape
        if not (1 <= out <= rows and 1 <= into <= columns):
            raise UserError(
                f"{self.name}: stage {n} is known for 1 to {rows} filters and 1 to {columns} input "
                f"channels, not for {out} and {into}."
            )
        return float(self.stages[n][out - 1, into - 1])

    def latency_ms(self, widths: Sequence[int] = UNMODIFIED) -> float:
        """A network's latency, ms.

        Args:
            widths: filters of each of the 18 stages.

        Raises:
            UserError: another number of widths, or one outside of the table.
        """
        if len(widths) != len(self.stages):
            raise UserError(f"give {len(self.stages)} widths, one a stage; got {len(widths)}.")
        reads = (1, *widths[:-1])
        pairs = zip(widths, reads, strict=True)
        return sum(self.stage_ms(n, o, i) for n, (o, i) in enumerate(pairs))

    def record(self, widths: Sequence[int] = UNMODIFIED) -> Record:
        """The same as a Record of kind predicted."""
        return Record(
            "latency_ms", self.latency_ms(widths), "ms", kind="predicted", batch=1,
            shape=(1, 3, 224, 224), device=self.name,
            subject={"model": "compactnet", "widths": ",".join(str(w) for w in widths)},
        )  # fmt: skip


def read(path: str | Path, name: str | None = None) -> CompactNetTable:
    """Read a table from its text form; nothing in a file is ever run.

    Args:
        path: the text file, 18 blocks ``[[...] [...]]``. The pickled form is not read.
        name: of the platform.

    Raises:
        UserError: no such file, too large, or not such a table; names the block.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: larger than {MAX_BYTES >> 20} MB: not such a table.")
        text = path.read_text(encoding="ascii")
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(
            f"{path}: not a text table. The pickled form is not read: a pickle can run code."
        ) from None
    blocks = _blocks(path, text)
    if len(blocks) != len(UNMODIFIED):
        raise UserError(f"{path}: {len(blocks)} blocks; a table has {len(UNMODIFIED)}.")
    shapes = zip(UNMODIFIED, (1, *UNMODIFIED[:-1]), strict=True)
    stages = []
    for n, (block, shape) in enumerate(zip(blocks, shapes, strict=True)):
        stages.append(_matrix(f"{path}: block {n}", block, shape))
    return CompactNetTable(name or path.stem, tuple(stages))


def _blocks(path: Path, text: str) -> list[str]:
    """What stands between each ``[[`` and its ``]]``."""
    out = []
    for k, part in enumerate(text.split("[[")):
        inside, end, rest = part.partition("]]")
        if k == 0:
            if part.strip():
                raise UserError(f"{path}: does not begin with '[[': not such a table.")
            continue
        if not end or rest.strip():
            raise UserError(f"{path}: block {k - 1} does not end with ']]'.")
        out.append(inside)
    return out


def _matrix(where: str, block: str, shape: tuple[int, int]) -> Matrix:
    rows = [row.split() for row in block.replace("]", "").split("[")]
    if len(rows) != shape[0] or any(len(row) != shape[1] for row in rows):
        found = f"{len(rows)} rows of {len(rows[0])}"
        raise UserError(f"{where}: expected {shape[0]} rows of {shape[1]} numbers, got {found}.")
    bad = next((word for row in rows for word in row if not NUMBER.fullmatch(word)), None)
    if bad is not None:
        raise UserError(f"{where}: '{bad[:20]}' is not a number.")
    values = np.array([[float(word) for word in row] for row in rows])
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise UserError(f"{where}: a time is not positive and finite.")
    return values
