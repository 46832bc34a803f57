"""What an export leaves on disk and how to open it again: one file, its units and its facts."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

from gracile.benchmark import param, tflite
from gracile.core.state import sha256
from gracile.errors import MissingExtra, UserError

KEY = "gracile"  # prefix of our entries in a file's own metadata
FORMAT = "1"
UNIT_MARK = "@"  # an operator's name in a file is "<unit>@<operator><number>"
RUNTIMES = {
    ".onnx": "onnxruntime",
    ".xml": "openvino",
    ".param": "ncnn",
    ".pte": "executorch",
    ".tflite": "litert",
    ".safetensors": "pytorch",
}
WITH_WEIGHTS = (".xml", ".param")  # whose numbers are in a second file, `.bin`
CASCADE = "cascade.json"  # a network with early exits: stages, each an artifact beside this file


@dataclass(frozen=True)
class Unit:
    """A piece of the network a runtime computes as one, and whose result can be looked at.

    Attributes:
        id: name of its output tensor in the artifact = id of a node of the captured graph.
        layers: names of the torch modules whose parameters it uses.
    """

    id: str
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Artifact:
    """An exported model.

    Attributes:
        path: the file (`.onnx`, `.xml` or `.param` with its `.bin`, `.pte`, `.tflite`,
            `.safetensors`; `cascade.json` with a file for each stage).
        runtime: the registered runtime that runs it.
        sha: hash of the file's content (of all its files).
        precision: "f32", "int8" (every layer with weights computes in integers) or "mixed".
        inputs: (name, shape) of each input, with batch 1.
        units: in the order they run.
        metadata: what was given at export (recipe_sha, plan_sha, seed, ...).
        module: the model a "pytorch" artifact belongs to; files of the other runtimes are whole.
    """

    path: Path
    runtime: str
    sha: str
    precision: str
    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    units: tuple[Unit, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    module: Any = field(default=None, repr=False, compare=False)

    @property
    def size_bytes(self) -> int:
        """Size on disk of all its files."""
        return sum(p.stat().st_size for p in files(self.path))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; without the module."""
        return {
            "path": str(self.path),
            "runtime": self.runtime,
            "sha": self.sha,
            "precision": self.precision,
            "inputs": [[name, list(shape)] for name, shape in self.inputs],
            "units": [{"id": u.id, "layers": list(u.layers)} for u in self.units],
            "metadata": dict(self.metadata),
            "size_bytes": self.size_bytes,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Artifact":
        """Inverse of `to_dict`; the files must still be there."""
        return cls(
            path=Path(data["path"]),
            runtime=data["runtime"],
            sha=data["sha"],
            precision=data["precision"],
            inputs=tuple((name, tuple(shape)) for name, shape in data["inputs"]),
            units=tuple(Unit(u["id"], tuple(u["layers"])) for u in data["units"]),
            metadata=dict(data["metadata"]),
        )


def unit_in(name: str, ids: Collection[str]) -> str:
    """The unit an operator's name speaks of, "" if none: runtimes add to names on both sides."""
    text = name.partition(UNIT_MARK)[0] if UNIT_MARK in name else name
    while text and text not in ids:
        text = text.partition(" ")[2]
    return text


def files(path: Path) -> list[Path]:
    """The files an artifact consists of."""
    if path.name == CASCADE:
        return [path, *(f for stage in stage_files(path) for f in files(stage))]
    return [path, path.with_suffix(".bin")] if path.suffix in WITH_WEIGHTS else [path]


def stage_files(path: Path) -> list[Path]:
    """The files of a cascade's stages, in order.

    Raises:
        UserError: no such file, or a damaged one.
    """
    try:
        files = [str(stage["file"]) for stage in json.loads(path.read_text())["stages"]]
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}.") from None
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: what gracile wrote into it is damaged: {e}.") from None
    for file in map(PurePosixPath, files):
        if file.is_absolute() or ".." in file.parts or file.name == CASCADE:
            raise UserError(
                f"{path}: a stage must be an artifact below this folder, got '{file}'. "
                "Export it again."
            )
    return [path.parent / file for file in files]


