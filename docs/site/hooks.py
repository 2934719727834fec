"""What `make docs` does to the pages: files from outside docs/, formulas as MathML, nothing fetched by the browser."""

import re
from pathlib import Path, PurePosixPath
from typing import Any

from latex2mathml.converter import convert

ROOT = Path(__file__).parents[2]
# Where a file outside docs/ stands in the site. README.md is the first page.
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
OUTSIDE |= {f"bench/results/{path.name}": f"benchmarks/{path.name}" for path in (ROOT / "bench/results").glob("*.svg")}
OUTSIDE |= {"LICENSE": "LICENSE.txt", "CITATION.cff": "CITATION.cff"}
LINK = re.compile(r"(\]\()([^)#:\s]+)((?:#[^)]*)?\))")
PROGRAM = re.compile(r"^\[(examples/\w+\.py)\]\(\.\./\1\)$", re.MULTILINE)
FORMULA = re.compile(r"^\$\$\n(.*?)\n\$\$$", re.DOTALL | re.MULTILINE)
NICER = (
    # A function stands apart from an argument without brackets.
    (r"(<mi>(?:log|exp|max|min|cos|sin)</mi>)(?!<mo stretchy=\"false\">&#x00028;)", r'\1<mspace width="0.17em" />'),
    # A minus sign after a bracket or a relation is a sign, not a difference.
    (r"((?:&#x00028;|&#x0003D;|&#x02264;)</mo>(?:<mrow>)?)<mo>&#x02212;</mo>", r'\1<mo form="prefix">&#x02212;</mo>'),
    # \mathrm{d} is upright.
    (r"<mi>&#x00064;</mi>", '<mi mathvariant="normal">d</mi>'),
)
FETCHED = re.compile(r"<(?:script|img|iframe)[^>]*\bsrc=\"?https?:|<link[^>]*stylesheet[^>]*https?:|@import")


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for source, place in OUTSIDE.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    place = PurePosixPath(page.file.src_uri)
    source = {there: here for here, there in OUTSIDE.items()}.get(str(place), f"docs/{place}")
    markdown = PROGRAM.sub(lambda found: f"```python\n{(ROOT / found[1]).read_text()}```", markdown)
    markdown = LINK.sub(lambda found: found[1] + _link(found[2], source, place) + found[3], markdown)
    return FORMULA.sub(lambda found: formula(found[1]), markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    if FETCHED.search(output):
        raise ValueError(f"{page.file.src_uri}: a reader's browser would fetch {FETCHED.search(output)[0]!r}")
    return output


def _link(target: str, source: str, place: PurePosixPath) -> str:
    """A link of the file `source` of the repository as the page at `place` of the site needs it."""
    parts: list[str] = []
    for part in (PurePosixPath(source).parent / target).parts:
        if part == "..":
            parts.pop()
        else:
            parts.append(part)
    file = "/".join(parts)
    there = OUTSIDE.get(file) or (file.removeprefix("docs/") if file.startswith("docs/") else None)
    return "../" * (len(place.parts) - 1) + there if there else target


def formula(tex: str) -> str:
    """A displayed formula of LaTeX as MathML, which browsers render by themselves, with its number at the right.

    Raises:
        ValueError: if a command is left that the conversion does not know.
    """
    number = re.search(r"\\tag\{(\w+)\}", tex)
    tex = re.sub(r"\\tag\{\w+\}", "", tex)
    # As brackets, bars stand close to what is between them.
    tex = re.sub(r"(?<!left)\\lvert(.*?)(?<!right)\\rvert", r"\\left\\lvert\1\\right\\rvert", tex)
    math = convert(tex, display="block")
    if "\\" in math:
        raise ValueError(f"a command that latex2mathml does not know, in {tex!r}")
    for pattern, better in NICER:
        math = re.sub(pattern, better, math)
    anchor = f' id="equation-{number[1].lower()}"' if number else ""
    return f'<div class="formula"{anchor}>{math}<span>{f"({number[1]})" if number else ""}</span></div>'
