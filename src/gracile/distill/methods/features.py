"""Feature distillation: layers of the student learn from layers of the teacher."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from gracile import registry
from gracile.core import method as core
from gracile.core.state import derive_seed
from gracile.distill.pairing import Layers, pairs_of
from gracile.distill.pairs import misfit
from gracile.distill.regressor import Regressor, channel_dim
from gracile.distill.teaching import Taught, TaughtOptions
from gracile.distribute.collective import average_gradients
from gracile.errors import BindError, UserError
from gracile.graph.capture import as_inputs
from gracile.graph.dependency import follow
from gracile.graph.taps import Taps, names_of
from gracile.graph.verify import kept_after
from gracile.recipe.fields import KernelRef, kernel
from gracile.recipe.messages import FieldError


class FeaturesOptions(TaughtOptions):
    """Options of `distill: features`.

    L = alpha * hard + weight * (sum of the loss over the pairs).

    Attributes:
        at: which layers: `{student's: teacher's}`, or patterns of names that both have: of modules
            (what they give) and of operators as `gracile summary --kind connectivity` lists them.
            Default: every layer with weights that both have in one shape (layer-wise distillation).
        loss: how what two layers give is compared.
        weight: of the sum.
        alpha: factor of the ordinary loss; with 0 only the layers teach, and what lies behind the
            last of them is not trained (the first stage of FitNets).
        regressor_lr: learning rate (Adam's) of the regressors, where the loss has them.
    """

    at: Layers = None
    loss: KernelRef("feature_loss") = Field(  # type: ignore[valid-type]
        default_factory=lambda: kernel("feature_loss", "mse")
    )
    weight: float = Field(default=1.0, gt=0)
    alpha: float = Field(default=1.0, ge=0, le=1)
    regressor_lr: float = Field(default=1e-3, gt=0)

    @model_validator(mode="after")
    def _one_teacher(self) -> Self:
        if len(self.teacher) > 1:
            raise FieldError(
                "must be one, whose layers are named. Write an entry for each.", ("teacher",)
            )
        return self


@dataclass
class _Pair:
    """A layer of the student and what it learns from.

    Attributes:
        student, teacher: operator ids.
        taught: shape of the teacher's.
        compares: dims that must be equal, see `kinds.feature_loss`.
        kept: dim -> the teacher's indices that the student's still stand for, where some are gone;
            none where the loss does not compare number by number.
        regressor: gives the student's the teacher's channels; None if the loss has none.
    """

    student: str
    teacher: str
    taught: tuple[int, ...]
    compares: str
    kept: dict[int, Tensor] = field(default_factory=dict)
    regressor: Regressor | None = None

    @property
    def key(self) -> str:
        return f"{self.student}:{self.teacher}"

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Why the student's layer, of this shape, cannot be compared; None if it can."""
        taught = list(self.taught)
        for dim, keep in self.kept.items():
            taught[dim] = len(keep)
        if self.regressor is not None and len(shape) == len(taught):
            dim, width = self.regressor.dim, self.regressor.weight.shape[1]
            shape = (*shape[:dim], taught[dim] if shape[dim] == width else -1, *shape[dim + 1 :])
        return misfit(shape, tuple(taught), self.compares)

    def cut(self, kept: Sequence[Tensor | None], optimizer: torch.optim.Optimizer | None) -> None:
        """Channels of the student's are gone; these stay in each dim."""
        for dim, keep in enumerate(kept):
            if keep is None:
                continue
            if self.regressor is not None and dim == self.regressor.dim:
                self.regressor.cut(keep, optimizer)
            elif self.compares == "all":
                self.kept[dim] = self.kept[dim][keep] if dim in self.kept else keep


@core.method(
    "distill",
    "features",
    source="Romero et al. 2015, arXiv:1412.6550; Zagoruyko & Komodakis 2017, arXiv:1612.03928; "
    "Park et al. 2019, arXiv:1904.05068",
)
class FeatureDistillation(Taught):
    """Train layers of the compressed model towards those of a frozen teacher."""

    Options = FeaturesOptions

    def on_attach(self, s: Any) -> None:
        super().on_attach(s)
        (self.teacher,) = self.teachers
        self.meta = registry.get("feature_loss", self.options.loss.name).meta
        if self.meta["regressor"]:
            core.refuse_loss_scaling(
                self, s, "its regressors, which have an optimizer of their own"
            )
        self.session = s
        self.graph, self.found = s.graph, follow(s.model, s.graph)
        self.removes: list[Any] = []  # cuts since the graph was captured
        self.pairs = self._bound(s)
        self._make_optimizer()

    def on_batch_start(self, s: Any) -> None:
        if s.active(self):
            self._settle()
            self.taps.open()

    def on_loss(self, s: Any) -> dict[str, Tensor]:
        if not s.active(self):
            return {}
        mine, alpha = self.taps.values(), self.options.alpha
        self.taps.close()
        if not mine and alpha == 0:
            raise UserError(
                f"'{self.id}': nothing is left to train with: its layers are gone and alpha is 0. "
                "Give it a 'when' that stops before they are cut."
            )
        theirs = self.teacher.features(s.inputs) if mine else {}
        total = torch.zeros((), device=s.device)
        with torch.autocast(s.device.type, enabled=False):
            for pair in self.pairs if mine else ():
                total = total + self._compare(pair, mine[pair.student], theirs[pair.teacher])
        out = {self.id: self.options.weight * total}
        if alpha == 1:
            return out
        return {"task": alpha * s.task_loss if alpha else torch.zeros_like(s.task_loss), **out}

    def on_before_step(self, s: Any) -> None:
        if self.optimizer is None or not s.active(self):
            return
        for pair in self.pairs:
            if pair.regressor is not None:
                average_gradients(pair.regressor)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def on_batch_end(self, s: Any) -> None:
        self.taps.close()

    def on_surgery(self, s: Any, edits: Iterable[Any]) -> None:
        self.removes += [e for e in edits if e.kind == "remove"]

    def on_detach(self, s: Any) -> Iterable[Any]:
        self.taps.close()
        return ()

    def state_dict(self) -> dict[str, Any]:
        self._settle()
        return {
            "kept": {p.key: {str(d): k for d, k in p.kept.items()} for p in self.pairs},
            "regressors": {
                p.key: dict(p.regressor.state_dict()) for p in self.pairs if p.regressor is not None
            },
            "optimizer": self.optimizer.state_dict() if self.optimizer is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.removes = []  # what they did is in the state
        self.pairs = [p for p in self.pairs if p.key in state["kept"]]
        for pair in self.pairs:
            pair.kept = {int(d): k.cpu() for d, k in state["kept"][pair.key].items()}
            if pair.regressor is not None:
                pair.regressor.take(state["regressors"][pair.key])
        self._make_optimizer()
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self._settle()

    # --- inside

    def _bound(self, s: Any) -> list[_Pair]:
        """The pairs of the recipe, each seen to be readable and comparable.

        Raises:
            BindError: no such layer, one that cannot be read, or shapes that cannot be compared.
        """
        teacher = self.teacher
        mine, theirs = names_of(s.model, s.graph), names_of(teacher.model, teacher.graph)
        names = pairs_of(
            self.options.at, (s.model, s.graph, mine), (teacher.model, teacher.graph, theirs),
            teacher.name,
        )  # fmt: skip
        pairs: dict[str, _Pair] = {}
        left_out = []
        for name, its in names:
            pair = self._pair(s, mine[name], theirs[its])
            wrong = pair.misfit(s.graph[pair.student].shape)
            if wrong is None:
                pairs.setdefault(pair.key, pair)
            elif self.options.at is None:
                left_out.append(name)
            else:
                raise BindError(
                    f"'{self.id}': {wrong}, got {s.graph[pair.student].shape} of the student's "
                    f"'{name}' and {pair.taught} of '{its}' of the teacher '{teacher.name}'. "
                    "Pair layers of one size, or take loss: rkd, which compares any two."
                )
        if not pairs:
            raise BindError(
                f"'{self.id}': no layer has one shape in the student and the teacher "
                f"'{teacher.name}' for loss {self.options.loss.name}. Pair them: at: "
                "{student's: teacher's}."
            )
        self._tell(s, left_out)
        found = list(pairs.values())
        inputs = as_inputs(s.example)
        used = [(n, i) for n, i in names if f"{mine[n]}:{theirs[i]}" in pairs]
        self.taps = Taps(s.model, s.graph, [p.student for p in found])
        self.taps.prove(inputs, s.overlays.laid, {n: mine[n] for n, _ in used if n != mine[n]})
        taps = teacher.watch([p.teacher for p in found])
        taps.prove(inputs, outputs={i: theirs[i] for _, i in used if i != theirs[i]})
        return found

    def _pair(self, s: Any, student: str, teacher: str) -> _Pair:
        shape, taught = s.graph[student].shape, self.teacher.graph[teacher].shape
        pair = _Pair(student, teacher, taught, self.meta["compares"])
        if self.meta["regressor"]:
            value = self.found.values.get(student)
            dim = channel_dim(shape, taught, getattr(value, "labelled", ()))
            if dim is not None:
                seed = derive_seed(s.recipe.seed, self.id, pair.key)
                pair.regressor = Regressor(shape, taught, dim, seed).to(s.device)
        return pair

    def _make_optimizer(self) -> None:
        learned = [x for p in self.pairs if p.regressor for x in p.regressor.parameters()]
        self.optimizer: torch.optim.Optimizer | None = None
        if learned:
            self.optimizer = torch.optim.Adam(learned, lr=self.options.regressor_lr)

    def _settle(self) -> None:
        """Follow what has become of the network since it was captured."""
        s = self.session
        if s.graph is self.graph:
            return
        if self.removes:
            for pair in self.pairs:
                pair.cut(kept_after(self.found, pair.student, self.removes), self.optimizer)
        self.removes = []
        self.graph, self.found = s.graph, follow(s.model, s.graph)
        left: list[_Pair] = []
        gone: list[_Pair] = []
        for pair in self.pairs:
            node = self.graph.nodes.get(pair.student)
            fits = node is not None and pair.misfit(node.shape) is None
            (left if fits else gone).append(pair)
        if gone:
            self.pairs = left
            self._tell(s, [p.student for p in gone])
        self.taps.close()
        self.taps = Taps(s.model, self.graph, [p.student for p in left])

    def _tell(self, s: Any, names: Sequence[str]) -> None:
        if names:
            s.warn(
                "features-left-out",
                f"'{self.id}': nothing is learned at {', '.join(names)}: of another shape than the "
                "teacher's, or no longer in the network.",
            )

    def _compare(self, pair: _Pair, student: Tensor, teacher: Tensor) -> Tensor:
        for dim, keep in pair.kept.items():
            teacher = teacher.index_select(dim, keep.to(teacher.device))
        student = student.float()
        if pair.regressor is not None:
            student = pair.regressor(student)
        return self.options.loss.fn(student, teacher.float())  # type: ignore[no-any-return]
