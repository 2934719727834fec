"""Orbits of equivalent atoms: which they are, in any cell, and models on one row for each."""

import csv
import dataclasses
import functools
import json

import numpy as np
import pytest
import torch
from command_line import SIZES
from crystals import DISORDERED, aflow_prototypes, import_or_skip
from operators import operator

import crystalformer as cf
from crystalformer.app import cli
from crystalformer.attention.layouts import layout as make_layout
from crystalformer.attention.settings import Settings
from crystalformer.data import crystals as crystals_module
from crystalformer.data import equivalent_atoms as equivalent_atoms_module
from crystalformer.geometry.orbit_images import build_orbit_images, merge

import_or_skip("spglib", reason="finds the symmetry")


def refined(structure, radius: float = 12.0, spread: float = 1e-4) -> np.ndarray:
    """Colour refinement: a class is split as long as two of its atoms see different numbers of atoms of some class at
    some distance. The coarsest partition for sums over distances; orbits must refine it."""
    i, j, _, d = structure.get_neighbor_list(radius)
    inside = d < radius - 0.01
    i, j, d = i[inside], j[inside], d[inside]
    order = np.argsort(d)
    shell = np.empty(len(d), int)
    shell[order] = np.cumsum(np.diff(d[order], prepend=0.0) > spread)
    color = np.unique([site.species_string for site in structure], return_inverse=True)[1]
    while True:
        seen = [(color[a], sorted(zip(color[j[i == a]], shell[i == a], strict=True))) for a in range(len(structure))]
        finer = np.unique([str(x) for x in seen], return_inverse=True)[1]
        if len(set(finer)) == len(set(color)):
            return color
        color = finer


@pytest.mark.parametrize("k", range(12))
def test_orbits_are_classes_of_atoms_that_see_the_same(k):
    structure = aflow_prototypes(limit=12, max_atoms=10)[k]
    orbit, color = cf.equivalent_atoms(structure).orbit, refined(structure)
    assert len({*zip(orbit.tolist(), color.tolist(), strict=True)}) == len(set(orbit.tolist()))
    assert len(set(orbit.tolist())) < len(structure) or len(structure) == len(set(color.tolist()))


@pytest.mark.parametrize(
    "cell", [(2, 1, 1), (3, 2, 2), [[1, 1, 0], [0, 1, 0], [-1, 2, 1]], [[0, 1, 1], [1, 0, 1], [1, 1, 0]]]
)
def test_any_cell_of_a_crystal_has_the_same_orbits(cell):
    for structure in aflow_prototypes(limit=20, max_atoms=12):
        one = cf.equivalent_atoms(structure)
        larger = structure.copy()
        larger.make_supercell(cell)
        other = cf.equivalent_atoms(larger)
        assert (other.number, sorted(other.multiplicity)) == (one.number, sorted(one.multiplicity))
        whole = np.linalg.solve(other.lattice.T, larger.lattice.matrix.T).T
        np.testing.assert_allclose(whole, np.round(whole), atol=1e-9)


def test_species_and_occupancies_are_part_of_the_symmetry():
    core = import_or_skip("pymatgen.core", reason="makes the crystals")
    sites = [[0, 0, 0], [0.5, 0.5, 0.5]]
    cubic = core.Lattice.cubic(3.0)
    same = core.Structure(cubic, ["Fe", "Fe"], sites)
    assert cf.equivalent_atoms(same).orbit.tolist() == [0, 0]
    assert len(cf.equivalent_atoms(same).atoms) == 1  # body-centred
    assert cf.equivalent_atoms(core.Structure(cubic, ["Fe", "Al"], sites)).orbit.tolist() == [0, 1]
    mixed = [{"Au": 0.75, "Cu": 0.25}, {"Au": 0.5, "Cu": 0.5}]
    assert cf.equivalent_atoms(core.Structure(cubic, mixed, sites)).orbit.tolist() == [0, 1]
    assert cf.equivalent_atoms(core.Structure(cubic, [mixed[0]] * 2, sites)).orbit.tolist() == [0, 0]
    assert cf.equivalent_atoms(same, symmetry_tol=0.0).orbit.tolist() == [0, 1]
    on_top = core.Structure(cubic, ["Fe", "Fe"], [[0, 0, 0], [0, 0, 1e-7]])
    assert cf.equivalent_atoms(on_top).orbit.tolist() == [0, 1]
    with pytest.raises(TypeError, match="structure must be a pymatgen Structure or an ase Atoms, not int"):
        cf.equivalent_atoms(3)
    with pytest.raises(ValueError, match="symmetry_tol must be"):
        cf.equivalent_atoms(same, symmetry_tol=-1.0)


