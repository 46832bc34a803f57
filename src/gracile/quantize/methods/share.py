"""Weight sharing: each tensor has a few values, found by k-means; training can tune them."""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from gracile.core.method import method
from gracile.quantize.codebook import Shared
from gracile.quantize.kmeans import cluster_numbers, density_start, linear_start, random_start
from gracile.quantize.sharing import Sharing, SharingOptions, no_gain


class ShareOptions(SharingOptions):
    """Options of `quantize: share`, added to `SharingOptions`.

    Attributes:
        bits: each tensor has at most 2^bits different values, besides zero where zeros are kept.
        init: where k-means starts: evenly spaced from the smallest weight to the largest; evenly in
            their density; or at weights drawn at random.
        keep_zeros: weights that are zero stay so and take no part; masks that come later act.
    """

    bits: int = Field(default=4, ge=1, le=12)
    init: Literal["linear", "density", "random"] = "linear"
    keep_zeros: bool = True


@method(
    "quantize",
    "share",
    source="Han et al. 2016, arXiv:1510.00149 (Deep Compression), section 3, eq. 2-3",
)
class ShareWeights(Sharing):
    """Give every weight of a tensor one of a few values, which training goes on to tune."""

    Options = ShareOptions

    def _share(self, s: Any, address: str, weight: Tensor) -> Shared | str:
        o = self.options
        if s.mask(address) is not None and not o.keep_zeros:
            self._refuse_masked(address)
        chosen = weight != 0 if o.keep_zeros else torch.ones_like(weight, dtype=torch.bool)
        values = weight[chosen]
        different = values.unique()
        if len(weight.unique()) < 2:
            return "all its weights are equal"
        k = 2**o.bits
        levels = min(k, len(different)) + int(o.keep_zeros)
        why = no_gain(weight, codes=weight.numel(), levels=levels, entries=levels)
        if why is not None:
            return why
        if len(different) <= k:
            found, codes = different, torch.searchsorted(different, values)
        else:
            found, codes = cluster_numbers(values, self._start(s, address, values, k))
        if not o.keep_zeros:
            return Shared(found, codes.reshape(weight.shape))
        whole = torch.zeros(weight.shape, dtype=torch.int64, device=weight.device)
        whole[chosen] = codes + 1
        return Shared(torch.cat([found.new_zeros(1), found]), whole, zeros=True)

    def _start(self, s: Any, address: str, values: Tensor, k: int) -> Tensor:
        if self.options.init == "linear":
            return linear_start(values, k)
        if self.options.init == "density":
            return density_start(values, k)
        return random_start(values, k, s.generator(self.id, address))
