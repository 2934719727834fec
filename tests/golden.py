"""Where the numbers of the paper's code are: beside a checkout of the project's workshop, no part of the project."""

from pathlib import Path

FILE = Path(__file__).parents[2] / "shared" / "golden" / "official_reference.npz"
