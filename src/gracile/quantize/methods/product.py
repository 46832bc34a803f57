"""Product quantization of weights (Q-CNN): short vectors along the input channels share values."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from gracile.analyze.responses import Responses, is_followed
from gracile.core.method import method
from gracile.errors import BindError
from gracile.graph.graph import Node
from gracile.graph.walk import Walk
from gracile.quantize.codebook import Shared, stretched
from gracile.quantize.error_correction import fit_responses
from gracile.quantize.kmeans import cluster_vectors
from gracile.quantize.sharing import LAYER, Sharing, SharingOptions, no_gain


class ProductOptions(SharingOptions):
    """Options of `quantize: product`, added to `SharingOptions`.

    Attributes:
        subspace: input channels in a vector.
        words: vectors that each stretch of so many input channels chooses from.
        correct: fit codebooks and codes to the responses of the layer on calibration data, layer
            after layer, each with the inputs that the quantized layers before it give.
        rounds: of that fit, at most.
        points: positions of each image that it uses; 0 is all of them.
    """

    subspace: int = Field(default=8, ge=1)
    words: int = Field(default=128, ge=2, le=65536)
    correct: bool = False
    rounds: int = Field(default=10, ge=1)
    points: int = Field(default=0, ge=0)


@method(
    "quantize",
    "product",
    source="Wu et al. 2016, arXiv:1512.06473 (Q-CNN), section 3, eq. 7-14",
)
class ProductQuantization(Sharing):
    """Cut weights into short vectors and give each one of a few values."""

    Options = ProductOptions

    def __init__(self, id: str, options: Any):
        super().__init__(id, options)
        if options.correct:
            self.needs = frozenset({"calibration"})  # type: ignore[misc]

    def on_attach(self, s: Any) -> None:
        super().on_attach(s)
        flat = [a for a in self.addresses if s.parameter(a).dim() < 2]
        if flat:
            raise BindError(
                f"'{self.id}': '{flat[0]}' has no input channels to cut into vectors; select "
                "weights of two dims or more, or take quantize: share."
            )

    def _share(self, s: Any, address: str, weight: Tensor) -> Shared | str:
        if s.mask(address) is not None:
            self._refuse_masked(address)
        o = self.options
        size = min(o.subspace, weight.shape[1])
        parts, columns = stretched(weight, size)  # (O, S, d, ...)
        points = parts.movedim(2, -1).transpose(0, 1).flatten(1, -2)  # (S, O * places, d)
        stretches, count, _ = points.shape
        entries = stretches * o.words * size
        why = (
            f"{count} vectors choose from {o.words}"
            if count <= o.words
            else no_gain(weight, codes=stretches * count, levels=o.words, entries=entries)
        )
        if why is not None:
            return why
        books, codes = [], []
        for k, x in enumerate(points):
            book, code = cluster_vectors(x, o.words, s.generator(self.id, address, k))
            books.append(book)
            codes.append(code.reshape(parts.shape[0], *parts.shape[3:]))
        return Shared(torch.stack(books), torch.stack(codes, 1), columns)

    def _share_all(self, s: Any) -> None:
        if not self.options.correct:
            super()._share_all(s)
            return
        wanted = set(self.addresses)
        layers: dict[str, Node] = {}
        for node in s.graph:
            address = node.params.get("weight")
            if is_followed(node) and address in wanted:
                layers[node.id] = node
                wanted.remove(address)
        for address in [a for a in self.addresses if a in wanted]:
            self._take(s, address)
            s.note(address, "precision", None, None, "its layer cannot be followed", self.id)

        def before(id: str) -> None:
            if id in layers:
                self._fit(s, layers[id], model, present)

        with s.walk(self, before, beside="present") as (model, present):
            for node in s.graph:
                if node.op != "output":
                    model.need(node.id)

    def _fit(self, s: Any, node: Node, model: Walk, present: Walk) -> None:
        address = node.params["weight"]
        self._take(s, address)
        shared = self.shared.get(address)
        if shared is None:
            return
        weight = s.overlays.effective(address, upto="mask").detach()
        sums = Responses(weight, node, bias=False)
        rng = s.generator(self.id, address, "points")
        shift = weight.new_zeros(())
        if "bias" in node.params:
            bias = s.parameter(node.params["bias"]).detach()
            shift = bias.reshape(-1, 1, 1) if node.op == "conv" else bias
        fed, wanted = model.need(node.inputs[0]), present.need(node.id)
        for x, y in zip(fed, wanted, strict=True):
            sums.see(x, y - shift, self.options.points, rng)
        sums.share()
        book, codes = fit_responses(
            shared.codebook.detach(), shared.codes, sums.gram, sums.right, self.options.rounds
        )
        self.shared[address] = Shared(book, codes, shared.columns)
        s.overlays.set(address, LAYER, self.shared[address])
