"""Cross-layer equalization: channels are rescaled between layers so that grids fit all of them.

A factor s per channel goes from the layer that writes it to those that read it; through ReLU
nothing changes. Different from the paper, BatchNorm is not folded: it takes the factor, and since
it also undoes any scale of the rows before it, these are brought to one range for nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from gracile.core import method as core
from gracile.core.schedule import When
from gracile.distribute.collective import broadcast_
from gracile.errors import BindError, GracileError, VerificationError
from gracile.graph.capture import as_inputs
from gracile.graph.scaling import Reader, ScaleGroup, Writer, by_channels, scale_groups

TOLERANCE = 1e-3  # of outputs, against their largest: factors are rounded to float32
SETTLED = 1e-3  # largest change of a factor after which rounds end


class EqualizeOptions(core.Options):
    """Options of `recover: equalize`.

    Attributes:
        rounds: over all channels, at most.
        absorb: move what a channel has in almost any case (its BatchNorm's shift less 3 times its
            scale) behind the ReLU, into the next layers; only where these have no padding. This
            is not exact.
        when: one instant, before the quantizer.
    """

    rounds: int = Field(default=20, ge=1)
    absorb: bool = False
    when: When = Field(default_factory=lambda: When(at="end"))


@core.method("recover", "equalize", source="Nagel et al. 2019, arXiv:1906.04721, section 4.1")
class Equalize(core.Method):
    """Give the channels of a weight similar ranges without changing what the network computes."""

    Options = EqualizeOptions
    needs = frozenset({"graph"})

    def on_attach(self, s: Any) -> None:
        groups, refused = scale_groups(s.graph)
        if not groups:
            why = next(iter(refused.values()), s.graph.reason or "no layer reads another")
            raise BindError(
                f"'{self.id}': no channels of {s.name} can be scaled between their layers: {why}."
            )

    def on_fire(self, s: Any, progress: float) -> None:
        if s.graph.of_op("quantize") or s.overlays.addresses("quantize"):
            raise GracileError(
                f"'{self.id}' fires when the network is quantized already; put it before the "
                "quantizer."
            )
        groups, refused = scale_groups(s.graph)
        weights = _Weights(s)
        groups = [g for g in groups if weights.free(g)]
        kept = {k: v.detach().clone() for k, v in s.model.state_dict().items()}
        before = _outputs(s)
        for _ in range(self.options.rounds):
            changes = [weights.balance(g) for g in groups]
            if max(changes, default=0.0) < SETTLED:
                break
        try:
            _compare(self.id, before, _outputs(s))
        except VerificationError:
            s.model.load_state_dict(kept)
            raise
        for g in groups if self.options.absorb else ():
            weights.absorb(g)
        for value in s.model.state_dict().values():
            broadcast_(value)  # ranks go on with the same network, to the last bit
        if refused:
            s.warn(
                "equalize.left",
                f"'{self.id}' left the outputs of {len(refused)} layers as they are: "
                + "; ".join(sorted(set(refused.values()))[:3])
                + ".",
            )
        s.changed = s.changed or self.options.absorb


@dataclass(frozen=True)
class _Weights:
    """The layers of a session's model, changed in place."""

    s: Any

    def free(self, group: ScaleGroup) -> bool:
        """Whether all weights of a group are what the forward sees, up to masks."""
        layers = [w.node for w in group.writers] + [r.node for r in group.readers]
        shared = set(self.s.overlays.addresses("share"))
        return not any(n.params["weight"] in shared for n in layers)

    @torch.no_grad()
    def balance(self, group: ScaleGroup) -> float:
        """One step of a group: s = sqrt(r_written / r_read), eq. 11; the largest |log s|."""
        for w in group.writers:
            self._even(w)
        written = torch.stack([self._written(w) for w in group.writers]).amax(0)
        read = torch.stack([self._read(r) for r in group.readers]).amax(0)
        factor = factors(written, read)
        for w in group.writers:
            self._scale_written(w, 1 / factor)
        for r in group.readers:
            address = r.node.params["weight"]
            view = by_channels(r.node, self.s.parameter(address).data, r.inputs)
            view.mul_(factor.reshape(view.shape[0], 1, -1, 1))
        return float(factor.log().abs().max())

    @torch.no_grad()
    def absorb(self, group: ScaleGroup) -> None:
        """Section 4.1.3: shift - 3 scale, if positive, goes from the BatchNorm to the readers."""
        first = group.writers[0]
        ops = {self.s.graph[id].op for id in group.passed} - {"batch_norm"}
        plain = ops <= {"relu", "identity", "dropout"}
        targets = [t for r in group.readers if (t := self._shifted(r)) is not None]
        able = len(targets) == len(group.readers)
        if len(group.writers) > 1 or first.norm is None or not plain or not able:
            return
        norm = self.s.model.get_submodule(first.norm.module)
        constant = (norm.bias - 3 * norm.weight.abs()).clamp(min=0)
        norm.bias.sub_(constant)
        for r, (target, sign) in zip(group.readers, targets, strict=True):
            weight = self.s.overlays.effective(r.node.params["weight"], upto="mask")
            view = by_channels(r.node, weight, r.inputs)
            gain = (view.sum(3) * constant.reshape(view.shape[0], 1, -1)).sum(2).flatten()
            target.add_(gain, alpha=sign)

    def _even(self, w: Writer) -> None:
        """Rows before a BatchNorm to one range; mean, variance and scale of it follow."""
        if w.norm is None:
            return
        norm = self.s.model.get_submodule(w.norm.module)
        rows = self._rows(w)
        factor = torch.where(rows > 0, rows.amax() / rows, 1.0)
        self._rescale_rows(w, factor)
        var = norm.running_var * factor**2
        norm.weight.mul_(((var + norm.eps) / (norm.running_var + norm.eps)).sqrt() / factor)
        norm.running_var.copy_(var)
        norm.running_mean.mul_(factor)

    def _rows(self, w: Writer) -> Tensor:
        weight = self.s.overlays.effective(w.node.params["weight"], upto="mask").detach()
        return by_channels(w.node, weight).abs().amax((2, 3)).flatten()

    def _written(self, w: Writer) -> Tensor:
        """Range of what makes each channel, with a BatchNorm's slope."""
        rows = self._rows(w)
        if w.norm is None:
            return rows
        norm = self.s.model.get_submodule(w.norm.module)
        slope: Tensor = norm.weight.abs() / (norm.running_var + norm.eps).sqrt()
        return rows * slope

    def _read(self, r: Reader) -> Tensor:
        weight = self.s.overlays.effective(r.node.params["weight"], upto="mask").detach()
        return by_channels(r.node, weight, r.inputs).abs().amax((1, 3)).flatten()

    def _scale_written(self, w: Writer, factor: Tensor) -> None:
        if w.norm is None:
            self._rescale_rows(w, factor)
            return
        norm = self.s.model.get_submodule(w.norm.module)
        norm.weight.mul_(factor)
        norm.bias.mul_(factor)

    def _rescale_rows(self, w: Writer, factor: Tensor) -> None:
        view = by_channels(w.node, self.s.parameter(w.node.params["weight"]).data)
        view.mul_(factor.reshape(view.shape[0], -1, 1, 1))
        if "bias" in w.node.params:
            self.s.parameter(w.node.params["bias"]).data.mul_(factor)

    def _shifted(self, r: Reader) -> tuple[Tensor, int] | None:
        """What takes a constant added to a reader's outputs, and with which sign.

        None where padding reads no constant, or nothing takes one.
        """
        if _padding(r.node):
            return None
        if "bias" in r.node.params:
            return self.s.parameter(r.node.params["bias"]).data, 1
        readers = self.s.graph.consumers(r.node.id)
        if len(readers) == 1 and readers[0].op == "batch_norm":
            return self.s.model.get_submodule(readers[0].module).running_mean, -1
        return None


