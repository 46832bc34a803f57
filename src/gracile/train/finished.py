"""A finished run, opened again: its original network, its Plan, and the values it ended with.

The idea is ours. A run keeps the hash of its weights file, not the file: whoever opens it names the
file again. Masks and grids are in the stored weights already; the float values under them are taken
from the last saved state of training, or from the original, and only where putting them through the
same masks and grids gives exactly the stored weights.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gracile.core.plan import Bits, Factorize, Mask, Plan, Replace, Skip
from gracile.core.state import sha256
from gracile.errors import UserError
from gracile.graph import surgery
from gracile.graph.additions import structural
from gracile.graph.depth import covers
from gracile.models.spec import architecture_sha
from gracile.nn.chain import Order
from gracile.nn.rounding import fake_quantize
from gracile.quantize.binary import signed_scale
from gracile.quantize.groups import on_groups
from gracile.quantize.restore import simulate
from gracile.recipe.load import load as load_recipe
from gracile.train.checkpoint import REPLAYED, check_kinds, load_state, stored_tensors
from gracile.train.evaluate import Score, predict_module, score
from gracile.train.folder import read_finished
from gracile.train.job import Job, Workplace

WEIGHT = ("weight", "bias")  # roles of a Bits edit that lie on a parameter
CHANGED = {  # key of the run's identity -> what is to be the same again
    "model_code": "the file of its model",
    "data_sha": "its data",
    "recipe_sha": "its recipe.yaml",
}


@dataclass(frozen=True)
class Finished:
    """What a finished run is made of.

    Attributes:
        folder: the run directory.
        at: its data and its original network.
        plan: all Edits.
        stored: all tensors of model.safetensors: weights, and what the Plan's keys name.
        trained: whether the recipe trains at all.
        pretrained: whether it began from a weights file, not from random weights.
    """

    folder: Path
    at: Workplace
    plan: Plan
    stored: dict[str, Tensor]
    trained: bool
    pretrained: bool

    @cached_property
    def example(self) -> Tensor:
        """Two images, to capture graphs with and to prove cuts on."""
        return self.at.example()

    def original(self) -> nn.Module:
        """The original network with its weights, made anew."""
        return self.at.fresh().model.eval()

    def build(self, plan: Plan, values: Mapping[str, Tensor] | None = None) -> nn.Module:
        """The network of a Plan, plain: cut, and filled with values.

        Args:
            plan: any.
            values: of all its tensors, and the orders of channels among factors; None leaves the
                original's, and zeros where layers were factorized.
        """
        model = surgery.apply(self.original(), structural(plan), example=self.example)
        if values is not None:
            with torch.no_grad():
                for name, tensor in named_tensors(model).items():
                    tensor.copy_(values[name])
            for path, module in model.named_modules():
                if isinstance(module, Order):
                    module.set_extra_state(values[f"{path}._extra_state"])
        return model

    def quantized(self, model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A plain network with the activation quantizers of a Plan."""
        return simulate(model, plan, tensors, self.example).eval()

    def score(self, model: nn.Module) -> Score:
        """Accuracy and loss on the validation split."""
        return score(*predict_module(model.to(self.at.device), self.at.batches("val")))

    def floats(self, at: str) -> Tensor:
        """A weight of the final structure as it was before masks and grids.

        Raises:
            UserError: the run does not hold these values.
        """
        lossy = value_edits(self.plan, at)
        if not lossy:
            return self.stored[at]
        for source in (self._trained, self._untrained):
            value = source.get(at)
            if value is not None and value.shape == self.stored[at].shape:
                again = settled(value, lossy, self.stored)
                if torch.equal(again, self.stored[at]):
                    return value
        raise UserError(
            f"{self.folder}: the float values of '{at}' are lost: the run stored it after "
            f"{lossy[0].id} ({lossy[0].kind}), and neither state/session.safetensors nor the "
            "original weights lead to what it stored. Run the recipe again without that entry."
        )

    @cached_property
    def _untrained(self) -> dict[str, Tensor]:
        return dict(named_tensors(self.build(self.plan)))

    @cached_property
    def _trained(self) -> dict[str, Tensor]:
        """Float values after the last epoch, cut by what came later; empty if there was none."""
        path = self.folder / "state" / "session.safetensors"
        if not path.exists():
            return {}
        session = load_state(path)["session"]
        then = Plan.model_validate_json(session["plan"])
        if self.plan.edits[: len(then)] != then.edits:
            return {}
        values: dict[str, Tensor] = dict(session["model"])
        later = Plan(architecture=self.plan.architecture, edits=self.plan.edits[len(then) :])
        for edit in structural(later):
            if isinstance(edit, Skip):
                values = {at: v for at, v in values.items() if not covers(edit.gone, at)}
                continue
            if isinstance(edit, Factorize):  # made after the last state: only what it gave is known
                values = {at: v for at, v in values.items() if not at.startswith(f"{edit.at}.")}
                continue
            assert not isinstance(edit, Replace)  # such a plan is not replayed
            for m in edit.group:
                if m.at in values:
                    values[m.at] = values[m.at].index_select(m.dim, torch.tensor(m.keep))
        return values


