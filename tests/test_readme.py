"""The examples of the README run as they stand there, one after another."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.filterwarnings("ignore")  # of the libraries that the examples import
def test_examples(tmp_path, monkeypatch):
    for library in ("pymatgen", "lightning", "safetensors"):
        pytest.importorskip(library, reason=f"an example needs {library}")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 2
    names: dict = {}
    exec(blocks[0], names)
    assert names["y"].shape == (10, 8, 16)
    cell, primitive = names["out"].detach()
    torch.testing.assert_close(cell, primitive, rtol=1e-4, atol=1e-5)
    exec(blocks[1], names)
    assert len(names["history"]) == 2
    assert names["forces"].shape == (10, 3)
    assert (tmp_path / "model" / "model.safetensors").is_file()
