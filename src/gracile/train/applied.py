"""A Plan put on a fresh copy of the network it was made for, without a run directory."""

from pathlib import Path

from torch import Tensor, nn

from gracile.core.plan import Plan
from gracile.errors import UserError
from gracile.graph import surgery
from gracile.graph.additions import structural
from gracile.models.spec import architecture_sha
from gracile.train.checkpoint import REBUILT, check_kinds

NEW = ("factorize", "replace", "exit")  # have weights that the original knows nothing of


def apply_plan(
    model: nn.Module,
    plan: Plan | str | Path,
    example_inputs: Tensor | tuple[Tensor, ...],
    *,
    prove: bool = False,
) -> nn.Module:
    """Give the original network the structure that a Plan leads to.

    The weights are cut with it; trained ones load into the result by `load_state_dict`. Masks and
    weight grids of a Plan are in such weights already and ask for nothing here. Activation
    quantizers are not placed: `load_model` does that.

    Args:
        model: a fresh copy of the original architecture; cut in place.
        plan: a Plan or the path of one.
        example_inputs: an input batch (or tuple of inputs), to follow the channels with.
        prove: prove the cut as when it was made: masked = sliced, in eval and train mode.

    Returns:
        What computes from now on: the model, or a GraphModule that shares its modules and
        parameters where channel counts were written in the forward. Names of tensors are the
        original's.

    Raises:
        UserError: the plan was made for another architecture, or holds an edit of a kind that this
            version cannot apply.
        VerificationError: `prove`, and the cut changes what the model computes.
    """
    plan = plan if isinstance(plan, Plan) else Plan.load(plan)
    made_for = plan.architecture
    if made_for.sha256 and architecture_sha(model) != made_for.sha256:
        raise UserError(
            f"the plan was made for another '{made_for.name}' than this {type(model).__name__}: "
            "names or shapes of parameters differ. Apply it to a fresh copy of the original."
        )
    check_kinds(plan, "apply", known=tuple(k for k in REBUILT if k not in NEW))
    if not prove:
        return surgery.apply(model, structural(plan), example=example_inputs)
    return surgery.verified_apply(model, structural(plan), examples=[example_inputs])[0]
