"""A finished model in as few bytes as its edits allow, and what each tensor takes of them.

Which tensors follow from others is known from the Plan: a weight from its codebook and codes, a
mask from the zeros of its weight. Each is left out only after it was made again and compared.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gracile.core.plan import Plan
from gracile.errors import UserError
from gracile.export.packed import TYPES, Header, Packed, Stored, pack, read_header, unpack
from gracile.quantize import bucketed
from gracile.quantize.codebook import restore

PARTS = ("codebook", "codes", "columns", "low", "width", "bucket")


def packed(tensors: Mapping[str, Tensor], plan: Plan) -> Packed:
    """What `packed.safetensors` holds of a finished model.

    Args:
        tensors: weights, and what the Plan's keys name; on the CPU.
        plan: of the model.
    """
    return pack(
        tensors,
        masks={e.key: e.at for e in plan.of_kind("mask")},
        shared={e.at: e.key for e in plan.of_kind("share")},
        restore=lambda key: made(tensors, key),
    )


def unpacked(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path
) -> dict[str, Tensor]:
    """The tensors that a packed file stands for; of any other file, just its tensors.

    Raises:
        UserError: what the file claims does not fit what it holds.
    """
    try:
        header = read_header(metadata)
        return dict(tensors) if header is None else unpack(tensors, header, made)
    except ValueError as e:
        raise UserError(f"{path}: damaged, or not what it says it is: {e}.") from None


def made(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    """The weight that a codebook and its codes stand for, in float32.

    Raises:
        ValueError: one of them is missing, or they do not fit together.
    """
    found = [tensors.get(f"{key}.{part}") for part in PARTS]
    codebook, codes, columns, low, width, bucket = found
    if codebook is None or codes is None:
        raise ValueError(f"its codebook or codes ('{key}.codes') are missing")
    vectors = codebook.dim() == 3 and codes.dim() > 1 and codes.shape[1] == codebook.shape[0]
    integers = not any(t.is_floating_point() for t in (codes, columns) if t is not None)
    levels = codebook.shape[-2 if vectors else 0] if codebook.dim() else 0
    inside = codes.numel() == 0 or (int(codes.min()) >= 0 and int(codes.max()) < levels)
    if not (codebook.dim() == 1 or vectors) or not integers or not inside:
        raise ValueError(
            f"codes of {tuple(codes.shape)} do not fit a codebook of {tuple(codebook.shape)}"
        )
    if low is None or width is None or bucket is None:
        return restore(codebook.float(), codes, columns if vectors else None)
    size = int(bucket) if bucket.numel() == 1 else 0
    if vectors or size < 1 or not low.shape == width.shape == (math.ceil(codes.numel() / size),):
        raise ValueError(
            f"ends of {tuple(low.shape)} and {tuple(width.shape)} buckets do not fit codes of "
            f"{tuple(codes.shape)}"
        )
    size = min(size, max(1, codes.numel()))  # few bytes cannot claim a bucket of any size
    return bucketed.restore(codebook.float(), codes, low.float(), width.float(), size)


@dataclass(frozen=True)
class Line:
    """What one tensor takes in a file.

    Attributes:
        name, shape, dtype: of the tensor.
        how: it is stored, for people.
        bytes: in the file, without the header.
        plain_bytes: of the tensor in its own type.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    how: str
    bytes: int
    plain_bytes: int


def lines(
    stored: Mapping[str, Tensor], whole: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> list[Line]:
    """What each tensor takes, the largest first.

    Args:
        stored: as the file has them.
        whole: as they are read back, see `unpacked`.
        metadata: of the file.
    """
    header = read_header(metadata) or Header()
    out = []
    for name, t in whole.items():
        held = stored.get(name)
        size = 0 if held is None else held.numel() * held.element_size()
        plain = t.numel() * t.element_size()
        dtype = str(t.dtype).removeprefix("torch.")
        out.append(Line(name, tuple(t.shape), dtype, _how(header, name), size, plain))
    return sorted(out, key=lambda line: (-line.bytes, -line.plain_bytes, line.name))


def _how(header: Header, name: str) -> str:
    if name in header.shared:
        return "by its codebook and codes"
    if name in header.nonzero:
        return "by its weight"
    if name not in header.tensors:
        return "as it is"
    return _coding(header.tensors[name])


def _coding(how: Stored) -> str:
    parts = []
    if how.gap_bits is not None:
        n = 0 if how.gaps is None else how.gaps.count
        share = n / max(1, math.prod(how.shape))
        parts.append(f"{share:.1%} of its places, {how.gap_bits}-bit distances")
    if how.codes is not None:
        parts.append(f"Huffman codes of {how.table} values")
    elif TYPES.get(how.dtype) != torch.bool:
        parts.append("values")
    return ", ".join(parts)
