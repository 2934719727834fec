"""What the build of the site does to pages: formulas, links, parameters described together, nothing fetched."""

import runpy
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "site"
MATH = (FOLDER.parent / "math.md").read_text()


@pytest.fixture(scope="module")
def hooks():
    pytest.importorskip("latex2mathml", reason="the site needs the extra [docs]")
    return SimpleNamespace(**runpy.run_path(str(FOLDER / "hooks.py")))


def test_every_formula_of_the_mathematics_becomes_mathml(hooks):
    text = hooks.FORMULA.sub(lambda found: hooks.formula(found[1]), MATH)
    assert text.count("<math ") == MATH.count("\n$$\n") // 2 > 35
    assert "$" not in text
    assert text.count('id="equation-') == MATH.count("\\tag{") > 25
    html = hooks.formula(r"a = \frac{\log b}{2} \tag{B3}")
    names = [part.tag.rpartition("}")[2] for part in ElementTree.fromstring(html).iter()]
    assert {"math", "mfrac", "mi", "mn", "span"} <= set(names)
    assert html.startswith('<div class="formula" id="equation-b3">')
    assert html.endswith("<span>(B3)</span></div>")


def test_a_command_that_is_not_known_is_an_error(hooks):
    with pytest.raises(ValueError, match="nosuchcommand"):
        hooks.formula(r"\nosuchcommand x")


def test_links_out_of_the_folder_lead_to_pages_of_the_site(hooks):
    index = PurePosixPath("index.md")
    assert hooks._link("docs/math.md", "README.md", index) == "math.md"
    assert hooks._link("CHANGELOG.md", "README.md", index) == "changelog.md"
    below = PurePosixPath("backends/cpu.md")
    assert hooks._link("../math.md", "docs/backends/cpu.md", below) == "../math.md"
    assert hooks._link("../../README.md", "docs/backends/cpu.md", below) == "../index.md"


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://cdn.example/x.js">',
        '<link rel="stylesheet" href="https://fonts.example/x.css">',
        '<img alt="" src="http://example.org/x.png">',
    ],
)
def test_nothing_is_fetched_by_a_reader(hooks, html):
    page = SimpleNamespace(file=SimpleNamespace(src_uri="x.md"))
    assert hooks.on_post_page('<a href="https://example.org">', page) == '<a href="https://example.org">'
    with pytest.raises(ValueError, match="fetch"):
        hooks.on_post_page(html, page)


def test_parameters_described_together_stand_one_by_one():
    pytest.importorskip("griffe", reason="the site needs the extra [docs]")
    one_by_one = runpy.run_path(str(FOLDER / "grouped.py"))["one_by_one"]
    text = "Sums.\n\nArgs:\n    q, k: (N,H,D) queries\n        and keys.\n    v: values.\n"
    wanted = "Sums.\n\nArgs:\n    q: (N,H,D) queries\n        and keys.\n    k: as q.\n    v: values.\n"
    assert one_by_one(text) == wanted
