"""What a user writes for a model, made into a network: `NAME`, `net.py:factory`, `timm:NAME`, ...

Arguments follow as in a web address: `mobilenet_v2?width_mult=0.5&small_images=true`.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from torch import nn

from gracile import registry
from gracile.core.plan import Architecture
from gracile.errors import GracileError, UserError, nearest
from gracile.models.adapters import from_hf, from_timm, from_torchvision
from gracile.models.user_file import blame, factory_of
from gracile.models.weights import architecture_sha, load_weights

__all__ = ["ModelSpec", "architecture_sha", "list_models", "load_weights", "registered", "resolve"]

ADAPTERS: dict[str, Callable[[str], Callable[..., nn.Module]]] = {
    "torchvision": from_torchvision,
    "timm": from_timm,
    "hf": from_hf,
}
FORMS = "a registered name, FILE.py:FACTORY, torchvision:NAME, timm:NAME or hf:DIR"


@dataclass(frozen=True)
class ModelSpec:
    """A network and where it is from.

    Attributes:
        model: the network, freshly built (from `hf:` with its saved weights).
        architecture: name, all arguments used, fingerprint: what a Plan stores.
        spec: what the user wrote.
        source: paper or project the network follows.
    """

    model: nn.Module
    architecture: Architecture
    spec: str
    source: str


def resolve(
    spec: str,
    *,
    num_classes: int | None = None,
    args: Mapping[str, Any] | None = None,
    allow_file: bool = True,
) -> ModelSpec:
    """Build the network a specification names.

    Weights are drawn from torch's global generator: seed it first.

    Args:
        spec: a registered name, `net.py:factory`, `torchvision:NAME`, `timm:NAME` or `hf:DIR`, with
            arguments as `?key=value&key=value`. Values are read as YAML: 0.5, true, null, [1, 2].
        num_classes: outputs, usually from the data. Used unless the specification or `args` say
            otherwise, and only if the factory takes an argument of this name.
        args: more arguments, e.g. of a saved architecture.
        allow_file: False refuses `net.py:factory`: for names that come out of a file rather than
            from the user, since a plan must not make gracile run code.

    Raises:
        UserError: no such model, file or factory, an argument that does not fit, the factory failed
            or returned no network.
        MissingExtra: the library named before the colon is not installed.

    >>> resolve("resnet20_cifar_a?num_classes=100").architecture.args
    {'num_classes': 100}
    """
    name, given = _split(spec)
    for key, value in (args or {}).items():
        if given.setdefault(key, value) != value:
            raise UserError(f"model '{spec}': '{key}' is also given as {value!r}; keep one.")
    factory, source, file = _factory(name, allow_file)
    takes = _parameters(factory)
    if num_classes is not None and "num_classes" in takes:
        given.setdefault("num_classes", num_classes)
    _check_arguments(name, takes, given)
    model = _build(name, factory, given, file)
    architecture = Architecture(name=name, args=given, sha256=architecture_sha(model))
    return ModelSpec(model, architecture, spec, source)


def registered(architecture: Architecture) -> ModelSpec:
    """Build the network a Plan starts from. Runs no code from a file, whatever the Plan says.

    Raises:
        UserError: the name is not registered here, is a file's, or the arguments do not fit.
    """
    return resolve(architecture.name, args=architecture.args, allow_file=False)


def list_models() -> list[registry.Entry]:
    """All registered networks, sorted by name; each knows its summary and source."""
    return list(registry.entries("model"))


def _split(spec: str) -> tuple[str, dict[str, Any]]:
    name, _, query = spec.partition("?")
    out: dict[str, Any] = {}
    for part in query.split("&") if query else []:
        key, equals, text = part.partition("=")
        if not (key and equals):
            raise UserError(
                f"model '{spec}': arguments are written ?key=value&key=value: '{part}'."
            )
        if key in out:
            raise UserError(f"model '{spec}': argument '{key}' is given twice.")
        out[key] = _value(text)
    return name, out


def _value(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, list) and all(isinstance(v, (int, float, str)) for v in value):
        return value
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if text == "None":
        return None
    try:
        return float(text)  # YAML 1.1 takes 1e-6 for a string
    except ValueError:
        return text


def _factory(name: str, allow_file: bool) -> tuple[Callable[..., Any], str, str | None]:
    origin, colon, rest = name.partition(":")
    if origin in ADAPTERS:
        if not rest:
            raise UserError(f"model '{name}': write {origin}:NAME.")
        return ADAPTERS[origin](rest), origin, None
    path, _, factory = name.rpartition(":")
    if path.endswith(".py") and factory:
        if not allow_file:
            raise UserError(
                f"the saved model needs '{name}', code from a file; gracile runs that only if you "
                "name the file yourself."
            )
        return factory_of(path, factory), path, path
    if name.rstrip(":").endswith(".py"):
        raise UserError(f"model '{name}': which function makes the network? Write {name}:FACTORY.")
    if colon:
        raise UserError(f"model '{name}': '{origin}' is no source of models; write {FORMS}.")
    entry = registry.get("model", name)
    return entry.obj, entry.source, None


def _parameters(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(factory).parameters)
    except (TypeError, ValueError):  # built in C
        return {}


def _check_arguments(
    name: str, takes: Mapping[str, inspect.Parameter], given: Mapping[str, Any]
) -> None:
    named = {
        n: p
        for n, p in takes.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY, p.POSITIONAL_ONLY)
    }
    anything = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    for key in given:
        if key not in named and not anything:
            hint = nearest(key, named) or " It takes none."
            raise UserError(f"model '{name}' has no argument '{key}'.{hint}")
    for key, p in named.items():
        if p.default is p.empty and key not in given:
            raise UserError(f"model '{name}' needs the argument '{key}': write {name}?{key}=VALUE.")


def _build(
    name: str, factory: Callable[..., Any], given: Mapping[str, Any], file: str | None
) -> nn.Module:
    try:
        model = factory(**given)
    except GracileError:
        raise
    except Exception as e:
        what = blame(e, file) if file else f"{type(e).__name__}: {e}"
        raise UserError(f"model '{name}' could not be built: {what}") from e
    if not isinstance(model, nn.Module):
        raise UserError(f"model '{name}' must return an nn.Module, got {type(model).__name__}.")
    return model
