"""build_crystals and its cache: the same lists as without, and no damage to the files goes unnoticed."""

import logging
import multiprocessing
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
import torch
from crystals import aflow_prototypes, import_or_skip
from safetensors.torch import load_file, save_file

import crystalformer as cf
from crystalformer.data import crystals as module
from crystalformer.data.crystals import ImageSettings, build_crystals

TENSORS = ("row_ptr", "col", "shift", "ptr", "cutoff")
NUMBERS = ("num_pairs", "decay_min", "tol", "logit_range", "every_pair")
SMALL = cf.CrystalformerConfig(model_dim=16, num_heads=2, num_blocks=2, ff_dim=16, num_basis=8, r0=(0.7,), tol=1e-4)


def prototypes(limit: int = 12) -> list[Any]:
    return aflow_prototypes(limit=limit, max_atoms=12)


def assert_same(one: list[cf.CrystalBatch], other: list[cf.CrystalBatch]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(getattr(a, x), getattr(b, x)) for x in ("species", "positions", "lattice", "ptr"))
        assert a.images is not None
        assert b.images is not None
        for name in TENSORS:
            x, y = getattr(a.images, name), getattr(b.images, name)
            assert x.dtype == y.dtype
            assert torch.equal(x, y), name
        assert all(getattr(a.images, name) == getattr(b.images, name) for name in NUMBERS)


def one_by_one(structures: list[Any], dtype: torch.dtype | None = None) -> list[cf.CrystalBatch]:
    model, result = cf.Crystalformer(SMALL), []
    for structure in structures:
        crystal = cf.CrystalBatch.from_structures([structure], dtype)
        crystal.images = model.build_images(crystal)
        result.append(crystal)
    return result


