"""A table of measured units as a file: JSON lines that can be shared, merged and read anywhere."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from gracile.core.state import sha256, write_atomic
from gracile.errors import UserError
from gracile.latency.difference import Point
from gracile.latency.staircase import PERIODS, Stair
from gracile.latency.unit import Setting, Unit

FORMAT = 1
HEAD = {"gracile": "latency table", "format": FORMAT}
SweepKey = tuple[str, str, int]  # kind, precision, which of the widths


@dataclass(frozen=True)
class Network:
    """A whole network that was measured, for the calibration.

    Attributes:
        sum_ms: of its units, when it was measured.
        ms: measured end to end.
        time: seconds since 1970.
        weights: numbers its units hold.
        steps: how many units it has; 0 in tables that did not count them.
    """

    sum_ms: float
    ms: float
    time: float
    weights: int = 0
    steps: int = 0


@dataclass
class Times:
    """What a table holds for one setting.

    Attributes:
        setting: under which all of it was measured.
        points: unit -> its time.
        stairs: (kind, precision, axis) -> the staircase found there.
        networks: name -> a whole network.
    """

    setting: Setting
    points: dict[Unit, Point] = field(default_factory=dict)
    stairs: dict[SweepKey, Stair] = field(default_factory=dict)
    networks: dict[str, Network] = field(default_factory=dict)

    def families(self) -> dict[tuple[str, str], dict[tuple[int, ...], Point]]:
        """Points by family: widths -> time."""
        out: dict[tuple[str, str], dict[tuple[int, ...], Point]] = {}
        for unit, point in self.points.items():
            out.setdefault(unit.family, {})[unit.widths] = point
        return out


class Table:
    """Times under any number of settings.

    >>> Table().settings
    []
    """

    def __init__(self) -> None:
        self._times: dict[Setting, Times] = {}

    @property
    def settings(self) -> list[Setting]:
        """The settings it knows."""
        return list(self._times)

    def at(self, setting: Setting) -> Times:
        """The times of a setting, to add to; empty if it is new."""
        return self._times.setdefault(setting, Times(setting))

    def of(self, setting: Setting, *, anyway: bool = False) -> Times:
        """The times of a setting, to predict with.

        Args:
            setting: of the prediction.
            anyway: take times of another device, version, threads or batch of the same runtime if
                there are none of this setting: the ones that differ in the fewest things.

        Raises:
            UserError: there are none; names what the table has instead.
        """
        if setting in self._times:
            return self._times[setting]
        same = [s for s in self._times if s.runtime == setting.runtime]
        if not same:
            known = ", ".join(sorted({s.runtime for s in self._times})) or "nothing"
            raise UserError(
                f"the table has no times of '{setting.runtime}'; it has {known}. Measure some "
                "with `gracile latency measure`."
            )
        nearest = min(same, key=lambda s: len(s.differences(setting)))
        if anyway:
            return self._times[nearest]
        raise UserError(
            f"the table's times are of {'; '.join(nearest.differences(setting))}. Measure here "
            "with `gracile latency measure`, or use them all the same with --anyway."
        )

    def merge(self, other: "Table") -> None:
        """Take over what another table knows; of two times of one thing the newer stays."""
        for setting, theirs in other._times.items():
            mine = self.at(setting)
            for unit, point in theirs.points.items():
                if unit not in mine.points or mine.points[unit].time <= point.time:
                    mine.points[unit] = point
            for name, network in theirs.networks.items():
                if name not in mine.networks or mine.networks[name].time <= network.time:
                    mine.networks[name] = network
            mine.stairs |= theirs.stairs

    def save(self, path: str | Path) -> None:
        """Write it in one step."""
        lines = [HEAD, *self._lines()]
        text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines)
        write_atomic(Path(path), text.encode())

    @classmethod
    def load(cls, path: str | Path) -> "Table":
        """Read a table; a torn last line is left out.

        Raises:
            UserError: no such file, another format, or a damaged line, with its number.
        """
        path = Path(path)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            raise UserError(
                f"{path}: no such table. `gracile latency measure MODEL --table {path}` makes one."
            ) from None
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"{path}: not a latency table: {e}.") from None
        _check_head(path, lines[0] if lines else "")
        table = cls()
        settings: dict[str, Setting] = {}
        for number, line in enumerate(lines[1:], 2):
            try:
                data = json.loads(line)
            except ValueError:
                if number == len(lines):
                    break  # torn by a crash
                raise UserError(f"{path}:{number}: broken JSON.") from None
            try:
                table._read(data, settings)
            except (KeyError, TypeError, ValueError, AttributeError) as e:
                raise UserError(f"{path}:{number}: not a line of a table: {e!r}.") from None
        return table

    def _lines(self) -> Iterable[Mapping[str, Any]]:
        for setting, times in self._times.items():
            id = sha256(json.dumps(setting.to_dict(), sort_keys=True))[:12]
            yield {"what": "setting", "id": id, **setting.to_dict()}
            for (kind, precision, axis), stair in times.stairs.items():
                which = {"kind": kind, "precision": precision, "axis": axis}
                yield {"what": "stair", "setting": id, **which, **asdict(stair)}
            for unit, point in times.points.items():
                yield {"what": "unit", "setting": id, **unit.to_dict(), **asdict(point)}
            for name, network in times.networks.items():
                yield {"what": "network", "setting": id, "name": name, **asdict(network)}

    def _read(self, line: Any, settings: dict[str, Setting]) -> None:
        what = line["what"]
        if what == "setting":
            values = {k: v for k, v in line.items() if k not in ("what", "id")}
            settings[line["id"]] = Setting(**values)
            self.at(settings[line["id"]])
            return
        times = self.at(settings[line["setting"]])
        if what == "unit":
            numbers = (_number(line[k]) for k in ("ms", "noise_ms", "rounds", "time"))
            ms, noise, rounds, when = numbers
            times.points[Unit.from_dict(line)] = Point(ms, noise, int(rounds), when)
        elif what == "stair":
            if line["period"] not in PERIODS:
                raise ValueError(f"period {line['period']}")
            key = (str(line["kind"]), str(line["precision"]), int(line["axis"]))
            times.stairs[key] = Stair(line["period"], bool(line["tail"]))
        elif what == "network":
            total, whole, when = (_number(line[k]) for k in ("sum_ms", "ms", "time"))
            weights, steps = (int(_number(line.get(k, 0))) for k in ("weights", "steps"))
            found = Network(total, whole, when, weights, steps)
            times.networks[str(line["name"])] = found
        else:
            raise ValueError(f"what: {what}")


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r} is no number")
    if not isfinite(value) or value < 0:
        raise ValueError(f"{value!r} is no time")
    return float(value)


def _check_head(path: Path, line: str) -> None:
    try:
        head = json.loads(line)
        found = head["format"] if head["gracile"] == HEAD["gracile"] else None
    except (ValueError, KeyError, TypeError):
        found = None
    if found is None:
        raise UserError(f"{path}: not a latency table of gracile.")
    if found != FORMAT:
        raise UserError(f"{path}: a table of format {found}; this gracile reads format {FORMAT}.")