@functools.lru_cache
def batch(limit: int = 16, most: int = 16) -> cf.CrystalBatch:
    return cf.CrystalBatch.from_structures(aflow_prototypes(limit, most), torch.float64, symmetry_tol=1e-5)


@pytest.mark.skipif(cf.available_backends()["cpu"] is not True, reason="the compiled CPU kernels are not here")
def test_compiled_lists_are_those_of_the_reference():
    x = batch().orbit_atoms
    few = build_orbit_images(x.positions, x.lattice, x.ptr, x.orbit)
    every = cf.build_images(x.positions, x.lattice, x.ptr)
    row_ptr, col, distance, repeats = merge(every, x.positions, x.lattice, x.orbit, x.first, 1e-5)
    assert torch.equal(few.row_ptr, row_ptr)
    assert torch.equal(few.col, col)
    torch.testing.assert_close(few.distance, distance, rtol=0.0, atol=1e-9)
    assert torch.equal(few.repeats, repeats)
    torch.testing.assert_close(few.cutoff, every.cutoff)
    # n_I m(I,J,d) = n_J m(J,I,d), and all images of a crystal's atoms are there.
    row, size = torch.repeat_interleave(row_ptr.diff()), x.multiplicity.double()
    total = torch.zeros(len(x.lattice)).double()
    total.index_add_(0, torch.repeat_interleave(few.ptr.diff())[row], size[row] * repeats.double())
    assert torch.equal(total.long(), every.row_ptr[x.ptr].diff())


@pytest.mark.skipif(cf.available_backends()["cpu"] is not True, reason="the compiled CPU kernels are not here")
def test_compiled_lists_of_pairs_weigh_what_those_of_the_reference_do():
    """Compiled, all pairs of two orbits have one cutoff; in the reference each pair of atoms has its own."""
    x = batch().orbit_atoms
    few = build_orbit_images(x.positions, x.lattice, x.ptr, x.orbit, every_pair=True)
    every = cf.build_images(x.positions, x.lattice, x.ptr, every_pair=True)
    number, weights = len(x.first), []
    reference = merge(every, x.positions, x.lattice, x.orbit, x.first, 1e-5)
    for row_ptr, col, distance, repeats in ((few.row_ptr, few.col, few.distance, few.repeats), reference):
        weight = repeats.double() * torch.exp(-0.1275 * distance.square())
        pair = torch.repeat_interleave(row_ptr.diff()) * number + col
        weights.append(torch.zeros(number**2).double().index_add_(0, pair, weight))
    torch.testing.assert_close(*weights, rtol=2e-6, atol=0.0)


def test_orbits_are_checked():
    x = batch().orbit_atoms
    good = (x.positions, x.lattice, x.ptr)
    for orbit in (x.orbit + 1, x.orbit.flip(0), x.orbit * 2):
        with pytest.raises(ValueError, match=r"^orbit must be numbered 0, 1, 2, \.\.\. from crystal to crystal"):
            build_orbit_images(*good, orbit)
    with pytest.raises(ValueError, match=r"^orbit must have shape"):
        build_orbit_images(*good, x.orbit[:-1])
    with pytest.raises(TypeError, match=r"^orbit must be torch.int64"):
        build_orbit_images(*good, x.orbit.int())


def model(domain: str, tol: float = 1e-11) -> cf.Crystalformer:
    torch.manual_seed(0)
    sizes = dict(num_blocks=2, model_dim=16, num_heads=4, ff_dim=16, num_basis=16)
    return cf.Crystalformer(cf.CrystalformerConfig(domain=domain, tol=tol, **sizes)).double()


def results(network, x: cf.CrystalBatch) -> tuple[torch.Tensor, ...]:
    out = network(x)
    return out.detach(), *torch.autograd.grad(out.sum(), [*network.parameters()])


