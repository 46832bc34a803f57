"""The command line: one file per command, one place that turns errors into exit statuses.

Exit status: 0 ok · 1 goal missed · 2 user error · 3 verification or parity failed ·
4 missing extra · 70 internal · 130 interrupted.
"""

import importlib
import json
import os
import pkgutil
import sys
import traceback
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads ruin timings

import typer

import gracile.cli.commands as commands
from gracile.errors import GracileError

INTERNAL, INTERRUPTED = 70, 130
# The base of all usage errors. Typer brings a click of its own, older versions used the installed
# one: reached through a public name it is the right one in both.
UsageProblem: type[Any] = next(
    c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException"
)

app = typer.Typer(
    name="gracile",
    help="Make a PyTorch model smaller and measurably faster on the device it will run on, and "
    "prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _load_commands() -> None:
    for info in pkgutil.iter_modules(commands.__path__, commands.__name__ + "."):
        importlib.import_module(info.name).register(app)


_load_commands()


def run(argv: list[str] | None = None) -> None:
    """Entry point of the `gracile` script."""
    sys.exit(main(sys.argv[1:] if argv is None else argv))


def main(argv: list[str]) -> int:
    """Run one command and return its exit status; errors go to stderr as one message."""
    wants_json = "--json" in argv
    try:
        code = app(argv, standalone_mode=False, prog_name="gracile")
        if code == INTERRUPTED:  # what typer makes of a KeyboardInterrupt
            return _interrupted(wants_json)
        return code if isinstance(code, int) else 0
    except typer.Exit as e:
        return int(e.exit_code)
    except UsageProblem as e:
        e.show()
        return _failed(wants_json, "usage error", e.format_message(), 2)
    except GracileError as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return _failed(wants_json, type(e).__name__, str(e), e.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted(wants_json)
    except Exception as e:
        traceback.print_exc()
        print("this is a defect of gracile; please report it with the lines above", file=sys.stderr)
        return _failed(wants_json, "internal error", repr(e), INTERNAL)


def _interrupted(wants_json: bool) -> int:
    text = "interrupted; a run goes on with the same command and --resume"
    print(text, file=sys.stderr)
    return _failed(wants_json, "interrupted", text, INTERRUPTED)


def _failed(wants_json: bool, status: str, text: str, code: int) -> int:
    if wants_json:
        warnings = [{"code": status, "text": text}]
        print(json.dumps({"format": 1, "status": status, "exit": code, "warnings": warnings}))
    return code
