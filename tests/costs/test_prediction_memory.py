"""What `crystalformer predict` holds in memory: some structures, however many there are."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import crystalformer as cf
from crystalformer.app import cli
from pathlib import Path

folder, number = Path(sys.argv[1]), int(sys.argv[2])
config = cf.CrystalformerConfig(model_dim=16, num_heads=2, num_blocks=1, ff_dim=32, num_basis=8, r0=(0.7,), tol=1e-3)
cf.Crystalformer(config).save_pretrained(folder / "model")
atoms = "".join(f"{x} {2.8 * (i % 2)} {2.8 * (i // 2 % 2)} {2.8 * (i // 4)}\\n" for i, x in enumerate(["Na", "Cl"] * 4))
with open(folder / "a.extxyz", "w") as file:
    for i in range(number):
        edge = 5.6 + i / number
        file.write(f'8\\nLattice="{edge} 0 0 0 {edge} 0 0 0 {edge}" Properties=species:S:1:pos:R:3\\n{atoms}')
arguments = ["predict", folder / "model", folder / "a.extxyz", "--out", folder / "out.csv", "--workers", "0"]
assert cli.main(list(map(str, arguments))) == 0
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((folder / "out.csv").read_text().count("\\n") - 1, peak // (1024 if sys.platform == "darwin" else 1))
"""


def test_memory_does_not_grow_with_the_number_of_structures(tmp_path) -> None:
    pytest.importorskip("resource", reason="peak memory is measured with the resource module")
    peaks = {}
    for number in (3000, 24000):
        command = [sys.executable, "-c", PROGRAM, tmp_path, str(number)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        rows, peaks[number] = map(int, done.stdout.split())
        assert rows == number
    # Ids are kept, some 0.2 KiB each. The arrays of a crystal alone are 4 KiB, its images some 60 KiB.
    assert (peaks[24000] - peaks[3000]) / 21000 < 1.0, peaks
