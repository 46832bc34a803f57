"""The kinds of Kernel: pure functions that a Method composes, each registered by name.

A kernel never sees a model or an epoch. Its first arguments are tensors (or a shape), its
keyword-only arguments are the options a recipe may set: ``{name: percentile, q: 99.9}``.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

from gracile import registry
from gracile.errors import UserError, nearest

F = TypeVar("F")


def criterion(
    name: str, *, source: str, needs: tuple[str, ...] = (), after: str = "sum"
) -> Callable[[F], F]:
    """Register ``f(weight, *evidence, *, ...) -> scores`` of weight's shape; smaller goes first.

    Args:
        name, source: see `registry.register`.
        needs: what it wants to know beyond the weight, in the order of its arguments (see
            `gracile.prune.evidence`).
        after: what is done with the sum of the scores of a group: sum (nothing), or abs, for scores
            whose signs cancel inside a group.
    """
    return registry.register("criterion", name, source=source, needs=needs, after=after)


def granularity(name: str, *, source: str) -> Callable[[F], F]:
    """Register ``f(shape) -> group ids`` (0..G-1, of that shape): what is pruned as one."""
    return registry.register("granularity", name, source=source)


def ramp(name: str, *, source: str) -> Callable[[F], F]:
    """Register ``f(progress, initial, final) -> level`` for progress in [0, 1]."""
    return registry.register("ramp", name, source=source)


def observer(name: str, *, source: str) -> Callable[[F], F]:
    """Register a range observer: ``observe(x)``, ``range() -> (low, high)``; see quantize."""
    return registry.register("observer", name, source=source)


def fake_quant(name: str, *, source: str) -> Callable[[F], F]:
    """Register ``f(x, scale, zero_point, qmin, qmax, axis) -> x`` on the quantization grid."""
    return registry.register("fake_quant", name, source=source)


def penalty(name: str, *, source: str) -> Callable[[F], F]:
    """Register ``f(weight, groups, *, ...) -> scalar``, groups as a granularity numbers them."""
    return registry.register("penalty", name, source=source)


def kd_loss(
    name: str,
    *,
    source: str,
    needs: tuple[str, ...] = (),
    mean: Literal["probabilities", "logits"] = "probabilities",
) -> Callable[[F], F]:
    """Register ``f(student, teacher, *evidence, *, temperature, t2, ...) -> scalar`` of logits.

    Args:
        name, source: see `registry.register`.
        needs: what it wants to know beyond the two, in the order of its arguments: labels.
        mean: of what, where several teachers answer as one.
    """
    return registry.register("kd_loss", name, source=source, needs=needs, mean=mean)


def feature_loss(
    name: str,
    *,
    source: str,
    compares: Literal["all", "positions", "images"] = "all",
    regressor: bool = False,
) -> Callable[[F], F]:
    """Register ``f(student, teacher, *, ...) -> scalar`` of what two layers give.

    Args:
        name, source: see `registry.register`.
        compares: which dims of the two must be equal: all; positions, all but the channels'; or
            images, the first one only.
        regressor: the student's goes through a layer that is learned along, which gives it the
            teacher's number of channels.
    """
    return registry.register(
        "feature_loss", name, source=source, compares=compares, regressor=regressor
    )


def factorizer(
    name: str,
    *,
    source: str,
    ranks: tuple[str, ...],
    full: Callable[..., tuple[int, ...]],
    chain: Callable[..., Any],
    matrices: Callable[..., Any] | None = None,
    along: Callable[..., tuple[int, ...]] | None = None,
    needs: tuple[str, ...] = (),
    fixed: tuple[int, ...] = (),
) -> Callable[[F], F]:
    """Register ``f(weight, groups, ranks, *evidence, *, ...) -> factors``, a tuple of tensors.

    One factor for each step of the chain that stands for the layer and has a tensor, in order, in
    the weight's dtype (see `gracile.nn.chain` and `gracile.lowrank.scheme`).

    Args:
        name, source: see `registry.register`.
        ranks: what each rank counts; as many are asked for.
        full: ``f(layer) -> ranks``, the largest that make sense; refuses layers it is not for.
        chain: ``f(layer, ranks) -> Chain``, what stands for the layer; needs no weights.
        matrices: ``f(weight, groups) -> tensors (batch, rows, columns)``, one for each rank, whose
            singular values say what a rank costs; None where the scheme has none.
        along: ``f(layer, t) -> ranks`` for t = 1, 2, ..., never decreasing: the ranks that are
            tried for a ratio. None if there is one rank, which is t.
        needs: what it wants to know beyond the weight, in the order of its arguments: gram, cross,
            generator.
        fixed: which factors are known beforehand and stay as they are in training.
    """
    return registry.register(
        "factorizer", name, source=source, ranks=ranks, full=full, chain=chain, matrices=matrices,
        along=along, needs=needs, fixed=fixed,
    )  # fmt: skip


def block(
    name: str, *, source: str, start: Callable[..., Any], reads: Literal["image", "flat"] = "image"
) -> Callable[[F], F]:
    """Register ``f(layer, *, ...) -> gracile.nn.blocks.Block``: what takes a layer's place.

    Known without weights, so that a saved model is built again; refuses layers it is not for.

    Args:
        name, source: see `registry.register`.
        start: ``f(weight, layer, block) -> factors``, weights to begin with, one for each of the
            shapes of the block's chain: the nearest to the layer where that can be told.
        reads: image, or flat for linear layers behind a flatten, which are told the `image` that
            was flattened: (channels, *size).
    """
    return registry.register("block", name, source=source, start=start, reads=reads)


def rank_rule(name: str, *, source: str, joint: bool = False) -> Callable[[F], F]:
    """Register ``f(weight, layer, scheme, size, *, ...) -> ranks`` for the factorizer `scheme`.

    `layer` is a `gracile.nn.chain.Layer`, `size` that of its input in pixels (or tokens).

    Args:
        name, source: see `registry.register`.
        joint: it sees all layers at once: ``f(tables, *, ratio, of, by, candidates) -> picks``,
            one table of `gracile.lowrank.candidates.Candidate` for each layer, the first of which
            is the layer as it is; `of` says what costs count, `by` what errors are, `candidates`
            how many ranks are tried.
    """
    return registry.register("rank_rule", name, source=source, joint=joint)


def exit_head(name: str, *, source: str) -> Callable[[F], F]:
    """Register ``f(shape, classes, *, ...) -> nn.Sequential``: what an early exit answers with.

    `shape` is that of one sample where the exit stands, without the batch.
    """
    return registry.register("exit_head", name, source=source)


def kernel_options(fn: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a kernel (of its ``__init__`` for a class): its options."""
    target = fn.__init__ if inspect.isclass(fn) else fn  # type: ignore[misc]
    parameters = inspect.signature(target).parameters
    return {n: p for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def check_options(kind: str, name: str, options: Mapping[str, Any]) -> None:
    """Refuse a kernel name or an option of it that does not exist.

    Raises:
        UserError: names the kernel, the option and the nearest known one.
    """
    entry = registry.get(kind, name)
    known = kernel_options(entry.obj)
    for key, value in options.items():
        if key not in known:
            raise UserError(f"{kind} '{name}' has no option '{key}'.{nearest(key, known)}")
        expected = _expected(known[key].default, value)
        if expected is not None:
            raise UserError(f"{kind} '{name}': option '{key}' must be {expected}, got {value!r}.")


def _expected(default: Any, value: Any) -> str | None:
    """What a value must be to stand in for a default; None if it is that."""
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "a bool"
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(default, int):
        return None if number and isinstance(value, int) else "a whole number"
    if isinstance(default, float):
        return None if number else "a number"
    if isinstance(default, str):
        return None if isinstance(value, str) else "a text"
    return None