@pytest.mark.parametrize("domain", ["real", "reciprocal", "multihead", "real_reciprocal"])
def test_a_model_on_orbits_is_the_model_on_atoms(domain):
    structures = aflow_prototypes(limit=12, max_atoms=12)
    structures = [*structures, *(s * (2, 1, 1) for s in structures[:4])]
    every = cf.CrystalBatch.from_structures(structures, torch.float64)
    few = cf.CrystalBatch.from_structures(structures, torch.float64, symmetry_tol=1e-5)
    assert 2 * few.num_atoms < every.num_atoms
    network = model(domain)
    network.calibrate(every)
    exact, found = results(network, every), results(network, few)
    scale = max(float(g.abs().max()) for g in exact[1:])
    torch.testing.assert_close(found[0], exact[0], rtol=0.0, atol=1e-9 * float(exact[0].abs().max()))
    for one, other in zip(found[1:], exact[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=1e-9 * scale)
    atoms = cf.app.predictor.Predictor(network, 1e-5).encode(structures, atoms=True)
    for one, other in zip(atoms, cf.app.predictor.Predictor(network, 0.0).encode(structures, atoms=True), strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=1e-9 * float(other.abs().max()))


@pytest.mark.parametrize("distortion", [0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 0.1])
def test_nearly_symmetric_crystals(distortion):
    """More orbits, never wrong numbers: features move by no more than the tolerance makes distances move."""
    rng = np.random.default_rng(0)
    structures = []
    for structure in aflow_prototypes(limit=8, max_atoms=8):
        moved = structure.copy()
        for i in range(len(moved)):
            moved.translate_sites([i], distortion * rng.normal(size=3) / 3, frac_coords=False)
        structures.append(moved)
    every = cf.CrystalBatch.from_structures(structures, torch.float64)
    few = cf.CrystalBatch.from_structures(structures, torch.float64, symmetry_tol=1e-5)
    if distortion >= 1e-3:
        assert few.num_atoms == every.num_atoms
    network = model("real")
    network.calibrate(every)
    exact, found = network(every).detach(), network(few).detach()
    bound = 1e-9 if distortion in (0.0, 0.1) else 20 * min(distortion, 1e-5)
    assert float((found - exact).abs().max()) < bound * float(exact.abs().max())


def test_disordered_crystals():
    core = import_or_skip("pymatgen.core", reason="makes the crystals")
    symbols = [{"Au": 0.75, "Cu": 0.25}] * 4 + ["Cl"] * 4
    sites = [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0], [0.5] * 3, [0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5]]
    structure = core.Structure(core.Lattice.cubic(5.0), symbols, sites)
    assert len(DISORDERED) == 3
    few = cf.CrystalBatch.from_structures([structure], torch.float64, symmetry_tol=1e-5)
    assert few.species.shape == (2, 98)
    network = model("real")
    every = cf.CrystalBatch.from_structures([structure], torch.float64)
    network.calibrate(every)
    torch.testing.assert_close(network(few), network(every), rtol=1e-9, atol=0.0)


def test_batches_of_orbits_join_and_move():
    structures = aflow_prototypes(limit=6, max_atoms=8)
    whole = cf.CrystalBatch.from_structures(structures, torch.float64, symmetry_tol=1e-5)
    parts = [cf.CrystalBatch.from_structures([s], torch.float64, symmetry_tol=1e-5) for s in structures]
    network = model("multihead")
    network.calibrate(whole)
    joined = cf.CrystalBatch.cat([network.prepare(x) for x in parts])
    assert torch.equal(joined.images.distance, network.build_images(whole).distance)
    torch.testing.assert_close(network(joined), network(whole), rtol=1e-12, atol=0.0)
    for name in ("ptr", "atom_ptr", "positions", "g"):
        assert torch.equal(getattr(joined.wave_vectors, name), getattr(network.build_wave_vectors(whole), name)), name
    assert joined.to("cpu").to(torch.float32).orbit_atoms.positions.dtype == torch.float64
    with pytest.raises(ValueError, match="batches must be all of orbits or all of atoms"):
        cf.CrystalBatch.cat([parts[0], cf.CrystalBatch.from_structures(structures[1:2], torch.float64)])


