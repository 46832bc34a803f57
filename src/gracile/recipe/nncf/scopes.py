"""Scope strings of NNCF and the modules they mean.

`ResNet/Sequential[layer1]/BasicBlock[0]/NNCFConv2d[conv1]/conv2d_0` is the first call of conv2d in
`layer1.0.conv1`: class names with attribute names in brackets, then the operator. `{re}` makes it a
regular expression that is searched in such strings.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gracile.errors import UserError, nearest

PREFIX = "NNCF"
_SEGMENT = re.compile(r"(\w+)\[([^\[\]/]+)\]")
_PORT = re.compile(r"\|(?:WEIGHT|OUTPUT|INPUT\d*)$")  # of an operator; a `|` may also be of a {re}
_OPERATION = re.compile(r"\w+_\d+")
_CONVOLUTIONS = {
    f"Conv{t}{d}d": f"conv{'_transpose' * bool(t)}{d}d" for t in ("", "Transpose") for d in "123"
}
# Classes that NNCF wraps, and what it calls the operator in them.
OPERATIONS = {**_CONVOLUTIONS, "Linear": "linear", "Embedding": "embedding"}
_NORMS = {f"BatchNorm{d}d": "batch_norm" for d in "123"} | {
    "GroupNorm": "group_norm",
    "LayerNorm": "layer_norm",
}


@dataclass(frozen=True)
class Layer:
    """A module as far as scopes and pruning want to know it.

    Attributes:
        classes: its class name, then those of its bases (if they are known).
        strides: of a convolution, where they are known.
    """

    classes: tuple[str, ...]
    strides: tuple[int, ...] = ()

    @property
    def kind(self) -> str | None:
        """`_ConvNd`, `Linear` or `Embedding` for what carries weights NNCF acts on."""
        for name in self.classes:
            if name in _CONVOLUTIONS:
                return "_ConvNd"
            if name in OPERATIONS:
                return name
        return None


Layers = Mapping[str, Layer]


def layers_of(model: Any) -> Layers:
    """Module path -> Layer, of a torch module or of a mapping path -> class name(s).

    >>> layers_of({"": "Net", "fc": "Linear"})["fc"].kind
    'Linear'
    """
    if hasattr(model, "named_modules"):
        out = {}
        for path, m in model.named_modules():
            strides = getattr(m, "stride", ())
            classes = tuple(c.__name__ for c in type(m).__mro__)
            out[path] = Layer(classes, strides if isinstance(strides, tuple) else ())
        return out
    return {p: Layer((c,) if isinstance(c, str) else tuple(c)) for p, c in model.items()}


def scope_of(path: str, layers: Layers) -> str:
    """The scope string of a module, class names as they are.

    >>> scope_of("body.0", layers_of({"": "Net", "body": "Sequential", "body.0": "Linear"}))
    'Net/Sequential[body]/Linear[0]'
    """
    names = path.split(".") if path else []
    paths = [".".join(names[: i + 1]) for i in range(len(names))]
    ends = [f"{layers[p].classes[0]}[{n}]" for p, n in zip(paths, names, strict=True)]
    return "/".join([layers[""].classes[0], *ends])


def resolve_scopes(
    scopes: str | Sequence[str],
    model: Any = None,
    *,
    validate: bool = True,
    tell: Callable[[str], None] = lambda text: None,
) -> list[str]:
    """The module paths that scopes mean; as selectors they mean the modules' weights.

    A scope of a container means all layers in it that NNCF gives weights to.

    Args:
        scopes: one or several.
        model: a torch module, or path -> class name(s), or what `layers_of` made of them; None: the
            names in brackets are taken as they are.
        validate: a scope that matches nothing is an error; else it is told and left out.
        tell: called with a sentence about what is left out; an operator without weights is.

    Raises:
        UserError: malformed, matches nothing, or a class that is not the model's; `{re}` without
            a model.

    >>> resolve_scopes("Net/Sequential[body]/NNCFLinear[0]/linear_0")
    ['body.0']
    """
    known = isinstance(model, Mapping) and all(isinstance(v, Layer) for v in model.values())
    layers: Layers | None = model if known or model is None else layers_of(model)
    out: list[str] = []
    for scope in [scopes] if isinstance(scopes, str) else scopes:
        try:
            found = _one(_PORT.sub("", scope), layers)
        except UserError as e:
            if validate:
                raise
            tell(f"{e} It is left out.")
            continue
        if not found:
            tell(f"'{scope}' is an operator without weights; it is left out.")
        out += [p for p in found if p not in out]
    return out


def call_of(scope: str) -> str | None:
    """The graph's name for a call of a module without parts; None for any other operator.

    >>> call_of("Net/Sequential[layer1]/Block[0]/ReLU[relu]/relu__0|OUTPUT")
    'layer1.0.relu'
    >>> call_of("Net/Sequential[layer1]/Block[0]/__add___0|OUTPUT")
    """
    segments = _PORT.sub("", scope).split("/")
    named = [m for s in segments[1:-1] if (m := _SEGMENT.fullmatch(s))]
    if "{re}" in scope or not named or len(named) != len(segments) - 2:
        return None
    operator, _, number = segments[-1].rpartition("_")
    if operator.replace("_", "").lower() not in named[-1][1].removeprefix(PREFIX).lower():
        return None  # a function called in a container
    path = ".".join(m[2] for m in named)
    return path if number == "0" else f"{path}_{number}"


def _one(scope: str, layers: Layers | None) -> list[str]:
    if "{re}" in scope:
        return _by_pattern(scope.replace("{re}", ""), layers)
    segments = scope.split("/")
    operation = _OPERATION.fullmatch(segments[-1]) is not None
    named = [_SEGMENT.fullmatch(s) for s in (segments[1:-1] if operation else segments[1:])]
    if not named and operation:
        return []  # an operator of the network itself, or an input
    parts = [(m[1].removeprefix(PREFIX), m[2]) for m in named if m is not None]
    if not parts or len(parts) != len(named):
        raise UserError(
            f"'{scope}' is not a scope. Write Net/Sequential[body]/NNCFConv2d[0], with or without "
            "/conv2d_0, or {re} and a regular expression."
        )
    path = ".".join(name for _, name in parts)
    if layers is None:
        if parts[-1][0] in OPERATIONS:
            return [path]
        if operation:
            return []
        raise UserError(
            f"'{scope}' means what is in '{path}', which needs the model. Pass --model MODEL."
        )
    if path not in layers:
        raise UserError(f"'{scope}' is not in the model.{_nearest(scope, layers)}")
    for i, (cls, _) in enumerate(parts):
        at = ".".join(name for _, name in parts[: i + 1])
        if cls not in layers[at].classes:
            raise UserError(f"'{scope}': '{at}' is a {layers[at].classes[0]}, not a {cls}.")
    if layers[path].kind:
        return [path]
    return [] if operation else _inside(path, layers)


def _by_pattern(pattern: str, layers: Layers | None) -> list[str]:
    if layers is None:
        raise UserError(
            f"'{{re}}{pattern}' is matched against the modules of the model. Pass --model MODEL."
        )
    try:
        regex = re.compile(pattern)
    except re.error as e:
        raise UserError(f"'{{re}}{pattern}' is not a regular expression: {e}.") from None
    found = [p for p in layers if any(regex.search(s) for s in _spellings(p, layers))]
    if not found:
        near = _nearest(re.sub(r"[\\.*^$]", "", pattern), layers)
        raise UserError(
            f"'{{re}}{pattern}' matches no module of the model.{near} For an operator without "
            "weights set validate_scopes to false."
        )
    return [p for p in found if layers[p].kind]


def _spellings(path: str, layers: Layers) -> list[str]:
    """What NNCF may call a module: its class as it is and wrapped, with and without operator."""
    if not path:
        return []
    plain, name = scope_of(path, layers), layers[path].classes[0]
    stem = plain[: plain.rindex("/") + 1]
    operation = (_NORMS | OPERATIONS).get(name)
    both = [plain] if operation is None else [plain, f"{stem}{PREFIX}{plain.removeprefix(stem)}"]
    return both + [f"{s}/{operation}_0" for s in both if operation]


def _inside(path: str, layers: Layers) -> list[str]:
    return [p for p in layers if p.startswith(f"{path}.") and layers[p].kind]


def _nearest(scope: str, layers: Layers) -> str:
    known: Iterable[str] = (s for p in layers for s in _spellings(p, layers))
    return nearest(scope, known)
