"""Teachers: frozen networks whose answers to a mini-batch are computed once for all who learn."""

from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gracile.core.state import sha256
from gracile.errors import BindError, UserError, nearest
from gracile.graph.capture import as_inputs, capture
from gracile.graph.graph import Graph
from gracile.graph.taps import Taps
from gracile.models.spec import load_weights, resolve
from gracile.recipe.teachers import ORIGINAL, TeacherSpec, comes_trained, find_weights


class Teacher:
    """A frozen network in eval mode.

    Args:
        name: for messages.
        model: is frozen.
        example: an input batch, or a tuple of inputs.
    """

    def __init__(self, name: str, model: nn.Module, example: Any):
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self.example = example
        self._ids: dict[str, None] = {}
        self._taps: Taps | None = None
        self.forget()

    @cached_property
    def graph(self) -> Graph:
        """The captured graph.

        Raises:
            BindError: it does not run on the student's inputs.
        """
        try:
            return capture(self.model, self.example)
        except UserError as e:
            raise BindError(f"the teacher '{self.name}': {e}") from e

    @cached_property
    def shape(self) -> tuple[int, ...] | None:
        """Of its answer to the example; None if that is not one tensor.

        Raises:
            BindError: it does not run on the student's inputs.
        """
        inputs = as_inputs(self.example)
        try:
            with torch.no_grad():
                out = self.model(*inputs)
        except Exception as e:
            shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
            raise BindError(
                f"the teacher '{self.name}' does not run on the student's inputs of shape "
                f"{shapes}: {str(e).strip().splitlines()[0] if str(e).strip() else e!r}."
            ) from e
        return tuple(out.shape) if isinstance(out, Tensor) else None

    def watch(self, ids: Collection[str]) -> Taps:
        """Read what these operators give too, from now on; several may ask.

        Raises:
            BindError: see `Taps`.
        """
        self._ids |= dict.fromkeys(ids)
        self._taps = Taps(self.model, self.graph, list(self._ids))
        return self._taps

    def outputs(self, inputs: tuple[Tensor, ...]) -> Any:
        """Its answer, without gradient; computed once for one tuple of inputs."""
        self._answer(inputs)
        return self._outputs

    def features(self, inputs: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
        """Operator id -> its output, for those that are watched."""
        self._answer(inputs)
        return self._features

    def forget(self) -> None:
        """The mini-batch is over."""
        self._inputs: tuple[Tensor, ...] | None = None
        self._outputs: Any = None
        self._features: Mapping[str, Tensor] = {}

    def _answer(self, inputs: tuple[Tensor, ...]) -> None:
        if self._inputs is inputs:
            return
        with torch.no_grad():
            if self._taps is None:
                self._outputs = self.model(*inputs)
            else:
                with self._taps.opened(grad=False):
                    self._outputs = self.model(*inputs)
                    self._features = self._taps.values()
        self._inputs = inputs


def learns_from_original(m: Any) -> bool:
    """Whether a method that needs a teacher means the network as it came."""
    return ORIGINAL in getattr(m.options, "teacher", (ORIGINAL,))


def separate(given: Mapping[str, nn.Module], student: nn.Module) -> Mapping[str, nn.Module]:
    """Teachers as given by a Python caller.

    Raises:
        UserError: one has parameters of the student, which would be frozen with it.
    """
    own = {id(p) for p in student.parameters()}
    for name, teacher in given.items():
        if any(id(p) in own for p in teacher.parameters()):
            raise UserError(
                f"teachers: '{name}' shares parameters with the student; give a copy "
                "(copy.deepcopy), or learn from 'original'."
            )
    return given


class Teachers:
    """The teachers of a session, each made when it is first asked for.

    Args:
        original: the network as it came; None if no method asks for it.
        given: name -> network, of a Python caller.
        recipe: where the recipe was read from.
        example: an input batch of the student.
        classes: outputs of the student, for models that can have any number; None if unknown.
    """

    def __init__(
        self,
        original: nn.Module | None,
        given: Mapping[str, nn.Module],
        *,
        recipe: str,
        example: Any,
        classes: int | None,
    ):
        if ORIGINAL in given:
            raise UserError(
                f"teachers: '{ORIGINAL}' is the network before compression; name yours otherwise."
            )
        self._original, self._given = original, dict(given)
        self._recipe, self._example, self._classes = recipe, example, classes
        self._made: dict[str | TeacherSpec, Teacher] = {}
        self.files: dict[str, str] = {}

    def of(self, ref: str | TeacherSpec) -> Teacher:
        """The one that a recipe names; entries that name the same one share it.

        Raises:
            BindError: no such network, or an untrained one.
            UserError: its weights cannot be had, or do not fit.
        """
        if ref not in self._made:
            model = self._built(ref) if isinstance(ref, TeacherSpec) else self._named(ref)
            device = as_inputs(self._example)[0].device
            self._made[ref] = Teacher(str(ref), model.to(device), self._example)
        return self._made[ref]

    def forget(self) -> None:
        """The mini-batch is over."""
        for teacher in self._made.values():
            teacher.forget()

    def _named(self, name: str) -> nn.Module:
        if name == ORIGINAL and self._original is not None:
            return self._original
        if name not in self._given:
            known = [ORIGINAL, *self._given]
            raise BindError(
                f"no teacher is called '{name}'.{nearest(name, known)} Another network is "
                "{model: ..., weights: ...}, or Session(..., teachers={name: network})."
            )
        return self._given[name]

    def _built(self, ref: TeacherSpec) -> nn.Module:
        if ref.weights is None and not comes_trained(ref.model):
            raise BindError(
                f"teacher '{ref.model}' needs weights, since it is untrained without. Write "
                f"{{model: {ref.model}, weights: FILE}}."
            )
        with torch.random.fork_rng(devices=[]):  # what training draws does not depend on it
            model = resolve(ref.model, num_classes=self._classes, allow_file=False).model
        if ref.weights is not None:
            path = find_weights(ref.weights, self._recipe)
            load_weights(model, path)
            self.files[str(Path(ref.weights))] = sha256(path.read_bytes())
        return model
