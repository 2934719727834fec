"""What crystals have that no crystal of the training had: what a model predicts for them is a guess."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from ..common.elements import NUM_ELEMENTS, SYMBOLS
from ..geometry.orbits import SYMMETRY_TOL, find_orbits
from ..model.config import CrystalformerConfig
from ..model.structures import Crystal

# By so much of itself a volume may be beyond those of the training, which were rounded to fp32.
ROUNDING = 1e-5
# Crystals that are named for each reason.
NAMED = 10


class Outside(NamedTuple):
    """What a crystal has that no crystal of the training had; as a string in words, "" if there is nothing.

    Attributes:
        elements: atomic numbers.
        atoms: in its primitive cell, if these are more than in any; else 0.
        volume: Å³ an atom, if that is less or more than in any; else 0.
    """

    elements: tuple[int, ...] = ()
    atoms: int = 0
    volume: float = 0.0

    def __str__(self) -> str:
        words = [f"element {SYMBOLS[z - 1]}" for z in self.elements]
        words += [f"{self.atoms} atoms"] * bool(self.atoms) + [f"{self.volume:.3g} Å³ an atom"] * bool(self.volume)
        return "; ".join(words)

    @classmethod
    def of(cls, crystal: Crystal, config: CrystalformerConfig) -> "Outside":
        """By what the model's configuration knows of the training."""
        seen = {*config.elements} or {*range(NUM_ELEMENTS + 1)}
        elements = {z for mixture in crystal.mixtures for z in mixture} - seen
        atoms = len(crystal.positions)
        volume = abs(float(np.linalg.det(crystal.lattice))) / atoms
        least, largest = config.atom_volumes or (0.0, np.inf)
        usual = least * (1 - ROUNDING) <= volume <= largest * (1 + ROUNDING)
        large = 0
        if 0 < config.largest_cell < atoms and (primitive := _primitive_atoms(crystal)) > config.largest_cell:
            large = primitive
        return cls(tuple(sorted(elements)), large, 0.0 if usual else volume)


def _primitive_atoms(crystal: Crystal) -> int:
    """In a primitive cell; without spglib in the cell as it is."""
    with suppress(ModuleNotFoundError):
        return len(find_orbits(crystal.lattice, crystal.positions, crystal.species, SYMMETRY_TOL).atoms)
    return len(crystal.positions)


class Guesses:
    """Which predictions are guesses and why, of any number: a line for each reason, with the first ids and a count."""

    def __init__(self, config: CrystalformerConfig) -> None:
        self.config = config
        self.ids: dict[tuple[str, int], list[str]] = {}
        self.number: dict[tuple[str, int], int] = {}

    def add(self, ids: Sequence[str], found: Iterable[Outside]) -> None:
        """Takes what crystals have."""
        for id, (elements, atoms, volume) in zip(ids, found, strict=True):
            reasons = [("element", z) for z in elements]
            for reason in reasons + [("atoms", 0)] * bool(atoms) + [("volume", 0)] * bool(volume):
                self.number[reason] = self.number.get(reason, 0) + 1
                named = self.ids.setdefault(reason, [])
                named += [id] * (len(named) < NAMED)

    def lines(self) -> list[str]:
        """What is to be said."""
        result = []
        for (kind, z), ids in sorted(self.ids.items()):
            if kind == "element":
                what = SYMBOLS[z - 1]
            elif kind == "atoms":
                what = f"more than {self.config.largest_cell} atoms in its primitive cell"
            else:
                what = "less than {:.3g} or more than {:.3g} Å³ an atom".format(*self.config.atom_volumes)
            more = self.number[kind, z] - len(ids)
            named = ", ".join(ids) + (f" and {more:,} more" if more else "")
            result.append(f"no crystal of the training had {what}, predictions are guesses for {named}")
        return result