def artifact_path(path: str | Path, runtime: str) -> Path:
    """The file to write: `path` if it has the runtime's ending, else `model.*` in that folder."""
    path = Path(path)
    suffix = next(s for s, name in RUNTIMES.items() if name == runtime)
    if path.suffix == suffix:
        return path
    if path.suffix in RUNTIMES:
        raise UserError(f"{path}: the runtime '{runtime}' reads {suffix}, not {path.suffix}.")
    return path / f"model{suffix}"


def content_sha(path: Path) -> str:
    """Hash of the content of all files of an artifact."""
    return sha256("".join(sha256(p.read_bytes()) for p in files(path)))


def facts(
    precision: str,
    inputs: Sequence[tuple[str, tuple[int, ...]]],
    units: Sequence[Unit],
    metadata: Mapping[str, Any],
) -> dict[str, str]:
    """What is written into the file itself, as text values."""
    values = {
        "format": FORMAT,
        "precision": precision,
        "inputs": json.dumps(inputs),
        "units": json.dumps([asdict(u) for u in units]),
        "metadata": json.dumps(dict(metadata), sort_keys=True, default=str),
    }
    return {f"{KEY}.{name}": value for name, value in values.items()}


def open_artifact(path: str | Path, module: Any = None) -> Artifact:
    """Read an artifact's facts from its file; no runtime is started.

    A file from elsewhere (without our metadata) has no units; its inputs and precision are read
    from the graph.

    Args:
        path: the exported file; its ending names the runtime.
        module: the model, for a `.safetensors` file.

    Raises:
        UserError: no such file, an ending no runtime here reads, or a damaged file.
        MissingExtra: reading an `.onnx` file needs the onnx extra, a `.tflite` file litert.
    """
    path = Path(path)
    if path.name == CASCADE:
        return _open_cascade(path)
    if path.suffix not in RUNTIMES:
        raise UserError(f"{path}: an artifact ends in {', '.join(RUNTIMES)}, not '{path.suffix}'.")
    missing = [p for p in files(path) if not p.is_file()]
    if missing:
        raise UserError(f"{missing[0]}: no such file.")
    values, inputs, guess = READERS[path.suffix](path)
    try:
        stored = json.loads(values.get(f"{KEY}.inputs", "[]"))
        units = json.loads(values.get(f"{KEY}.units", "[]"))
        return Artifact(
            path=path,
            runtime=RUNTIMES[path.suffix],
            sha=content_sha(path),
            precision=values.get(f"{KEY}.precision", guess),
            inputs=tuple((name, tuple(shape)) for name, shape in stored) or inputs,
            units=tuple(Unit(u["id"], tuple(u["layers"])) for u in units),
            metadata=json.loads(values.get(f"{KEY}.metadata", "{}")),
            module=module,
        )
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: what gracile wrote into it is damaged: {e}.") from None


def _open_cascade(path: Path) -> Artifact:
    missing = [p for p in files(path) if not p.is_file()]
    if missing:
        raise UserError(f"{missing[0]}: no such file.")
    try:
        facts = json.loads(path.read_text())
        return Artifact(
            path=path,
            runtime=facts["runtime"],
            sha=content_sha(path),
            precision=facts["precision"],
            inputs=tuple((name, tuple(shape)) for name, shape in facts["inputs"]),
            metadata=facts["metadata"],
        )
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: what gracile wrote into it is damaged: {e}.") from None


Read = tuple[dict[str, str], tuple[tuple[str, tuple[int, ...]], ...], str]


def _read_onnx(path: Path) -> Read:
    try:
        import onnx
    except ImportError:
        raise MissingExtra("reading an ONNX file", "onnx") from None
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as e:  # protobuf's own error type is not public
        raise UserError(f"{path}: not an ONNX file: {e}.") from None
    weights = {i.name for i in model.graph.initializer}
    inputs = tuple(
        (i.name, tuple(d.dim_value or 1 for d in i.type.tensor_type.shape.dim))
        for i in model.graph.input
        if i.name not in weights
    )
    integer = any(n.op_type == "QuantizeLinear" for n in model.graph.node)
    return {p.key: p.value for p in model.metadata_props}, inputs, "mixed" if integer else "f32"


