"""What the pages show is run: Python as scripts, recipes read, commands parsed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from gracile.cli.main import app
from gracile.recipe.load import loads

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.M | re.S)


def blocks(page, language):
    return [m[3] for m in FENCE.finditer(page.read_text()) if m[1] == language]


def having(language):
    return [p for p in PAGES if blocks(p, language)]


def scripts():
    """The Python of all pages of the docs, a page one script; README leaves names open."""
    pages = [p for p in having("python") if p.parent.parent == ROOT / "docs"]
    return [
        pytest.param(code, id=f"{named(page)}-{k}")
        for page in pages
        for k, text in enumerate(page.read_text().split("<!-- new script -->"))
        if (code := "\n".join(m[3] for m in FENCE.finditer(text) if m[1] == "python"))
    ]


def commands(page):
    text = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    lines = (line.split("   #")[0].strip() for line in text.splitlines())
    return [line for line in lines if line.startswith("gracile ")]


def named(page):
    return str(page.relative_to(ROOT))


def test_pages_were_found():
    assert len(scripts()) > 4
    assert sum(len(commands(p)) for p in PAGES) > 15


@pytest.mark.parametrize("code", scripts())
def test_the_python_of_a_page_runs(code, tmp_path):
    script = tmp_path / "page.py"
    script.write_text(code)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("page", having("yaml"), ids=named)
def test_the_recipes_of_a_page_are_recipes(page):
    for block in blocks(page, "yaml"):
        if re.search(r"^recipe:", block, re.M):
            loads(block, name=page.name)
        else:
            entries = "".join(f"  {line}\n" for line in block.splitlines())
            loads(f"recipe: 1\ntrain: {{epochs: 40}}\nmethods:\n{entries}", name=page.name)


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=named)
def test_the_commands_of_a_page_exist_with_their_options(page):
    for line in commands(page):
        parse(line.removeprefix("gracile "))


def test_a_wrong_option_would_be_seen():
    with pytest.raises(Exception, match="No such option"):
        parse("summary resnet20_cifar_a --shapes 3,32,32")


def test_recipes_and_examples_that_pages_name_are_there():
    for page in PAGES:
        for path in re.findall(r"\b((?:recipes|examples)/[\w./-]+\.(?:yaml|py))", page.read_text()):
            assert (ROOT / path).is_file(), f"{page}: {path}"


def parse(line):
    """Parse a command line without running it."""
    command, words = typer.main.get_command(app), shlex.split(line)
    context = command.context_class(command, info_name="gracile")
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context(command.name, words, parent=context)
