"""Cutting channels in one call, without a recipe file and without training."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from gracile.analyze.widths import Widths
from gracile.core.result import Result
from gracile.prune.methods.structure import Structure
from gracile.recipe.build import build, prune
from gracile.train.session import Session


def prune_channels(
    model: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...],
    *,
    ratio: float = 0.5,
    criterion: str | dict[str, Any] = "l1",
    scope: str = "global",
    ignore: str | Sequence[str] = (),
    target: str | Callable[[Widths], float] = "channels",
    norm: str = "auto",
    families: str = "outermost",
    multiple_of: int = 1,
    min_keep: int = 1,
    min_width: int = 1,
    max_ratio: float = 1.0,
) -> Result:
    """Cut the least important channels out of a model, each cut proven before it is made.

    The share is of what the model has now; a call on a pruned model cuts that share again.

    Args:
        model: cut in place; the result holds it, in eval mode.
        example_inputs: an input batch (or tuple of inputs) on the model's device, batch size >= 2.
        ratio: share to remove, in [0, 1).
        criterion: a registered criterion, or `{"name": ..., option: value}`.
        scope: what is ranked together: "layer", "global" or "isomorphic".
        ignore: selectors of weights whose channels are left alone.
        target: what `ratio` is a share of: "channels" of the groups that can be cut, "params" or
            "macs" of the whole model, or a function of the widths that are kept,
            (address, dim) -> indices, to predicted milliseconds.
        norm: how scores of layers are made comparable: "none", "mean", "max", or "auto": the mean
            for scope "global", none otherwise.
        families: "outermost" (of heads and the width in each head only the heads) or "all".
        multiple_of: keep multiples of so many channels.
        min_keep: units that stay in every group.
        min_width: channels that stay in every group.
        max_ratio: largest share one group may lose.

    Returns:
        Model, Plan and ledger. What is protected, and why, stands in the ledger; a target that
        narrow layers or the limits did not let it reach stands in `warnings`.

    Raises:
        UserError: a wrong option, a selector that matches nothing, a budget out of reach, or a
            model whose output on the example is not finite.
        VerificationError: no group at all passes its proof.
    """
    options: dict[str, Any] = {
        "ratio": ratio, "criterion": criterion, "scope": scope, "norm": norm, "families": families,
        "multiple_of": multiple_of, "min_keep": min_keep, "min_width": min_width,
        "max_ratio": max_ratio, "when": {"at": "end"},
    }  # fmt: skip
    if ignore:
        options["ignore"] = ignore if isinstance(ignore, str) else list(ignore)
    if isinstance(target, str):
        options["target"] = target
    recipe = build(methods={"structure": prune("structure", **options)})
    session = Session(model, build(), example=example_inputs)
    method = Structure(
        "structure",
        recipe.methods["structure"].options,
        predict=None if isinstance(target, str) else target,
    )
    try:
        method.on_attach(session)
        method.on_fire(session, 1.0)
    except BaseException:
        session.close()
        raise
    return session.finish()
