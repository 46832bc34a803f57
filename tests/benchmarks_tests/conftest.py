"""The benchmarks are a package at the root of the repository, which is not installed."""

import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))


@pytest.fixture(autouse=True)
def _slot_of_its_own(tmp_path_factory, monkeypatch):
    """A benchmark that measures on this machine must not hold the tests up."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.getbasetemp()))