def factors(written: Tensor, read: Tensor) -> Tensor:
    """What a channel is divided by where it is written, and multiplied by where it is read.

    Both ranges become their geometric mean (eq. 11: s = sqrt(r1 r2) / r2). 1 where either is 0.

    Args:
        written: (C,) range of the weights that make each channel.
        read: (C,) range of those that read it.

    >>> factors(torch.tensor([8.0, 1.0]), torch.tensor([2.0, 4.0]))
    tensor([2.0000, 0.5000])
    """
    dead = (written == 0) | (read == 0)
    return torch.where(dead, 1.0, (written / torch.where(dead, 1.0, read)).sqrt())


def _padding(node: Any) -> int:
    padding = node.attrs.get("padding", 0)
    if isinstance(padding, str):
        return 0 if padding == "valid" else 1
    return max(padding) if isinstance(padding, tuple) else int(padding)


def _outputs(s: Any) -> list[Tensor]:
    training = s.model.training
    s.model.eval()
    with torch.no_grad():
        out = s.model(*as_inputs(s.example))
    s.model.train(training)
    values = out if isinstance(out, (tuple, list)) else (out,)
    return [v for v in values if isinstance(v, Tensor)]


def _compare(id: str, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
    for a, b in zip(before, after, strict=True):
        error = float((a - b).abs().max() / a.abs().max().clamp(min=1e-12))
        if not error <= TOLERANCE:
            raise VerificationError(
                f"'{id}': the network computes something else after its channels were rescaled "
                f"(largest difference {error:.2g} of the largest output). Please report it."
            )
