"""When a policy fires, how a level moves over its firings, and what its masks do to weights."""

from itertools import pairwise
from typing import Any

from gracile.recipe.distiller.read import Policy, Schedule

Entry = dict[str, Any]


def firings(s: Schedule, p: Policy) -> Entry:
    """`when` of something that acts at points: all epochs of the policy that training reaches."""
    if p.every is None:
        epochs = [f"{e}ep" for e in p.epochs if e < s.epochs]
        return {"at": epochs[0] if len(p.epochs) == 1 else epochs}
    return {"start": f"{p.start}ep", "stop": f"{p.stop}ep", "every": f"{p.every}ep"}


def pruning_times(s: Schedule, p: Policy, *, spans: bool) -> Entry:
    """`when` of a pruner.

    Args:
        s, p: the schedule and the policy.
        spans: the end of the policy means something, so that a list of epochs must be a range.

    Raises:
        RecipeError: recipes cannot say this.
    """
    batches, first = p.args.get("mini_batch_pruning_frequency", 0), p.start == 0
    late = first and p.args.get("skip_first_minibatch", False)
    gaps = {b - a for a, b in pairwise(p.epochs)}
    if batches:
        if gaps - {1}:
            s.refuse(
                (*p.keys, "pruner", "args", "mini_batch_pruning_frequency"),
                "needs epochs without gaps. Set frequency: 1.",
            )
        start = "1mb" if late else f"{p.start}ep"
        stop = min(p.epochs[-1] + 1, s.epochs)
        return {"start": start, "stop": f"{stop}ep", "every": f"{batches}mb"}
    if late and spans:
        s.refuse(
            (*p.keys, "pruner", "args", "skip_first_minibatch"),
            "cannot be told together with masks that end or a threshold that grows. Leave it out.",
        )
    if late:
        at = ["1mb", *(f"{e}ep" for e in p.epochs[1:] if e < s.epochs)]
        return {"at": at[0] if len(p.epochs) == 1 else at}
    if not spans or p.every is not None:
        return firings(s, p)
    if len(gaps) > 1:
        s.refuse(
            (*p.keys, "epochs"),
            "must be evenly spaced for masks that end, or a threshold that grows. Write a range.",
        )
    every = gaps.pop() if gaps else 1
    return {"start": f"{p.start}ep", "stop": f"{p.stop}ep", "every": f"{every}ep"}


def rising_level(s: Schedule, p: Policy) -> Any:
    """The level of an automated gradual pruner: cubic, and `final` in the last scheduled epoch.

    Where training ends before the policy does, the level stops where Distiller's would.
    """
    args, keys = p.component.args, p.component.keys
    initial, final = float(args["initial_sparsity"]), float(args["final_sparsity"])
    if final <= initial:
        s.refuse((*keys, "final_sparsity"), f"must be more than initial_sparsity, got {final:g}.")
    n, k = len(p.epochs), sum(e < s.epochs for e in p.epochs)
    if n == 1:
        s.warn("fixed", p.keys, "acts once and goes to final_sparsity; Distiller stops here.")
    if n == k:
        return {"ramp": "agp", "initial": initial, "final": final}
    stairs = [final + (initial - final) * (1 - i / (n - 1)) ** 3 for i in range(k)]
    s.warn("cut-short", p.keys, f"ends after training, at a level of {stairs[-1]:.4f}.")
    if k == 1:
        return stairs[0]
    steps = [i / (k - 1) for i in range(1, k)]
    ramp = {"name": "multistep", "steps": steps, "levels": stairs[1:-1]}
    return {"ramp": ramp, "initial": stairs[0], "final": stairs[-1]}


def masking(s: Schedule, p: Policy) -> tuple[str, str]:
    """(`masked`, `lifetime`) that have the effect of the policy's flags.

    Raises:
        RecipeError: a combination that Distiller refuses.
    """
    forward = p.args.get("mask_on_forward_only", False)
    copies = p.args.get("use_double_copies", False)
    gradients = p.args.get("mask_gradients", False)
    discard = p.args.get("discard_masks_at_minibatch_end", False)
    args = (*p.keys, "pruner", "args")
    if gradients and not forward:
        s.refuse((*args, "mask_gradients"), "needs mask_on_forward_only: true. Set it, or neither.")
    if forward and any(b - a > 1 for a, b in pairwise(p.epochs)):
        s.warn("approximated", p.keys, "masks in the epochs between as well; Distiller did not.")
    masked = "frozen"
    if forward and not (copies and gradients):
        masked = "trained" if copies else "reset"
    if forward and gradients and not copies:
        s.warn("approximated", (*args, "mask_gradients"), "lets masked weights learn from 0 here.")
    if discard and not forward:
        masked = "reset"
        s.warn(
            "approximated",
            (*args, "discard_masks_at_minibatch_end"),
            "lets weights grow back from 0 one step earlier than in Distiller.",
        )
    if s.strict and masked == "trained" and _twin(s, p):
        masked = "reset"  # the second copy of the weights is already masked
    if discard:
        return masked, "batch"
    kept = p.args.get("keep_mask", False) and not (s.strict and not _ends(s, p))
    return masked, "span" if forward and not kept else "run"


def _ends(s: Schedule, p: Policy) -> bool:
    """Whether Distiller takes an epoch for the policy's last one: that before its end."""
    return p.stop - 1 in p.epochs and p.stop <= s.epochs


def _twin(s: Schedule, p: Policy) -> bool:
    """Whether another policy cannot be told from this one by its epochs and flags."""
    mine = (p.epochs, p.stop, p.args)
    return any(
        q is not p and q.kind == "pruner" and (q.epochs, q.stop, q.args) == mine for q in s.policies
    )