def open_run(folder: Path, weights: Path | None = None) -> Finished:
    """Open a finished run.

    Args:
        folder: a run directory.
        weights: the file the run began from; needed exactly if it began from one.

    Raises:
        UserError: not finished, another file, or model, data or recipe changed since.
    """
    then = read_finished(folder)["identity"]
    _check_weights(folder, then.get("weights"), weights)
    recipe = load_recipe(folder / "recipe.yaml")
    at = Workplace(
        Job(
            model=then["model"], data=then["data"], recipe=recipe, out=folder, weights=weights,
            progress=False,
        ),
        bind=False,
    )  # fmt: skip
    now = at.identity()
    for key, what in CHANGED.items():
        if now[key] != then.get(key):
            raise UserError(f"{folder}: {what} changed since the run; replay needs it as it was.")
    plan = Plan.load(folder / "plan.json")
    if architecture_sha(at.fresh().model) != plan.architecture.sha256:
        raise UserError(f"{folder}: plan.json was made for another network than {then['model']}.")
    check_kinds(plan, "replay", f"{folder}: ", REPLAYED)
    stored = stored_tensors(folder)
    return Finished(folder, at, plan, stored, recipe.train.epochs > 0, weights is not None)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that are saved, each tied one once, under its first name."""
    saved = model.state_dict().keys()
    both = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: t.detach() for name, t in both.items() if name in saved}


def value_edits(edits: Iterable[Any], at: str) -> list[Mask | Bits]:
    """The edits, in order, that change the values of one weight."""
    return [
        e
        for e in edits
        if e.kind in ("mask", "bits") and e.at == at and getattr(e, "role", "weight") in WEIGHT
    ]


def settled(value: Tensor, edits: Sequence[Mask | Bits], tensors: Mapping[str, Tensor]) -> Tensor:
    """A float weight behind masks and on grids, as these edits say."""
    for e in edits:
        if isinstance(e, Mask):
            value = value * tensors[e.key].to(value.dtype)
        else:
            scale, zero_point = tensors[f"{e.key}.scale"], tensors[f"{e.key}.zero_point"]
            if e.group is not None:
                value = on_groups(value, scale, zero_point, e.qmin, e.qmax)
                continue
            if e.bits == 1 and e.signed:
                value = signed_scale(value, scale, e.axis)
            else:
                value = fake_quantize(value, scale, zero_point, e.qmin, e.qmax, e.axis)
    return value


def describe(edit: Any) -> str:
    """One line for people: what an edit does, and where."""
    match edit.kind:
        case "remove" | "add":
            m = edit.group[0]
            old, new = (m.of, len(m.keep)) if edit.kind == "remove" else (len(m.keep), m.of)
            more = f" and {len(edit.group) - 1} more" if len(edit.group) > 1 else ""
            return f"{m.at} dim {m.dim}: {old} -> {new}{more}"
        case "mask":
            return f"{edit.at}: {100 * edit.sparsity:.3g} % zeros"
        case "decompose":
            return f"{edit.at}: taken apart" + (f", {edit.steps} steps" if edit.steps else "")
        case "factorize":
            return f"{edit.at}: {edit.scheme}, rank {', '.join(str(r) for r in edit.ranks)}"
        case "bits":
            when = ", range found at run time" if edit.dynamic else ""
            when = f", a scale for each {edit.group} inputs" if edit.group else when
            return f"{edit.role} {edit.at}: {'' if edit.signed else 'u'}int{edit.bits}{when}"
    return str(getattr(edit, "at", getattr(edit, "block", "")))


def _check_weights(folder: Path, known: str | None, weights: Path | None) -> None:
    if known is None and weights is not None:
        raise UserError(f"--weights: the run in {folder} began from none; leave it out.")
    if known is not None and weights is None:
        raise UserError(
            f"the run in {folder} began from a weights file (sha256 {known[:12]}...), and a run "
            "does not keep it: name it again with --weights FILE."
        )
    if weights is not None:
        if not weights.is_file():
            raise UserError(f"{weights}: no such file.")
        found = sha256(weights.read_bytes())
        if found != known:
            raise UserError(
                f"--weights {weights}: sha256 {found[:12]}..., the run in {folder} began from "
                f"{str(known)[:12]}...; name the file it began from."
            )