def test_the_command_line_reduces_by_default(tmp_path, capsys):
    """And the models trained on rows of orbits and of atoms predict the same."""
    core = import_or_skip("pymatgen.core", reason="makes the crystals")
    table = [["material_id", "energy", "cif"]]
    for number in range(12):
        cell = core.Lattice.cubic(5.0 + 0.1 * number)
        salt = core.Structure.from_spacegroup("Fm-3m", cell, ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
        table.append([f"salt-{number}", str(number**2 - 30.0), salt.to(fmt="cif")])
    data = tmp_path / "salts.csv"
    with data.open("w", newline="") as file:
        csv.writer(file).writerows(table)
    predicted = {}
    for name, option in (("orbits", []), ("atoms", ["--symmetry_tol", "0"])):
        out = tmp_path / name
        arguments = ["train", "--data", data, "--target", "energy", "--out", out, "--epochs", "2", "--batch_size", "4"]
        arguments += ["--cache", tmp_path / "cache", *(f"--model.{x}" for x in SIZES.split()), *option]
        assert cli.main([str(x) for x in arguments]) == 0
        metrics = json.loads((out / "metrics.json").read_text())
        said = f"{metrics['atoms']:,} atoms, of which symmetry makes {metrics['rows']:,} rows."
        assert said in (out / "README.md").read_text()
        assert (metrics["rows"] < metrics["atoms"]) == (name == "orbits")
        assert ("of which symmetry makes" in capsys.readouterr().out) == (name == "orbits")
        found = tmp_path / f"{name}.csv"
        assert cli.main(["predict", str(out), str(data), "--out", str(found), *option]) == 0
        predicted[name] = [float(row["energy"]) for row in csv.DictReader(found.read_text().splitlines())]
    assert predicted["orbits"] == pytest.approx(predicted["atoms"], rel=1e-4)
    assert len(set(predicted["atoms"])) == 12
    capsys.readouterr()
    assert cli.main(["predict", str(out), str(data), "--symmetry_tol", "-1"]) == 2
    assert "symmetry_tol must be" in capsys.readouterr().err


def check_op(backend, name, *arguments):
    torch.library.opcheck(operator(backend, name), arguments)


@pytest.mark.skipif(cf.available_backends()["cpu"] is not True, reason="the compiled CPU kernels are not here")
def test_opcheck():
    x = batch(4, 6).orbit_atoms
    orbit_ptr, decay = batch(4, 6).ptr, torch.full((len(x.lattice),), 0.5).double()
    settings = (decay, 1e-3, 4.0, 0.01, None, False, 1 << 20, 1e-5)
    arguments = (x.positions, x.lattice, x.ptr, x.orbit, orbit_ptr, *settings)
    torch.library.opcheck(torch.ops.crystalformer.cpu_orbit_images.default, arguments)
    images = build_orbit_images(x.positions, x.lattice, x.ptr, x.orbit, 0.5, 1e-3)
    number = images.num_atoms
    waves = cf.build_wave_vectors(x.lattice, orbit_ptr, 0.5, 1e-3, positions=x.positions, orbit=x.orbit)
    q, k, v = (torch.randn(number, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    a = torch.full((number, 2), 0.6, dtype=torch.float64, requires_grad=True)
    weight, told = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True), Settings(r_max=6.0, of_orbits=1.0)
    geometry = (x.positions[x.first], x.lattice)
    for backend in ("reference", "cpu"):
        layout = make_layout(backend, images, *geometry, 4, told, by_pair=False, merge=True)
        lists, more = (images.packed(), layout), (waves.packed(), waves.largest)
        run = functools.partial(check_op, backend)
        halves = [t.detach().requires_grad_() for t in (a[:, :1], a[:, 1:], weight[:1])]
        run("attention", q, k, v, a, weight, *geometry, *lists, told)
        run("reciprocal", q, k, v, a, *geometry, *more)
        run("dual_space", q, k, v, *halves, *geometry, *lists, *more, told)


@pytest.mark.filterwarnings("ignore")  # torch.compile's own, which change from release to release
def test_a_compiled_model_takes_orbits():
    network, few = model("multihead"), batch(4, 6)
    network.calibrate(few)
    few = network.prepare(few)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(network, fullgraph=True, backend="aot_eager")(few), network(few))


def test_what_orbits_do_not_serve_is_refused():
    structures = aflow_prototypes(limit=6, max_atoms=8)
    few = cf.CrystalBatch.from_structures(structures, torch.float64, symmetry_tol=1e-5)
    network = model("reciprocal")
    network.calibrate(few)
    for name in ("positions", "lattice"):
        moving = dataclasses.replace(few, **{name: getattr(few, name).clone().requires_grad_()})
        with pytest.raises(ValueError, match=r"^wave_vectors must be of all atoms, not of orbits, where positions or"):
            network(moving)
    first_atoms = cf.build_images(few.positions, few.lattice, few.ptr)
    with pytest.raises(ValueError, match=r"batch.images must be of orbits if, and only if, the batch is"):
        model("real")(dataclasses.replace(few, images=first_atoms))
    of_atoms = cf.build_wave_vectors(few.lattice, few.ptr)
    for rows, waves in ((few, of_atoms), (dataclasses.replace(few, orbit_atoms=None), network.build_wave_vectors(few))):
        with pytest.raises(ValueError, match=r"batch.wave_vectors must be of orbits if, and only if, the batch is"):
            network(dataclasses.replace(rows, wave_vectors=waves))
    q = torch.ones(few.num_atoms, 2, 1, dtype=torch.float64)
    lists = (model("real", 1e-6).build_images(few), cf.build_wave_vectors(few.lattice, few.ptr, 0.5))
    with pytest.raises(ValueError, match=r"^wave_vectors must be of orbits if, and only if, images are"):
        cf.dual_space_attention(q, q, q, q[:, :1, 0], q[:, :1, 0], few.positions, few.lattice, *lists)


def test_calibration_is_that_of_all_atoms():
    structures = [s * (1, 1, 1 + i % 2) for i, s in enumerate(aflow_prototypes(limit=6, max_atoms=12))]
    one, other = model("real"), model("real")
    one.calibrate(cf.CrystalBatch.from_structures(structures, torch.float64))
    other.calibrate(cf.CrystalBatch.from_structures(structures, torch.float64, symmetry_tol=1e-5))
    for name, x in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], x, rtol=1e-9, atol=1e-12)


