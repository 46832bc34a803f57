"""Tensors in few bytes, bit by bit the same when read back: what is stored, not what is computed.

After Han et al. 2016, arXiv:1510.00149, sections 2-4: a tensor of few different values is a table
of them and Huffman codes; one with many zeros is the distances between the others, and these. The
file is safetensors: each coded tensor one stream of bytes, how to read it in the metadata. Nothing
in it is code, and what it claims is checked against the bytes there are.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from gracile.export import huffman
from gracile.export.gaps import MAX_BITS, gaps, positions
from gracile.export.huffman import MAX_SYMBOLS, Coded

KEY = "gracile.packed"  # of the metadata
SMALLEST = 64  # bytes of a tensor below which a record costs more than it saves
SPARSE = 0.4  # share of zeros from which distances are tried
TYPES = {
    str(t).removeprefix("torch."): t
    for t in (
        torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.bool, torch.uint8,
        torch.int8, torch.int16, torch.int32, torch.int64,
    )
}  # fmt: skip
WORDS: dict[int, Any] = {n: np.dtype(f"<u{n}") for n in (1, 2, 4, 8)}

Array = NDArray[Any]


class Code(BaseModel):
    """How many bytes the parts of a Huffman code take, one after the other."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int = Field(ge=0)
    symbols: int = Field(ge=1, le=MAX_SYMBOLS)
    stream: int = Field(ge=0)


class Stored(BaseModel):
    """How one tensor is to be read from its stream: distances, then values (or a table and codes).

    Attributes:
        shape, dtype: of the tensor.
        gap_bits: what is stored are entries at distances of so many bits; None if all entries are.
        gaps: the code of the distances less 1.
        codes: the code of places in the table; None: the values themselves.
        table: number of values in the table, or of the values themselves.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[int, ...]
    dtype: str
    gap_bits: int | None = Field(default=None, ge=1, le=MAX_BITS)
    gaps: Code | None = None
    codes: Code | None = None
    table: int = Field(ge=0)


class Header(BaseModel):
    """The metadata: how tensors are stored, and which others follow from them.

    Attributes:
        tensors: name -> how; those that are not named are stored as they are.
        nonzero: name of a mask -> name of the tensor that is not zero where it is True.
        shared: name of a weight -> key of the codebook and codes that it is made of.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    tensors: dict[str, Stored] = Field(default_factory=dict)
    nonzero: dict[str, str] = Field(default_factory=dict)
    shared: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True)
class Packed:
    """What a file holds: tensors as they are or as streams, and the header."""

    tensors: dict[str, Tensor]
    header: Header

    def metadata(self) -> dict[str, str]:
        """For the file."""
        return {KEY: self.header.model_dump_json(exclude_defaults=True)}


def pack(
    tensors: Mapping[str, Tensor],
    *,
    masks: Mapping[str, str] | None = None,
    shared: Mapping[str, str] | None = None,
    restore: Callable[[str], Tensor] | None = None,
) -> Packed:
    """Store each tensor in the smallest of the ways there are.

    Args:
        tensors: on the CPU.
        masks: name of a mask -> its weight; left out where it says what the weight says. Zeros of
            such a weight lose their sign; nothing else changes by a bit.
        shared: name of a weight -> key of its codebook; left out where `restore` gives just it.
        restore: key -> the weight that its codebook and codes make.
    """
    left = dict(tensors)
    nonzero, made = {}, {}
    for mask, weight in (masks or {}).items():
        if mask in left and weight in left and torch.equal(left[mask], left[weight] != 0):
            nonzero[mask] = weight
            del left[mask]
            if left[weight].is_floating_point():
                left[weight] = left[weight] + 0.0  # weight * mask has -0.0, which is not zero bits
    for weight, key in (shared or {}).items():
        if restore is not None and weight in left and _same(restore(key), left[weight]):
            made[weight] = key
            del left[weight]
    out: dict[str, Tensor] = {}
    how: dict[str, Stored] = {}
    for name, value in left.items():
        found = _smallest(value)
        if found is None:
            out[name] = value.contiguous()
        else:
            how[name], stream = found
            out[name] = torch.from_numpy(stream)
    return Packed(out, Header(tensors=how, nonzero=nonzero, shared=made))


