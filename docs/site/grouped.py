"""For the API reference: parameters that a docstring describes together, as "q, k: ...", stand there one by one."""

import re
from typing import Any

from griffe import Extension

TOGETHER = re.compile(r"^( {4,})(\w+)((?:, \w+)+): (.*(?:\n\1 +.*)*)", re.MULTILINE)


def one_by_one(docstring: str) -> str:
    def lines(found: re.Match[str]) -> str:
        indent, first, others, text = found.groups()
        return "\n".join([f"{indent}{first}: {text}", *(f"{indent}{x}: as {first}." for x in others[2:].split(", "))])

    return TOGETHER.sub(lines, docstring)


class Grouped(Extension):
    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = one_by_one(obj.docstring.value)
