"""What the documents and the code say of each other: equation numbers, names of functions, files and commands."""

import importlib
import re
import runpy
from functools import reduce
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MATH = (ROOT / "docs" / "math.md").read_text()
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").rglob("*.md"))
SOURCES = sorted(
    path
    for folder in ("crystalformer", "kernels", "csrc", "bench", "tests", "examples")
    for path in (ROOT / folder).rglob("*.*")
    if path.suffix in (".py", ".cpp", ".h", ".inc") and path.name != Path(__file__).name
)
NUMBER = r"\(B?\d+\)"
CITATION = re.compile(rf"[Ee]quations?[\s#/]+({NUMBER}(?:(?:,| to| and|, and)[\s#/]+{NUMBER})*)")


def cited(text: str) -> set[str]:
    """The numbers of the equations that a text cites, the ends of "(3) to (5)" standing for what is between."""
    return {number for citation in CITATION.findall(text) for number in re.findall(NUMBER, citation)}


def test_a_citation_is_found_in_all_its_forms():
    text = "Equation (1). equations (2) to\n    (5) and (B9)\n// Equations (6), (7)\n a list (8), an equation of 9"
    assert cited(text) == {"(1)", "(2)", "(5)", "(B9)", "(6)", "(7)"}


def test_every_equation_that_the_code_cites_is_there():
    there = {f"({number})" for number in re.findall(r"\\tag\{(\w+)\}", MATH)}
    citations = {path: cited(path.read_text()) for path in SOURCES}
    assert len(set.union(*citations.values())) > 20
    assert {str(path.relative_to(ROOT)): found - there for path, found in citations.items() if found - there} == {}


def test_every_equation_has_one_number_and_they_are_in_order():
    tags = re.findall(r"\\tag\{(\w+)\}", MATH)
    for letter in ("", "B"):
        numbers = [int(tag.lstrip("B")) for tag in tags if tag.startswith("B") == bool(letter)]
        assert numbers == list(range(1, len(numbers) + 1))


def test_the_mathematics_names_functions_that_exist():
    names = re.findall(r"`((?:\w+\.)+\w+)`", MATH)
    assert len(names) > 25
    for name in names:
        # `module.function`, or `Class.method` of what the package exports
        module, *path = name.split(".")
        try:
            start = importlib.import_module(f"crystalformer.{module}")
        except ModuleNotFoundError:
            start, path = importlib.import_module("crystalformer"), [module, *path]
        assert reduce(lambda x, attribute: getattr(x, attribute, None), path, start) is not None, name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_names_files_and_commands_that_exist(document):
    text = document.read_text()
    files = re.findall(r"(?<![\w/.-])((?:bench|tests|csrc|kernels|crystalformer|docs|examples)/[\w/.-]*\w/?)", text)
    for name in files:
        assert (ROOT / name).exists(), name
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (document.parent / target).exists(), target
    assert "python -m bench." not in text
    for command in re.findall(r"python -m bench (\w+)", text):
        assert f'("{command}",' in (ROOT / "bench" / "__main__.py").read_text(), command


def test_make_targets_that_documents_name_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        assert {*re.findall(r"`make ([\w-]+)", document.read_text())} <= targets, document.name
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    (called,) = re.findall(r"target: \[(.+)\]", workflow)
    run = re.findall(r"^make ([\w-]+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert set(called.split(", ")) >= {"lint", "test", "docs"}
    assert set(called.split(", ")) <= {*run}


def test_the_site_has_every_page_and_every_public_name():
    site, api = (ROOT / "mkdocs.yml").read_text(), (ROOT / "docs" / "api.md").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert f": {page.relative_to(ROOT / 'docs')}\n" in site, page
    described = {name.rpartition(".")[2] for name in re.findall(r"^::: (crystalformer\..+)$", api, re.MULTILINE)}
    for module in ("", ".ase", ".data", ".training", ".runs"):
        names = set(importlib.import_module(f"crystalformer{module}").__all__)
        assert names - described <= {"__version__", "NUM_ELEMENTS", "convert"}, module  # convert by its one function
    assert "::: crystalformer.convert.from_official\n" in api


def test_words_of_the_glossary_are_words_of_the_code():
    words = re.findall(r"\*\*([\w ]+)\*\*", (ROOT / "docs" / "glossary.md").read_text())
    assert len(words) > 45
    code = "\n".join(path.read_text() for path in SOURCES).lower()
    for word in words:
        assert re.search(rf"\b{word.replace(' ', '[ _]')}", code), word


@pytest.mark.parametrize("name", ["attention_picture", "orbits_picture"])
def test_a_picture_is_what_its_program_draws(name):
    names = runpy.run_path(str(ROOT / "docs" / "site" / f"{name}.py"))
    assert names["FILE"].read_text() == names["picture"]()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_lists_stand_apart_from_the_text_before(document):
    """Without an empty line some renderers show a list as text, and others show text that begins with + as a list."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    assert re.findall(r"^(?!\s|[-+*] |\d+\. |\|).+\n(?:[-+*]|1\.) .*", text, re.MULTILINE) == []


def test_every_promise_has_a_test_that_is_there():
    rows = [x for x in (ROOT / "docs" / "promises.md").read_text().splitlines() if x.startswith("| ") and "`" in x]
    assert len(rows) > 30
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    for row in rows:
        cited_tests = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", row)
        assert cited_tests, row
        for file, name in cited_tests:
            assert (f"def {name}(" if name else "def test_") in files[file], row