def unpack(
    tensors: Mapping[str, Tensor],
    header: Header,
    restore: Callable[[Mapping[str, Tensor], str], Tensor],
) -> dict[str, Tensor]:
    """Inverse of `pack`.

    Args:
        tensors: of the file.
        header: see `read_header`.
        restore: (all stored tensors, key) -> the weight that a codebook makes.

    Raises:
        ValueError: names the tensor that cannot be read, and why.
    """
    out = dict(tensors)

    def stored(name: str) -> Tensor:
        if name not in out:
            raise ValueError("it is not in the file")
        return out[name]

    def each(name: str, make: Callable[[], Tensor]) -> None:
        try:
            out[name] = make()
        except (ValueError, IndexError, KeyError, RuntimeError) as e:
            raise ValueError(f"'{name}': {e}") from None

    for name, how in header.tensors.items():
        each(name, lambda name=name, how=how: _read(stored(name), how))  # type: ignore[misc]
    for name, key in header.shared.items():
        each(name, lambda key=key: restore(out, key))  # type: ignore[misc]
    for name, weight in header.nonzero.items():
        each(name, lambda weight=weight: stored(weight) != 0)  # type: ignore[misc]
    return out


def read_header(metadata: Mapping[str, str]) -> Header | None:
    """The header of a packed file; None if it is not one.

    Raises:
        ValueError: it is damaged, or of another format.
    """
    if KEY not in metadata:
        return None
    try:
        return TypeAdapter(Header).validate_python(json.loads(metadata[KEY]))
    except ValidationError as e:
        first = e.errors()[0]
        place = ".".join(str(p) for p in first["loc"])
        raise ValueError(f"its header is wrong at '{place}': {first['msg']}") from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"its header is no JSON: {e}") from None


# ------------------------------------------------------------------ writing


def _smallest(value: Tensor) -> tuple[Stored, NDArray[np.uint8]] | None:
    """The smallest way to store a tensor; None for as it is."""
    dtype = str(value.dtype).removeprefix("torch.")
    words = _words(value)
    if words.nbytes < SMALLEST or dtype not in TYPES:
        return None
    best: tuple[dict[str, Any], list[Array]] | None = None
    size = words.nbytes
    for bits in (None, *_gap_bits(words)):
        fields, parts = _with(words, bits)
        found = sum(p.nbytes for p in parts)
        if found < size:
            best, size = (fields, parts), found
    if best is None:
        return None
    fields, parts = best
    stream = np.concatenate([np.frombuffer(p.tobytes(), np.uint8) for p in parts])
    return Stored(shape=tuple(value.shape), dtype=dtype, **fields), stream.copy()


def _gap_bits(words: Array) -> tuple[int, ...]:
    zeros = 1 - np.count_nonzero(words) / len(words)
    return (3, 5, MAX_BITS) if zeros >= SPARSE else ()


def _with(words: Array, gap_bits: int | None) -> tuple[dict[str, Any], list[Array]]:
    if gap_bits is None:
        return _values(words)
    there = np.flatnonzero(words)
    distances, of = gaps(there, gap_bits, len(words))
    values = np.where(of >= 0, words[there[of]] if len(there) else 0, 0).astype(words.dtype)
    coded = huffman.encode(distances - 1, 1 << gap_bits)
    fields, parts = _values(values)
    return {"gap_bits": gap_bits, "gaps": _code(coded), **fields}, [*_parts(coded), *parts]