def test_no_tolerance_merges_what_rounding_parts():
    for structure in aflow_prototypes(limit=8, max_atoms=4):
        x = cf.CrystalBatch.from_structures([structure], torch.float64, symmetry_tol=1e-5)
        y = x.orbit_atoms
        images = build_orbit_images(y.positions, y.lattice, y.ptr, y.orbit, symmetry_tol=0.0)
        q = torch.ones(x.num_atoms, 1, 1, dtype=torch.float64)
        assert cf.periodic_attention(q, q, q, q[:, 0], x.positions, x.lattice, images).isfinite().all()


@pytest.mark.skipif(cf.available_backends()["cpu"] is not True, reason="the compiled CPU kernels are not here")
def test_an_invalid_list_of_orbits_is_refused_on_two_threads():
    """Rows are packed before the rows that check their mirrors have been looked at."""
    number, before = 41, torch.get_num_threads()
    grid = torch.rand(number, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    geometry = 9 * grid, 9 * torch.eye(3, dtype=torch.float64)[None]
    images = build_orbit_images(*geometry, torch.tensor([0, number]), torch.arange(number))
    row = torch.repeat_interleave(images.row_ptr.diff())
    bad = torch.where((row == 40) & (images.col == 39), -1e3 * images.distance, images.distance)
    q = torch.ones(number, 1, 1, dtype=torch.float64)
    try:
        torch.set_num_threads(2)
        for _ in range(5):
            spoilt = dataclasses.replace(images, distance=bad)
            with pytest.raises(ValueError, match=r"^images must"):
                cf.periodic_attention(q, q, q, q[:, 0], *geometry, spoilt, backend="cpu")
    finally:
        torch.set_num_threads(before)


def test_orbits_and_their_lists_are_found_again(tmp_path, monkeypatch):
    """In any order and company; those of another tolerance are not."""
    structures = [s * (1, 1, 2) for s in aflow_prototypes(limit=5, max_atoms=8)]
    build = functools.partial(crystals_module.build_crystals, settings=model("real"), cache=tmp_path)
    first = build(structures, symmetry_tol=1e-5)
    with monkeypatch.context() as patch:
        patch.setattr(equivalent_atoms_module, "find_orbits", None)
        patch.setattr(crystals_module, "build_orbit_images", None)
        again = build(structures[::-1], symmetry_tol=1e-5)[::-1]
        with pytest.raises(TypeError):
            build(structures, symmetry_tol=1e-4)
    for one, other in zip(first, again, strict=True):
        for x, y in ((one.images, other.images), (one.orbit_atoms, other.orbit_atoms)):
            tensors = [[t for t in vars(z).values() if isinstance(t, torch.Tensor)] for z in (x, y)]
            assert all(map(torch.equal, *tensors)), len(tensors[0])
        assert torch.equal(one.positions, other.positions)
    assert len(build(structures, symmetry_tol=1e-4)) == 5
