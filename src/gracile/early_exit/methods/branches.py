"""BranchyNet: heads behind inner layers are trained along, and answer what they are sure of."""

from collections.abc import Iterable
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from gracile.core import method as core
from gracile.core.address import select
from gracile.core.schedule import When
from gracile.core.state import derive_seed
from gracile.distribute.collective import broadcast_
from gracile.early_exit import thresholds
from gracile.early_exit.cascade import exit_macs
from gracile.errors import BindError, UserError
from gracile.graph.exits import exit_edits, head_path
from gracile.graph.taps import names_of
from gracile.nn.exits import SOURCE, all_exits, choice_of
from gracile.recipe.fields import KernelRef, Selector, kernel
from gracile.recipe.messages import FieldError

TEMPERATURE = 4.0  # of `imitate`, as that of distill: kd


class ExitGoal(BaseModel):
    """What thresholds are chosen for, on validation data; one of the two.

    Attributes:
        max_drop: points of top-1 that the exits may lose against the final answer alone.
        mean_cost: mean multiply-adds of an input, as a share of the network's without exits.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_drop: float | None = Field(default=None, ge=0, le=100)
    mean_cost: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.max_drop is None) == (self.mean_cost is None):
            raise ValueError("give one of max_drop (points) and mean_cost (a share of the MACs)")
        return self


class BranchesOptions(core.Options):
    """Options of `early_exit: branches`.

    L = (1 - sum of the weights) * task + sum of weight * exit's loss, where an exit's loss is
    (1 - imitate) * cross-entropy + imitate * divergence from the final answer.

    Attributes:
        at: behind which modules or operators the exits stand.
        head: what an exit answers with, a registered exit_head.
        weights: of each exit's loss, or one for all; default equal shares of the exits and the end.
        imitate: share of what an exit learns from the final answer, which does not learn from it;
            with 1 no labels are needed.
        calibrate: find a temperature for each exit's answers first, on the same validation data.
        goal: what the thresholds are chosen for.
        when: the exits are attached; they are trained from then on.
    """

    at: Selector
    head: KernelRef("exit_head") = Field(default_factory=lambda: kernel("exit_head", "pool_linear"))  # type: ignore[valid-type]
    weights: float | tuple[float, ...] | None = None
    imitate: float = Field(default=0.0, ge=0, le=1)
    calibrate: bool = True
    goal: ExitGoal = Field(default_factory=lambda: ExitGoal(max_drop=0.5))
    when: When = Field(default_factory=lambda: When.model_validate({"at": "0ep"}))

    @model_validator(mode="after")
    def _weights_leave_a_rest(self) -> Self:
        each = self.weights if isinstance(self.weights, tuple) else (self.weights or 0.1,)
        if any(not 0 < w < 1 for w in each) or sum(each) >= 1:
            raise FieldError(
                f"must be above 0 and sum to less than 1, the rest is the final answer's, got "
                f"{self.weights}. Write such as [0.2, 0.3].",
                ("weights",),
            )
        if self.when.at is None:
            raise FieldError(
                "must be one point: exits are attached once. Write {at: 0ep}.", ("when",)
            )
        return self


@core.method("early_exit", "branches", source=SOURCE)
class Branches(core.Method):
    """Attach exits, train them along, and choose on validation data how sure they must be."""

    Options = BranchesOptions
    needs = frozenset({"train", "validation"})

    def on_attach(self, s: Any) -> None:
        self.handle: Any = None
        self.answers: tuple[
            Tensor, ...
        ] = ()  # of the last forward in training; the final one first
        self._edits(s)

    def on_fire(self, s: Any, progress: float) -> None:
        edits = self._edits(s)
        s.apply(edits)
        with torch.random.fork_rng(devices=[]):
            for edit in edits:
                torch.manual_seed(derive_seed(s.recipe.seed, self.id, edit.after))
                for m in s.model.get_submodule(head_path(edit.after)).modules():
                    getattr(m, "reset_parameters", lambda: None)()

    def on_batch_start(self, s: Any) -> None:
        self._close()
        choice = choice_of(s.model)
        if choice is None:
            return

        def keep(_module: Any, args: tuple[Any, ...]) -> None:
            self.answers = args

        self.handle = choice.register_forward_pre_hook(keep)

    def on_loss(self, s: Any) -> dict[str, Tensor]:
        answers = self.answers
        self._close()
        if not answers:
            return {}
        final, *early = answers
        weights = self._weights(len(early))
        terms = [w * self._loss(s, x, final) for w, x in zip(weights, early, strict=True)]
        return {"task": (1 - sum(weights)) * s.task_loss, self.id: torch.stack(terms).sum()}

    def on_batch_end(self, s: Any) -> None:
        self._close()

    def on_detach(self, s: Any) -> Iterable[Any]:
        self._close()
        self._settle(s)
        return ()

    def claims(self, s: Any) -> Iterable[tuple[str, str]]:
        return [("exit", "the network")]

    # --- inside

    def _close(self) -> None:
        if self.handle is not None:
            self.handle.remove()
        self.handle, self.answers = None, ()

    def _edits(self, s: Any) -> list[Any]:
        o = self.options
        names = names_of(s.model, s.graph)
        ids = [names[n] for n in select(o.at, list(names), {}, what="layer", model=s.name)]
        edits = exit_edits(
            s.graph, list(dict.fromkeys(ids)), o.head.name, dict(o.head.options), self.id
        )
        for edit in edits:
            o.head.fn(s.graph[edit.after].shape[1:], 2)  # refuses what it cannot read
        if isinstance(o.weights, tuple) and len(o.weights) != len(edits):
            raise BindError(
                f"'{self.id}': weights must be one for each exit, got {len(o.weights)} for "
                f"{', '.join(e.after for e in edits)}."
            )
        if isinstance(o.weights, float) and o.weights * len(edits) >= 1:
            raise BindError(
                f"'{self.id}': {len(edits)} exits of weight {o.weights} leave nothing for the "
                f"final answer; write less than {1 / len(edits):.3g}."
            )
        return edits

    def _weights(self, exits: int) -> tuple[float, ...]:
        given = self.options.weights
        if isinstance(given, tuple):
            return given
        return (1 / (exits + 1) if given is None else given,) * exits

    def _loss(self, s: Any, answer: Tensor, final: Tensor) -> Tensor:
        share = self.options.imitate
        with torch.autocast(s.device.type, enabled=False):
            answer, final = answer.float(), final.detach().float()
            loss = torch.zeros((), device=answer.device)
            if share < 1:
                if s.labels is None:
                    raise UserError(
                        f"'{self.id}': exits learn from the labels of each mini-batch: "
                        "session.loss(loss, labels=...), or labels=... in before_backward_pass. "
                        "Or imitate: 1, to learn from the final answer alone."
                    )
                judge = s.loss_of or F.cross_entropy
                loss = loss + (1 - share) * judge(answer, s.labels)
            if share > 0:
                loss = loss + share * _divergence(answer, final)
        return loss

    def _settle(self, s: Any) -> None:
        """Temperatures and thresholds, on validation data, of the network as it is deployed."""
        o, choice = self.options, choice_of(s.model)
        assert choice is not None  # `finish` refuses what did not fire
        answers, labels = _validated(s)
        exits = len(answers) - 1
        heats = [thresholds.calibrated(x, labels) if o.calibrate else 1.0 for x in answers[:exits]]
        entropies, right = thresholds.as_arrays(answers, labels, heats)
        until, whole = exit_macs(s.model, s.example)
        costs = [macs / whole for macs in until]
        found = thresholds.curve(entropies, right, costs)
        if o.goal.max_drop is not None:
            final = float(right[-1].mean())
            chosen = thresholds.cheapest(found, final - o.goal.max_drop / 100)
        else:
            best = thresholds.most_accurate(found, o.goal.mean_cost)
            chosen = best or found[0]
            if best is None:
                s.warn(
                    "exit-goal",
                    f"'{self.id}': no thresholds have a mean cost of {o.goal.mean_cost}: if all "
                    f"leave at the first exit it is {chosen.mean_cost:.3f} already. Put one "
                    "further to the front, or take a cheaper head.",
                )
        # ranks have BatchNorm statistics of their own; the first one's decision is all ranks'
        both = torch.tensor([chosen.thresholds, heats], dtype=torch.float64, device=s.device)
        at, warm = broadcast_(both).tolist()
        mine = [e for e in s.plan.of_kind("exit") if e.by == self.id]
        s.settle(
            {
                edit.id: {"threshold": sure, "temperature": heat}
                for edit, sure, heat in zip(mine, at, warm, strict=True)
            }
        )
        with torch.no_grad():
            choice.thresholds.copy_(torch.tensor(at))
            choice.temperatures.copy_(torch.tensor(warm))
        s.changed = True


def _divergence(answer: Tensor, final: Tensor) -> Tensor:
    """T^2 * KL(softmax(final / T) || softmax(answer / T)), as in distill: kd."""
    p = F.log_softmax(answer / TEMPERATURE, dim=1)
    q = F.log_softmax(final / TEMPERATURE, dim=1)
    return TEMPERATURE**2 * F.kl_div(p, q, reduction="batchmean", log_target=True)


def _validated(s: Any) -> tuple[list[Tensor], Tensor]:
    """The answers of all exits to the validation data, the final ones last, and the labels."""
    model, training = s.model, s.model.training
    found: list[list[Tensor]] = []
    labels: list[Tensor] = []
    model.eval()
    try:
        with torch.no_grad():
            for x, y in s.val():
                found.append([a.detach().float().cpu() for a in all_exits(model, x.to(s.device))])
                labels.append(y.cpu())
    finally:
        model.train(training)
    return [torch.cat(parts) for parts in zip(*found, strict=True)], torch.cat(labels)
