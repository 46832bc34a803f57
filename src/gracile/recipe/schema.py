"""The Recipe: what the user wants, as frozen, validated values. Nothing here knows torch.

Its fields are the YAML keys. `load` reads one from text, `Recipe.build` from Python; both give the
same messages. A method's options are read by the `Options` model the registered method brings.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetPydanticSchema,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import core_schema

from gracile import registry
from gracile.core import lr as schedules
from gracile.core.state import sha256, write_atomic
from gracile.errors import UserError, nearest
from gracile.recipe import optimizers
from gracile.recipe.document import Document, dump
from gracile.recipe.messages import EntryError, FieldError, refuse, show, verbs_of

MAX_EPOCHS = 1_000_000  # a timetable lists every firing
_ROWS = re.compile(r"(?:train|val|test)(?:\[(?:-?\d+)?:(?:-?\d+)?\])?")
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Goal(_Section):
    """What must come out; all optional. A missed goal is exit status 1, never silence.

    Attributes:
        speedup: at least this many times faster than the original, in the first runtime asked for.
        latency_ms: at most this median latency.
        size_mb: the exported artifact at most this large, in 10^6 bytes.
        max_drop: at most this many points of the task's metric lost (1 point = 1 %).
    """

    speedup: float | None = Field(default=None, ge=1)
    latency_ms: float | None = Field(default=None, gt=0)
    size_mb: float | None = Field(default=None, gt=0)
    max_drop: float | None = Field(default=None, ge=0, le=100)


class Optimizer(_Section):
    """`{class: SGD, lr: 0.05, momentum: 0.9}`: a class of torch.optim and its arguments.

    Attributes:
        class_: the class's name (`class` in YAML).
        lr: the learning rate; that of the whole training, or what a schedule starts from.
    """

    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True)

    class_: str = Field(alias="class")
    lr: float = Field(gt=0)

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for the class: `lr` and the others that are set."""
        return {"lr": self.lr, **(self.model_extra or {})}

    @model_validator(mode="after")
    def _known(self) -> Self:
        wrong = optimizers.problem(self.class_, self.model_extra or {})
        if wrong is not None:
            raise FieldError(wrong[1], (wrong[0],))
        return self


