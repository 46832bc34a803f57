"""What a schedule of Distiller may say: its sections, its classes and all their arguments.

Facts of its last version. Arguments that Distiller fills in itself (model, name, optimizer,
last_epoch) are none of these.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from gracile.core.rules import FLAG, TEXT, Rule, list_of, number, one_of, or_null, whole

SECTIONS = {  # section -> kind; Distiller takes the first kind in this order
    "pruners": "pruner",
    "regularizers": "regularizer",
    "quantizers": "quantizer",
    "lr_schedulers": "lr_scheduler",
    "extensions": "extension",
}


@dataclass(frozen=True)
class Choice(Rule):
    """One of a few words; a wrong one is told the nearest."""

    known: tuple[str, ...] = ()


@dataclass(frozen=True)
class Named:
    """A mapping from names to values that all follow one rule.

    Attributes:
        of: the rule of the values.
        what: what the names are of, in words.
        every: `*` may stand for all parameters that are not named.
        empty: it may be null, or have nothing in it.
    """

    of: "Shape"
    what: str = "a parameter's name"
    every: bool = False
    empty: bool = False


@dataclass(frozen=True)
class Fields:
    """A mapping with known keys, all optional."""

    known: "Mapping[str, Shape]"


@dataclass(frozen=True)
class Pair:
    """A list of two."""

    first: "Shape"
    second: "Shape"


Shape = Rule | Named | Fields | Pair


@dataclass(frozen=True)
class Class:
    """A class that a component may name.

    Attributes:
        kind: in which section it belongs.
        args: of its constructor.
        required: those without a default.
    """

    kind: str
    args: Mapping[str, Shape]
    required: frozenset[str] = field(default_factory=frozenset)


def choice(*words: str, null: bool = False, any_case: bool = False) -> Choice:
    """One of these words, or null if that may be."""
    known = {w.upper() if any_case else w for w in words}

    def fits(value: object) -> bool:
        if not isinstance(value, str):
            return null and value is None
        return (value.upper() if any_case else value) in known

    rule = one_of(*words)
    return Choice(or_null(rule).text if null else rule.text, fits, words)


def _class(kind: str, required: Mapping[str, Shape], **optional: Shape) -> Class:
    return Class(kind, {**required, **optional}, frozenset(required))


def _fits_names(value: object) -> bool:
    names = value if isinstance(value, list) else [value]
    return bool(names) and all(isinstance(n, str) and n for n in names)


def _fits_blocks(value: object) -> bool:
    shape = value.get("block_shape") if isinstance(value, dict) and len(value) == 1 else None
    return list_of(whole(1), 4).fits(shape) and shape[2:] == [1, 1]  # type: ignore[index]


SHARE = number(0, 1, below=True)
POSITIVE = number(0, above=True)
NAMES = Rule("a parameter's name or a list of them", _fits_names)
FUNCTION = Rule("left out, as it takes a Python function, which no YAML can hold", lambda v: False)
BLOCKS = Rule("{block_shape: [repetitions, depth, 1, 1]}", _fits_blocks)
LEADER = choice("Leader", null=True)
FILTERS = choice("Filters", "3D")
RANKED = choice("Filters", "3D", "Channels", "Rows", "Blocks")
THRESHOLDED = choice("2D", "Rows", "Cols", "3D", "Filters", "Channels", "4D")
LASSO = choice(*THRESHOLDED.known, "Rows+Cols", "Cols+Rows", "Channels+4D", "4D+Channels")
CRITERIA = choice("Max", "Mean_Abs")
BITS = or_null(whole(1))
MODES = ("SYMMETRIC", "SYMMETRIC_RESTRICTED", "ASYMMETRIC_UNSIGNED", "ASYMMETRIC_SIGNED")
CLIPS = choice("NONE", "AVG", "N_STD", "GAUSS", "LAPLACE", any_case=True)
FLOAT_BITS = Rule("16, 32 or 64, or null", lambda v: v in (None, 16, 32, 64, "16", "32", "64"))


def _fits_mode(value: object) -> bool:
    parts = value if isinstance(value, dict) else {"activations": value, "weights": value}
    return parts.keys() == {"activations", "weights"} and all(
        choice(*MODES, any_case=True).fits(v) for v in parts.values()
    )


MODE = Rule(f"{' or '.join(MODES)}, or {{activations: ..., weights: ...}}", _fits_mode)

_LEVELS = {"initial_sparsity": SHARE, "final_sparsity": SHARE}
_RANK = {"group_type": RANKED, "weights": NAMES}
_FILTERS = {"group_type": FILTERS, "weights": NAMES}
_LP_MORE: dict[str, Shape] = {"group_dependency": LEADER, "kwargs": or_null(BLOCKS)}
_LP = _class(
    "pruner", {**_RANK, "desired_sparsity": SHARE}, **_LP_MORE, noise=number(0, 1),
    group_size=whole(1), rounding_fn=FUNCTION,
)  # fmt: skip
_LP_AGP = _class("pruner", {**_RANK, **_LEVELS}, **_LP_MORE)
_BY_FILTER = _class("pruner", {**_FILTERS, "desired_sparsity": SHARE}, group_dependency=LEADER)
_BY_FILTER_AGP = _class("pruner", {**_FILTERS, **_LEVELS}, group_dependency=LEADER)
BY_FILTER = (
    "ActivationAPoZRankedFilterPruner", "ActivationMeanRankedFilterPruner",
    "GradientRankedFilterPruner", "RandomRankedFilterPruner", "BernoulliFilterPruner",
)  # fmt: skip

PRUNERS: dict[str, Class] = {
    "MagnitudeParameterPruner": _class("pruner", {"thresholds": Named(number(0), every=True)}),
    "SparsityLevelParameterPruner": _class("pruner", {"levels": Named(SHARE, every=True)}),
    "SensitivityPruner": _class("pruner", {"sensitivities": Named(number(0), every=True)}),
    "SplicingPruner": _class(
        "pruner",
        {"sensitivities": Named(number(), every=True), "low_thresh_mult": POSITIVE,
         "hi_thresh_mult": POSITIVE},
        sensitivity_multiplier=number(0),
    ),
    "StructureParameterPruner": _class(
        "pruner",
        {"reg_regims": Named(Pair(POSITIVE, THRESHOLDED)), "threshold_criteria": CRITERIA},
    ),
    "AutomatedGradualPruner": _class(
        "pruner", {**_LEVELS, "weights": NAMES}, rate_scheduler_factory=FUNCTION
    ),
    "BaiduRNNPruner": _class(
        "pruner",
        {"q": POSITIVE, "ramp_epoch_offset": whole(0), "ramp_slope_mult": POSITIVE,
         "weights": NAMES},
    ),
    "L1RankedStructureParameterPruner": _LP,
    "L2RankedStructureParameterPruner": _LP,
    "L1RankedStructureParameterPruner_AGP": _LP_AGP,
    "L2RankedStructureParameterPruner_AGP": _LP_AGP,
    "RandomLevelStructureParameterPruner": _class(
        "pruner", {**_RANK, "sparsity_range": Pair(SHARE, SHARE)}, **_LP_MORE
    ),
    "FMReconstructionChannelPruner": _class(
        "pruner",
        {"group_type": choice("Channels"), "desired_sparsity": SHARE, "weights": NAMES},
        group_dependency=LEADER, kwargs=or_null(BLOCKS), magnitude_fn=FUNCTION,
        group_size=whole(1), rounding_fn=FUNCTION, ranking_noise=number(0, 1),
    ),
    **dict.fromkeys(BY_FILTER, _BY_FILTER),
    **dict.fromkeys((f"{name}_AGP" for name in BY_FILTER), _BY_FILTER_AGP),
}  # fmt: skip

REGULARIZERS: dict[str, Class] = {
    "L1Regularizer": _class(
        "regularizer", {"reg_regims": Named(number(0))}, threshold_criteria=or_null(TEXT)
    ),
    "GroupLassoRegularizer": _class(
        "regularizer",
        {"reg_regims": Named(Pair(number(0), LASSO))},
        threshold_criteria=choice(*CRITERIA.known, null=True),
    ),
    "GroupVarianceRegularizer": _class(
        "regularizer", {"reg_regims": Named(Pair(number(0), choice("Channels")))}
    ),
}


def _overrides(more: Mapping[str, Shape] | None = None) -> Named:
    bits = dict.fromkeys(("bits_activations", "bits_weights", "bits_bias"), BITS)
    return Named(
        Fields({**bits, **(more or {})}), "a module's name or a regular expression", empty=True
    )


_CLIP: dict[str, Shape] = {
    "clip_acts": CLIPS, "clip_n_stds": or_null(POSITIVE), "clip_half_range": FLAG,
}  # fmt: skip
_INPUT = Named(
    Fields({"from_output": FLAG, "bits_activations": BITS, "mode": MODE, **_CLIP}),
    "an input's number",
)
_PTQ_LAYER: dict[str, Shape] = {
    **_CLIP, "per_channel_wts": FLAG, "mode": MODE, "fp16": FLAG, "fpq_module": FLOAT_BITS,
    "scale_approx_mult_bits": BITS, "input_overrides": _INPUT, "inputs_quant_auto_fallback": FLAG,
    "make_identity": FLAG, "quantize_inputs": FLAG, "fake": FLAG,
}  # fmt: skip
_TRAINED: dict[str, Shape] = {
    "bits_activations": BITS, "bits_weights": BITS, "bits_bias": BITS, "overrides": _overrides(),
}  # fmt: skip
_LINEAR: dict[str, Shape] = {
    **_TRAINED, "mode": MODE, "ema_decay": number(0, 1, below=True), "per_channel_wts": FLAG,
}  # fmt: skip

QUANTIZERS: dict[str, Class] = {
    "PostTrainLinearQuantizer": _class(
        "quantizer", {}, bits_activations=BITS, bits_parameters=BITS, bits_accum=whole(1),
        overrides=_overrides(_PTQ_LAYER), mode=MODE, per_channel_wts=FLAG,
        model_activation_stats=or_null(TEXT), fp16=FLAG, scale_approx_mult_bits=BITS,
        inputs_quant_auto_fallback=FLAG, fpq_module=FLOAT_BITS, save_fp_weights=FLAG,
        also_clip_weights=FLAG, **_CLIP,
    ),
    "QuantAwareTrainRangeLinearQuantizer": _class(
        "quantizer", {}, **_LINEAR, quantize_inputs=FLAG, num_bits_inputs=BITS
    ),
    "NCFQuantAwareTrainQuantizer": _class("quantizer", {}, **_LINEAR),
    "DorefaQuantizer": _class("quantizer", {}, **_TRAINED),
    "WRPNQuantizer": _class("quantizer", {}, **_TRAINED),
    "PACTQuantizer": _class(
        "quantizer", {}, **_TRAINED, act_clip_init_val=POSITIVE, act_clip_decay=or_null(number(0))
    ),
}  # fmt: skip

_THINNING = choice("remove_filters", "remove_channels", "contract_model")
_REMOVER = _class("extension", {"thinning_func_str": _THINNING, "arch": TEXT, "dataset": TEXT})
EXTENSIONS = dict.fromkeys(("StructureRemover", "FilterRemover", "ChannelRemover"), _REMOVER)

_MILESTONES = list_of(whole(0))
_CYCLE: dict[str, Shape] = {
    "cycle_momentum": FLAG, "base_momentum": SHARE, "max_momentum": SHARE,
}  # fmt: skip
LR_SCHEDULERS: dict[str, Class] = {
    "LambdaLR": _class("lr_scheduler", {"lr_lambda": FUNCTION}),
    "StepLR": _class("lr_scheduler", {"step_size": whole(1)}, gamma=POSITIVE),
    "MultiStepLR": _class("lr_scheduler", {"milestones": _MILESTONES}, gamma=POSITIVE),
    "ExponentialLR": _class("lr_scheduler", {"gamma": POSITIVE}),
    "CosineAnnealingLR": _class("lr_scheduler", {"T_max": whole(1)}, eta_min=number(0)),
    "ReduceLROnPlateau": _class(
        "lr_scheduler", {}, mode=choice("min", "max"), factor=number(0, 1, above=True, below=True),
        patience=whole(0), verbose=FLAG, threshold=number(0),
        threshold_mode=choice("rel", "abs"), cooldown=whole(0), min_lr=number(0), eps=number(0),
    ),
    "CyclicLR": _class(
        "lr_scheduler", {"base_lr": number(0), "max_lr": POSITIVE}, step_size_up=whole(1),
        step_size_down=or_null(whole(1)), mode=choice("triangular", "triangular2", "exp_range"),
        gamma=POSITIVE, scale_fn=FUNCTION, scale_mode=choice("cycle", "iterations"), **_CYCLE,
    ),
    "CosineAnnealingWarmRestarts": _class(
        "lr_scheduler", {"T_0": whole(1)}, T_mult=whole(1), eta_min=number(0)
    ),
    "OneCycleLR": _class(
        "lr_scheduler", {"max_lr": POSITIVE}, total_steps=whole(1), epochs=whole(1),
        steps_per_epoch=whole(1), pct_start=number(0, 1), anneal_strategy=choice("cos", "linear"),
        div_factor=POSITIVE, final_div_factor=POSITIVE, **_CYCLE,
    ),
    "PolynomialLR": _class("lr_scheduler", {"T_max": whole(1), "power": number(0)}),
    "MultiStepMultiGammaLR": _class(
        "lr_scheduler", {"milestones": _MILESTONES, "gammas": list_of(POSITIVE)}
    ),
}  # fmt: skip

CLASSES: dict[str, Class] = {
    **PRUNERS, **REGULARIZERS, **QUANTIZERS, **EXTENSIONS, **LR_SCHEDULERS
}  # fmt: skip

_FLAGS = (
    "keep_mask", "mask_on_forward_only", "mask_gradients", "use_double_copies",
    "discard_masks_at_minibatch_end", "skip_first_minibatch", "fold_batchnorm",
)  # fmt: skip
POLICY_ARGS: dict[str, Mapping[str, Shape]] = {
    "pruner": {
        "levels": Named(SHARE, every=True), "mini_batch_pruning_frequency": whole(0),
        **dict.fromkeys(_FLAGS, FLAG),
    },
    "regularizer": {"keep_mask": FLAG},
}  # fmt: skip


def of_kind(kind: str) -> Iterable[str]:
    """Names of the classes of a section."""
    return [name for name, c in CLASSES.items() if c.kind == kind]
