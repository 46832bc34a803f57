"""A configuration of NNCF as a recipe: what it asks for in gracile's words, and what is different.

Order of the entries: sparsity, pruning and distillation as in the file, then quantization, which
sees what they leave, then the statistics of batch norm.
"""

from typing import Any

from pydantic import BaseModel

from gracile.recipe.document import Document, Keys
from gracile.recipe.nncf import filters, movement, quantization, sparsity
from gracile.recipe.nncf.grammar import (
    SAMPLE_KEYS,
    AccuracyAware,
    Binarization,
    Config,
    ConstSparsity,
    FilterPruning,
    KnowledgeDistillation,
    MagnitudeSparsity,
    MovementSparsity,
    Quantization,
    RbSparsity,
    read,
)
from gracile.recipe.nncf.scopes import layers_of
from gracile.recipe.nncf.text import error, parse
from gracile.recipe.nncf.training import training
from gracile.recipe.nncf.work import Work

IGNORED = ("disable_shape_matching", "hw_config_type", "log_dir")


def convert(
    text: str | bytes, *, name: str, epochs: int | None = None, model_names: Any = None
) -> tuple[dict[str, Any], list[str]]:
    """Read a legacy JSON configuration of NNCF and say it as a recipe.

    Args:
        text: of the file; comments and trailing commas are allowed, bytes are UTF-8.
        name: stands for the file in messages.
        epochs: length of training; default the file's `epochs`, else the shortest in which all its
            schedules end.
        model_names: the model, or module path -> class name(s); needed for scopes with `{re}`.

    Returns:
        (plain values of a recipe, warnings): each warning begins with `name:line:` and says what
        is different from NNCF.

    Raises:
        RecipeError: not JSON, an unknown name (with the nearest known one), or something that this
            version has not. Begins with `name:line:`.
    """
    return convert_document(parse(text, name), epochs=epochs, model_names=model_names)


def convert_document(
    document: Document, *, epochs: int | None = None, model_names: Any = None
) -> tuple[dict[str, Any], list[str]]:
    """`convert`, for values that were read already."""
    config = read(document)
    layers = None if model_names is None else layers_of(model_names)
    aware = config.accuracy_aware_training
    work = Work(document, layers, _epochs(config, epochs, document))
    work.adaptive = aware is not None and aware.mode == "adaptive_compression_level"
    _tell_root(config, work)
    algorithms = list(_placed(config, document))
    sparse = any(isinstance(a, RbSparsity) for a, _ in algorithms)
    training(config.foreign, sparse, work)
    late = (Quantization, Binarization)
    for algorithm, keys in sorted(algorithms, key=lambda a: isinstance(a[0], late)):
        _one(algorithm, keys, work)
    _batch_norm(algorithms, work)
    return _recipe(config, work), work.warnings


def _one(algorithm: BaseModel, keys: Keys, work: Work) -> None:
    match algorithm:
        case MagnitudeSparsity():
            sparsity.magnitude(algorithm, keys, work)
        case RbSparsity():
            sparsity.regularized(algorithm, keys, work)
        case ConstSparsity():
            sparsity.constant(algorithm, keys, work)
        case FilterPruning():
            filters.filters(algorithm, keys, work)
        case KnowledgeDistillation():
            _distillation(algorithm, work)
        case Quantization():
            quantization.quantization(algorithm, keys, work)
        case Binarization():
            quantization.binarization(algorithm, keys, work)
        case MovementSparsity():
            movement.movement(algorithm, keys, work)


def _distillation(algorithm: KnowledgeDistillation, work: Work) -> None:
    """`distill: kd` on top of the task's loss.

    NNCF's softmax loss is the cross-entropy with the teacher's probabilities, here it is the
    divergence from them: less by their entropy, so of the same gradient.
    """
    soft = {"temperature": algorithm.temperature} if algorithm.type == "softmax" else {}
    loss = "soft" if algorithm.type == "softmax" else "mse"
    work.add(algorithm.algorithm, {"distill": "kd", "scale": algorithm.scale, "loss": loss, **soft})


