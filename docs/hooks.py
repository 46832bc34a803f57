"""Pages made from the code while the site is built: the registry, the command line, recipes.

A name that is registered gets its page, a command its entry; nothing is listed by hand.
"""

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any

import typer
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import gracile
from gracile import registry
from gracile.cli.main import app
from gracile.core import lr
from gracile.recipe import schema

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

TITLES = {
    "method": "Methods",
    "criterion": "Criteria",
    "granularity": "Granularities",
    "penalty": "Penalties",
    "ramp": "Ramps",
    "observer": "Observers",
    "fake_quant": "Fake quantization",
    "kd_loss": "Distillation losses",
    "feature_loss": "Feature losses",
    "factorizer": "Factorizers",
    "rank_rule": "Rank rules",
    "block": "Blocks",
    "exit_head": "Heads of early exits",
    "model": "Models",
    "dataset": "Data sets",
    "runtime": "Runtimes",
    "exporter": "Exporters",
    "oprule": "Operator rules",
}
WHAT = {
    "method": "What a recipe may ask for. Each has a page of its own under Methods.",
    "criterion": "`criterion:` of a pruning method: how important a weight is.",
    "granularity": "`granularity:` of a pruning method: which weights go as one.",
    "penalty": "`penalty:` of `regularize: penalty`: what is added to the loss.",
    "ramp": "`ramp:` of a sparsity: how a level moves from initial to final.",
    "observer": "`observer:` of a quantization method: the range of a tensor.",
    "fake_quant": "The rounding rule of quantization in training.",
    "kd_loss": "`loss:` of `distill: kd`: what the student is pulled towards.",
    "feature_loss": "`loss:` of `distill: features`: how what two layers give is compared.",
    "factorizer": "Schemes of low rank: which smaller layers stand for one, and their weights.",
    "rank_rule": "How large the factors of a layer are.",
    "block": "`block:` of `lowrank: replace`: which smaller layers take a layer's place.",
    "exit_head": "`head:` of `early_exit: branches`: what an exit answers with.",
    "model": "MODEL on the command line, `gracile.resolve_model` in Python.",
    "dataset": "`--data` on the command line, `gracile.open_data` in Python.",
    "runtime": "`--runtime` on the command line: where a model runs and is measured.",
    "exporter": "What writes the artifact of a runtime.",
    "oprule": "Operators that can be followed: how channels flow through them and what they cost.",
}
PROFILE = re.compile(r"^<!-- profile: (\w+) -->$", re.M)
HEADINGS = ("Args:", "Returns:", "Raises:", "Attributes:", "Yields:")


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Add the generated pages."""
    from mkdocs.structure.files import File

    for uri, text in pages().items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """`<!-- profile: NAME -->` becomes the text of that quantization profile."""
    return PROFILE.sub(lambda m: profile(m[1]), markdown)


def profile(name: str) -> str:
    """A quantization profile as a code block."""
    path = resources.files("gracile.quantize.profiles") / f"{name}.yaml"
    return f"```yaml\n{path.read_text().strip()}\n```"


def pages() -> dict[str, str]:
    """Path in the docs -> Markdown, of every generated page."""
    out = {
        "reference/index.md": reference_index(),
        "reference/cli.md": command_line(),
        "reference/recipe.md": recipe_page(),
        "reference/api.md": python_page(),
    }
    for kind, title in TITLES.items():
        entries = list(registry.entries(kind))
        out[f"reference/{kind}/index.md"] = kind_page(kind, title, entries)
        for entry in entries:
            out[f"reference/{kind}/{slug(entry.name)}.md"] = entry_page(entry)
    return out


def python_page() -> str:
    """All public names, documented from their source by mkdocstrings."""
    lines = ["# Python", "", "The public names of `import gracile`.", ""]
    for name in sorted(gracile.__all__, key=lambda n: (n[0].isupper(), n)):
        obj = getattr(gracile, name)
        lines += [
            f"::: {obj.__module__}.{obj.__qualname__}",
            "    options:",
            f"      heading: {name}",
            f"      toc_label: {name}",
            "",
        ]
    return "\n".join(lines)


def slug(name: str) -> str:
    """A registered name as a file name."""
    return name.replace("/", "-")


def reference_index() -> str:
    """The list of all reference pages."""
    lines = ["# Reference", ""]
    lines += ["- [Command line](cli.md)", "- [Recipe](recipe.md)", "- [Python](api.md)"]
    lines += [f"- [{title}]({kind}/index.md): {WHAT[kind]}" for kind, title in TITLES.items()]
    return "\n".join(lines) + "\n"


def kind_page(kind: str, title: str, entries: Iterable[registry.Entry]) -> str:
    """All entries of a kind with their first line."""
    lines = [f"# {title}", "", WHAT[kind], "", "| name | what | source |", "|---|---|---|"]
    for e in entries:
        name = e.name.replace("/", ": ")
        lines.append(f"| [{name}]({slug(e.name)}.md) | {cell(e.summary)} | {cell(e.source)} |")
    return "\n".join(lines) + "\n"


def entry_page(e: registry.Entry) -> str:
    """One registered thing: docstring, options, source, file."""
    parts = [f"# {e.name.replace('/', ': ')}", "", docstring(inspect.getdoc(e.obj) or "")]
    if e.kind == "method":
        parts += [
            f"Described, with an example, under [{e.name.replace('/', ': ')}]"
            f"(../../methods/{slug(e.name)}.md).",
            "",
            *model_table(e.obj.Options, "Options"),
        ]
    elif inspect.isclass(e.obj):
        parts += options_table(e.obj.__init__, skip=("self",))
    elif callable(e.obj):
        parts += options_table(e.obj)
    if e.kind == "oprule":
        parts += rule_facts(e.obj)
    parts += [f"Source: {e.source}.", "", f"Defined in `{e.module}`."]
    return "\n".join(parts) + "\n"


def rule_facts(rule: Any) -> list[str]:
    """Which modules and functions an operator rule recognises."""
    modules = [m if isinstance(m, str) else f"{m.__module__}.{m.__name__}" for m in rule.modules]
    names = sorted({call_name(c) for c in rule.calls})
    lines = []
    if modules:
        lines += ["Modules: " + ", ".join(f"`{m}`" for m in modules) + ".", ""]
    if names:
        lines += ["Calls: " + ", ".join(f"`{n}`" for n in names) + ".", ""]
    return lines


def call_name(call: Any) -> str:
    """A function, a `.method` or an `aten.` name as text."""
    return call if isinstance(call, str) else getattr(call, "__name__", str(call))


def options_table(fn: Callable[..., Any], skip: Iterable[str] = ()) -> list[str]:
    """The parameters of a function that have a default, or are keyword-only."""
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):
        return []
    rows = [
        f"| `{p.name}` | {'' if p.default is p.empty else f'`{p.default!r}`'} |"
        for p in parameters.values()
        if p.name not in skip
        and (p.kind is p.KEYWORD_ONLY or p.default is not p.empty)
        and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    return ["| option | default |", "|---|---|", *rows, ""] if rows else []


# ------------------------------------------------------------------ recipes


def recipe_page() -> str:
    """Every key of a recipe, from the models that read it."""
    lines = [
        "# Recipe",
        "",
        "Every key a recipe may have. An unknown key is refused with its file, line and the "
        "nearest known one. How to write one is in the [guide](../guide/recipes.md).",
        "",
        "| key | default | meaning |",
        "|---|---|---|",
        "| `recipe` | required | version of the format: 1 |",
        "| `seed` | `0` | every random number of a run derives from it |",
        "| `compat` | `none` | `strict`: as Distiller did, defects included where "
        "[the guide](../guide/from-distiller.md) says so |",
        "| `goal` | | what must come out, see below |",
        "| `train` | | how the model is trained while it is compressed |",
        "| `accuracy` | | train until the accuracy is good enough, or look for the highest level |",
        "| `data` | | which rows serve for what |",
        "| `methods` | | id -> `{<verb>: <method>, <options>}`; due at one instant, they act in "
        "this order |",
        "",
    ]
    for key, model in (
        ("goal", schema.Goal),
        ("train", schema.Train),
        ("train.optimizer", schema.Optimizer),
        ("accuracy", schema.Accuracy),
        ("data", schema.Data),
    ):
        lines += model_table(model, f"`{key}`")
    lines += [
        "## `train.lr`",
        "",
        "`{class: NAME, ...}`, the classes and arguments of torch "
        "(`MultiStepMultiGammaLR` and `Spans` are Distiller's):",
        "",
    ]
    lines += [f"- `{name}`" for name in lr._KINDS]
    lines += ["", "## `methods`", ""]
    for e in registry.entries("method"):
        verb, name = e.name.split("/")
        lines.append(f"- [`{verb}: {name}`](method/{slug(e.name)}.md): {e.summary}")
    return "\n".join(lines) + "\n"


def model_table(model: type[BaseModel], title: str) -> list[str]:
    """Keys, defaults and meanings of a pydantic model, meanings from its docstrings."""
    meaning = {}
    for cls in reversed(model.__mro__):
        meaning |= attributes(inspect.cleandoc(cls.__doc__ or ""))
    lines = [f"## {title}", "", first_paragraph(model), ""]
    lines += ["| key | default | meaning |", "|---|---|---|"]
    for name, info in model.model_fields.items():
        key = info.alias or name
        lines.append(f"| `{key}` | {default(info)} | {cell(meaning.get(name, ''))} |")
    return [*lines, ""]


def default(info: FieldInfo) -> str:
    """A field's default as YAML shows it."""
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True, validated_data={})
    if value is None:
        return "`null`"
    plain = getattr(value, "plain", None)
    if callable(plain):
        value = plain()
    elif isinstance(value, BaseModel):
        value = value.model_dump(mode="json", by_alias=True, exclude_none=True)
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000)
    return f"`{text.removesuffix('...' + chr(10)).strip()}`"


