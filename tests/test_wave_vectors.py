"""The certificate of `build_wave_vectors`: what the sum over G leaves out is at most `tol`, and hardly less.

The oracle is a sum over a box of reciprocal lattice vectors in numpy, converged.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from crystals import KINDS, aflow_prototypes, box_images, geometry, pack, random_crystal

import crystalformer as cf

# The oracle stops where exp(-c |G|²) is e^-27 (2e-12) of tol.
CONVERGED = 27.0
ROUNDING = 1e-4


def basis(lattice: torch.Tensor) -> torch.Tensor:
    return 2 * math.pi * torch.linalg.inv(lattice.double()).T


def case(kind: str, seed: int) -> tuple[float, float]:
    """A decay from 0.2 to 20 Å² and a tol from 1e-3 to 1e-10; the corners come first."""
    corners = [(0.2, 1e-10), (20.0, 1e-3), (0.2, 1e-3), (20.0, 1e-10)]
    rng = np.random.default_rng([KINDS.index(kind), seed])
    return corners[seed] if seed < len(corners) else (0.2 * 100 ** rng.random(), 1e-3 * 1e-7 ** rng.random())


def tail(waves: cf.WaveVectors, lattice: torch.Tensor, decay: float, without: int = 0) -> float:
    """What the vectors but the last few leave out of sum_G exp(-c |G|²), the worst case of all r."""
    b = basis(lattice)
    radius2 = (CONVERGED - math.log(waves.tol)) / decay
    _, _, every = box_images(torch.zeros(1, 3), b, math.sqrt(radius2))
    kept = (waves.g[: waves.num_vectors - without].double() @ b).square().sum(1).numpy()
    # Sums of small terms: those within the kept radius are the kept ones, each G twice and zero once.
    inside = 2 * len(kept) - 1
    return float(np.exp(-decay * np.sort(every)[inside:])[::-1].sum())


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_out_is_at_most_tol(kind: str, seed: int) -> None:
    decay, tol = case(kind, seed)
    _, lattice = random_crystal(kind, seed, num_atoms=1 + seed % 4)
    waves = cf.build_wave_vectors(lattice[None], torch.tensor([0, 1]), decay, tol)
    for factor in (1.0, 1.3, 4.0):
        assert tail(waves, lattice, decay * factor) <= tol * (1 + ROUNDING)
    if waves.num_vectors > 1:  # one vector less would be too few
        assert tail(waves, lattice, decay, without=1) > 0.95 * tol


@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_of_any_two_atoms_is_within_tol(kind: str, backend: str) -> None:
    """Through the public function: one atom at 0, one anywhere, values that show the weight of the second."""
    decay, tol = 1.21, 1e-4
    _, lattice = random_crystal(kind, 3, num_atoms=2)
    ptr, h = torch.tensor([0, 2]), 40
    rng = torch.Generator().manual_seed(0)
    zero, one = torch.zeros(2, h, 1, dtype=torch.float64), torch.tensor([0.0, 1.0]).double()
    for _ in range(3):
        positions = torch.rand(2, 3, generator=rng, dtype=torch.float64) @ lattice
        decays = decay * (1 + torch.rand(2, h, generator=rng, dtype=torch.float64))
        weight = {
            t: cf.reciprocal_attention(
                zero, zero, one[:, None, None].expand(2, h, 1), decays, positions, lattice[None], ptr, t, backend
            )
            for t in (tol, 1e-14)
        }
        # p = S_12 / (S_11 + S_12): both within tol, S_11 at least 1.
        assert (weight[tol] - weight[1e-14]).abs().max() <= 2 * tol


def test_half_of_the_vectors_by_length() -> None:
    crystals = [geometry(s) for s in aflow_prototypes(limit=12, max_atoms=12)]
    _, lattice, ptr = pack(crystals)
    waves = cf.build_wave_vectors(lattice, ptr)
    assert waves.max_atoms == int(ptr.diff().max())
    assert waves.max_vectors == int(waves.g_ptr.diff().max())
    for c, g in enumerate(waves.g.split(waves.g_ptr.diff().tolist())):
        assert g[0].tolist() == [0, 0, 0]
        both = {tuple(x) for x in torch.cat([g, -g]).tolist()}
        assert len(both) == 2 * len(g) - 1
        length = (g.double() @ basis(lattice[c])).norm(dim=1)
        assert (length.diff() > -1e-12).all()


def test_a_batch_is_its_crystals() -> None:
    crystals = [random_crystal(kind, 2, 1 + i) for i, kind in enumerate(KINDS)]
    together = cf.build_wave_vectors(*pack(crystals)[1:], decay_min=1.0, tol=1e-5)
    alone = [cf.build_wave_vectors(*pack([x])[1:], decay_min=1.0, tol=1e-5) for x in crystals]
    joined = cf.WaveVectors.cat(alone)
    for name in ("g", "g_ptr", "ptr"):
        assert torch.equal(getattr(joined, name), getattr(together, name)), name
    for name in ("max_atoms", "max_vectors", "decay_min", "tol", "num_crystals"):
        assert getattr(joined, name) == getattr(together, name), name
    assert together.to("meta").device.type == "meta"
    weaker = cf.WaveVectors.cat([alone[0], cf.build_wave_vectors(*pack(crystals[1:2])[1:], decay_min=2.0, tol=1e-3)])
    assert (weaker.decay_min, weaker.tol) == (2.0, 1e-3)


def test_large_decays_see_the_mean_density_alone() -> None:
    _, lattice, ptr = pack([random_crystal("cubic", 0, 2)])
    assert cf.build_wave_vectors(lattice, ptr, decay_min=500.0).g.tolist() == [[0, 0, 0]]


def test_a_loader_carries_them() -> None:
    model = cf.Crystalformer(cf.CrystalformerConfig(domain="multihead", num_blocks=1, model_dim=32, num_heads=4))
    atoms = [cf.CrystalBatch(torch.tensor([8, 26]), *pack([random_crystal(k, 1, 2)])).to(torch.float32) for k in KINDS]
    prepared = cf.CrystalBatch.cat([model.prepare(x) for x in atoms])
    assert prepared.wave_vectors is not None
    assert model.prepare(prepared).wave_vectors is prepared.wave_vectors
    torch.testing.assert_close(model(prepared), model(cf.CrystalBatch.cat(atoms)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decay_min": 0.0}, r"decay_min must be larger than 0 and finite, not 0\.0"),
        ({"tol": 1.0}, r"tol must be larger than 0 and smaller than 1, not 1\.0"),
        ({"ptr": torch.tensor([0, 1, 2])}, r"ptr must have shape \(C\+1=2\), as lattice, not \(3,\)"),
        ({"lattice": torch.zeros(1, 3, 3)}, r"lattice must have a volume, but lattice\[0\] is singular"),
    ],
)
def test_errors(change: dict, message: str) -> None:
    arguments = {"lattice": torch.eye(3)[None], "ptr": torch.tensor([0, 2])} | change
    with pytest.raises(ValueError, match=message):
        cf.build_wave_vectors(**arguments)


def test_wave_vectors_of_other_crystals_or_decays_are_refused() -> None:
    positions, lattice, ptr = pack([random_crystal("cubic", 0, 2), random_crystal("skewed", 0, 1)])
    x = torch.zeros(3, 2, 4, dtype=torch.float64)
    decay = torch.ones(3, 2, dtype=torch.float64)

    def call(waves: object) -> None:
        cf.reciprocal_attention(x, x, x, decay, positions, lattice, ptr, wave_vectors=waves)  # type: ignore[arg-type]

    call(cf.build_wave_vectors(lattice, ptr, decay_min=1.0))
    with pytest.raises(TypeError, match="wave_vectors must be WaveVectors, from build_wave_vectors, not list"):
        call([])
    with pytest.raises(
        ValueError, match=r"wave_vectors must be of the crystals of ptr, \[0, 2, 3\], not of \[0, 1, 3\]"
    ):
        call(cf.build_wave_vectors(lattice, torch.tensor([0, 1, 3]), decay_min=1.0))
    with pytest.raises(
        ValueError, match=r"decay_reciprocal must be at least 1\.21, the decay_min that wave_vectors were"
    ):
        call(cf.build_wave_vectors(lattice, ptr))


def test_a_model_refuses_wave_vectors_of_a_weaker_certificate() -> None:
    model = cf.Crystalformer(cf.CrystalformerConfig(domain="reciprocal", num_blocks=1, model_dim=32, num_heads=4))
    x = cf.CrystalBatch(torch.tensor([8, 26]), *pack([random_crystal("cubic", 1, 2)])).to(torch.float32)
    x.wave_vectors = cf.build_wave_vectors(x.lattice, x.ptr, decay_min=2.0)
    with pytest.raises(
        ValueError, match=r"batch.wave_vectors must be built for decay_min at most 1\.21, as the model's"
    ):
        model(x)


def orbits(order: list[int]) -> cf.WaveVectors:
    """Two crystals of three atoms and two, whose rows are two and one; the atoms in some order."""
    _, lattice, _ = pack([random_crystal("cubic", 0, 1), random_crystal("skewed", 0, 1)])
    positions = torch.arange(15.0).view(5, 3)[order]
    orbit = torch.tensor([0, 1, 0, 2, 2])[order]
    return cf.build_wave_vectors(lattice, torch.tensor([0, 2, 3]), 1.0, positions=positions, orbit=orbit)


def test_lists_of_orbits_pack_and_join() -> None:
    waves = orbits([0, 1, 2, 3, 4])
    assert (waves.max_atoms, waves.max_rows, waves.of_orbits) == (3, 2, True)
    assert waves.atom_ptr.tolist() == [0, 2, 3, 5]
    assert waves.positions[:, 0].tolist() == [0.0, 6.0, 3.0, 9.0, 12.0]  # those of a row together
    assert waves.column_ptr.tolist() == [0, 3, 5]
    other = orbits([4, 1, 0, 2, 3])
    assert torch.equal(other.atom_ptr, waves.atom_ptr)
    assert other.positions[:, 0].tolist() == [0.0, 6.0, 3.0, 12.0, 9.0]
    unpacked = cf.WaveVectors.unpack(waves.packed(), 2, waves.largest)
    for name in ("g", "g_ptr", "ptr", "atom_ptr", "positions"):
        assert torch.equal(getattr(unpacked, name), getattr(waves, name)), name
    assert unpacked.largest == waves.largest
    twice = cf.WaveVectors.cat([waves, other])
    assert twice.atom_ptr.tolist() == [0, 2, 3, 5, 7, 8, 10]
    assert torch.equal(twice.positions, torch.cat([waves.positions, other.positions]))
    assert twice.largest == (3, waves.max_vectors, 2, 6, 10)
    atoms = cf.build_wave_vectors(waves.lattice, waves.ptr, 1.0)
    with pytest.raises(ValueError, match="parts must be all of orbits or all of atoms"):
        cf.WaveVectors.cat([waves, atoms])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"positions": None}, TypeError, "positions must be a torch.Tensor, not NoneType"),
        ({"atom_ptr": None}, TypeError, "atom_ptr must be a torch.Tensor, not NoneType"),
        ({"positions": torch.zeros(5, 3)}, TypeError, "positions must be torch.float64"),
        ({"atom_ptr": torch.tensor([0, 2, 2, 5])}, ValueError, "atom_ptr must rise by at least one atom a row"),
        ({"atom_ptr": torch.tensor([0, 2, 3, 4])}, ValueError, "atom_ptr must run from 0 to the number of atoms 5"),
        ({"ptr": torch.tensor([0, 2, 4])}, ValueError, "ptr must run from 0 to the number of atoms 3"),
        ({"max_rows": None}, ValueError, "max_rows must be an integer"),
        ({"max_rows": 1}, ValueError, "max_rows must be 2, that of the largest crystal, not 1"),
        ({"max_atoms": 2}, ValueError, "max_atoms must be 3, that of the largest crystal, not 2"),
    ],
)
def test_lists_of_orbits_check_themselves(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dataclasses.replace(orbits([0, 1, 2, 3, 4]), **change)


def test_wrong_orbits_are_refused() -> None:
    _, lattice, ptr = pack([random_crystal("cubic", 0, 2)])
    positions = torch.zeros(3, 3)
    for orbit in (torch.tensor([0, 0, 2]), torch.tensor([-1, 0, 1]), torch.tensor([0, 0, 0])):
        with pytest.raises(ValueError, match="orbit must hold each row of ptr, 0 to 1, but it is"):
            cf.build_wave_vectors(lattice, ptr, positions=positions, orbit=orbit)
    with pytest.raises(ValueError, match=r"orbit must have shape \(P=3\), not \(2,\)"):
        cf.build_wave_vectors(lattice, ptr, positions=positions, orbit=torch.tensor([0, 1]))
    with pytest.raises(TypeError, match=r"orbit must be a torch.Tensor, not NoneType"):
        cf.build_wave_vectors(lattice, ptr, positions=positions)
    with pytest.raises(ValueError, match="positions must be finite"):
        cf.build_wave_vectors(lattice, ptr, positions=positions / 0, orbit=torch.tensor([0, 1, 1]))
