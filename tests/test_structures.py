"""Structures of other libraries: they come into a batch whole, and what is not a crystal is refused by name."""

import importlib
import io
import re
import warnings
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from crystals import DISORDERED, aflow_prototypes, import_or_skip, occupancies

import crystalformer as cf

# The crystal of DISORDERED.
DISORDERED_CIF = """data_disordered
_cell_length_a 4
_cell_length_b 5
_cell_length_c 6
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_space_group_name_H-M_alt 'P 1'
loop_
_space_group_symop_operation_xyz
'x, y, z'
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
Au1 Au 0.1 0 0 0.75
Cu1 Cu 0.1 0 0 0.25
Na1 Na 0.5 0.5 0.5 1
Cl1 Cl 0.5 0 0 0.5
"""


@pytest.fixture
def core() -> ModuleType:
    return import_or_skip("pymatgen.core", reason="reads pymatgen Structures")


@pytest.fixture
def ase() -> ModuleType:
    module = import_or_skip("ase", reason="reads ase Atoms")
    importlib.import_module("ase.io")
    return module


def read_cif(ase: ModuleType, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ase.io.read(io.StringIO(DISORDERED_CIF), format="cif", **options)


def salt(core: ModuleType, **options: Any) -> Any:
    return core.Structure(
        core.Lattice([[4, 0, 0], [1, 5, 0], [0, 2, 6]]), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3], **options
    )


# What comes in --------------------------------------------------------------------------------------------------------


def test_pymatgen(core: ModuleType) -> None:
    batch = cf.CrystalBatch.from_structures([salt(core)], dtype=torch.float64)
    assert batch.species.tolist() == [11, 17]
    assert batch.species.dtype == torch.int64
    assert batch.lattice.tolist() == [[[4, 0, 0], [1, 5, 0], [0, 2, 6]]]
    assert batch.positions.tolist() == [[0, 0, 0], [2.5, 3.5, 3]]
    assert batch.ptr.tolist() == [0, 2]
    assert batch.images is None


def test_ase(ase: ModuleType) -> None:
    cell = [[4, 0, 0], [1, 5, 0], [0, 2, 6]]
    atoms = ase.Atoms("NaCl", scaled_positions=[[0, 0, 0], [1.5, 0.5, -0.5]], cell=cell, pbc=True)
    batch = cf.CrystalBatch.from_structures([atoms], dtype=torch.float64)
    assert batch.species.tolist() == [11, 17]
    assert batch.lattice.tolist() == [cell]
    # Atoms outside the cell stay where they are.
    torch.testing.assert_close(batch.positions, torch.tensor([[0, 0, 0], [6.5, 1.5, -3]], dtype=torch.float64))


def test_mixed_sizes_and_libraries(core: ModuleType, ase: ModuleType) -> None:
    iron = ase.Atoms("Fe", cell=[2.5] * 3, pbc=True)
    structures = [salt(core), iron, iron * (3, 1, 1), salt(core)]
    batch = cf.CrystalBatch.from_structures(structures)
    assert len(batch) == batch.num_crystals == 4
    assert batch.num_atoms == 8
    assert batch.ptr.tolist() == [0, 2, 3, 6, 8]
    assert batch.species.tolist() == [11, 17, 26, 26, 26, 26, 11, 17]
    assert batch.positions[3:6].tolist() == [[0, 0, 0], [2.5, 0, 0], [5, 0, 0]]
    assert torch.diagonal(batch.lattice, dim1=1, dim2=2).tolist() == [[4, 5, 6], [2.5] * 3, [7.5, 2.5, 2.5], [4, 5, 6]]
    # A tuple or a generator is as good as a list.
    assert torch.equal(cf.CrystalBatch.from_structures(s for s in structures).positions, batch.positions)


def test_cat_gives_what_one_batch_of_all_gives(core: ModuleType, ase: ModuleType) -> None:
    structures = [salt(core), read_cif(ase), salt(core)]
    together = cf.CrystalBatch.from_structures(structures)
    joined = cf.CrystalBatch.cat([cf.CrystalBatch.from_structures([s]) for s in structures])
    for name in ("species", "positions", "lattice", "ptr"):
        assert torch.equal(getattr(joined, name), getattr(together, name))