def first_paragraph(model: type[BaseModel]) -> str:
    """What a model's docstring begins with."""
    return inspect.cleandoc(model.__doc__ or "").split("\n\n", 1)[0]


def attributes(text: str) -> dict[str, str]:
    """name -> meaning, from the `Attributes:` of a docstring."""
    out: dict[str, str] = {}
    for heading, body in sections(text):
        if heading == "Attributes:":
            for names, meaning in items(body):
                out |= dict.fromkeys((n.strip() for n in names.split(",")), meaning)
    return out


# ------------------------------------------------------------------ docstrings


def docstring(text: str) -> str:
    """A docstring in our style as Markdown."""
    out: list[str] = []
    for heading, body in sections(text):
        if not heading:
            out.append(examples(body))
            continue
        out.append(f"**{heading.removesuffix(':')}**\n")
        listed = list(items(body)) if heading != "Returns:" else []
        out += [f"- `{names}`: {meaning}" for names, meaning in listed] or [body.strip()]
        out.append("")
    return "\n".join(out)


def sections(text: str) -> Iterator[tuple[str, str]]:
    """("" or a heading, its dedented text) in order."""
    heading, lines = "", []
    for line in [*text.splitlines(), None]:
        ends = line is None or line in HEADINGS
        back = heading and line and not line.startswith(" ") and not ends
        if ends or back:
            if any(x.strip() for x in lines):
                yield heading, textwrap.dedent("\n".join(lines)).strip("\n")
            heading, lines = (line or "") if ends else "", []
            if back:
                lines = [line]
        else:
            lines.append(line)


