"""Counts, numbers and lists as people read them."""

from collections.abc import Sequence


def count(number: int, noun: str) -> str:
    """1 thread, 2 threads."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def one_line(message: object, longest: int = 2000) -> str:
    """A message as a line that a terminal shows as it is: without control characters, and bounded.

    The middle is left out: a message says what is wrong at its ends, with a value of any length in between.
    """
    text = " ".join(str(message).split())
    text = "".join(x if x.isprintable() else ascii(x)[1:-1] for x in text)
    return text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-longest // 2 :]}"


def short(x: float) -> str:
    """Four significant digits, or all of those before the point; an exponent only for what is tiny or huge."""
    return f"{x:.0f}" if 1e4 <= abs(x) < 1e15 else f"{x:.4g}"


def some(names: Sequence[str], number: int = 10) -> str:
    """The first of many names, and how many more there are."""
    more = len(names) - number
    return ", ".join(names[:number]) + (f" and {more} more" if more > 0 else "")
