"""Canonical Huffman codes of small integers, written and read by array operations.

Huffman 1952; canonical form (Schwartz & Kallick 1964): a table holds only the length of each code.
For reading, symbols are written in blocks of 1024 whose lengths are kept, and all blocks are read
side by side, a symbol of each at a time.
"""

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_LENGTH = 16  # bits of a code; a table of 2^16 entries finds it
MAX_SYMBOLS = 1 << 12
BLOCK = 1024

Bytes = NDArray[np.uint8]
Symbols = NDArray[np.int64]


@dataclass(frozen=True)
class Coded:
    """Symbols as a Huffman code.

    Attributes:
        lengths: (symbols,) bits of each symbol's code; 0 for one that does not occur.
        blocks: bits of each block of 1024 symbols.
        stream: the bits, the first one highest; zeros fill the last byte.
        count: number of symbols.
    """

    lengths: Bytes
    blocks: NDArray[np.uint16]
    stream: Bytes
    count: int

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return self.lengths.nbytes + self.blocks.nbytes + self.stream.nbytes


def code_lengths(counts: Symbols) -> Bytes:
    """Bits of each symbol's code, from how often it occurs.

    The sum of counts * lengths is the least that a prefix code can have, unless a code would need
    more than 16 bits; then counts are halved (and stay at least 1) until none does.

    Args:
        counts: (n,), n <= 4096. A symbol alone gets a code of one bit.

    >>> code_lengths(np.array([5, 2, 1, 0, 1]))
    array([1, 2, 3, 0, 3], dtype=uint8)
    """
    counts = counts.copy()
    while True:
        lengths = _tree_depths(counts)
        if lengths.max(initial=0) <= MAX_LENGTH:
            return lengths
        counts = np.where(counts > 0, (counts + 1) // 2, 0)


def encode(symbols: Symbols, alphabet: int) -> Coded:
    """Write symbols as a Huffman code made for them.

    Args:
        symbols: integers in 0..alphabet-1, any number of them.
        alphabet: at most 4096.
    """
    symbols = symbols.ravel()
    lengths = code_lengths(np.bincount(symbols, minlength=alphabet))
    codes = _canonical(lengths)
    sizes = lengths.astype(np.int64)[symbols]
    starts = np.cumsum(sizes) - sizes
    bits = np.zeros(int(sizes.sum()), np.uint8)
    for k in range(int(sizes.max(initial=0))):
        longer = sizes > k
        shift = sizes[longer] - 1 - k
        bits[starts[longer] + k] = (codes[symbols[longer]] >> shift) & 1
    blocks = np.add.reduceat(sizes, np.arange(0, len(sizes), BLOCK)) if len(sizes) else sizes
    return Coded(lengths, blocks.astype(np.uint16), np.packbits(bits), len(symbols))


def decode(coded: Coded) -> Symbols:
    """Inverse of `encode`: (count,) symbols.

    Raises:
        ValueError: no complete prefix code, or a stream that does not hold what is claimed.
    """
    if coded.count == 0:
        if len(coded.stream) or len(coded.blocks):
            raise ValueError("a code of no symbols has a stream")
        return np.zeros(0, np.int64)
    symbol_at, length_at = _table(coded.lengths)
    blocks = coded.blocks.astype(np.int64)
    if len(blocks) != -(-coded.count // BLOCK):
        raise ValueError(f"{len(blocks)} blocks cannot hold {coded.count} symbols")
    ends = np.cumsum(blocks)
    if len(coded.stream) != -(-int(ends[-1]) // 8) or int(ends[-1]) < coded.count:
        raise ValueError(f"a stream of {len(coded.stream)} bytes where {ends[-1]} bits are claimed")
    padded = np.concatenate([coded.stream, np.zeros(4, np.uint8)]).astype(np.int64)
    at = ends - blocks
    out = np.zeros((len(blocks), BLOCK), np.int64)
    last = coded.count - (len(blocks) - 1) * BLOCK
    for k in range(min(BLOCK, coded.count)):
        lanes = slice(None) if k < last else slice(-1)  # the last block is over
        byte, bit = np.minimum(at[lanes] >> 3, len(padded) - 3), at[lanes] & 7
        window = (padded[byte] << 16) | (padded[byte + 1] << 8) | padded[byte + 2]
        seen = (window >> (8 - bit)) & 0xFFFF
        out[lanes, k] = symbol_at[seen]
        at[lanes] += length_at[seen]
    if not np.array_equal(at, ends):
        raise ValueError("a block of the stream does not end where it should")
    return out.ravel()[: coded.count]


def _tree_depths(counts: Symbols) -> Bytes:
    depths = np.zeros(len(counts), np.uint8)
    present = np.flatnonzero(counts)
    if len(present) == 1:
        depths[present] = 1
    heap = [(int(counts[s]), int(s), [int(s)]) for s in present]
    heapq.heapify(heap)
    while len(heap) > 1:
        n, first, left = heapq.heappop(heap)
        m, other, right = heapq.heappop(heap)
        together = left + right
        depths[together] += 1
        heapq.heappush(heap, (n + m, min(first, other), together))
    return depths


def _canonical(lengths: Bytes) -> Symbols:
    """Codes in the order of (length, symbol), each one more than the last."""
    codes = np.zeros(len(lengths), np.int64)
    code = previous = 0
    for s in np.lexsort((np.arange(len(lengths)), lengths)):
        n = int(lengths[s])
        if n:
            code <<= n - previous
            codes[s] = code
            code, previous = code + 1, n
    return codes


def _table(lengths: Bytes) -> tuple[Symbols, Symbols]:
    """Symbol and code length for every possible next 16 bits."""
    used = np.flatnonzero(lengths)
    if not 0 < len(lengths) <= MAX_SYMBOLS or not len(used):
        raise ValueError(f"a code of {len(used)} of {len(lengths)} symbols")
    sizes = lengths.astype(np.int64)
    if sizes.max() > MAX_LENGTH:
        raise ValueError(f"a code of {sizes.max()} bits; {MAX_LENGTH} is the most")
    spans = np.where(sizes > 0, 1 << (MAX_LENGTH - sizes), 0)
    alone = len(used) == 1 and sizes[used[0]] == 1
    if spans.sum() != 1 << MAX_LENGTH and not alone:
        raise ValueError("the lengths make no complete prefix code")
    order = used[np.lexsort((used, sizes[used]))]
    symbols = np.repeat(order, spans[order])
    if alone:
        symbols = np.repeat(order, 1 << MAX_LENGTH)
    return symbols, sizes[symbols]