def items(body: str) -> Iterator[tuple[str, str]]:
    """(names, meaning) of `name: meaning` entries; indented lines continue one."""
    names, meaning = "", []
    for line in body.splitlines():
        head, colon, rest = line.partition(": ")
        if line and not line.startswith(" ") and (colon or line.endswith(":")):
            if names:
                yield names, " ".join(meaning)
            names, meaning = head.removesuffix(":"), [rest] if rest else []
        else:
            meaning.append(line.strip())
    if names:
        yield names, " ".join(m for m in meaning if m)


def examples(text: str) -> str:
    """Doctest examples as code blocks."""
    out, inside = [], False
    for line in [*text.splitlines(), ""]:
        starts = line.startswith(">>>")
        if starts and not inside:
            out.append("```python")
            inside = True
        elif inside and not line.strip():
            out.append("```")
            inside = False
        out.append(line)
    return "\n".join(out)


def cell(text: str) -> str:
    """Text that may stand in a table."""
    return text.replace("|", "\\|").replace("\n", " ")


# ------------------------------------------------------------------ the command line


def command_line() -> str:
    """Every command with its arguments and options."""
    lines = [
        "# Command line",
        "",
        (main_help() or ""),
        "",
        "Exit status: 0 ok · 1 goal missed · 2 user error · 3 verification or parity failed · "
        "4 missing extra · 70 internal · 130 interrupted.",
        "",
    ]
    for name, command in commands(typer.main.get_command(app)):
        lines += command_section(name, command)
    return "\n".join(lines) + "\n"


def main_help() -> str | None:
    """What `gracile --help` begins with."""
    return typer.main.get_command(app).help


def commands(group: Any, path: str = "gracile") -> Iterator[tuple[str, Any]]:
    """All commands below a group, in order."""
    found: Mapping[str, Any] = group.commands
    for name, command in sorted(found.items()):
        if hasattr(command, "commands"):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def command_section(name: str, command: Any) -> list[str]:
    """What `--help` of one command says."""
    ctx = command.context_class(command, info_name=name, terminal_width=96)
    return [f"## {name}", "", "```text", command.get_help(ctx).strip(), "```", ""]