def shards(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def forbid_building(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "build_images", lambda *_, **__: pytest.fail("built again"))


# What is built --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("atoms", [1, 30, 1 << 15])
def test_built_together_is_built_alone(atoms: int, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ATOMS_AT_ONCE", atoms)
    core = import_or_skip("pymatgen.core", reason="makes a disordered crystal")
    disordered = core.Structure(core.Lattice.cubic(3), [{"Au": 0.5, "Cu": 0.5}], [[0, 0, 0]])
    structures = [*prototypes(), disordered]
    seen: list[tuple[int, int]] = []
    built = build_crystals(structures, SMALL, dtype=dtype, workers=2, progress=lambda *x: seen.append(x))
    assert_same(built, one_by_one(structures, dtype))
    assert seen[-1] == (13, 13)
    assert len(seen) == {1: 13, 1 << 15: 1}.get(atoms, len(seen))
    assert torch.get_num_threads() == 1


def test_the_model_computes_with_them_what_it_computes_without(tmp_path: Path) -> None:
    model = cf.Crystalformer(SMALL).eval()
    structures = prototypes()
    build_crystals(structures, model, cache=tmp_path)
    batch = cf.CrystalBatch.cat(build_crystals(structures, model, cache=tmp_path))
    with torch.no_grad():
        assert torch.equal(model(batch), model(cf.CrystalBatch.from_structures(structures)))


def test_a_model_without_images(tmp_path: Path) -> None:
    config = cf.CrystalformerConfig(domain="reciprocal")
    for crystal in build_crystals(prototypes(2), config, cache=tmp_path):
        assert crystal.images is None
        assert crystal.wave_vectors is not None
    assert not shards(tmp_path)


def test_every_pair_and_no_crystals(tmp_path: Path) -> None:
    settings = ImageSettings(decay_min=0.5, tol=1e-3, every_pair=True)
    for _ in range(2):
        (crystal,) = build_crystals(prototypes(1), settings, cache=tmp_path)
        assert crystal.images is not None
        expected = cf.build_images(
            crystal.positions, crystal.lattice, crystal.ptr, decay_min=0.5, tol=1e-3, every_pair=True
        )
        assert torch.equal(crystal.images.shift, expected.shift)
        assert crystal.images.every_pair
    assert build_crystals([], SMALL, cache=tmp_path) == []


def test_errors_name_the_structure() -> None:
    with pytest.raises(TypeError, match=r"^structures\[1\] must be a pymatgen Structure or an ase Atoms, not int"):
        build_crystals([prototypes(1)[0], 3], SMALL)
    with pytest.raises(ValueError, match=r"^workers must be an integer, at least 0 and at most 1024, not -1"):
        build_crystals([], SMALL, workers=-1)


# What is kept ---------------------------------------------------------------------------------------------------------


def test_from_the_cache_in_any_order_and_company(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    structures = prototypes()
    build_crystals(structures[:5], SMALL, cache=tmp_path)
    build_crystals(structures[3:], SMALL, cache=tmp_path)
    assert len(shards(tmp_path)) == 2
    expected = one_by_one(structures)
    forbid_building(monkeypatch)
    order = [7, 0, 11, 3, 3]
    assert_same(build_crystals([structures[i] for i in order], SMALL, cache=tmp_path), [expected[i] for i in order])


def test_only_what_is_new_is_built_and_twins_are_written_once(tmp_path: Path) -> None:
    structures = prototypes(4)
    build_crystals([*structures[:3], structures[0]], SMALL, cache=tmp_path)
    (first,) = shards(tmp_path)
    assert len(load_file(first)["keys"]) == 3
    build_crystals(structures, SMALL, cache=tmp_path)
    (second,) = set(shards(tmp_path)) - {first}
    assert len(load_file(second)["keys"]) == 1


@pytest.mark.parametrize(
    "change",
    [{"tol": 1e-3}, {"logit_range": 2.0}, {"decay_min": 0.3}, {"every_pair": True}, "positions", "lattice", "species"],
)
def test_another_crystal_or_setting_is_another_list(
    change: str | dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = import_or_skip("pymatgen.core", reason="makes crystals")
    settings = ImageSettings(decay_min=0.5, tol=1e-4)

    def crystal(**other: Any) -> Any:
        parts = {"lattice": 4.0, "species": "Cl", "positions": 0.5} | other
        coords = [[0, 0, 0], [parts["positions"]] * 3]
        return core.Structure(core.Lattice.cubic(parts["lattice"]), ["Na", parts["species"]], coords)

    build_crystals([crystal()], settings, cache=tmp_path)
    values: dict[str, Any] = {"positions": 0.5 + 1e-7, "lattice": 4.000001, "species": "Br"}
    if isinstance(change, str):
        build_crystals([crystal(**{change: values[change]})], settings, cache=tmp_path)
    else:
        build_crystals([crystal()], ImageSettings(**({"decay_min": 0.5, "tol": 1e-4} | change)), cache=tmp_path)
    assert len(shards(tmp_path)) == 2
    forbid_building(monkeypatch)
    build_crystals([crystal()], settings, cache=tmp_path)


def test_lists_of_another_version_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_crystals(prototypes(2), SMALL, cache=tmp_path)
    monkeypatch.setattr(module, "LIST_FORMAT", module.LIST_FORMAT + 1)
    build_crystals(prototypes(2), SMALL, cache=tmp_path)
    assert len(shards(tmp_path)) == 2


# What is damaged ------------------------------------------------------------------------------------------------------


def _flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def _foreign(path: Path) -> None:
    save_file({"keys": torch.zeros(3, 16, dtype=torch.uint8)}, path)


def _of_other_settings(path: Path) -> None:
    build_crystals(prototypes(3), ImageSettings(tol=1e-2), cache=path.parent / "other")
    (other,) = shards(path.parent / "other")
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda p: p.write_bytes(p.read_bytes()[:-1]), id="a byte short"),
        pytest.param(lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), id="half of it"),
        pytest.param(lambda p: p.write_bytes(b""), id="empty"),
        pytest.param(lambda p: p.write_bytes(b"a note"), id="not a safetensors file"),
        pytest.param(lambda p: _flip(p, -1), id="a bit of the last number"),
        pytest.param(lambda p: _flip(p, p.stat().st_size // 2), id="a bit in the middle"),
        pytest.param(lambda p: _flip(p, 40), id="a bit of the header"),
        pytest.param(lambda p: _flip(p, 3), id="a bit of the header's length"),
        pytest.param(_foreign, id="of another program"),
        pytest.param(_of_other_settings, id="of other settings, renamed"),
    ],
)
def test_damage_is_reported_and_made_good(
    damage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    structures, folder = prototypes(3), tmp_path / "cache"
    expected = one_by_one(structures)
    build_crystals(structures, SMALL, cache=folder)
    (path,) = shards(folder)
    damage(path)
    with caplog.at_level(logging.WARNING, logger="crystalformer.data"):
        assert_same(build_crystals(structures, SMALL, cache=folder), expected)
    (message,) = caplog.messages
    assert message.startswith(f"{path} is damaged, so its content is made again: ")
    assert "\n" not in message
    forbid_building(monkeypatch)
    caplog.clear()
    assert_same(build_crystals(structures, SMALL, cache=folder), expected)
    assert not caplog.messages


def test_a_folder_that_cannot_be_written_costs_only_the_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    structures = prototypes(2)
    with caplog.at_level(logging.WARNING, logger="crystalformer.data"):
        assert_same(build_crystals(structures, SMALL, cache=tmp_path / "cache"), one_by_one(structures))
    assert len(caplog.messages) == 1
    assert "cannot be written" in caplog.messages[0]


# Many at once ---------------------------------------------------------------------------------------------------------


def _work(folder: str, barrier: Barrier, structures: list[Any]) -> None:
    torch.set_num_threads(1)
    module.ATOMS_AT_ONCE = 20
    expected = one_by_one(structures)
    barrier.wait(60)
    for _ in range(10):
        assert_same(build_crystals(structures, SMALL, cache=folder), expected)
        for path in Path(folder).glob("*.safetensors"):
            path.unlink(missing_ok=True)


def test_processes_that_share_a_folder(tmp_path: Path) -> None:
    """Each reads, writes and removes shards while the other does; neither fails nor gets a wrong list."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    workers = [context.Process(target=_work, args=(str(tmp_path), barrier, prototypes())) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(100)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".safetensors"]
