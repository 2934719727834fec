"""Lists of orbits: one row for each orbit of equivalent atoms, and the sums of all atoms, on every backend."""

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

import pytest
import torch
from operators import NOT_IN_TRITON, operator
from problems import relative_error
from torch import Tensor

import crystalformer as cf
from crystalformer.geometry.orbit_images import build_orbit_images

HEXAGONAL = [[1.0, 0.0, 0.0], [-0.5, math.sqrt(0.75), 0.0], [0.0, 0.0, 1.6]]
# Primitive cells: vectors in Å, the atoms in fractions of them, the orbit of each.
CELLS = {
    "perovskite": (
        3.9,
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[0, 0, 0], [0.5, 0.5, 0.5], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]],
        [0, 1, 2, 2, 2],
    ),
    "rutile": (
        4.6,
        [[1, 0, 0], [0, 1, 0], [0, 0, 0.64]],
        [[0, 0, 0], [0.3, 0.3, 0], [0.5, 0.5, 0.5], [0.7, 0.7, 0], [0.2, 0.8, 0.5], [0.8, 0.2, 0.5]],
        [0, 1, 0, 1, 1, 1],
    ),
    "wurtzite": (
        3.8,
        HEXAGONAL,
        [[1 / 3, 2 / 3, 0], [2 / 3, 1 / 3, 0.5], [1 / 3, 2 / 3, 0.38], [2 / 3, 1 / 3, 0.88]],
        [0, 0, 1, 1],
    ),
    "triclinic": (
        5.0,
        [[1, 0, 0], [0.2, 0.9, 0], [-0.1, 0.3, 0.8]],
        [[0.1, 0.2, 0.3], [0.4, 0.15, 0.3], [0.9, 0.8, 0.7], [0.6, 0.85, 0.7], [0.5, 0.5, 0.5]],
        [0, 1, 0, 1, 2],
    ),
}  # fmt: skip


class Crystals(NamedTuple):
    """Packed, with the orbit of each atom and the first atom of each orbit."""

    positions: Tensor
    lattice: Tensor
    ptr: Tensor
    orbit: Tensor
    first: Tensor

    @staticmethod
    @functools.lru_cache
    def of(*names: str) -> "Crystals":
        lattice = torch.stack([CELLS[x][0] * torch.tensor(CELLS[x][1], dtype=torch.float64) for x in names])
        fractions = [torch.tensor(CELLS[x][2], dtype=torch.float64) for x in names]
        orbits = [torch.tensor(CELLS[x][3]) for x in names]
        begin = torch.tensor([0, *(int(x.max()) + 1 for x in orbits)]).cumsum(0)
        orbit = torch.cat([x + n for x, n in zip(orbits, begin, strict=False)])
        return Crystals(
            torch.cat([x @ cell for x, cell in zip(fractions, lattice, strict=True)]),
            lattice,
            torch.tensor([0, *(len(x) for x in orbits)]).cumsum(0),
            orbit,
            torch.tensor([orbit.tolist().index(i) for i in range(int(begin[-1]))]),
        )


OPS = ("attention", "reciprocal", "dual space")


def inputs(number: int, seed: int = 0) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shapes = ((number, 2, 3), (number, 2, 3), (number, 2, 4), (number, 2), (2, 4, 5))
    q, k, v, decay, weight = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in shapes)
    return [q, k, v, 0.5 + 0.5 * decay.sigmoid(), weight]


def attend(op, leaves, geometry, lists, backend):
    """y of an op, and of attention lse, of all leaves; of `lists`, images and wave vectors, what it needs."""
    (q, k, v, decay, weight), (images, waves), basis = leaves, lists, cf.RadialBasis(5, 6.0)
    if op == "attention":
        return cf.periodic_attention(q, k, v, decay, *geometry, images, weight, basis, backend, return_lse=True)
    if op == "reciprocal":
        options = {"wave_vectors": waves, "backend": backend}
        return (cf.reciprocal_attention(q, k, v, decay, *geometry, waves.ptr, **options),)
    heads = (decay[:, :1], decay[:, 1:])
    return (cf.dual_space_attention(q, k, v, *heads, *geometry, images, waves, weight[:1], basis, backend),)


def of_all_atoms(x, **options):
    return cf.build_images(x.positions, x.lattice, x.ptr, **options), cf.build_wave_vectors(x.lattice, x.ptr, **options)


