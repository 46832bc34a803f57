"""What the processor of this machine is called and which integer instructions it has."""

import platform
from functools import lru_cache
from pathlib import Path

BLOCK = 16  # channels that float convolutions compute at once with AVX-512; with AVX2 half of it
FULL_RANGE = 8  # bits of a weight at which a sum of two products with uint8 outgrows 16 bits
PAIRS_IN_32_BITS = {"avx512_vnni", "avx_vnni", "amx_int8"}
PAIRS_IN_16_BITS = {"avx2", "avx512bw", "ssse3"}
BF16_UNITS = {"amx_bf16", "avx512_bf16", "bf16"}  # the last is Arm's
F16_UNITS = {"amx_fp16", "avx512_fp16", "fphp"}


def cpu_name() -> str:
    """The processor's name, as the operating system gives it."""
    return _line("model name") or platform.processor() or platform.machine()


def cpu_flags() -> str:
    """The processor's features, apart from each other by spaces; empty where they are not told."""
    return _line("flags") or _line("Features")


def sums_saturate(flags: str | None = None) -> bool:
    """Whether sums of two products of uint8 and int8 numbers may overflow on a processor.

    x86 processors without VNNI add such pairs in 16 bits (`vpmaddubsw`) and cut off what does not
    fit, so a network with full 8-bit weights may compute something else there.

    Args:
        flags: the processor's features, as in /proc/cpuinfo; None reads this machine's.
    """
    have = set((cpu_flags() if flags is None else flags).split())
    return bool(have & PAIRS_IN_16_BITS) and not have & PAIRS_IN_32_BITS


def computes_bf16(flags: str | None = None) -> bool:
    """Whether a processor multiplies bfloat16 numbers itself; others are slower than in float32.

    Args:
        flags: the processor's features, as in /proc/cpuinfo; None reads this machine's.
    """
    return bool(set((cpu_flags() if flags is None else flags).split()) & BF16_UNITS)


def computes_f16(flags: str | None = None) -> bool:
    """Whether a processor multiplies float16 numbers itself.

    Args:
        flags: the processor's features, as in /proc/cpuinfo; None reads this machine's.
    """
    return bool(set((cpu_flags() if flags is None else flags).split()) & F16_UNITS)


@lru_cache(maxsize=4)
def _line(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == key), "")
