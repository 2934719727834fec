"""Lists of orbits: one row for each orbit of equivalent atoms, and the sums of all atoms, on every backend."""

import functools

import pytest
import torch
from crystals import aflow_prototypes
from problems import relative_error

import crystalformer as cf
from crystalformer.geometry.orbit_images import build_orbit_images

NAMES = ("q", "k", "v", "decay", "edge_weight")


@functools.lru_cache
def prototypes():
    """Primitive cells, packed: positions, lattice, ptr, the orbit of each atom, the first atom of each orbit."""
    found = [cf.equivalent_atoms(structure) for structure in aflow_prototypes(limit=8, max_atoms=8)]
    positions = [torch.tensor(s.cart_coords[x.atoms]) for s, x in zip(aflow_prototypes(8, 8), found, strict=True)]
    lattice = torch.stack([torch.tensor(x.lattice) for x in found])
    sizes = torch.tensor([0, *(len(x.atoms) for x in found)])
    begin = torch.tensor([0, *(x.number for x in found)]).cumsum(0)
    orbit = torch.cat([torch.tensor(x.orbit[x.atoms]) + n for x, n in zip(found, begin, strict=False)])
    first = torch.tensor([orbit.tolist().index(i) for i in range(int(begin[-1]))])
    return torch.cat(positions), lattice, sizes.cumsum(0), orbit, first


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
    positions, lattice, ptr, orbit, first = prototypes()
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
    for structure in aflow_prototypes(8, 8)[2:5]:
        x = cf.equivalent_atoms(structure)
        positions, lattice = torch.tensor(structure.cart_coords[x.atoms]), torch.tensor(x.lattice)[None]
        orbit, ptr = torch.tensor(x.orbit[x.atoms]), torch.tensor([0, len(x.atoms)])
        first = [orbit.tolist().index(i) for i in range(x.number)]
        *_, decay, weight = inputs(x.number)
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
    positions, lattice, ptr, orbit, first = prototypes()
    stop = 2
    positions, lattice = positions[: ptr[stop]], lattice[:stop]
    orbit, ptr = orbit[: ptr[stop]], ptr[: stop + 1]
    number = int(orbit.max()) + 1
    images = build_orbit_images(positions, lattice, ptr, orbit, 1.0, 1e-14)
    leaves = [x.requires_grad_() for x in inputs(number)]
    leaves[3].data += 0.5

    def attend(*x):
        q, k, v, decay, weight = x
        return cf.periodic_attention(
            q, k, v, decay, positions[first[:number]], lattice, images, weight, cf.RadialBasis(5, 6.0), way.backend
        )

    assert torch.autograd.gradcheck(attend, leaves)
    assert torch.autograd.gradgradcheck(attend, leaves)


def test_geometry_has_no_gradients(way):
    positions, lattice, ptr, orbit, first = prototypes()
    images = build_orbit_images(positions, lattice, ptr, orbit, 0.5, 1e-3).to(way.device)
    q, k, v, decay, _ = (x.to(way.device, way.dtype) for x in inputs(len(first)))
    geometry = [x.to(way.device, way.dtype) for x in (positions[first], lattice)]
    for i in (0, 1):
        leaf = geometry[i].clone().requires_grad_()
        moving = [*geometry[:i], leaf, *geometry[i + 1 :]]
        with pytest.raises(ValueError, match=r"^images must be of all atoms, from build_images, not of orbits, where"):
            cf.periodic_attention(q, k, v, decay, *moving, images, backend=way.backend)
    with pytest.raises(ValueError, match=r"^images must be built for these positions and lattice"):
        cf.periodic_attention(q, k, v, decay, geometry[0] * 1.01, geometry[1] * 1.01, images, backend=way.backend)
