"""The examples of README and tutorial run as they stand there, one after another, commands too."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries that the examples import


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    for library in ("pymatgen", "lightning", "safetensors", "jsonargparse"):
        pytest.importorskip(library, reason=f"an example needs {library}")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def examples(document: str) -> list[tuple[str, str]]:
    """Language and text of the blocks that name a language, python or sh."""
    return re.findall(r"```(python|sh)\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


def run(blocks: list[tuple[str, str]], names: dict, more: tuple[str, ...] = ()) -> dict:
    """Runs blocks in one namespace; commands in this process, trainings with more options."""
    from crystalformer.app.cli import main

    for language, text in blocks:
        if language == "python":
            exec(text, names)
            continue
        for command in text.splitlines():
            program, *arguments = shlex.split(command)
            assert program == "crystalformer"
            assert main([*arguments, *(more if arguments[0] in ("train", "crossval") else ())]) == 0, command
    return names


def test_readme():
    first, second, commands = examples("README.md")
    names = run([first], {})
    assert names["y"].shape == (10, 8, 16)
    cell, primitive = names["out"].detach()
    torch.testing.assert_close(cell, primitive, rtol=1e-4, atol=1e-5)
    run([second], names)
    assert len(names["history"]) == 2
    assert names["forces"].shape == (10, 3)
    assert Path("model/model.safetensors").is_file()

    run(examples("docs/tutorial.md")[:1], {})
    Path("salts.csv").rename("crystals.csv")
    run([commands], {}, ("--epochs=1", "--model.num_blocks=1"))
    lines = Path("predictions.csv").read_text().splitlines()
    assert lines[0] == "id,energy,outside"
    assert len(lines) == 121


def test_tutorial():
    names = run(examples("docs/tutorial.md"), {})
    text = (ROOT / "docs/tutorial.md").read_text()
    for name in Path("run").iterdir():
        assert f"`{name.name}" in text, "the tutorial must say what it is"
    assert names["energy"].shape == (1, 1)
    assert names["both"].names == ("energy", "volume")
    assert names["features"].shape == (120, 64)
    assert len(names["atoms"]) == 2
    volumes = names["samples"].targets
    assert names["error"] < 0.8 * (volumes[100:] - volumes[:100].mean()).abs().mean()
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["mae"]["test"]["energy"] < 0.7 * metrics["baseline_mae"]["test"]["energy"]
