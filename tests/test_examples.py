"""The programs of examples/ run, and do what they say."""

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
FILES = sorted(FOLDER.glob("*.py"))
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries that the examples import


@pytest.fixture(autouse=True)
def found(monkeypatch):
    for library in ("pymatgen", "lightning", "safetensors", "matplotlib"):
        pytest.importorskip(library, reason=f"an example needs {library}")
    monkeypatch.syspath_prepend(FOLDER)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where one example trains, and the next takes the model from."""
    return tmp_path_factory.mktemp("examples")


def test_attention_in_your_model():
    assert 0 < importlib.import_module("attention_in_your_model").main() < 0.2


def test_train_from_csv(folder):
    assert 0 < importlib.import_module("train_from_csv").main(folder) < 0.3
    assert (folder / "run" / "model" / "model.safetensors").is_file()


def test_features_for_sklearn(folder):
    assert 0 < importlib.import_module("features_for_sklearn").main(folder) < 0.6


def test_forces():
    largest, total, difference = importlib.import_module("forces").main()
    assert largest > 0.1
    assert total < 1e-12
    assert difference < 1e-6


def test_relax_and_md():
    largest, drift = importlib.import_module("relax_and_md").main(epochs=4, picoseconds=0.1)
    assert largest < 0.01
    assert 0 < abs(drift) < 1


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_an_example_is_short_and_has_a_test(file):
    assert len(file.read_text().splitlines()) < 60
    assert f"def test_{file.stem}(" in Path(__file__).read_text()
    assert f"(../examples/{file.name})" in (FOLDER.parent / "docs" / "examples.md").read_text()
