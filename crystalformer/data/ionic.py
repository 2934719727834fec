"""Ionic crystals whose energy is known: a target that is a true infinite sum, for demonstrations and tests."""

from dataclasses import dataclass
from typing import Any

import numpy as np

# Ions by charge; all of them have a tabulated ionic radius.
IONS = {
    +1: ("Li", "Na", "K", "Rb", "Cs"),
    +2: ("Mg", "Ca", "Sr", "Ba", "Zn"),
    +3: ("Al", "Sc", "Y", "La"),
    +4: ("Ti", "Zr", "Sn", "Ce"),
    -1: ("F", "Cl", "Br", "I"),
    -2: ("O", "S", "Se", "Te"),
    -3: ("N",),
}

# Name and AFLOW label of each prototype, then which charges the sites of its elements may take together.
PROTOTYPES: tuple[tuple[str, str, tuple[dict[str, int], ...]], ...] = (
    ("rock salt", "AB_cF8_225_a_b", ({"Na": 1, "Cl": -1}, {"Na": 2, "Cl": -2})),
    ("caesium chloride", "AB_cP2_221_b_a", ({"Cs": 1, "Cl": -1},)),
    ("zincblende", "AB_cF8_216_c_a", ({"Zn": 2, "S": -2}, {"Zn": 3, "S": -3})),
    ("wurtzite", "AB_hP4_186_b_b", ({"Zn": 2, "S": -2},)),
    ("nickel arsenide", "AB_hP4_194_c_a", ({"Ni": 2, "As": -2},)),
    ("fluorite", "AB2_cF12_225_a_c", ({"Ca": 2, "F": -1}, {"Ca": 4, "F": -2})),
    ("antifluorite", "AB2_cF12_225_a_c", ({"Ca": -2, "F": 1},)),
    ("cadmium iodide", "AB2_hP3_164_a_d", ({"Cd": 2, "I": -1}, {"Cd": 4, "I": -2})),
    ("rutile", "A2B_tP6_136_f_a", ({"Ti": 4, "O": -2}, {"Ti": 2, "O": -1})),
    ("aluminium fluoride", "A3B_cP4_221_d_a", ({"Re": 3, "O": -1},)),
    ("half-Heusler", "ABC_cF12_216_b_c_a", ({"Mg": 1, "Ag": 2, "As": -3},)),
    ("delafossite", "ABC2_hR4_166_a_b_c", ({"Na": 1, "Cr": 3, "S": -2},)),
    ("perovskite", "AB3C_cP5_221_a_c_b", ({"Ca": 2, "Ti": 4, "O": -2}, {"Ca": 1, "Ti": 2, "O": -1})),
)


@dataclass(frozen=True)
class IonicCrystal:
    """Attributes: name of its prototype; pymatgen Structure of ions; electrostatic energy, eV per atom."""

    prototype: str
    structure: Any
    energy: float

    @property
    def formula(self) -> str:
        return self.structure.composition.element_composition.reduced_formula


def ionic_crystals(number: int, seed: int = 0) -> list[IonicCrystal]:
    """Random crystals of ions on the sites of known prototypes, with their Ewald energies.

    Prototype, charges and elements are drawn at random. The cell is scaled so that the nearest ions touch, then scaled
    by 0.95 to 1.15 and strained by about 2 %, and the atoms are moved by about 0.05 Å. The same seed gives the same
    crystals. Needs the extra [data].
    """
    random = np.random.default_rng(seed)
    crystals = []
    for _ in range(number):
        name, label, charges = PROTOTYPES[random.integers(len(PROTOTYPES))]
        ions = _draw_ions(charges[random.integers(len(charges))], random)
        structure = _distorted(substituted(prototype(label), ions), random)
        crystals.append(IonicCrystal(name, structure, ewald_energy(structure)))
    return crystals


def prototype(label: str) -> Any:
    """The pymatgen Structure of an AFLOW prototype, as "AB_cF8_225_a_b" for rock salt."""
    from pymatgen.analysis.prototypes import AFLOW_PROTOTYPE_LIBRARY

    return next(x["snl"].structure.copy() for x in AFLOW_PROTOTYPE_LIBRARY if x["tags"]["aflow"] == label)


def substituted(structure: Any, ions: dict[str, tuple[str, int]]) -> Any:
    """The structure with ions (element, charge) in place of its elements, scaled so that the nearest ones touch."""
    from pymatgen.core import Species

    structure = structure.copy()
    structure.replace_species({old: Species(element, charge) for old, (element, charge) in ions.items()})
    radius = np.array([float(site.specie.ionic_radius) for site in structure])
    charge = np.array([site.specie.oxi_state for site in structure])
    opposite = charge[:, None] * charge < 0
    touching = (radius[:, None] + radius)[opposite] / structure.distance_matrix[opposite]
    return _deformed(structure, touching.max() * np.eye(3))


def ewald_energy(structure: Any) -> float:
    """Electrostatic energy of a structure of ions, eV per atom: half of sum_ij q_i q_j / d_ij over all images."""
    from pymatgen.analysis.ewald import EwaldSummation

    return float(EwaldSummation(structure).total_energy) / len(structure)


def _draw_ions(charges: dict[str, int], random: np.random.Generator) -> dict[str, tuple[str, int]]:
    return {site: (str(random.choice(IONS[charge])), charge) for site, charge in charges.items()}


def _distorted(structure: Any, random: np.random.Generator) -> Any:
    strain = random.normal(0, 0.02, (3, 3))
    structure = _deformed(structure, random.uniform(0.95, 1.15) * (np.eye(3) + (strain + strain.T) / 2))
    return _rebuilt(
        structure, structure.lattice.matrix, structure.cart_coords + random.normal(0, 0.05, (len(structure), 3))
    )


def _deformed(structure: Any, deformation: np.ndarray) -> Any:
    return _rebuilt(structure, structure.lattice.matrix @ deformation, structure.cart_coords @ deformation)


def _rebuilt(structure: Any, lattice: np.ndarray, positions: np.ndarray) -> Any:
    from pymatgen.core import Structure

    return Structure(lattice, structure.species, positions, coords_are_cartesian=True)