def of_orbits(x, device="cpu", **options):
    images = build_orbit_images(x.positions, x.lattice, x.ptr, x.orbit, **options, symmetry_tol=1e-9)
    waves = cf.build_wave_vectors(x.lattice, images.ptr, **options, positions=x.positions, orbit=x.orbit)
    return images.to(device), waves.to(device)


def outputs_and_gradients(op, leaves, geometry, lists, backend, rows=slice(None), spread=None):
    """Of leaves by row; `spread` gives every atom its row's."""
    leaves = [x.clone().requires_grad_() for x in leaves[: 4 if op == "reciprocal" else 5]]
    given = [x if spread is None or i == 4 else x[spread] for i, x in enumerate(leaves)]
    outputs = [y[rows] for y in attend(op, [*given, *[None] * (5 - len(given))], geometry, lists, backend)]
    grads = [torch.sin(torch.arange(y.numel()).to(y)).view_as(y) for y in outputs]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, grads)]


@pytest.mark.parametrize("op", OPS)
def test_attention_is_that_of_all_atoms(op, way):
    x = Crystals.of(*CELLS)
    options = dict(decay_min=0.5, tol=1e-12 if way.double else 1e-7)
    every, few = of_all_atoms(x, **options), of_orbits(x, way.device, **options)
    assert 3 * few[0].num_images < every[0].num_images
    leaves = inputs(len(x.first))
    wanted = outputs_and_gradients(op, leaves, (x.positions, x.lattice), every, "reference", x.first, x.orbit)
    geometry = [t.to(way.device, way.dtype) for t in (x.positions[x.first], x.lattice)]
    found = outputs_and_gradients(op, [t.to(way.device, way.dtype) for t in leaves], geometry, few, way.backend)
    for y, exact in zip(found, wanted, strict=True):
        assert relative_error(y.cpu(), exact) < (1e-9 if way.double else 2e-5)


def test_encoding_is_that_of_all_pairs_of_two_orbits(way):
    """alpha of (I, J) sums over all atoms of J, beta is the mean over them with the weights of alpha."""
    tol = 1e-12 if way.double else 1e-7
    basis, bound = cf.RadialBasis(5, 6.0), 1e-9 if way.double else 2e-5
    for name in CELLS:
        positions, lattice, ptr, orbit, first = Crystals.of(name)
        *_, decay, weight = inputs(len(first))
        every = cf.build_images(positions, lattice, ptr, 0.5, tol, every_pair=True)
        alpha, beta = cf.periodic_encoding(decay[orbit], positions, lattice, every, weight, basis, "reference")
        alpha, beta = (y.unflatten(0, (len(orbit), -1))[first] for y in (alpha, beta))
        member = torch.nn.functional.one_hot(orbit).double()  # (atoms, orbits)
        share = torch.einsum("ijh,jk->ijkh", alpha.exp(), member)
        mean = torch.einsum("ijkh,ijhd->ikhd", share, beta) / share.sum(1)[..., None]
        few = build_orbit_images(positions, lattice, ptr, orbit, 0.5, tol, every_pair=True, symmetry_tol=1e-9)
        here = (t.to(way.device, way.dtype) for t in (decay, positions[first], lattice))
        found = cf.periodic_encoding(*here, few.to(way.device), weight.to(way.device, way.dtype), basis, way.backend)
        for y, exact in zip(found, (share.sum(1).log(), mean), strict=True):
            assert relative_error(y.cpu(), exact.flatten(0, 1)) < bound


@pytest.mark.parametrize("op", OPS)
def test_derivatives(op, way):
    """Of first and second order."""
    if not way.double:
        way.skip("differences of fp32 show no derivatives")
    x = Crystals.of("wurtzite", "triclinic")
    lists = of_orbits(x, way.device, decay_min=1.0, tol=1e-14)
    leaves = [t.to(way.device).requires_grad_() for t in inputs(len(x.first))]
    leaves[3].data += 0.5
    geometry = [t.to(way.device) for t in (x.positions[x.first], x.lattice)]
    run = lambda *given: attend(op, [*given, *leaves[len(given) :]], geometry, lists, way.backend)[0]
    given = leaves[: 4 if op == "reciprocal" else 5]
    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given)


