"""What differs by runtime: which units a loaded artifact has, and how one is built alone."""

from collections.abc import Callable
from typing import Any

from gracile.benchmark.runtimes import onnxruntime, openvino
from gracile.benchmark.runtimes.base import Loaded
from gracile.errors import UserError
from gracile.latency import onnxruntime_units, openvino_units
from gracile.latency.difference import Pair, Step
from gracile.latency.unit import Setting, Unit

COPIES = 6
RUNTIMES = ("onnxruntime", "openvino")


def units_of(loaded: Loaded) -> list[tuple[str, Unit]]:
    """(name, unit) of every step that a runtime executes for a loaded artifact, in order.

    Raises:
        UserError: the runtime does not say what it executes.
    """
    if isinstance(loaded, onnxruntime.OnnxRuntime):
        return onnxruntime_units.units_of(loaded)
    if isinstance(loaded, openvino.OpenVino):
        return openvino_units.units_of(loaded)
    raise _unknown(loaded.name)


def builder(setting: Setting) -> Callable[[Unit], Pair]:
    """What makes the two small networks of a unit, ready to run under a setting.

    Raises:
        UserError: the runtime's programs are not known here; also of what it returns, for a unit
            that cannot be built alone.
    """
    make = {"onnxruntime": _in_onnxruntime, "openvino": _in_openvino}.get(setting.runtime)
    if make is None:
        raise _unknown(setting.runtime)

    def build(unit: Unit) -> Pair:
        try:
            return make(unit, setting)
        except Exception as e:  # runtimes have no common public base of their errors
            raise UserError(f"{unit} cannot be built alone: {str(e).strip()[:300]}") from e

    return build


def isolated(unit: Unit, setting: Setting) -> Step:
    """A network of nothing but one unit, as a plain sum of layers would time it; to compare with.

    Raises:
        UserError: the runtime's programs are not known here.
    """
    if setting.runtime == "onnxruntime":
        model = onnxruntime_units.small_network(unit, 1)
        return onnxruntime.step_of(model, threads=setting.threads)
    if setting.runtime == "openvino":
        model = openvino_units.isolated_network(unit)
        return openvino.step_of(model, threads=setting.threads, hint=setting.hint)
    raise _unknown(setting.runtime)


def _in_onnxruntime(unit: Unit, setting: Setting) -> Pair:
    def step(copies: int) -> Any:
        model = onnxruntime_units.small_network(unit, copies)
        return onnxruntime.step_of(model, threads=setting.threads)

    return Pair(step(1 + COPIES), step(1), COPIES, setting.threads)


def _in_openvino(unit: Unit, setting: Setting) -> Pair:
    whole, alone = (
        openvino.step_of(model, threads=setting.threads, hint=setting.hint)
        for model in openvino_units.small_networks(unit)
    )
    return Pair(whole, alone, threads=setting.threads)


def _unknown(runtime: str) -> UserError:
    return UserError(
        f"'{runtime}' does not say which units it executes, so their times cannot be told apart; "
        f"those that do: {', '.join(RUNTIMES)}."
    )