def _read_ir(path: Path) -> Read:
    try:
        root = ElementTree.fromstring(path.read_bytes())
    except ElementTree.ParseError as e:
        raise UserError(f"{path}: not an OpenVINO IR: {e}.") from None
    values = {
        f"{KEY}.{node.tag}": node.get("value", "") for node in root.iterfind(f"rt_info/{KEY}/*")
    }
    layers = root.findall("layers/layer")
    inputs = tuple(
        (str(layer.get("name")), _shape(layer))
        for layer in layers
        if layer.get("type") == "Parameter"
    )
    integer = any(layer.get("type") == "FakeQuantize" for layer in layers)
    return values, inputs, "mixed" if integer else "f32"


def _shape(layer: ElementTree.Element) -> tuple[int, ...]:
    dims = [int(d.text or 1) for d in layer.iterfind("output/port/dim")]
    return tuple(1 if d < 0 else d for d in dims)


def _read_param(path: Path) -> Read:
    try:
        layers, values = param.read(path.read_text())
    except (ValueError, IndexError) as e:
        raise UserError(f"{path}: not an ncnn network: {e}.") from None
    inputs = tuple(
        (x.outputs[0], (1, *(n for k in (2, 1, 0) if isinstance(n := x.params.get(k), int) and n)))
        for x in layers
        if x.type == "Input"
    )
    return values, inputs, "mixed" if any(x.in_integers for x in layers) else "f32"


def _read_safetensors(path: Path) -> Read:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {}), (), "f32"
    except SafetensorError as e:
        raise UserError(f"{path}: not a safetensors file: {e}.") from None


FACTS_END = b"gracile-facts"  # the last bytes of a file with facts behind its content


def with_facts(content: bytes, values: Mapping[str, str]) -> bytes:
    """A file's content with facts behind it, for formats that do not read what follows.

    The facts are JSON, then their length in 8 bytes, then `FACTS_END`.
    """
    data = json.dumps(dict(values)).encode()
    return content + data + len(data).to_bytes(8, "little") + FACTS_END


def facts_behind(content: bytes) -> dict[str, str]:
    """The facts that `with_facts` put behind a content; {} if there are none."""
    if not content.endswith(FACTS_END):
        return {}
    end = len(content) - len(FACTS_END) - 8
    size = int.from_bytes(content[end : end + 8], "little")
    return {str(k): str(v) for k, v in json.loads(content[end - size : end]).items()}


def units_path(path: Path) -> Path:
    """The program beside a `.pte` that shows its units; no part of the artifact."""
    return path.with_suffix(".units")


def _read_pte(path: Path) -> Read:
    content = path.read_bytes()
    if content[4:6] != b"ET":  # the identifier of its flatbuffer
        raise UserError(f"{path}: not an ExecuTorch program.")
    try:
        return facts_behind(content), (), "f32"
    except (ValueError, AttributeError) as e:  # no JSON, or no object
        raise UserError(f"{path}: the facts behind the program are damaged: {e}.") from None


def _read_tflite(path: Path) -> Read:
    try:
        model = tflite.read(path.read_bytes())
        inputs = tflite.inputs_of(model)
        integer = any(t.type == tflite.INT8 for t in model.subgraphs[0].tensors)
        return tflite.facts_of(model), inputs, "mixed" if integer else "f32"
    except (ValueError, TypeError, IndexError, AttributeError) as e:
        raise UserError(f"{path}: not a LiteRT file: {e}.") from None


READERS: Mapping[str, Callable[[Path], Read]] = {
    ".onnx": _read_onnx,
    ".xml": _read_ir,
    ".param": _read_param,
    ".pte": _read_pte,
    ".tflite": _read_tflite,
    ".safetensors": _read_safetensors,
}