def _values(words: Array) -> tuple[dict[str, Any], list[Array]]:
    table, symbols = np.unique(words, return_inverse=True)
    if len(words) and len(table) <= MAX_SYMBOLS:
        coded = huffman.encode(symbols, len(table))
        if coded.size + table.nbytes < words.nbytes:
            fields = {"codes": _code(coded), "table": len(table)}
            return fields, [*_parts(coded), table]
    return {"table": len(words)}, [words]


def _code(coded: Coded) -> Code:
    return Code(count=coded.count, symbols=len(coded.lengths), stream=len(coded.stream))


def _parts(coded: Coded) -> list[Array]:
    return [coded.lengths, coded.blocks.astype("<u2"), coded.stream]


def _words(value: Tensor) -> Array:
    """The elements as unsigned integers of their bits, so that -0.0 and NaN stay what they are."""
    flat = value.detach().contiguous().flatten()
    if flat.dtype == torch.bool:
        flat = flat.to(torch.uint8)
    words: Array = flat.view(torch.uint8).numpy().view(WORDS[flat.element_size()])
    return words


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(np.all(_words(a) == _words(b)))


# ------------------------------------------------------------------ reading


class _Reader:
    """Takes one part after the other off a stream; more than there is, is an error."""

    def __init__(self, stream: Tensor):
        if stream.dtype != torch.uint8 or stream.dim() != 1:
            raise ValueError("its stream is no row of bytes")
        self.data, self.at = stream.numpy(), 0

    def take(self, n: int, dtype: Any) -> Array:
        size = n * np.dtype(dtype).itemsize
        if size > len(self.data) - self.at:
            raise ValueError(f"its stream of {len(self.data)} bytes is too short for what it holds")
        part = self.data[self.at : self.at + size]
        self.at += size
        return np.frombuffer(part.tobytes(), dtype)

    def symbols(self, code: Code) -> NDArray[np.int64]:
        lengths = self.take(code.symbols, np.uint8)
        blocks = self.take(-(-code.count // huffman.BLOCK), "<u2")
        stream = self.take(code.stream, np.uint8)
        return huffman.decode(Coded(lengths, blocks, stream, code.count))

    def end(self) -> None:
        if self.at != len(self.data):
            raise ValueError(f"{len(self.data) - self.at} bytes of its stream are left over")


def _read(stream: Tensor, how: Stored) -> Tensor:
    if how.dtype not in TYPES:
        raise ValueError(f"unknown type '{how.dtype}'")
    dtype = TYPES[how.dtype]
    word = WORDS[torch.empty(0, dtype=dtype).element_size()]
    size = math.prod(how.shape)
    if min(how.shape, default=0) < 0:
        raise ValueError(f"a shape of {how.shape}")
    reader = _Reader(stream)
    distances = None if how.gaps is None else reader.symbols(how.gaps) + 1
    words = values = _read_values(reader, how, word)
    reader.end()
    if distances is not None:
        at = positions(distances)
        last = int(at[-1]) if len(at) else -1
        rest = size - 1 - last  # less than a filler would bridge: few bytes cannot claim any size
        if len(at) != len(values) or not 0 <= rest < 1 << (how.gap_bits or 0):
            raise ValueError(f"{len(at)} entries up to place {last} are no tensor of {how.shape}")
        words = np.zeros(size, word)
        words[at] = values
    if len(words) != size:
        raise ValueError(f"{len(words)} values are no tensor of {how.shape}")
    raw = torch.from_numpy(words.copy().view(np.uint8))
    if dtype == torch.bool:
        return raw.to(torch.bool).reshape(how.shape)
    return raw.view(dtype).reshape(how.shape)


def _read_values(reader: _Reader, how: Stored, word: Any) -> Array:
    if how.codes is None:
        return reader.take(how.table, word)
    symbols = reader.symbols(how.codes)
    table = reader.take(how.table, word)
    if len(symbols) and int(symbols.max()) >= len(table):
        raise ValueError(f"a code names entry {symbols.max()} of a table of {len(table)}")
    return table[symbols]
