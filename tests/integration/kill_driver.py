"""Runs the command line with a bomb in it: the n-th call of a named function kills the process.

    python kill_driver.py MODULE FUNCTION N -- compress ... arguments of gracile ...

FUNCTION may be `Class.method`. SIGKILL cannot be caught: nothing is tidied up, as in a power cut.
"""

import importlib
import os
import signal
import sys


def arm(module: str, function: str, n: int) -> None:
    owner = importlib.import_module(module)
    *path, name = function.split(".")
    for part in path:
        owner = getattr(owner, part)
    real, calls = getattr(owner, name), [0]

    def bomb(*args, **kwargs):
        calls[0] += 1
        if calls[0] == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, bomb)


if __name__ == "__main__":
    from gracile.cli.main import main

    split = sys.argv.index("--")
    if split > 1:
        arm(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    sys.exit(main(sys.argv[split + 1 :]))
