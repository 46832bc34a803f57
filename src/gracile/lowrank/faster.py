"""The option `latency`: a layer is replaced only where a table says that this is faster.

The idea is ours. Fewer multiply-adds are often not less time (a depthwise layer moves as many
values as a dense one), so the table of a runtime is asked about the network with and without.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from torch import Tensor, nn

from gracile.errors import UserError
from gracile.graph import surgery
from gracile.graph.capture import bare_copy
from gracile.graph.factorize import Factors
from gracile.latency.replacement import replacement_ms, times_of
from gracile.latency.table import Table
from gracile.recipe.fields import plain_type
from gracile.recipe.messages import FieldError, show, unknown_key

EXAMPLE = "{table: latency.jsonl, runtime: openvino, threads: 1, measure: true}"


@dataclass(frozen=True)
class LatencyRef:
    """Which times are asked.

    Attributes:
        table: file that `gracile latency measure` made, beside the recipe or in the working
            directory.
        runtime, threads: of the setting, where the table has several.
        measure: measure here what the table lacks, and add it to the file.
    """

    table: str
    runtime: str | None = None
    threads: int | None = None
    measure: bool = False

    def plain(self) -> Any:
        """The YAML form: the file, or a mapping where there is more."""
        more = {k: v for k, v in self.__dict__.items() if k != "table" and v not in (None, False)}
        return {"table": self.table, **more} if more else self.table


def read_latency(value: object) -> LatencyRef:
    """Read `FILE` or `{table: FILE, runtime: ..., threads: ..., measure: ...}`.

    Raises:
        FieldError: another shape, an unknown key or a value of another type.
    """
    if isinstance(value, LatencyRef):
        return value
    if isinstance(value, str):
        value = {"table": value}
    if not isinstance(value, Mapping):
        raise FieldError(f"must be a latency table's file, got {show(value)}. Write {EXAMPLE}.")
    types = {"table": str, "runtime": str, "threads": int, "measure": bool}
    for key, found in value.items():
        if key not in types:
            raise unknown_key(str(key), types)
        if type(found) is not types[key]:
            raise FieldError(f"must be a {types[key].__name__}, got {show(found)}.", (key,))
    if "table" not in value:
        raise FieldError(f"needs 'table', a file. Write {EXAMPLE}.")
    return LatencyRef(**value)


LatencyTable = Annotated[LatencyRef, plain_type(read_latency, lambda v: v.plain())]


class Faster:
    """Says of replacements whether the table predicts them to be faster.

    Args:
        ref: which times.
        recipe: where the recipe was read from; `<python>` has no folder.

    Raises:
        UserError: no such file, or no or several settings that fit.
    """

    def __init__(self, ref: LatencyRef, recipe: str):
        folders = [Path()] if recipe.startswith("<") else [Path(recipe).parent, Path()]
        paths = [folder / ref.table for folder in folders]
        self.path = next((p for p in paths if p.is_file()), paths[0])
        self.table, self.measuring = Table.load(self.path), ref.measure
        self.times = times_of(self.table, ref.runtime, ref.threads)

    def refusal(
        self,
        model: nn.Module,
        edits: Sequence[Any],
        factors: Factors,
        example: Tensor | tuple[Tensor, ...],
    ) -> str | None:
        """Why these edits are not made: the two predicted times; None if they gain.

        Args:
            model: as it is; not changed.
            edits: `factorize` or `replace`, of one layer.
            factors: the new weights.
            example: an input batch.

        Raises:
            UserError: the table cannot tell.
        """
        made = partial(surgery.apply, edits=edits, example=example, factors=factors)
        known = len(self.times.points)
        before, after = replacement_ms(
            model, made(bare_copy(model)), example, self.times, measuring=self.measuring
        )
        if len(self.times.points) > known:
            self.table.save(self.path)
        if after.ms < before.ms:
            return None
        return (
            f"{self.times.setting.runtime} would take {after.ms:.4f} ms for it ({after.how}), "
            f"{before.ms:.4f} ms as it is ({before.how})"
        )

    def verdict(self, s: Any, edits: Sequence[Any], factors: Factors) -> str | None:
        """`refusal` for a Session; what the table cannot tell is a reason, and a warning."""
        try:
            return self.refusal(s.model, edits, factors, s.example)
        except UserError as e:
            s.warn("latency", f"'{edits[0].at}' is kept as it is: {e}")
            return str(e)