def _default_optimizer() -> Optimizer:
    return Optimizer.model_validate(
        {"class": "SGD", "lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}
    )


class Train(_Section):
    """How the model is trained while it is compressed.

    Attributes:
        epochs: 0 means no training: only what fires `at: end`.
        batch_size: images per mini-batch.
        optimizer: see `Optimizer`; default SGD, lr 0.01, momentum 0.9, weight decay 1e-4.
        lr: a schedule by torch's name, see core.lr; null keeps the optimizer's rate.
        autocast: forward in bf16 or fp16; auto is bf16 where the device has units for it, which
            halves the time there, and float32 elsewhere, where bf16 takes several times as long.
        channels_last: training images lie in memory with their channels last, which convolutions
            of a CPU like (ResNet-20 in float32: a quarter less time); a forward that calls `view`
            on a feature map may need `reshape` then.
        augment: of the training images; auto is what suits the data set.
        accumulate: mini-batches per optimizer step.
        label_smoothing: share of the target spread over all classes.
        clip_grad_norm: largest norm of all gradients together.
    """

    epochs: int = Field(default=0, ge=0, le=MAX_EPOCHS)
    batch_size: int = Field(default=128, ge=1)
    optimizer: Optimizer = Field(default_factory=_default_optimizer)
    lr: dict[str, Any] | None = None
    autocast: Literal["none", "auto", "bf16", "fp16"] = "none"
    channels_last: bool = False
    augment: Literal["none", "standard", "shift", "auto"] = "auto"
    accumulate: int = Field(default=1, ge=1)
    label_smoothing: float = Field(default=0.0, ge=0, le=1)
    clip_grad_norm: float | None = Field(default=None, gt=0)

    @field_validator("lr", mode="before")
    @classmethod
    def _schedule(cls, spec: Any) -> Any:
        if spec is not None and not isinstance(spec, dict):
            raise FieldError(f"must be a mapping, got {show(spec)}. Write {{class: OneCycleLR}}.")
        wrong = schedules.problem(spec) if spec is not None else None
        if wrong is not None:
            keys = (k for k in wrong[0].split(".") if k)
            raise FieldError(wrong[1], tuple(int(k) if k.isdigit() else k for k in keys))
        return spec

    @model_validator(mode="after")
    def _momentum(self) -> Self:
        if self.lr and schedules.cycles_momentum(self.lr):
            name = self.optimizer.class_
            if not optimizers.has_momentum(name):
                raise FieldError(
                    f"must not cycle momentum, which {name} has not. Set cycle_momentum: false.",
                    ("lr",),
                )
        return self


def _rows(*, auto: bool = False, count: bool = False, share: bool = False) -> Any:
    """Rows of a split, `test` or `test[5000:]`, or what else a field allows."""
    allowed = ["rows of train, val or test"]
    allowed += ["a count >= 1"] if count else []
    allowed += ["a share in (0, 1)"] if share else []
    allowed += ["auto"] if auto else []
    example = "300" if count else "test[:5000]"

    def read(value: object) -> int | float | str | None:
        if value is None or (auto and value == "auto"):
            return value  # type: ignore[return-value]
        if isinstance(value, str) and _ROWS.fullmatch(value):
            return value
        if count and isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return value
        if share and isinstance(value, float) and 0 < value < 1:
            return value
        raise FieldError(f"must be {' or '.join(allowed)}, got {show(value)}. Write {example}.")

    schema = core_schema.no_info_plain_validator_function(read)
    return Annotated[int | float | str | None, GetPydanticSchema(lambda _s, _h: schema)]


class Data(_Section):
    """Which rows of the data set serve for what. The test split never selects anything.

    Attributes:
        val: `auto`, a share or count of the training rows, or rows of a split (`test[5000:]`).
        test: rows the final numbers are measured on; null is the data set's own choice.
        train: rows to train on; null is all that are not for validation.
        calibration: how many training images (or which rows) set the quantization ranges.
        transfer: a data set whose images are trained on in the place of the training rows; their
            labels are not used, so a teacher has to answer (`distill: kd`, `alpha: 0`).
        mean, std: per channel; null is the data set's own.
    """

    val: _rows(auto=True, count=True, share=True) = "auto"  # type: ignore[valid-type]
    test: _rows() = None  # type: ignore[valid-type]
    train: _rows() = None  # type: ignore[valid-type]
    calibration: _rows(count=True) = 300  # type: ignore[valid-type]
    transfer: str | None = Field(default=None, min_length=1)
    mean: tuple[float, ...] | None = Field(default=None, min_length=1)
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(default=None, min_length=1)

    @field_validator("val", "calibration")
    @classmethod
    def _given(cls, value: Any) -> Any:
        if value is None:
            raise FieldError("must not be null. Leave it out for the default.")
        return value

    @model_validator(mode="after")
    def _together(self) -> Self:
        if (self.mean is None) != (self.std is None):
            raise FieldError("needs both 'mean' and 'std', or neither. Give the other one as well.")
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise FieldError(
                f"must be as long as mean ({len(self.mean)}), got {len(self.std)} values. "
                "Give one value per channel.",
                ("std",),
            )
        return self


class Accuracy(_Section):
    """How long to train, and how far to compress, goes by the accuracy on validation data.

    Attributes:
        mode: early_exit: stop as soon as all methods have reached their last level and the accuracy
            is within `max_drop`. adaptive: look for the highest level of one method at which it is.
        max_drop: points (1 point = 1 %) of top-1 that may be lost against the original.
        relative: the drop is in percent of the original's accuracy instead.
        method: adaptive: the entry whose level is varied; default the last that has one.
        step: adaptive: first change of the level.
        shrink: after a level that fails the step is multiplied by this.
        min_step: a smaller step is not tried.
        min_level, max_level: levels beyond these are not tried.
        patience: epochs that a higher level has to get within `max_drop`.
        lr_factor: after a level that fails the learning rate is multiplied by this.
        max_epochs: no other level is tried after so many epochs in all.
    """

    mode: Literal["early_exit", "adaptive"]
    max_drop: float = Field(ge=0, le=100)
    relative: bool = False
    method: str | None = None
    step: float = Field(default=0.1, gt=0, lt=1)
    shrink: float = Field(default=0.5, gt=0, lt=1)
    min_step: float = Field(default=0.025, gt=0, lt=1)
    min_level: float = Field(default=0.05, ge=0, lt=1)
    max_level: float = Field(default=0.95, gt=0, lt=1)
    patience: int = Field(default=3, ge=1)
    lr_factor: float = Field(default=0.5, gt=0, le=1)
    max_epochs: int = Field(default=10_000, ge=1)


@dataclass(frozen=True)
class Entry:
    """One method of a recipe: `{<verb>: <method>, <options>}`.

    Attributes:
        verb: prune, quantize, distill, ...
        method: the registered name.
        options: an instance of the method's own `Options`.
    """

    verb: str
    method: str
    options: Any

    @classmethod
    def read(cls, value: object) -> "Entry":
        """From the mapping of a recipe.

        Raises:
            FieldError, EntryError: no or two verbs, an unknown method, or wrong options.
        """
        if isinstance(value, Entry):
            return value
        if not isinstance(value, dict):
            raise FieldError(
                f"must be a mapping with a verb, got {show(value)}. "
                "Write {prune: gradual, weights: ..., ...}."
            )
        found = verbs_of(value)
        verbs = sorted({n.split("/")[0] for n in registry.names("method")})
        if not found:
            near = next((k for k in value if nearest(k, verbs).startswith(" Nearest")), "")
            raise FieldError(
                f"needs a verb ({', '.join(verbs)})"
                + (
                    f"; '{near}' is none.{nearest(near, verbs)}"
                    if near
                    else ". Write {prune: ...}."
                ),
                key=near or None,
            )
        if len(found) > 1:
            raise FieldError(
                f"has two verbs, '{found[0]}' and '{found[1]}'. Give each its own entry.",
                key=found[1],
            )
        verb = found[0]
        model = _options_model(verb, value[verb])
        rest = {k: v for k, v in value.items() if k != verb}
        try:
            return cls(verb, value[verb], model.model_validate_json(json.dumps(rest), strict=True))
        except ValidationError as e:
            raise EntryError(e, model) from None

    def plain(self) -> dict[str, Any]:
        """The YAML form, defaults filled in."""
        return {self.verb: self.method, **_plain(self.options)}


def _options_model(verb: str, name: object) -> type[BaseModel]:
    known = [n.split("/")[1] for n in registry.names("method") if n.startswith(f"{verb}/")]
    if not isinstance(name, str):
        raise FieldError(
            f"must name a {verb} method, got {show(name)}.{nearest('', known)}", key=verb
        )
    if name not in known:
        raise FieldError(
            f"must name a known {verb} method, got '{name}'.{nearest(name, known)}", key=verb
        )
    model: type[BaseModel] = registry.get("method", f"{verb}/{name}").obj.Options
    return model


_EntryField = Annotated[
    Entry,
    GetPydanticSchema(
        lambda _source, _handler: core_schema.no_info_plain_validator_function(
            Entry.read, serialization=core_schema.plain_serializer_function_ser_schema(Entry.plain)
        )
    ),
]


class Recipe(BaseModel):
    """A whole recipe. Equal recipes mean the same, wherever they were read from.

    Attributes:
        recipe: version of the format.
        seed: every random number of a run derives from it.
        compat: strict: methods that follow Distiller do what it did even where that is a defect,
            see docs/guide/from-distiller.md.
        goal, train, accuracy, data: see there.
        methods: id -> entry; several due at one instant act in this order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: Literal[1]
    seed: int = Field(default=0, ge=0)
    compat: Literal["none", "strict"] = "none"
    goal: Goal = Field(default_factory=Goal)
    train: Train = Field(default_factory=Train)
    accuracy: Accuracy | None = None
    data: Data = Field(default_factory=Data)
    methods: dict[str, _EntryField] = Field(default_factory=dict)

    _document: Document = PrivateAttr(default_factory=lambda: Document("<python>", {}))

    @field_validator("methods", mode="before")
    @classmethod
    def _ids(cls, value: Any) -> Any:
        for id in value if isinstance(value, dict) else ():
            if not _ID.fullmatch(id):
                raise FieldError(
                    f"must be named with letters, digits, _ and -, got {show(id)}. Rename it.",
                    key=id,
                )
        return value

    @model_validator(mode="after")
    def _accuracy_of(self) -> Self:
        aware = self.accuracy
        if aware is not None and self.train.epochs == 0:
            raise FieldError("goes by training. Set train: {epochs: N}.", ("accuracy",))
        if aware is not None and aware.method not in (None, *self.methods):
            raise FieldError(
                f"must name an entry, got {show(aware.method)}.{nearest('', self.methods)}",
                ("accuracy", "method"),
            )
        return self

    @classmethod
    def read(cls, document: Document) -> "Recipe":
        """From plain values.

        Raises:
            RecipeError: one message for the first fault, with its place.
        """
        if not isinstance(document.data, dict):
            raise UserError("a document's data must be a mapping")
        try:
            out = cls.model_validate_json(json.dumps(document.data), strict=True)
        except ValidationError as e:
            raise refuse(e, document, cls) from None
        out._document = document
        return out

    @classmethod
    def build(
        cls,
        *,
        seed: int = 0,
        compat: str = "none",
        goal: Mapping[str, Any] | None = None,
        train: Mapping[str, Any] | None = None,
        accuracy: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        methods: Mapping[str, Any] | None = None,
    ) -> "Recipe":
        """A recipe written in Python, checked as if it were a file; see recipe.build.

        Raises:
            RecipeError: the message a file would give, in place of file and line `<python>`.
        """
        from gracile.recipe.build import build

        sections = {"goal": goal, "train": train, "data": data, "methods": methods}
        return build(seed=seed, compat=compat, accuracy=accuracy, **sections)

    @property
    def path(self) -> str:
        """Where it was read from: a file's path, `<string>` or `<python>`."""
        return self._document.name

    @property
    def lines(self) -> dict[str, int]:
        """Line of each method entry, where it was read from text."""
        found = {id: self._document.line(("methods", id)) for id in self.methods}
        return {id: line for id, line in found.items() if line is not None}

    @property
    def places(self) -> Mapping[tuple[str | int, ...], str]:
        """`file:line` of each path of keys that was read from text."""
        return self._document.places

    @property
    def sha(self) -> str:
        """Hash of what it says, defaults filled in; comments, layout and file name do not count."""
        plain = self.plain()
        plain["methods"] = list(plain.get("methods", {}).items())  # their order means something
        return sha256(json.dumps(plain, sort_keys=True))

    def plain(self) -> dict[str, Any]:
        """Plain values in YAML's order, defaults filled in; what is null by default is left out."""
        out: dict[str, Any] = {"recipe": self.recipe, "seed": self.seed}
        if self.compat != "none":
            out["compat"] = self.compat
        for name in ("goal", "train", "accuracy", "data"):
            section = getattr(self, name)
            out[name] = _plain(section) if section is not None else {}
        out["methods"] = {id: entry.plain() for id, entry in self.methods.items()}
        return {k: v for k, v in out.items() if v != {}}

    def to_yaml(self) -> str:
        """The recipe as text, defaults filled in. `loads(r.to_yaml()) == r`."""
        return dump(self.plain())

    def save(self, path: str | Path) -> None:
        """Write `to_yaml()` in one step."""
        write_atomic(Path(path), self.to_yaml().encode())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash(self.sha)


def _plain(model: BaseModel) -> dict[str, Any]:
    """Field values as YAML writes them; null where that is the default is left out."""
    values = model.model_dump(mode="json", by_alias=True)
    out: dict[str, Any] = {}
    for name, info in type(model).model_fields.items():
        key, value = info.alias or name, getattr(model, name)
        if value is not None or not _null_by_default(info):
            out[key] = _nested(value, values[key])
    extra = model.model_extra or {}
    return out | {k: values[k] for k in sorted(extra)}


def _null_by_default(info: FieldInfo) -> bool:
    default = info.get_default(call_default_factory=True, validated_data={})
    return not info.is_required() and default is None


def _nested(value: Any, dumped: Any) -> Any:
    if isinstance(value, BaseModel):
        return _plain(value)
    if isinstance(value, (list, tuple)) and isinstance(dumped, list) and len(value) == len(dumped):
        return [_nested(v, d) for v, d in zip(value, dumped, strict=True)]
    if isinstance(value, dict) and isinstance(dumped, dict) and len(value) == len(dumped):
        return {k: _nested(v, d) for (k, d), v in zip(dumped.items(), value.values(), strict=True)}
    return dumped