def test_prototypes_keep_species_and_distances() -> None:
    structures = aflow_prototypes(limit=20, max_atoms=24)
    batch = cf.CrystalBatch.from_structures(structures, dtype=torch.float64)
    assert batch.ptr.diff().tolist() == [len(s) for s in structures]
    assert batch.species.tolist() == [z for s in structures for z in s.atomic_numbers]
    np.testing.assert_allclose(batch.positions.numpy(), np.concatenate([s.cart_coords for s in structures]), atol=1e-12)
    np.testing.assert_allclose(
        torch.linalg.det(batch.lattice).abs().numpy(), [s.volume for s in structures], rtol=1e-10
    )


def test_dtype(core: ModuleType) -> None:
    for dtype in (torch.float32, torch.float64):
        batch = cf.CrystalBatch.from_structures([salt(core)], dtype=dtype)
        assert (batch.positions.dtype, batch.lattice.dtype) == (dtype, dtype)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert cf.CrystalBatch.from_structures([salt(core)]).positions.dtype == torch.float64
    finally:
        torch.set_default_dtype(before)
    assert cf.CrystalBatch.from_structures([salt(core)]).positions.dtype == before
    with pytest.raises(TypeError, match=r"^positions must be torch.float32 or torch.float64, not torch.int64$"):
        cf.CrystalBatch.from_structures([salt(core)], dtype=torch.int64)


# Mixtures and isotopes ------------------------------------------------------------------------------------------------


def test_disordered_pymatgen(core: ModuleType) -> None:
    sites = [{"Au": 0.75, "Cu": 0.25}, "Na", {"Cl": 0.5}]
    structure = core.Structure(core.Lattice.cubic(4), sites, [[0, 0, 0], [0.5] * 3, [0.5, 0, 0]])
    batch = cf.CrystalBatch.from_structures([structure])
    assert batch.species.dtype == torch.float32
    assert torch.equal(batch.species, occupancies(DISORDERED))
    assert batch.occupancies() is batch.species


@pytest.mark.parametrize("options", [{"fractional_occupancies": True}, {}])
def test_disordered_ase(ase: ModuleType, options: dict[str, bool]) -> None:
    """ase keeps one atom a site, of the element with the largest share, and the shares aside; a supercell has both."""
    atoms = read_cif(ase, **options)
    batch = cf.CrystalBatch.from_structures([atoms, atoms * (1, 2, 1)])
    assert torch.equal(batch.species, occupancies(DISORDERED * 3))
    torch.testing.assert_close(batch.positions[0], torch.tensor([0.4, 0, 0]))
    assert torch.diagonal(batch.lattice, dim1=1, dim2=2).tolist() == [[4, 5, 6], [4, 10, 6]]


def test_ase_told_to_ignore_occupancies(ase: ModuleType) -> None:
    atoms = read_cif(ase, fractional_occupancies=False)
    assert cf.CrystalBatch.from_structures([atoms]).species.tolist() == [79, 11, 17]


def test_both_libraries_read_a_disordered_cif_alike(core: ModuleType, ase: ModuleType) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        structure = core.Structure.from_str(DISORDERED_CIF, fmt="cif")
    ours = [cf.CrystalBatch.from_structures([s], dtype=torch.float64) for s in (structure, read_cif(ase))]
    for batch in ours:
        order = batch.species.argmax(1).sort().indices
        assert torch.equal(batch.species[order], occupancies([*DISORDERED[1:], DISORDERED[0]], torch.float64))
    torch.testing.assert_close(ours[0].lattice, ours[1].lattice)


def test_an_ordered_crystal_beside_a_disordered_one_becomes_a_mixture(core: ModuleType, ase: ModuleType) -> None:
    batch = cf.CrystalBatch.from_structures([salt(core), read_cif(ase)], dtype=torch.float64)
    assert torch.equal(batch.species, occupancies([{11: 1.0}, {17: 1.0}, *DISORDERED], torch.float64))


