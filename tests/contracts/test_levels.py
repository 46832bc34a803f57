"""Rooms stay in order: imports point down, and rooms of one level do not know each other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "src" / "gracile"
ORDER = (
    ("errors", "units", "registry"),
    ("core",),
    ("recipe", "nn"),
    ("graph", "track", "distribute", "models", "data"),
    ("benchmark",),
    ("latency",),
    ("analyze",),
    ("prune", "regularize", "quantize", "lowrank", "distill", "early_exit", "export"),
    ("recover",),
    ("train",),
    ("search",),
    ("report",),
    ("api", "compat"),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")
# Lazy exports of the package itself name the api for type checkers only.


def rooms_imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "gracile":
                names = [f"gracile.{a.name}" for a in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("gracile.")}
    return found & LEVEL.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert room in LEVEL, f"{path}: the room '{room}' has no level"
    for other in rooms_imported(path):
        flat = LEVEL[room] == 0  # errors, units and registry are one floor
        assert other == room or LEVEL[other] < LEVEL[room] or flat, (
            f"{path} imports {other}; {room} may only import lower rooms"
        )


def test_the_test_sees_imports():
    assert rooms_imported(ROOT / "api.py") >= {"train", "core", "models"}


def test_importing_the_package_loads_neither_torch_nor_a_runtime():
    import subprocess
    import sys

    code = (
        "import sys, gracile; print([m for m in ('torch', 'onnx', 'openvino') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_recipe_is_parsed_without_torch_where_no_method_needs_it():
    import subprocess
    import sys

    code = (
        "import sys; from gracile.recipe.load import loads; "
        "loads('recipe: 1\\ntrain: {epochs: 1}\\n', name='x'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