def _batch_norm(algorithms: list[tuple[Any, Keys]], work: Work) -> None:
    """One `recover: batch_norm` at the start, for all algorithms whose initializer asks for it."""
    asked = [
        a.initializer.batchnorm_adaptation.num_bn_adaptation_samples
        for a, _ in algorithms
        if getattr(getattr(a, "initializer", None), "batchnorm_adaptation", None)
    ]
    if any(asked):
        work.samples += asked
        when = {"at": "0ep" if work.epochs else "end"}
        work.add("batchnorm_adaptation", {"recover": "batch_norm", "when": when})


# ------------------------------------------------------------------ the root


def _placed(config: Config, document: Document) -> list[tuple[Any, Keys]]:
    """The algorithms and where each is written."""
    if not isinstance(document.data.get("compression"), list):
        return [(a, ("compression",)) for a in config.compression]
    return [(a, ("compression", i)) for i, a in enumerate(config.compression)]


def _epochs(config: Config, given: int | None, document: Document) -> int:
    if given is not None:
        return given
    aware = config.accuracy_aware_training
    if aware is not None and aware.mode == "adaptive_compression_level":
        return aware.params.initial_training_phase_epochs
    if aware is not None and "maximal_total_epochs" in aware.params.model_fields_set:
        return aware.params.maximal_total_epochs
    found = config.foreign.get("epochs")
    if found is not None:
        if isinstance(found, bool) or not isinstance(found, int) or found < 0:
            raise error(document, ("epochs",), f"must be a whole number, got {found!r}.")
        return found
    needed = [0]
    for a in config.compression:
        match a:
            case MagnitudeSparsity() | RbSparsity():
                needed.append(sparsity.epochs_of(a))
            case MovementSparsity():
                needed.append(movement.epochs_of(a))
            case FilterPruning():
                needed.append(filters.epochs_of(a))
            case Quantization() | Binarization():
                needed.append(quantization.epochs_of(a.params))
            case KnowledgeDistillation():
                needed.append(1)
    return max(needed)


def _tell_root(config: Config, work: Work) -> None:
    if config.bootstrapNAS is not None:
        work.refuse(("bootstrapNAS",), "is a search over sub-networks that this version has not.")
    if "epochs" not in config.foreign and config.accuracy_aware_training is None:
        work.tell((), f"has no 'epochs': train.epochs is {work.epochs}, all that it needs.")
    others = [k for k in config.foreign if k not in SAMPLE_KEYS]
    if others:
        work.tell((others[0],), f"is the script's own and left out, as are all of these: {others}.")
    for key in IGNORED:
        if key in config.model_fields_set:
            work.tell((key,), "is not needed and left out.")
    if config.target_device in ("GPU", "NPU", "VPU"):
        work.tell(
            ("target_device",),
            f"is {config.target_device}, which has no profile: quantizers stand where the runtime "
            "named by --runtime wants them.",
        )
    if config.compression_lr_multiplier is not None:
        work.tell(("compression_lr_multiplier",), "is left out here; give it to each algorithm.")
    if not config.compression:
        work.tell((), "has no 'compression': the recipe only trains.")


def _accuracy(aware: AccuracyAware) -> dict[str, Any]:
    p = aware.params
    relative = p.maximal_relative_accuracy_degradation
    drop = p.maximal_absolute_accuracy_degradation if relative is None else relative
    out: dict[str, Any] = {"max_drop": drop, "relative": relative is not None}
    if aware.mode == "early_exit":
        return {"mode": "early_exit", **out}
    return {
        "mode": "adaptive",
        **out,
        "step": p.initial_compression_rate_step,
        "shrink": p.compression_rate_step_reduction_factor,
        "min_step": p.minimal_compression_rate_step,
        "patience": p.patience_epochs,
        "lr_factor": p.lr_reduction_factor,
        "max_epochs": p.maximal_total_epochs,
    }


def _recipe(config: Config, work: Work) -> dict[str, Any]:
    out: dict[str, Any] = {"recipe": 1, "train": {"epochs": work.epochs, **work.train}}
    if any(work.samples):
        out["data"] = {"calibration": max(work.samples)}
    if config.accuracy_aware_training is not None:
        out["accuracy"] = _accuracy(config.accuracy_aware_training)
    return {**out, "methods": work.methods}
