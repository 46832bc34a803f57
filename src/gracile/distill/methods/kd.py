"""Knowledge distillation: the student learns the answers of its teachers beside the labels'."""

from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from gracile import registry
from gracile.core import method as core
from gracile.distill.answers import Answers
from gracile.distill.teaching import Taught, TaughtOptions, together
from gracile.errors import BindError, UserError
from gracile.recipe.fields import KernelRef, kernel

ALPHA = 0.1  # where neither form is given


class KDOptions(TaughtOptions):
    """Options of `distill: kd`.

    With `alpha` (the default, 0.1) L = (1 - alpha) * soft + alpha * hard; with `scale`
    L = hard + scale * soft, so that the task's gradient keeps its size.

    Attributes:
        alpha: share of the ordinary (hard) loss, in [0, 1]; with 0 no labels are needed.
        scale: > 0, weight of the soft loss beside all of the hard one; instead of alpha.
        temperature: softness of both distributions.
        t2: scale the soft loss by temperature squared.
        loss: the soft loss.
        teacher: `original`, the network before compression; `{model: SPEC, weights: FILE}`; a name
            of `Session(..., teachers={name: network})`; or a list of these, which answers as one.
        cache: keep the answers to each image, in half precision; for images that are the same
            picture every time.
    """

    alpha: float | None = Field(default=None, ge=0, le=1)
    scale: float | None = Field(default=None, gt=0)
    temperature: float = Field(default=4.0, gt=0)
    t2: bool = True
    loss: KernelRef("kd_loss") = Field(default_factory=lambda: kernel("kd_loss", "soft"))  # type: ignore[valid-type]
    cache: bool = False

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.alpha is not None and self.scale is not None:
            raise ValueError(
                "alpha (shares of the two losses) and scale (the soft loss on top of the other) "
                "are two forms; keep one"
            )
        return self


@core.method("distill", "kd", source="Hinton, Vinyals & Dean 2015, arXiv:1503.02531")
class KnowledgeDistillation(Taught):
    """Train the compressed model towards the outputs of a frozen teacher, or of several."""

    Options = KDOptions

    def on_attach(self, s: Any) -> None:
        super().on_attach(s)
        self.needed = registry.get("kd_loss", self.options.loss.name).meta
        self.answers = Answers()
        self._check_classes(s)
        if self.options.cache and s.numbered is False:
            raise BindError(
                f"'{self.id}': cache keeps an answer for each image, and these batches have other "
                "pictures in every epoch, or do not say which they have. Set train: "
                "{augment: none}; or cache: false; or write the loop yourself: session.loss(loss, "
                "samples=<numbers of the images>)."
            )

    def on_loss(self, s: Any) -> dict[str, Tensor]:
        if not s.active(self):
            return {}
        o = self.options
        evidence = [self._evidence(s, what) for what in self.needed["needs"]]
        target = self._target(s)
        soft = o.loss.fn(s.outputs, target, *evidence, temperature=o.temperature, t2=o.t2)
        if o.scale is not None:
            return {self.id: o.scale * soft}
        alpha = ALPHA if o.alpha is None else o.alpha
        task = alpha * s.task_loss if alpha else torch.zeros_like(s.task_loss)  # 0 * nan is nan
        return {"task": task, self.id: (1 - alpha) * soft}

    def state_dict(self) -> dict[str, Any]:
        return {"answers": self.answers.state_dict()} if self.options.cache else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.options.cache:
            self.answers.load_state_dict(state["answers"])

    def _target(self, s: Any) -> Tensor:
        if not self.options.cache:
            return self._ask(s)
        if s.samples is None:
            raise UserError(
                f"'{self.id}': cache keeps an answer for each image, and it was not said which "
                "images these are: augmentation is on (set train: {augment: none}), or your loop "
                "does not pass samples=<numbers> to session.loss. Or set cache: false."
            )
        return self.answers.of(s.samples, s.inputs[0], lambda: self._ask(s))

    def _ask(self, s: Any) -> Tensor:
        each = (teacher.outputs(s.inputs) for teacher in self.teachers)
        return together(each, self.options.temperature, self.needed["mean"])

    def _evidence(self, s: Any, what: str) -> Tensor:
        found: Tensor | None = getattr(s, what)
        if found is None:
            raise UserError(
                f"'{self.id}': loss {self.options.loss.name} needs the {what} of each mini-batch: "
                f"session.loss(loss, {what}=...), or {what}=... in before_backward_pass."
            )
        return found

    def _check_classes(self, s: Any) -> None:
        if self.options.teacher == ("original",):
            return
        outs = [s.graph[i].shape for n in s.graph.of_op("output") for i in n.inputs]
        for teacher in self.teachers:
            if len(outs) == 1 and None not in (outs[0], teacher.shape) and outs[0] != teacher.shape:
                raise BindError(
                    f"'{self.id}': student and teacher must answer in one shape, got {outs[0]} and "
                    f"{teacher.shape} of '{teacher.name}'. Name a teacher of the same classes."
                )