@pytest.mark.parametrize(
    ("op", "name"), [("attention", "images"), ("reciprocal", "wave_vectors"), ("dual space", "wave_vectors")]
)
def test_geometry_has_no_gradients(op, name, way):
    x = Crystals.of(*CELLS)
    lists = of_orbits(x, way.device, decay_min=0.5, tol=1e-3)
    leaves = [t.to(way.device, way.dtype) for t in inputs(len(x.first))]
    geometry = [t.to(way.device, way.dtype) for t in (x.positions[x.first], x.lattice)]
    for i in (0, 1):
        leaf = geometry[i].clone().requires_grad_()
        moving = [*geometry[:i], leaf, *geometry[i + 1 :]]
        with pytest.raises(ValueError, match=rf"^{name} must be of all atoms, .*not of orbits, where positions or"):
            attend(op, leaves, moving, lists, way.backend)
    for moved in ([1.01 * t for t in geometry], [geometry[0].flip(0), geometry[1]], [geometry[0], 1.001 * geometry[1]]):
        with (
            cf.debug_checks(True),
            pytest.raises(ValueError, match=rf"^{name} must be built for these positions and lattice"),
        ):
            attend(op, leaves, moved, lists, way.backend)


def reciprocal(way, q, k, v, decay, geometry, waves, moving=False):
    """y and the gradients by the operators themselves, past the checks of values."""
    arguments = (q, k, v, decay, *geometry, waves.packed(), waves.largest)
    y = operator(way.backend, "reciprocal")(*arguments)
    grad = torch.sin(torch.arange(y.numel(), device=y.device)).to(y).view_as(y)
    return [y, *operator(way.backend, "reciprocal_backward")(grad, *arguments, y, moving)[:4]]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in Triton's interpreter
def test_what_operators_of_reciprocal_space_refuse_and_show(way):
    """The gradients of the geometry, the sums of pairs and wrong lists; and NaN in all that it belongs to."""
    x = Crystals.of("rutile", "wurtzite")
    waves = of_orbits(x, way.device, decay_min=0.5, tol=1e-3)[1]
    leaves = [t.to(way.device, way.dtype) for t in inputs(len(x.first))[:4]]
    geometry = [t.to(way.device, way.dtype) for t in (x.positions[x.first], x.lattice)]
    with pytest.raises(
        ValueError, match=r"^wave_vectors must be of all atoms, not of orbits, for the gradients of pos"
    ):
        reciprocal(way, *leaves, geometry, waves, moving=True)
    if way.backend != "triton" or "reciprocal_sum" not in NOT_IN_TRITON:
        pairs = operator(way.backend, "reciprocal_sum")
        with pytest.raises(
            ValueError, match=r"^wave_vectors must be of all atoms, not of orbits, for the sums of pairs"
        ):
            pairs(leaves[3], *geometry, waves.packed(), waves.largest, 25)
    if way.backend == "cpu":
        packed = waves.packed()
        with pytest.raises(ValueError, match=r"^g_ptr must run from 0 to \d+"):
            operator("cpu", "reciprocal")(*leaves, *geometry, packed, waves.largest[:2])
        for place, value in ((16, 1), (18, 0), (24, 1 << 40)):  # atom_ptr stands behind two of three numbers each
            bad = packed.clone()
            bad[place : place + 2] = torch.tensor([value]).view(torch.int32)
            with pytest.raises(ValueError, match=r"^atom_ptr must run from 0 to the number of atoms and rise"):
                operator("cpu", "reciprocal")(*leaves, *geometry, bad, waves.largest)
    reference = dataclasses.replace(way, backend="reference")
    for i, place in itertools.product(range(4), (0, -1)):
        spoilt = [t.clone() for t in leaves]
        spoilt[i].view(-1)[place] = math.nan
        found, wanted = (reciprocal(w, *spoilt, geometry, waves) for w in (way, reference))
        assert wanted[0].isnan().any()
        for y, exact in zip(found, wanted, strict=True):
            if way.backend == "triton":  # a sum over a tile shows it in the rest of the tile, too
                assert not (exact.isnan() & ~y.isnan()).any()
            else:
                assert torch.equal(y.isnan(), exact.isnan())


def test_a_batch_of_nothing(way):
    none = torch.zeros(0, 3, device=way.device, dtype=way.dtype)
    ptr, cell = torch.zeros(1, dtype=torch.int64, device=way.device), none.new_zeros(0, 3, 3)
    waves = cf.build_wave_vectors(cell, ptr, positions=none, orbit=ptr[:0])
    assert waves.of_orbits
    q = none.new_zeros(0, 2, 3).requires_grad_()
    y = cf.reciprocal_attention(q, q, q, q[..., 0], none, cell, ptr, backend=way.backend, wave_vectors=waves)
    assert torch.autograd.grad(y.sum(), q)[0].shape == y.shape == q.shape
