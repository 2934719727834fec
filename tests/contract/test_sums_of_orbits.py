"""Lists of orbits: one row for each orbit of equivalent atoms, and the sums of all atoms, on every backend."""

import functools
import math
from typing import NamedTuple

import pytest
import torch
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


def inputs(number: int, seed: int = 0) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shapes = ((number, 2, 3), (number, 2, 3), (number, 2, 4), (number, 2), (2, 4, 5))
    q, k, v, decay, weight = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in shapes)
    return [q, k, v, 0.5 + 0.5 * decay.sigmoid(), weight]


def outputs_and_gradients(op, leaves, positions, lattice, images, backend, rows=slice(None), spread=None):
    """Of leaves by row; `spread` gives every atom its row's."""
    leaves = [x.clone().requires_grad_() for x in leaves]
    q, k, v, decay, weight = (x if spread is None or i == 4 else x[spread] for i, x in enumerate(leaves))
    basis = cf.RadialBasis(5, 6.0)
    if op == "attention":
        outputs = cf.periodic_attention(
            q, k, v, decay, positions, lattice, images, weight, basis, backend, return_lse=True
        )
        used = leaves
    else:
        outputs = cf.periodic_encoding(decay, positions, lattice, images, weight, basis, backend)
        used = leaves[3:]
    outputs = [y[rows] for y in outputs]
    grads = [torch.sin(torch.arange(y.numel()).to(y)).view_as(y) for y in outputs]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, used, grads)]


def test_attention_is_that_of_all_atoms(way):
    positions, lattice, ptr, orbit, first = Crystals.of(*CELLS)
    options = dict(decay_min=0.5, tol=1e-12 if way.double else 1e-7)
    every = cf.build_images(positions, lattice, ptr, **options)
    few = build_orbit_images(positions, lattice, ptr, orbit, **options, symmetry_tol=1e-9).to(way.device)
    assert 3 * few.num_images < every.num_images
    leaves = inputs(len(first))
    wanted = outputs_and_gradients("attention", leaves, positions, lattice, every, "reference", first, orbit)
    geometry = (x.to(way.device, way.dtype) for x in (positions[first], lattice))
    leaves = [x.to(way.device, way.dtype) for x in leaves]
    found = outputs_and_gradients("attention", leaves, *geometry, few, way.backend)
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


def test_derivatives(way):
    """Of first and second order."""
    if not way.double:
        way.skip("differences of fp32 show no derivatives")
    positions, lattice, ptr, orbit, first = Crystals.of("wurtzite", "triclinic")
    images = build_orbit_images(positions, lattice, ptr, orbit, 1.0, 1e-14).to(way.device)
    leaves = [x.to(way.device).requires_grad_() for x in inputs(len(first))]
    leaves[3].data += 0.5
    geometry = [x.to(way.device) for x in (positions[first], lattice)]

    def attend(*x):
        q, k, v, decay, weight = x
        return cf.periodic_attention(q, k, v, decay, *geometry, images, weight, cf.RadialBasis(5, 6.0), way.backend)

    assert torch.autograd.gradcheck(attend, leaves)
    assert torch.autograd.gradgradcheck(attend, leaves)


def test_geometry_has_no_gradients(way):
    positions, lattice, ptr, orbit, first = Crystals.of(*CELLS)
    images = build_orbit_images(positions, lattice, ptr, orbit, 0.5, 1e-3).to(way.device)
    q, k, v, decay, _ = (x.to(way.device, way.dtype) for x in inputs(len(first)))
    geometry = [x.to(way.device, way.dtype) for x in (positions[first], lattice)]
    for i in (0, 1):
        leaf = geometry[i].clone().requires_grad_()
        moving = [*geometry[:i], leaf, *geometry[i + 1 :]]
        with pytest.raises(ValueError, match=r"^images must be of all atoms, from build_images, not of orbits, where"):
            cf.periodic_attention(q, k, v, decay, *moving, images, backend=way.backend)
    moved = [1.01 * x for x in geometry]
    with (
        cf.debug_checks(True),
        pytest.raises(ValueError, match=r"^images must be built for these positions and lattice"),
    ):
        cf.periodic_attention(q, k, v, decay, *moved, images, backend=way.backend)
