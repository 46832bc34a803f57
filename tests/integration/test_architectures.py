"""Pruned, saved, loaded elsewhere, quantized, exported to both runtimes: eleven architectures."""

import subprocess
import sys
from pathlib import Path

import pytest
from small_architectures import NETS, cut, fresh

pytestmark = pytest.mark.slow

SHIP = Path(__file__).with_name("small_architectures.py")


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", NETS)
def test_from_cut_to_artifact(name, tmp_path):
    result = cut(name, tmp_path)
    assert parameters(result.model) < 0.65 * parameters(fresh(name))
    done = subprocess.run(
        [sys.executable, str(SHIP), name, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