def test_whole_occupancies_are_atomic_numbers(ase: ModuleType) -> None:
    atoms = read_cif(ase)[[1]]
    assert atoms.info["occupancy"]
    assert cf.CrystalBatch.from_structures([atoms]).species.tolist() == [11]


@pytest.mark.parametrize(
    ("site", "mixture"),
    [
        ("Na+", {11: 1.0}),
        ("D", {1: 1.0}),
        ("T", {1: 1.0}),
        ({"D": 0.5, "H": 0.5}, {1: 1.0}),
        ({"Fe2+": 0.5, "Fe3+": 0.5}, {26: 1.0}),
        ({"Fe2+": 0.25, "Fe3+": 0.25, "Li+": 0.5}, {26: 0.5, 3: 0.5}),
        ("Cf", {98: 1.0}),
    ],
)
def test_charges_and_isotopes_of_an_element_are_that_element(
    core: ModuleType, site: Any, mixture: dict[int, float]
) -> None:
    batch = cf.CrystalBatch.from_structures([core.Structure(core.Lattice.cubic(3), [site], [[0, 0, 0]])])
    assert torch.equal(batch.occupancies(), occupancies([mixture]))
    assert batch.species.is_floating_point() == (len(mixture) > 1)


def test_oxidation_states_added_to_a_structure(core: ModuleType) -> None:
    structure = salt(core)
    structure.add_oxidation_state_by_element({"Na": 1, "Cl": -1})
    assert cf.CrystalBatch.from_structures([structure]).species.tolist() == [11, 17]


def test_deuterium_in_a_cif_that_ase_reads(ase: ModuleType) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        atoms = ase.io.read(io.StringIO(DISORDERED_CIF.replace("Na1 Na", "D1 D")), format="cif")
    assert torch.equal(cf.CrystalBatch.from_structures([atoms]).species[1], occupancies([{1: 1.0}])[0])


# What is refused ------------------------------------------------------------------------------------------------------


def refused(structures: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape(message)):
        cf.CrystalBatch.from_structures(structures)


def test_no_structures() -> None:
    refused([], ValueError, "structures must hold at least one structure, not none")
    refused(iter(()), ValueError, "structures must hold at least one structure, not none")


def test_what_is_not_a_list_of_structures() -> None:
    refused(None, TypeError, "structures must be a list of structures, not NoneType")
    refused(3, TypeError, "structures must be a list of structures, not int")
    refused("NaCl.cif", TypeError, "structures[0] must be a pymatgen Structure or an ase Atoms, not str")
    refused([None], TypeError, "structures[0] must be a pymatgen Structure or an ase Atoms, not NoneType")


def test_a_single_structure(core: ModuleType, ase: ModuleType) -> None:
    message = "structures must be a list of structures, not a single one: put it into a list"
    refused(salt(core), TypeError, message)
    refused(core.Molecule(["H"], [[0, 0, 0]]), TypeError, message)
    refused(ase.Atoms("Fe", cell=[2.5] * 3, pbc=True), TypeError, message)


def test_the_message_says_which_structure(core: ModuleType) -> None:
    good = salt(core)
    refused([good, good, 7, good], TypeError, "structures[2] must be a pymatgen Structure or an ase Atoms, not int")


def test_not_periodic_pymatgen(core: ModuleType) -> None:
    molecule = core.Molecule(["H", "H"], [[0, 0, 0], [0, 0, 0.74]])
    refused([salt(core), molecule], ValueError, "structures[1] must be periodic, not a Molecule")
    slab = core.Structure(core.Lattice(4 * np.eye(3), pbc=(True, True, False)), ["C"], [[0, 0, 0]])
    message = "structures[0] must be periodic in all three directions, not pbc=[True, True, False]"
    refused([slab], ValueError, message)


@pytest.mark.parametrize("pbc", [(False, False, False), (True, False, True)])
def test_not_periodic_ase(ase: ModuleType, pbc: tuple[bool, bool, bool]) -> None:
    atoms = ase.Atoms("C", cell=[4] * 3, pbc=pbc)
    refused([atoms], ValueError, f"structures[0] must be periodic in all three directions, not pbc={list(pbc)}")


