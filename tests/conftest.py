"""What all tests share: one thread, repeatable examples, and where real data and weights are."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: waiting threads must not spin

from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("gracile", deadline=None, derandomize=True)
settings.load_profile("gracile")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder $GRACILE_DATA with the real data sets."""
    return _folder("GRACILE_DATA")


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """The folder $GRACILE_MODELS with the trained weights."""
    return _folder("GRACILE_MODELS")


def _folder(variable: str) -> Path:
    folder = Path(os.environ.get(variable, ""))
    if os.environ.get(variable) and folder.is_dir():
        return folder
    if os.environ.get("GRACILE_REQUIRE_DATA") == "1":
        pytest.fail(f"GRACILE_REQUIRE_DATA=1, but ${variable} names no folder")
    pytest.skip("data not there")
