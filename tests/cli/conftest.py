"""Runs commands, in a folder with a network, recipes and, where asked for, a finished run."""

import json

import pytest
from cli_case import HEAD, NET, PRUNE, QUANTIZE, compress

from gracile.cli.main import main


@pytest.fixture(scope="session")
def _files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "net.py").write_text(NET)
    for name, methods in {"small": PRUNE, "both": PRUNE + QUANTIZE, "int8": QUANTIZE}.items():
        (folder / f"{name}.yaml").write_text(HEAD + methods)
    return folder


@pytest.fixture
def place(_files, monkeypatch):
    """The current directory, with net.py, small.yaml, int8.yaml and both.yaml."""
    monkeypatch.chdir(_files)
    return _files


@pytest.fixture
def call(place, capsys):
    """Run a command; gives exit status, stdout and stderr."""

    def run(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(a) for a in argv])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def as_json(call):
    """Run a command with --json; its stdout must be exactly one JSON object."""

    def run(*argv: str, code: int = 0) -> dict:
        found, out, err = call(*argv, "--json")
        assert found == code, err
        assert out.endswith("\n")
        assert out.count("\n") == 1
        value = json.loads(out)
        assert isinstance(value, dict)
        assert value["format"] == 1
        assert value["exit"] == code
        return value

    return run


@pytest.fixture
def finished(place, as_json):
    """A run in the folder "run", made once."""
    if not (place / "run").exists():
        as_json(*compress("both.yaml", "run", "--runtime", "onnxruntime"))
    return place / "run"
