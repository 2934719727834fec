"""One Gaussian sum in two spaces: the same number, certified in both, and slow decays cost no more than usual ones."""

import dataclasses
import math

import pytest
import torch
from crystals import KINDS, aflow_prototypes, geometry, pack, random_crystal

import crystalformer as cf
from crystalformer.geometry.crossover import smallest_sum
from crystalformer.geometry.lattice import triangular

ROUNDING = 1e-4


def both(crystals, decays, tol, backend="reference"):
    """alpha over wave vectors, and over images alone (tol 1e-13), of decays below the crossover."""
    packed = pack(crystals)
    decay = torch.tensor(decays, dtype=torch.float64).expand(len(packed[0]), len(decays))
    images = cf.build_images(*packed, decay_min=min(decays), tol=tol, every_pair=True, reciprocal=True)
    assert (images.crossover > max(decays)).all(), "not the sum over wave vectors"
    converged = cf.build_images(*packed, decay_min=min(decays), tol=1e-13, every_pair=True)
    found, exact = (cf.periodic_encoding(decay, *packed[:2], x, backend=backend)[0] for x in (images, converged))
    return found, exact


def test_the_two_sums_are_one(backend):
    """Over decays where both converge, to 1e-10; the list of the reciprocal one is a fraction of the other."""
    crystals = [random_crystal(kind, 1, 3) for kind in ("cubic", "skewed", "left_handed")]
    found, exact = both(crystals, [0.01, 0.015, 0.02, 0.03], 1e-12, backend)
    torch.testing.assert_close(found, exact, rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("tol", [1e-3, 1e-6, 1e-8])
@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_over_wave_vectors_is_certified(kind, tol):
    """Relatively within tol for every pair, at the crossover and below, wherever the atoms are."""
    worst = 0.0
    for seed in range(3):
        crystal = random_crystal(kind, seed, num_atoms=4)
        images = cf.build_images(*pack([crystal]), decay_min=1e-4, tol=tol, every_pair=True, reciprocal=True)
        top = float(images.crossover) * (1 - 1e-9)
        found, exact = both([crystal], [top, 0.8 * top, 0.4 * top], tol)
        worst = max(worst, float((found - exact).expm1().abs().max()))
    assert worst <= tol * (1 + ROUNDING) + 1e-11
    assert worst > 1e-14  # something was left out


@pytest.mark.parametrize("kind", KINDS)
def test_no_sum_is_smaller_than_the_bound(kind):
    """The bound of (16), against sums at the cell's own deep holes and at random places."""
    for seed in range(3):
        _, lattice = random_crystal(kind, seed, 2)
        t, _ = triangular(lattice[None])
        scale = float(torch.diagonal(t[0]).max())
        r = torch.rand(200, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        r = torch.cat([r, torch.tensor([[0.5, 0.5, 0.5], [0.0, 0.0, 0.5], [0.5, 0.5, 0.0]]).double()]) @ lattice
        for x in (1.0, 6.0):
            a = x / scale**2
            g = cf.build_wave_vectors(lattice[None], torch.tensor([0, 1]), 1 / (4 * a), 1e-13).g.double()
            vectors = g @ (2 * math.pi * torch.linalg.inv(lattice).T)
            weight = torch.exp(-vectors.square().sum(1) / (4 * a))
            total = 2 * (weight * torch.cos(r @ vectors.T)).sum(1) - 1  # G and -G, and the zero vector once
            bound = float(smallest_sum(t, torch.tensor([[a]], dtype=torch.float64)))
            assert 0 < bound <= float(total.min()) * (1 + 1e-9)


def mixed(dtype=torch.float64):
    """Two crystals and decays on both sides of their crossovers, in one row too."""
    positions, lattice, ptr = pack([random_crystal("cubic", 0, 2), random_crystal("left_handed", 1, 3)])
    images = cf.build_images(positions, lattice, ptr, decay_min=0.01, tol=1e-8, every_pair=True, reciprocal=True)
    share = torch.rand(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1.6 + 0.2
    share[0] = torch.tensor([0.5, 1.5, 3.0])
    crossover = images.crossover[torch.tensor([0, 0, 1, 1, 1]), None]
    decay = share * crossover
    assert (decay < crossover).any()
    assert (decay > crossover).any()
    return [x.to(dtype) for x in (decay, positions, lattice)], images, ptr


def test_each_takes_its_own(backend):
    (decay, positions, lattice), images, ptr = mixed()
    plain = cf.build_images(positions, lattice, ptr, decay_min=0.01, tol=1e-8, every_pair=True)
    alpha, beta = cf.periodic_encoding(decay, positions, lattice, images, backend=backend)
    assert beta is None
    exact = cf.periodic_encoding(decay, positions, lattice, plain, backend="reference")[0]
    torch.testing.assert_close(alpha, exact, rtol=0.0, atol=4e-8)
    single = cf.periodic_encoding(*mixed(torch.float32)[0], images, backend=backend)[0]
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-5)


def test_gradients(backend):
    inputs, images, _ = mixed()
    inputs = [x.requires_grad_() for x in inputs]
    run = lambda *x: cf.periodic_encoding(*x, images, backend=backend)[0]
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_same_bits_on_any_number_of_threads():
    if cf.available_backends()["cpu"] is not True:
        pytest.skip(cf.available_backends()["cpu"])
    positions, lattice, ptr = pack([random_crystal("skewed", 0, 30), random_crystal("cubic", 0, 11)])
    images = cf.build_images(positions, lattice, ptr, decay_min=1e-3, every_pair=True, reciprocal=True)
    decay = 2e-3 * (1 + torch.rand(41, 5, dtype=torch.float64))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            inputs = [x.clone().requires_grad_() for x in (decay, positions, lattice)]
            alpha = cf.periodic_encoding(*inputs, images, backend="cpu")[0]
            results.append([alpha, *torch.autograd.grad(alpha.square().sum(), inputs)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_slow_decays_need_no_long_list():
    """For sigma = 16 Å: at most twice the images of the usual decay, few wave vectors; alone they were 100 times."""
    crystals = [geometry(s) for s in aflow_prototypes(limit=24, max_atoms=20)]
    usual = cf.build_images(*pack(crystals), decay_min=0.1275, every_pair=True)
    slow = cf.build_images(*pack(crystals), decay_min=0.002, every_pair=True, reciprocal=True)
    assert slow.num_images < 2 * usual.num_images
    assert slow.wave_vectors is not None
    assert slow.wave_vectors.num_vectors < 100 * len(crystals)
    one = pack([random_crystal("cubic", 0, 1)])
    alone = cf.build_images(*one, decay_min=0.002, every_pair=True)
    assert alone.num_images > 100 * cf.build_images(*one, decay_min=0.1275, every_pair=True).num_images


def test_fast_decays_need_no_wave_vectors():
    packed = pack([random_crystal("cubic", 0, 3)])
    images = cf.build_images(*packed, decay_min=3.0, every_pair=True, reciprocal=True)
    assert images.crossover.tolist() == [0.0]
    assert images.real_decay_min == 3.0
    plain = cf.build_images(*packed, decay_min=3.0, every_pair=True)
    assert torch.equal(images.col, plain.col)


def test_lists_of_crystals_join():
    crystals = [random_crystal(kind, 4, 2) for kind in ("cubic", "skewed")]
    options = {"decay_min": 0.01, "every_pair": True, "reciprocal": True}
    together = cf.build_images(*pack(crystals), **options)
    joined = cf.ImageList.cat([cf.build_images(*pack([x]), **options) for x in crystals])
    torch.testing.assert_close(joined.crossover, together.crossover)
    assert torch.equal(joined.wave_vectors.g, together.wave_vectors.g)
    assert torch.equal(joined.col, together.col)
    assert joined.to("meta").wave_vectors.device.type == "meta"
    with pytest.raises(ValueError, match="lists must be built all with reciprocal=True or all without"):
        cf.ImageList.cat([together, dataclasses.replace(together, crossover=None, wave_vectors=None)])


def test_the_rest_of_the_library_takes_the_images_from_the_crossover_on(backend):
    (decay, positions, lattice), images, ptr = mixed()
    x = torch.zeros(5, 3, 2, dtype=torch.float64)
    weight, basis = torch.zeros(3, 2, 4, dtype=torch.float64), cf.RadialBasis(4, 6.0)
    message = rf"decay must be at least {images.real_decay_min:g}, the decay_min that images were built for"
    with pytest.raises(ValueError, match=message):
        cf.periodic_attention(x, x, x, decay, positions, lattice, images, backend=backend)
    with pytest.raises(ValueError, match=message):
        cf.periodic_encoding(decay, positions, lattice, images, weight, basis, backend)
    with pytest.raises(ValueError, match=r"decay must be at least 0\.01, the decay_min that images were built for"):
        cf.periodic_encoding(0 * decay + 0.001, positions, lattice, images, backend=backend)
    fast = torch.full_like(decay, 1.01 * images.real_decay_min)
    assert torch.isfinite(cf.periodic_attention(x, x, x, fast, positions, lattice, images, backend=backend)).all()
    assert torch.isfinite(cf.periodic_encoding(fast, positions, lattice, images, weight, basis, backend)[1]).all()
    with pytest.raises(ValueError, match="every_pair must be True with reciprocal=True"):
        cf.build_images(positions, lattice, ptr, reciprocal=True)
