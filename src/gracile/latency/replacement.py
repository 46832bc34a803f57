"""What a layer takes in a runtime, and what would stand in its place, predicted from a table.

The idea is ours. Both networks are exported and read as the runtime's own program; units that they
have in common cancel, whatever the table knows of them. So single layers can be compared as well as
whole networks that differ in a layer, where the runtime fuses what stands around it.
"""

from collections import Counter
from collections.abc import Mapping
from math import hypot
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from gracile import registry
from gracile.benchmark.runtimes.base import load
from gracile.core.plan import Architecture, Plan
from gracile.errors import UserError
from gracile.graph.capture import bare_copy
from gracile.latency.lowering import units_of
from gracile.latency.measuring import measure
from gracile.latency.predict import Estimate, How, Predictor
from gracile.latency.table import Table, Times
from gracile.latency.unit import Setting, Unit

WORST: tuple[How, ...] = ("measured", "interpolated", "scaled", "unknown")
EXPORTED = 2  # images of an example: batch sizes stay free


def times_of(table: Table, runtime: str | None = None, threads: int | None = None) -> Times:
    """The times of the one setting that is meant.

    Args:
        table: of measured units.
        runtime: of the setting; None where the table leaves no choice.
        threads: of the setting; None where the table leaves no choice.

    Raises:
        UserError: no setting fits, or several do; names what the table has.
    """
    asked = {"runtime": runtime, "threads": threads}
    fit = [
        s for s in table.settings if all(v is None or getattr(s, k) == v for k, v in asked.items())
    ]
    if len(fit) == 1:
        return table.of(fit[0])
    have = "; ".join(_spelled(s) for s in table.settings) or "nothing"
    said = ", ".join(f"{k} {v}" for k, v in asked.items() if v is not None) or "no runtime"
    what = "has several" if fit else "has none"
    raise UserError(
        f"the table {what} of the settings that fit ({said}); it has {have}. Name the runtime and "
        "threads of one, or measure it with `gracile latency measure`."
    )


def replacement_ms(
    before: nn.Module,
    after: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    times: Times,
    *,
    measuring: bool = False,
) -> tuple[Estimate, Estimate]:
    """What two networks take in those units that they do not have in common.

    The difference of the two is what replacing gains; each by itself is the time of the part of
    the network that changes, before calibration.

    Args:
        before: a layer, or a network with it.
        after: what would stand in its place, or the network with that.
        example: an input batch (or tuple of inputs) that both take.
        times: of the setting; see `times_of`.
        measuring: measure here what the table lacks, into `times`.

    Returns:
        Two estimates, of `before` and `after`; `how` is that of the least known unit.

    Raises:
        UserError: the table knows nothing of a unit and nothing may be measured; or what is
            measured here would not be of the table's setting.
    """
    here, mine = program(before, example, times.setting)
    _, theirs = program(after, example, times.setting)
    mine, theirs = mine - theirs, theirs - mine
    if measuring:
        _measure(times, mine + theirs, here)
    predictor = Predictor(times)
    found = _sum(predictor, mine), _sum(predictor, theirs)
    if any(e.how == "unknown" for e in found):
        blank = [u for u in mine + theirs if predictor.unit(u).how == "unknown"]
        raise UserError(
            f"the table knows nothing of {len(blank)} unit(s) of {times.setting.runtime}, the "
            f"first: {blank[0]}. Let them be measured (`measure: true`), or measure a network "
            "that has them with `gracile latency measure`."
        )
    return found


def program(
    module: nn.Module, example: Tensor | tuple[Tensor, ...], setting: Setting
) -> tuple[Setting, Counter[Unit]]:
    """The units a runtime on this machine would execute for a network, and how often each.

    Args:
        module: a layer or network; not changed. It is exported in eval mode.
        example: an input batch (or tuple of inputs).
        setting: runtime, threads, batch and hint are taken from it.

    Returns:
        The setting they are of, with this machine's processor and version; and the units.

    Raises:
        UserError: it cannot be exported, or the runtime does not say what it executes.
        MissingExtra: the runtime is not installed.
    """
    copied = bare_copy(module).cpu().eval()
    inputs = tuple(_some(x) for x in (example if isinstance(example, tuple) else (example,)))
    write = registry.get("exporter", setting.runtime).obj
    plan = Plan(architecture=Architecture(name=type(module).__name__))
    with TemporaryDirectory() as folder:
        given = inputs if isinstance(example, tuple) else inputs[0]
        artifact = write(copied, plan, {}, given, Path(folder) / "model", {})
        loaded = load(artifact, threads=setting.threads, hint=setting.hint, batch=setting.batch)
        return Setting.of(loaded), Counter(unit for _, unit in units_of(loaded))


def _measure(times: Times, units: Mapping[Unit, int], here: Setting) -> None:
    if here != times.setting:
        raise UserError(
            f"the table's times are of {'; '.join(times.setting.differences(here))}; what it lacks "
            "cannot be measured here. Measure on that device, or leave `measure` out."
        )
    measure(times, [("", unit) for unit in units])


def _sum(predictor: Predictor, units: Mapping[Unit, int]) -> Estimate:
    """Of units that run one after the other; the same one twice is off by the same twice."""
    found = [(predictor.unit(u), n) for u, n in units.items()]
    ms = sum(n * e.ms for e, n in found)
    sigma = hypot(0.0, *(n * e.sigma_ms for e, n in found))
    return Estimate(ms, sigma, max((e.how for e, _ in found), key=WORST.index, default="measured"))


def _some(x: Tensor) -> Tensor:
    """As many images as an export needs, on the CPU."""
    x = x.detach().cpu()
    return torch.cat([x] * EXPORTED)[:EXPORTED] if len(x) < EXPORTED else x[:EXPORTED]


def _spelled(s: Setting) -> str:
    return f"{s.runtime} on {s.device} with {s.threads} thread(s), batch {s.batch}, {s.hint}"
