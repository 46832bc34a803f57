"""The recovery ladder: after an edit the cheapest recovery first, until the accuracy is in budget.

The idea is ours. Each rung is the method of the recipe language by that name, run by its own code;
the ladder decides which are needed, by measured accuracy, and takes back what loses.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from gracile.core import method as core
from gracile.core.schedule import When
from gracile.distill.methods.features import FeatureDistillation, FeaturesOptions
from gracile.distill.methods.kd import KDOptions, KnowledgeDistillation
from gracile.distribute.collective import all_reduce_mean_
from gracile.errors import BindError
from gracile.recover.climbing import Rung, climb
from gracile.recover.methods.accuracy import top1
from gracile.recover.methods.batch_norm import BatchNormOptions, BatchNormStatistics
from gracile.recover.methods.bias import BiasCorrection, BiasOptions
from gracile.recover.methods.reconstruct import Reconstruct, ReconstructOptions

Name = Literal["batch_norm", "bias", "reconstruct", "layerwise", "finetune"]
RUNGS: tuple[Name, ...] = ("batch_norm", "bias", "reconstruct", "layerwise", "finetune")
TRAINED = ("layerwise", "finetune")
AT_END = When(at="end")


class LadderOptions(core.Options):
    """Options of `recover: ladder`.

    Attributes:
        max_drop: points of top-1 (1 point = 1 %) on validation data that the compressed network may
            be below the original; climbing stops as soon as it is within.
        rungs: what is tried, in this order; default from the cheapest to the dearest. batch_norm,
            bias and reconstruct are the recoveries of these names, layerwise is distill: features
            with every layer that both networks have, finetune is distill: kd from the original.
        images: of the calibration data for the rungs that do not train; 0 is all.
        layerwise_epochs: of training by layerwise.
        epochs: of training by finetune, at most; the accuracy is measured after each.
        lr: learning rate of both at their start; it falls in a straight line to 0.
        after_cuts: climb also in training, as soon as other entries have changed the structure,
            without the rungs that train: the recipe's own training goes on from there.
        when: the firings. Rungs that train are taken only after training.
    """

    on_noise: ClassVar[Mapping[str, Any]] = {"rungs": ()}  # accuracy on noise says nothing

    max_drop: float = Field(ge=0, le=100)
    rungs: tuple[Name, ...] = RUNGS
    images: int = Field(default=0, ge=0)
    layerwise_epochs: float = Field(default=0.25, gt=0)
    epochs: float = Field(default=1.0, gt=0)
    lr: float = Field(default=1e-3, gt=0)
    after_cuts: bool = True
    when: When = AT_END

    @model_validator(mode="after")
    def _some_rungs(self) -> "LadderOptions":
        if not self.rungs:
            raise ValueError(f"rungs must name at least one of {', '.join(RUNGS)}, got none")
        twice = [r for r in RUNGS if self.rungs.count(r) > 1]
        if twice:
            raise ValueError(f"rungs name '{twice[0]}' twice; once is enough")
        return self


@core.method(
    "recover",
    "ladder",
    source="ours; the rungs as in recover: batch_norm, bias, reconstruct, distill: features, kd",
)
class Ladder(core.Method):
    """Recover by the cheapest means that bring the accuracy back into the budget."""

    Options = LadderOptions

    def __init__(self, id: str, options: Any):
        super().__init__(id, options)
        self.rungs: dict[str, core.Method] = {}
        self.unable: dict[str, str] = {}  # rung -> why this network or recipe has no use for it
        self.climbs: list[dict[str, Any]] = []
        self.dense: float | None = None  # top-1 of the original
        self.cut = False  # since the last climb
        calibrated = set(options.rungs) - set(TRAINED)
        self.needs = frozenset({"validation", "teacher", *(["calibration"] if calibrated else [])})
        self.counts_statistics = "batch_norm" in options.rungs

    def on_attach(self, s: Any) -> None:
        self._check_place(s)
        for name in self.options.rungs:
            rung = _made(f"{self.id}.{name}", name)
            if name in TRAINED:
                s.refuse_without_training_data(self)
            try:
                rung.on_attach(s)
                self.rungs[name] = rung
            except BindError as e:
                self.unable[name] = str(e).removeprefix(f"'{rung.id}'").lstrip(": ")
        if not self.rungs:
            raise BindError(
                f"'{self.id}': none of its rungs is of use here. "
                f"{' '.join(f'{n}: {why}' for n, why in self.unable.items())}"
            )

    def on_fire(self, s: Any, progress: float) -> None:
        table, k = s.timetables[self.id], s.fired[self.id]
        over = k >= len(table.instants)
        climbed = self._climb(s, self.options.rungs if over else self._untrained())
        if climbed and k + 1 == len(table) and not self.climbs[-1]["met"]:
            self._tell_missed(s, self.climbs[-1])

    def on_epoch_start(self, s: Any) -> None:
        self._after_cut(s)

    def on_batch_start(self, s: Any) -> None:
        self._after_cut(s)

    def on_surgery(self, s: Any, edits: Iterable[Any]) -> None:
        self.cut = True
        edits = list(edits)
        for rung in self.rungs.values():
            rung.on_surgery(s, edits)

    def climbed(self) -> list[dict[str, Any]]:
        """What each climb cost and brought, in order, as JSON."""
        return list(self.climbs)

    def state_dict(self) -> dict[str, Any]:
        return {
            "dense": self.dense,
            "cut": self.cut,
            "climbs": self.climbs,
            "rungs": {name: rung.state_dict() for name, rung in self.rungs.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.dense, self.cut = state["dense"], state["cut"]
        self.climbs = list(state["climbs"])
        for name, rung in self.rungs.items():
            rung.load_state_dict(state["rungs"][name])

    # --- climbing

    def _after_cut(self, s: Any) -> None:
        if self.cut and self.options.after_cuts:
            self._climb(s, self._untrained())

    def _untrained(self) -> tuple[Name, ...]:
        return tuple(r for r in self.options.rungs if r not in TRAINED)

    def _climb(self, s: Any, names: tuple[Name, ...]) -> bool:
        """Whether there was anything to climb."""
        self.cut = False
        if not names:
            return False
        if self.dense is None:
            self.dense = self._top1(s, "teacher")
        wanted = self.dense - self.options.max_drop / 100 - 1e-9
        start = top = self._top1(s)
        s.track("ladder/top1", start)
        number = len(self.climbs)
        rows: list[Rung] = []
        for rung in climb(
            [(name, partial(self._run, s, name, number)) for name in names],
            start,
            measure=lambda: self._top1(s),
            hold=s.hold,
            put_back=s.put_back,
            enough=lambda found: found >= wanted,
        ):
            rows.append(rung)
            if rung.kept and rung.after is not None:
                top = rung.after
                s.track("ladder/top1", top)
        s.changed = True
        self.climbs.append(
            {
                "entry": self.id,
                "epoch": s.epoch_number,
                "dense": self.dense,
                "before": start,
                "after": top,
                "met": top >= wanted,
                "rungs": [r.to_dict() for r in rows],
            }
        )
        return True

    def _run(self, s: Any, name: str, number: int) -> Iterator[int]:
        """Run a rung; says after each part how many images it took."""
        if name not in self.rungs:
            raise BindError(self.unable[name])
        rung, o = self.rungs[name], self.options
        if name in TRAINED:
            epochs = o.epochs if name == "finetune" else o.layerwise_epochs
            yield from s.tune(self, rung, epochs=epochs, lr=o.lr, number=number)
            return
        if isinstance(rung, BiasCorrection) and not rung.quantized(s):
            raise BindError("nothing is quantized at this moment.")
        with s.calibrating_on(o.images) as data:
            rung.on_fire(s, 1.0)
        yield data.images

    def _top1(self, s: Any, of: str = "present") -> float:
        """On the validation data; ranks that train together must decide alike."""
        found = torch.tensor(top1(*s.logits(self, of=of)), dtype=torch.float64, device=s.device)
        return float(all_reduce_mean_(found))

    # --- what is said

    def _check_place(self, s: Any) -> None:
        others = [m for m in s.methods if m.verb not in ("recover", "distill")]
        if not others:
            raise BindError(
                f"'{self.id}' recovers from what other entries do to the network, and this recipe "
                "has none that prunes, factorizes or quantizes. Add one before it."
            )
        later = s.methods[s.methods.index(self) + 1 :]
        late = [m for m in later if m in others and s.timetables.get(m.id) is not None]
        late = [m for m in late if s.timetables[m.id].at_end]
        if late and not any(isinstance(m, Ladder) for m in later):
            raise BindError(
                f"'{late[0].id}' acts after training, behind '{self.id}', so nothing would recover "
                f"from it. Write '{self.id}' behind it."
            )

    def _tell_missed(self, s: Any, climbed: Mapping[str, Any]) -> None:
        rows = [r for r in climbed["rungs"] if r["after"] is not None]
        taken = ", ".join(f"{r['rung']} {r['gain']:+.2f}" for r in rows)
        s.warn(
            "ladder-missed",
            f"'{self.id}': top-1 on the validation data is {climbed['after']:.2%}, of "
            f"{self.dense:.2%} before compression; {self.options.max_drop:g} points may be lost. "
            f"Points gained: {taken or 'none, as no rung could be taken'}. Compress less, or train "
            "longer.",
        )


def _made(id: str, name: Name) -> core.Method:
    made: dict[str, Callable[[], core.Method]] = {
        "batch_norm": lambda: BatchNormStatistics(id, BatchNormOptions(when=AT_END)),
        "bias": lambda: BiasCorrection(id, BiasOptions()),
        "reconstruct": lambda: Reconstruct(id, ReconstructOptions(when=AT_END)),
        "layerwise": lambda: FeatureDistillation(id, FeaturesOptions(alpha=0)),
        "finetune": lambda: KnowledgeDistillation(id, KDOptions()),
    }
    return made[name]()
