"""Structures as read_samples parses them: warned of, made primitive, in many processes, and kept in a cache."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from crystal_files import ase_io, atoms, cif, core, pair, table, write_csv, write_json
from crystals import aflow_prototypes

import crystalformer as cf
from crystalformer.data import Samples, bulk_parsing, read_samples


def test_a_cif_without_the_hydrogen_of_its_formula(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = cif(pair()[0])
    formula = "_chemical_formula_sum   'Na4 Cl4'"
    assert formula in text
    (tmp_path / "a.cif").write_text(text.replace(formula, "_chemical_formula_sum   'Na4 Cl4 H8'"))
    (tmp_path / "b.cif").write_text(text)
    for _ in range(3):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="crystalformer.data"):
            samples, problems = read_samples(tmp_path, cache=tmp_path / "cache")
        assert (samples.ids, problems) == (("a", "b"), [])
        (message,) = caplog.messages
        assert message == (
            f"{tmp_path}: 1 of 2 CIFs differ from their formulas, first a: "
            "Missing elements H from PMG structure composition"
        )


def test_deuterium_is_hydrogen(tmp_path: Path) -> None:
    (tmp_path / "a.cif").write_text(cif(core.Structure(core.Lattice.cubic(3), ["D"], [[0, 0, 0]])))
    samples, _ = read_samples(tmp_path / "a.cif")
    assert cf.CrystalBatch.from_structures(samples.structures).species.tolist() == [1]


# Primitive cells ------------------------------------------------------------------------------------------------------


def test_primitive_cells_are_the_same_crystal(tmp_path: Path) -> None:
    salt = pair()[0]
    write_json(tmp_path / "a.json", [(salt * (2, 1, 1)).as_dict(), salt.as_dict()])
    ase_io.write(tmp_path / "b.extxyz", atoms(salt))
    model = cf.Crystalformer(
        cf.CrystalformerConfig(model_dim=16, num_heads=2, num_blocks=2, ff_dim=16, num_basis=8, r0=(0.7,))
    ).double()
    for name in ("a.json", "b.extxyz"):
        samples, problems = read_samples(tmp_path / name, primitive=True)
        assert problems == []
        assert {len(x) for x in samples.structures} == {2}
        with torch.no_grad():
            reduced = model(cf.CrystalBatch.from_structures(samples.structures, torch.float64))
            full = model(cf.CrystalBatch.from_structures([salt], torch.float64))
        assert torch.allclose(reduced, full.expand_as(reduced), rtol=1e-5, atol=0)


def test_distortions_are_not_averaged_away(tmp_path: Path) -> None:
    double = pair()[0] * (2, 1, 1)
    double.translate_sites([0], [0.1, 0, 0], frac_coords=False)
    write_json(tmp_path / "a.json", double.as_dict())
    samples, _ = read_samples(tmp_path / "a.json", primitive=True)
    assert len(samples.structures[0]) == 16


# In parallel, and kept ------------------------------------------------------------------------------------------------


def identical(one: Samples, other: Samples) -> bool:
    return one.ids == other.ids and all(
        a.species_and_occu == b.species_and_occu
        and a.labels == b.labels
        and np.array_equal(a.cart_coords, b.cart_coords)
        and np.array_equal(a.frac_coords, b.frac_coords)
        and np.array_equal(a.lattice.matrix, b.lattice.matrix)
        for a, b in zip(one.structures, other.structures, strict=True)
    )


def test_processes_give_the_same(tmp_path: Path) -> None:
    structures = [cif(x) for x in aflow_prototypes(limit=70, max_atoms=8)]
    rows = [[f"x{i}", x] for i, x in enumerate(structures)]
    rows.insert(50, ["bad", "data_x"])
    path = write_csv(tmp_path / "t.csv", [["id", "cif"], *rows])
    seen: list[tuple[int, int]] = []
    one, problems = read_samples(path)
    two, others = read_samples(path, workers=2, progress=lambda *x: seen.append(x))
    assert identical(one, two)
    assert problems == others
    assert [x.id for x in problems] == ["bad"]
    assert seen[-1] == (len(rows), len(rows))


@pytest.mark.parametrize("primitive", [False, True])
def test_parsed_structures_are_kept(primitive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    charged = pair()[0].copy()
    charged.add_oxidation_state_by_element({"Na": 1, "Cl": -1})
    disordered = core.Structure(core.Lattice.cubic(3), [{"Au": 0.5, "Cu": 0.25}], [[0, 0, 0]])
    structures = [*pair(), charged, disordered, core.Structure(core.Lattice.cubic(3), ["D"], [[0, 0, 0]])]
    path = write_csv(tmp_path / "t.csv", [["id", "cif"], *([f"x{i}", cif(s)] for i, s in enumerate(structures))])
    fresh = read_samples(path, primitive=primitive)[0]
    first = read_samples(path, primitive=primitive, cache=tmp_path / "cache")[0]
    assert read_samples(path, primitive=not primitive, cache=tmp_path / "cache")[0].ids == fresh.ids
    monkeypatch.setattr(bulk_parsing, "parse", lambda *_: pytest.fail("parsed again"))
    again = read_samples(path, primitive=primitive, cache=tmp_path / "cache")[0]
    assert identical(fresh, first)
    assert identical(fresh, again)
    assert {str(site.specie) for site in fresh.structures[2]} == {"Na+", "Cl-"}


def test_what_does_not_come_back_whole_is_not_kept(tmp_path: Path) -> None:
    magnetic = pair()[0].copy()
    magnetic.add_site_property("magmom", [1.0] * len(magnetic))
    path = write_json(tmp_path / "a.json", magnetic.as_dict())
    for _ in range(2):
        (structure,) = read_samples(path, cache=tmp_path / "cache")[0].structures
        assert structure.site_properties["magmom"] == [1.0] * 8
    assert not (tmp_path / "cache").exists()


def test_damage_to_kept_structures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_csv(tmp_path / "t.csv", table())
    fresh = read_samples(path, cache=tmp_path / "cache")[0]
    (shard,) = (tmp_path / "cache").iterdir()
    data = bytearray(shard.read_bytes())
    data[-9] ^= 1
    shard.write_bytes(data)
    with caplog.at_level(logging.WARNING, logger="crystalformer.data"):
        assert identical(read_samples(path, cache=tmp_path / "cache")[0], fresh)
    (message,) = caplog.messages
    assert message.startswith(f"{shard} is damaged, so its content is made again: damaged: its SHA-256 is ")
