"""The benchmarks of quantization: `python -m benchmarks.quantization ptq|qat|step|integers`.

Each is one of `benchmarks.run`, in full; further options go there. `ptq` and `step` stand beside
other libraries and need `make bench-peers`'s environment.
"""

import sys
from collections.abc import Sequence

from benchmarks import integer_proof, ptq, qat, qat_step, run

PARTS = {"ptq": ptq, "qat": qat, "step": qat_step, "integers": integer_proof}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one part; returns how many cells were measured."""
    part, *rest = sys.argv[1:] if argv is None else argv
    if part not in PARTS:
        raise SystemExit(f"no part '{part}': {', '.join(PARTS)}")
    return run.main(["--tier", "full", "--only", PARTS[part].NAME, *rest])


if __name__ == "__main__":
    main()
