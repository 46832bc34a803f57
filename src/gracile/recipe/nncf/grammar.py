"""The legacy configuration of NNCF (1.0 to 2.19) as frozen, validated values with its defaults.

Names, choices and defaults are those of its JSON schemas. What only old versions know (1.x, the
paper's) is accepted as well.
"""

import difflib
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetPydanticSchema,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import core_schema

from gracile.errors import nearest
from gracile.recipe.document import Document
from gracile.recipe.messages import EntryError, FieldError, refuse, show
from gracile.recipe.nncf.text import error

T = TypeVar("T")
SAMPLE_KEYS = ("epochs", "optimizer", "batch_size")  # of the sample scripts; these are used


def _listed(value: object) -> object:
    return value if isinstance(value, list) else [value]


Listed = Annotated[list[T], BeforeValidator(_listed)]  # one, or a list of them
Share = Annotated[float, Field(ge=0, lt=1)]
Epoch = Annotated[int, Field(ge=0)]
Mode = Literal["symmetric", "asymmetric"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class _Scoped(_Part):
    ignored_scopes: Listed[str] = []
    target_scopes: Listed[str] | None = None


class _Algorithm(_Scoped):
    validate_scopes: bool = True
    compression_lr_multiplier: float | None = Field(default=None, gt=0)


# ------------------------------------------------------------------ initializers


class BatchNormAdaptation(_Part):
    """Statistics of batch norm counted anew at the start; 0 samples is off."""

    num_bn_adaptation_samples: int = Field(default=2000, ge=0)
    num_bn_forget_samples: int = Field(default=0, ge=0)


class Initializer(_Part):
    """Of sparsity and pruning."""

    batchnorm_adaptation: BatchNormAdaptation | None = None


class RangeParams(_Part):
    """Of the types percentile and mean_percentile."""

    min_percentile: float = Field(default=0.1, ge=0, lt=50)
    max_percentile: float = Field(default=99.9, gt=50, le=100)


class Range(_Scoped):
    """How the ranges of quantizers begin; scopes and group only in a list of several."""

    num_init_samples: int = Field(default=256, ge=0)
    type: Literal[
        "mixed_min_max", "min_max", "mean_min_max", "threesigma", "percentile", "mean_percentile"
    ] = "mixed_min_max"
    params: RangeParams = RangeParams()
    target_quantizer_group: Literal["activations", "weights"] | None = None


class Precision(_Part):
    """Bit widths of each quantizer: found by a search, or written down."""

    type: Literal["hawq", "autoq", "manual"]
    bits: list[int] = [2, 4, 8]
    num_data_points: int = 100
    iter_number: int | None = None
    tolerance: float = 1e-4
    compression_ratio: float | None = None
    eval_subset_ratio: float = 1.0
    warmup_iter_number: int = 20
    bitwidth_per_scope: list[tuple[int, str]] = []
    traces_per_layer_path: str | None = None
    dump_init_precision_data: bool = False
    bitwidth_assignment_mode: Literal["strict", "liberal"] = "liberal"

    @field_validator("bitwidth_per_scope", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        if isinstance(value, list):
            return [tuple(v) if isinstance(v, list) else v for v in value]
        return value


class QuantizationInitializer(Initializer):
    """Of quantization and binarization."""

    range: Listed[Range] = []
    precision: Precision | None = None


# ------------------------------------------------------------------ quantization


class Grid(_Part):
    """A quantizer; null is what the preset, the data or the device says."""

    mode: Mode | None = None
    bits: int | None = Field(default=None, ge=1, le=32)
    signed: bool | None = None
    per_channel: bool | None = None


class Weights(Grid, _Scoped):
    """All quantizers of weights."""

    logarithm_scale: bool = False


class Activations(Weights):
    """All quantizers of activations."""

    unified_scale_ops: list[list[str]] = []


class Override(Grid):
    """Quantizers of one scope."""

    initializer: QuantizationInitializer | None = None


class Overrides(_Part):
    """Scope -> what is different there."""

    weights: dict[str, Override] = {}
    activations: dict[str, Override] = {}


class Staged(_Part):
    """`params` of quantization and binarization: begin at an epoch."""

    batch_multiplier: int = Field(default=1, ge=1)
    activations_quant_start_epoch: Epoch = 1
    weights_quant_start_epoch: Epoch = 1
    lr_poly_drop_start_epoch: Epoch | None = None
    lr_poly_drop_duration_epochs: Epoch = 30
    disable_wd_start_epoch: Epoch | None = None
    base_lr: float = Field(default=1e-3, gt=0)
    base_wd: float = Field(default=1e-5, ge=0)


class Quantization(_Algorithm):
    """`algorithm: quantization`."""

    algorithm: Literal["quantization"]
    preset: Literal["performance", "mixed"] = "performance"
    initializer: QuantizationInitializer = QuantizationInitializer()
    weights: Weights = Weights()
    activations: Activations = Activations()
    scope_overrides: Overrides = Overrides()
    quantize_inputs: bool = True
    quantize_outputs: bool = False
    overflow_fix: Literal["enable", "disable", "first_layer_only"] = "enable"
    disable_saturation_fix: bool = False  # 1.x
    export_to_onnx_standard_ops: bool = False
    quantizable_subgraph_patterns: list[Any] = []  # 1.x
    params: Staged | None = None


class Binarization(_Algorithm):
    """`algorithm: binarization`."""

    algorithm: Literal["binarization"]
    mode: Literal["xnor", "dorefa"] = "xnor"
    initializer: QuantizationInitializer = QuantizationInitializer()
    params: Staged = Staged()


# ------------------------------------------------------------------ sparsity


class SparsityParams(_Part):
    """Of both learned kinds of sparsity; `schedule` null is the algorithm's own."""

    schedule: Literal["polynomial", "exponential", "adaptive", "multistep"] | None = None
    patience: int = Field(default=1, ge=1)
    power: float = Field(default=0.9, gt=0)
    concave: bool = True
    sparsity_target: Share = 0.5
    sparsity_target_epoch: Epoch = 90
    sparsity_freeze_epoch: Epoch = 100
    update_per_optimizer_step: bool = False
    steps_per_epoch: int | None = Field(default=None, ge=1)
    multistep_steps: list[Epoch] = [90]
    multistep_sparsity_levels: list[Share] = [0.1, 0.5]
    sparsity_level_setting_mode: Literal["global", "local"] = "global"


class MagnitudeParams(SparsityParams):
    """`params` of magnitude_sparsity."""

    weight_importance: Literal["normed_abs", "abs"] = "normed_abs"


class MagnitudeSparsity(_Algorithm):
    """`algorithm: magnitude_sparsity`."""

    algorithm: Literal["magnitude_sparsity"]
    sparsity_init: Share = 0.0
    initializer: Initializer = Initializer()
    params: MagnitudeParams = MagnitudeParams()


class RbSparsity(_Algorithm):
    """`algorithm: rb_sparsity`."""

    algorithm: Literal["rb_sparsity"]
    sparsity_init: Share = 0.0
    params: SparsityParams = SparsityParams()


class ConstSparsity(_Algorithm):
    """`algorithm: const_sparsity`."""

    algorithm: Literal["const_sparsity"]


class Structure(_Part):
    """An entry of `sparse_structure_by_scopes`; block wants two factors, per_dim an axis."""

    mode: Literal["fine", "block", "per_dim"]
    sparse_factors: list[Annotated[int, Field(ge=1)]] | None = None
    axis: Literal[0, 1] | None = None
    target_scopes: Listed[str]

    @model_validator(mode="after")
    def _as_the_mode_wants(self) -> Self:
        block, per_dim = self.mode == "block", self.mode == "per_dim"
        plain = self.mode == "fine" and self.sparse_factors == [1, 1]
        if (self.sparse_factors is not None) != block and not plain:
            rule = "needs sparse_factors, such as [32, 32]" if block else "has no sparse_factors"
            raise FieldError(f"{rule}, as its mode is {self.mode}.")
        if block and len(self.sparse_factors or ()) != 2:
            raise FieldError(
                f"must be two numbers, rows and columns of a block, got {self.sparse_factors}.",
                ("sparse_factors",),
            )
        if (self.axis is not None) != per_dim:
            rule = "needs axis, 0 (rows) or 1 (columns)" if per_dim else "has no axis"
            raise FieldError(f"{rule}, as its mode is {self.mode}.")
        return self


class MovementParams(_Part):
    """`params` of movement_sparsity."""

    warmup_start_epoch: float = Field(ge=0)
    warmup_end_epoch: float = Field(gt=0)
    importance_regularization_factor: float = Field(ge=0)
    enable_structured_masking: bool = True
    power: float = Field(default=3.0, gt=0)
    init_importance_threshold: float | None = None
    final_importance_threshold: float = 0.0
    steps_per_epoch: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _has_a_warm_up(self) -> Self:
        if self.warmup_end_epoch <= self.warmup_start_epoch:
            raise FieldError(
                f"must be after warmup_start_epoch ({self.warmup_start_epoch:g}), got "
                f"{self.warmup_end_epoch:g}.",
                ("warmup_end_epoch",),
            )
        return self


class MovementSparsity(_Algorithm):
    """`algorithm: movement_sparsity`, experimental; linear layers only."""

    algorithm: Literal["movement_sparsity"]
    params: MovementParams
    sparse_structure_by_scopes: list[Structure] = []


# ------------------------------------------------------------------ filters, distillation


class Legr(_Part):
    """`legr_params`: the search of learned ranking; max_pruning None is the target."""

    generations: int = Field(default=400, ge=1)
    train_steps: int = Field(default=200, ge=0)
    max_pruning: float | None = Field(default=None, gt=0, lt=1)
    random_seed: int = 42


Importance = Literal["L2", "L1", "geometric_median"]


class FilterParams(_Part):
    """`params` of filter_pruning."""

    schedule: Literal["exponential", "exponential_with_bias", "baseline"] = "exponential"
    filter_importance: Importance = "L2"
    weight_importance: Importance | None = None  # 1.x
    pruning_target: Share = 0.5
    pruning_flops_target: Share | None = None
    pruning_steps: int = Field(default=100, ge=1)
    num_init_steps: Epoch = 0
    interlayer_ranking_type: Literal["unweighted_ranking", "learned_ranking"] = "unweighted_ranking"
    all_weights: bool = False
    prune_first_conv: bool = False
    prune_last_conv: bool = False  # 1.x
    prune_downsample_convs: bool = False
    prune_batch_norms: bool = True
    zero_grad: bool = True  # 1.x
    legr_params: Legr = Legr()
    save_ranking_coeffs_path: str | None = None
    load_ranking_coeffs_path: str | None = None


class FilterPruning(_Algorithm):
    """`algorithm: filter_pruning`."""

    algorithm: Literal["filter_pruning"]
    pruning_init: Share = 0.0
    initializer: Initializer = Initializer()
    params: FilterParams = FilterParams()


class KnowledgeDistillation(_Part):
    """`algorithm: knowledge_distillation`; the loss is task + scale * distillation."""

    algorithm: Literal["knowledge_distillation"]
    type: Literal["softmax", "mse"]
    scale: float = Field(default=1.0, gt=0)
    temperature: float = Field(default=1.0, gt=0)


# ------------------------------------------------------------------ the whole


class Accuracy(_Part):
    """`params` of accuracy_aware_training; one of the two degradations."""

    maximal_relative_accuracy_degradation: float | None = Field(default=None, ge=0)
    maximal_absolute_accuracy_degradation: float | None = Field(default=None, ge=0)
    maximal_total_epochs: int = Field(default=10000, ge=1)
    initial_training_phase_epochs: int = Field(default=5, ge=1)
    initial_compression_rate_step: float = Field(default=0.1, gt=0, lt=1)
    compression_rate_step_reduction_factor: float = Field(default=0.5, gt=0, lt=1)
    minimal_compression_rate_step: float = Field(default=0.025, gt=0, lt=1)
    lr_reduction_factor: float = Field(default=0.5, gt=0, le=1)
    patience_epochs: int = Field(default=3, ge=1)

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = (
            self.maximal_relative_accuracy_degradation,
            self.maximal_absolute_accuracy_degradation,
        )
        if given.count(None) != 1:
            raise FieldError(
                "needs maximal_relative_accuracy_degradation (in percent of the accuracy) or "
                "maximal_absolute_accuracy_degradation (in its points), one of the two."
            )
        return self


class AccuracyAware(_Part):
    """`accuracy_aware_training`."""

    mode: Literal["early_exit", "adaptive_compression_level"]
    params: Accuracy


class InputInfo(_Part):
    """A tensor the model takes; `filler` is what it is made of."""

    sample_size: list[int] = [1, 3, 224, 224]
    type: Literal["float", "long"] = "float"
    filler: Literal["ones", "zeros", "random"] = "ones"
    keyword: str | None = None


ALGORITHMS: dict[str, type[BaseModel]] = {
    "quantization": Quantization,
    "binarization": Binarization,
    "magnitude_sparsity": MagnitudeSparsity,
    "rb_sparsity": RbSparsity,
    "const_sparsity": ConstSparsity,
    "filter_pruning": FilterPruning,
    "knowledge_distillation": KnowledgeDistillation,
    "movement_sparsity": MovementSparsity,
}


def _algorithm(value: object) -> Any:
    known = list(ALGORITHMS)
    if not isinstance(value, dict):
        raise FieldError(f'must be a mapping, got {show(value)}. Write {{"algorithm": ...}}.')
    if "algorithm" not in value:
        raise FieldError(f"needs 'algorithm'.{nearest('', known)}")
    name = value["algorithm"]
    if name not in known:
        raise FieldError(
            f"has an unknown algorithm, {show(name)}.{nearest(str(name), known)}", key="algorithm"
        )
    try:
        return ALGORITHMS[name].model_validate(value, strict=True)
    except ValidationError as e:
        raise EntryError(e, ALGORITHMS[name]) from None


_AnyAlgorithm = Annotated[
    Any,
    GetPydanticSchema(
        lambda _source, _handler: core_schema.no_info_plain_validator_function(_algorithm)
    ),
]


class Config(_Part):
    """A whole configuration; keys at the root that are not NNCF's are the script's own."""

    model_config = ConfigDict(frozen=True, extra="allow")

    input_info: Listed[InputInfo] = []
    target_device: Literal["ANY", "CPU", "CPU_SPR", "GPU", "NPU", "VPU", "TRIAL"] = "ANY"
    compression: Listed[_AnyAlgorithm] = []
    accuracy_aware_training: AccuracyAware | None = None
    compression_lr_multiplier: float | None = Field(default=None, gt=0)
    disable_shape_matching: bool = False
    hw_config_type: str | None = None
    log_dir: str | None = None
    bootstrapNAS: dict[str, Any] | None = None

    @property
    def foreign(self) -> dict[str, Any]:
        """Keys of the script, with their values."""
        return dict(self.model_extra or {})


def read(document: Document) -> Config:
    """Plain values as a configuration.

    Raises:
        RecipeError: one message for the first fault, with its place and the nearest known name.
    """
    if not isinstance(document.data, dict):
        raise error(document, (), f"must be a mapping, got {show(document.data)}. Write {{...}}.")
    try:
        config = Config.model_validate(document.data, strict=True)
    except ValidationError as e:
        raise refuse(e, document, Config) from None
    for key in config.foreign:
        close = difflib.get_close_matches(key, Config.model_fields, n=1, cutoff=0.85)
        if close:
            raise error(document, (key,), f"is no key of it. Nearest: '{close[0]}'.")
    return config