def test_no_atoms(core: ModuleType, ase: ModuleType) -> None:
    message = "structures[0] must have at least one atom, not none"
    refused([core.Structure(core.Lattice.cubic(3), [], [])], ValueError, message)
    refused([ase.Atoms(cell=[3] * 3, pbc=True)], ValueError, message)


def test_unknown_elements_pymatgen(core: ModuleType) -> None:
    def of(site: Any) -> list[Any]:
        return [core.Structure(core.Lattice.cubic(3), [site], [[0, 0, 0]])]

    message = "structures[0] must be of the elements 1 (H) to 98 (Cf), not "
    refused(of("Es"), ValueError, message + "Es")
    refused(of(core.DummySpecies("X")), ValueError, message + "X0+")
    refused(of({"Na": 0.5, "Lr": 0.5}), ValueError, message + "Lr")


def test_unknown_elements_ase(ase: ModuleType) -> None:
    message = "structures[0] must be of the elements 1 (H) to 98 (Cf), not "
    for symbol in ("X", "Es", "Og"):
        refused([ase.Atoms(symbol, cell=[3] * 3, pbc=True)], ValueError, message + symbol)
    refused([ase.Atoms(numbers=[150], cell=[3] * 3, pbc=True)], ValueError, message + "150")
    refused([ase.Atoms(numbers=[-1], cell=[3] * 3, pbc=True)], ValueError, message + "-1")


def test_occupancies_of_other_atoms(ase: ModuleType) -> None:
    """ase keeps the sites of the file when atoms are replaced or added; their shares are not those of the new ones."""
    message = "structures[0] must have each atom's element in its site of info['occupancy'], but atom "
    atoms = read_cif(ase)
    atoms.symbols[1] = "K"
    refused([atoms], ValueError, message + "1 is K and its site is {'Na': 1")
    atoms = read_cif(ase)
    atoms.extend(ase.Atoms("O", positions=[[1, 1, 1]]))
    refused([atoms], ValueError, message + "3 is O and its site is {")
    atoms = read_cif(ase)
    del atoms.info["occupancy"]["3"]
    refused([atoms], ValueError, message + "2 is Cl and its site is {}")


def test_no_volume(core: ModuleType, ase: ModuleType) -> None:
    flat = [[1.0, 0, 0], [0, 1.0, 0], [1.0, 1.0, 0]]
    message = f"structures[0] must have a volume, but its lattice is {[[float(x) for x in row] for row in flat]}"
    refused([core.Structure(core.Lattice(flat), ["H"], [[0, 0, 0]])], ValueError, message)
    refused([ase.Atoms("H", cell=flat, pbc=True)], ValueError, message)
    refused([ase.Atoms("H", pbc=True)], ValueError, "structures[0] must have a volume, but its lattice is [[0.0, 0.0")


def test_a_left_handed_cell_has_a_volume(core: ModuleType) -> None:
    lattice = core.Lattice([[0, 3, 0], [3, 0, 0], [0, 0, 3]])
    batch = cf.CrystalBatch.from_structures([core.Structure(lattice, ["H"], [[0, 0, 0]])])
    assert float(torch.linalg.det(batch.lattice[0])) == pytest.approx(-27)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(core: ModuleType, ase: ModuleType, value: float) -> None:
    positions = [[0, 0, 0], [1, value, 1]]
    message = f"structures[0] must have finite positions, not {value}"
    refused([ase.Atoms("H2", positions=positions, cell=[3] * 3, pbc=True)], ValueError, message)
    molecule = core.Structure(core.Lattice.cubic(3), ["H", "H"], [[0, 0, 0], [0, 0, float("nan")]])
    refused([molecule], ValueError, "structures[0] must have finite positions, not nan")
    cell = [[3, 0, 0], [0, value, 0], [0, 0, 3]]
    refused([ase.Atoms("H", cell=cell, pbc=True)], ValueError, f"structures[0] must have finite lattice, not {value}")
