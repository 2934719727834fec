"""Counts, numbers and lists as people read them."""

from collections.abc import Sequence


def count(number: int, noun: str) -> str:
    """1 thread, 2 threads."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def short(x: float) -> str:
    """Four significant digits, or all of those before the point; an exponent only for what is tiny or huge."""
    return f"{x:.0f}" if 1e4 <= abs(x) < 1e15 else f"{x:.4g}"


def some(names: Sequence[str], number: int = 10) -> str:
    """The first of many names, and how many more there are."""
    more = len(names) - number
    return ", ".join(names[:number]) + (f" and {more} more" if more > 0 else "")
