"""Which processors add products of 8-bit numbers in 16 bits."""

import pytest

from gracile.benchmark.processor import (
    computes_bf16,
    computes_f16,
    cpu_flags,
    cpu_name,
    sums_saturate,
)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu sse ssse3 avx avx2 fma", True),
        ("ssse3 avx2 avx512f avx512bw", True),
        ("avx2 avx512bw avx512_vnni", False),
        ("avx2 avx_vnni", False),
        ("avx2 amx_int8 avx512_vnni", False),
        ("fp asimd asimddp", False),
        ("", False),
    ],
)
def test_only_x86_without_vnni_saturates(flags, expected):
    assert sums_saturate(flags) is expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("avx2 fma", False), ("avx512_bf16", True), ("amx_bf16", True), ("asimd bf16", True)],
)
def test_bf16_needs_units_of_its_own(flags, expected):
    assert computes_bf16(flags) is expected


@pytest.mark.parametrize(
    ("flags", "expected"), [("avx2 f16c", False), ("avx512_fp16", True), ("fp asimd fphp", True)]
)
def test_f16_needs_units_of_its_own(flags, expected):
    assert computes_f16(flags) is expected


def test_this_processor_is_the_default():
    assert sums_saturate() is sums_saturate(cpu_flags())
    assert cpu_name()
