"""Numbers for people: milliseconds, bytes, counts and shares, always with their unit."""


def human_bytes(n: float) -> str:
    """Format a size with binary prefixes.

    >>> human_bytes(1_092_568)
    '1.04 MiB'
    """
    for unit in ("B", "KiB", "MiB"):
        if abs(n) < 1023.5:
            return f"{n:.0f} B" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"


def human_count(n: float) -> str:
    """Format a count (parameters, MACs) with decimal prefixes.

    >>> human_count(40_550_000)
    '40.55 M'
    """
    for unit in ("", " k", " M"):
        if abs(n) < 1000:
            return f"{n:.0f}" if unit == "" else f"{n:.2f}{unit}"
        n /= 1000
    return f"{n:.2f} G"


def human_ms(ms: float) -> str:
    """Format milliseconds with three significant digits.

    >>> human_ms(0.36012)
    '0.360 ms'
    """
    digits = 3 if abs(ms) < 1 else 2 if abs(ms) < 10 else 1
    return f"{ms:.{digits}f} ms"


def percent(share: float, digits: int = 1) -> str:
    """Format a share in [0, 1].

    >>> percent(0.9255, 2)
    '92.55 %'
    """
    return f"{100 * share:.{digits}f} %"
