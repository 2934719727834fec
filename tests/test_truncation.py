"""The certificate of `build_images`: what a list leaves out is at most `tol`, and hardly less than it could be.

The oracle is a sum over a box of translations in numpy, so long that what it leaves out is nothing beside `tol`.
"""

import math

import numpy as np
import pytest
import torch
from crystals import KINDS, aflow_prototypes, box_images, cell, geometry, list_images, pack, random_crystal, rotation
from torch import Tensor

import crystalformer as cf
from crystalformer.geometry.lattice import gaussian_sum_bound, points_in_spheres, triangular
from crystalformer.geometry.truncation import pair_cutoff2, row_cutoff2, tail_radius2

LOGIT_RANGE = 4.0
# The oracle stops where exp(-a d²) is e^-27 (2e-12) of what still matters.
CONVERGED = 27.0
# Rounding of the oracle's sums, relative to tol: they are of order 1 and known to some 1e-15.
ROUNDING = 1e-4


def worst_fraction(tail: np.ndarray, whole: np.ndarray, logit_range: float) -> float:
    """The largest share of any row that lies in the tails, over all content scores in [0, logit_range].

    Of row i it is max over c_j of sum_j e^{c_j} T_j / sum_j e^{c_j} F_j: linear-fractional in each e^{c_j}, so largest
    with every c_j at an end, the upper one for the pairs with the largest T_j / F_j.

    Args:
        tail, whole: (n,n) T and F of each pair.
    """
    share = np.divide(tail, whole, out=np.zeros_like(tail), where=whole > 0)
    order = np.argsort(-share, axis=1)
    tail, whole = np.take_along_axis(tail, order, 1), np.take_along_axis(whole, order, 1)

    def total(x: np.ndarray) -> np.ndarray:
        raised = np.concatenate([np.zeros((len(x), 1)), x.cumsum(1)], axis=1)
        return x.sum(1, keepdims=True) + math.expm1(logit_range) * raised

    return float((total(tail) / total(whole)).max())


def pair_sums(pair: np.ndarray, weight: np.ndarray, num_atoms: int) -> np.ndarray:
    return np.bincount(pair, weight, num_atoms**2).reshape(num_atoms, num_atoms)


class Converged:
    """All images of a crystal that matter to decays from `decay` on, and what a list leaves out of them."""

    def __init__(self, positions: Tensor, lattice: Tensor, decay: float, tol: float, logit_range: float) -> None:
        self.positions, self.lattice, self.n = positions, lattice, len(positions)
        radius = math.sqrt((CONVERGED + logit_range - math.log(tol)) / decay)
        self.pair, _, self.d2 = box_images(positions, lattice, radius)

    def sums(self, images: cf.ImageList, decay: float) -> tuple[np.ndarray, np.ndarray]:
        """T and F (n,n) of each pair at this decay."""
        pair, _, d2 = list_images(images, self.positions, self.lattice)
        whole = pair_sums(self.pair, np.exp(-decay * self.d2), self.n)
        return whole - pair_sums(pair, np.exp(-decay * d2), self.n), whole


def case(kind: str, seed: int) -> tuple[float, float]:
    """A decay from 0.05 to 3 and a tol from 1e-3 to 1e-10, log-uniform; the corners come first."""
    corners = [(0.05, 1e-10), (3.0, 1e-3), (0.05, 1e-3), (3.0, 1e-10)]
    if seed < len(corners):
        return corners[seed]
    rng = np.random.default_rng([KINDS.index(kind), seed])
    return 0.05 * 60 ** rng.random(), 1e-3 * 1e-7 ** rng.random()


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.parametrize("kind", KINDS)
def test_the_mass_left_out_is_at_most_tol(kind: str, seed: int) -> None:
    decay, tol = case(kind, seed)
    positions, lattice = random_crystal(kind, seed, num_atoms=1 + seed % 4)
    images = cf.build_images(*pack([(positions, lattice)]), decay_min=decay, tol=tol, logit_range=LOGIT_RANGE)
    oracle = Converged(positions, lattice, decay, tol, LOGIT_RANGE)
    rng = np.random.default_rng(seed)
    for factor in (1.0, 1.1, 2.0, 7.0):
        tail, whole = oracle.sums(images, decay * factor)
        worst = worst_fraction(tail, whole, LOGIT_RANGE)
        assert worst <= tol * (1 + ROUNDING), f"{kind} {seed}: decay {decay}·{factor}, tol {tol}: {worst}"
        scores = np.exp(rng.uniform(0, LOGIT_RANGE, size=(20, *tail.shape)))
        some = ((scores * tail).sum(2) / (scores * whole).sum(2)).max()
        assert some <= worst + 1e-15, "the worst scores of the test are not the worst"


@pytest.mark.parametrize("every_pair", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_mass_left_out_is_at_most_twice_tol_while_atoms_move(kind: str, every_pair: bool) -> None:
    """As far as the list says that it bears it: by steps of the atoms, and by a strain that moves far images more."""
    worst = []
    for seed in range(6):
        decay, tol = case(kind, seed)
        positions, lattice = random_crystal(kind, seed, num_atoms=1 + seed % 4)
        packed = pack([(positions, lattice)])
        images = cf.build_images(*packed, decay_min=decay, tol=tol, logit_range=LOGIT_RANGE, every_pair=every_pair)
        bearable = float(images.bearable)
        rng = np.random.default_rng(seed)
        for strained in (False, True):
            step, grow = rng.normal(size=positions.shape), rng.choice((-1.0, 1.0))
            deform = np.eye(3) * (1 + grow * 0.99 * bearable / float(images._reach_and_bearable[0]))
            step -= step.mean(0)
            step *= 0.49 * bearable / max(np.linalg.norm(step, axis=1).max(), 1e-9)
            deformed = torch.from_numpy(deform if strained else np.eye(3))
            moved = positions @ deformed if strained else positions + torch.from_numpy(step)
            images.check_built_for(moved, (lattice @ deformed)[None])
            oracle = Converged(moved, lattice @ deformed, decay, tol, LOGIT_RANGE)
            for factor in (1.0, 2.0, 7.0):
                tail, whole = oracle.sums(images, decay * factor)
                if every_pair:
                    found = (tail[whole > 1e-3 * tol] / whole[whole > 1e-3 * tol]).max(initial=0)
                else:
                    found = worst_fraction(tail, whole, LOGIT_RANGE)
                worst.append(found / tol)
                assert worst[-1] <= 2 * (1 + ROUNDING), f"{kind} {seed}: decay {decay}·{factor}, tol {tol}: {worst[-1]}"
    assert max(worst) > 0.3, "hardly anything is left out"


@pytest.mark.parametrize("logit_range", [0.0, 1.0, 12.0])
def test_any_logit_range(logit_range: float) -> None:
    decay, tol, found = 0.2, 1e-6, []
    for kind in KINDS:
        positions, lattice = random_crystal(kind, 11, num_atoms=3)
        images = cf.build_images(*pack([(positions, lattice)]), decay_min=decay, tol=tol, logit_range=logit_range)
        tail, whole = Converged(positions, lattice, decay, tol, logit_range).sums(images, decay)
        found.append(worst_fraction(tail, whole, logit_range))
    assert max(found) <= tol * (1 + ROUNDING)
    # Not a certificate of the widest range given to every range.
    assert max(found) > 0.1 * tol


def test_a_batch_certifies_each_crystal() -> None:
    crystals = [random_crystal(kind, 5, num_atoms=n) for kind, n in zip(KINDS, (1, 4, 2, 3, 1), strict=True)]
    decay, tol = 0.1276, 1e-6
    together = cf.build_images(*pack(crystals), decay_min=decay, tol=tol)
    alone = [cf.build_images(*pack([crystal]), decay_min=decay, tol=tol) for crystal in crystals]
    torch.testing.assert_close(together.cutoff, torch.cat([x.cutoff for x in alone]), rtol=1e-12, atol=0)
    assert together.num_images == sum(x.num_images for x in alone)


def test_the_mass_is_left_out_where_the_list_is_cut() -> None:
    """The oracle is able to fail: without its farthest images a list is not within tol."""
    positions, lattice = random_crystal("left_handed", 0, num_atoms=3)
    packed = pack([(positions, lattice)])
    images = cf.build_images(*packed, decay_min=0.1276, tol=1e-6)
    shorter = cf.build_images(*packed, cutoff=0.97 * float(images.cutoff))
    oracle = Converged(positions, lattice, 0.1276, 1e-6, LOGIT_RANGE)
    assert worst_fraction(*oracle.sums(shorter, 0.1276), LOGIT_RANGE) > 1e-6


# Tightness ------------------------------------------------------------------------------------------------------------


def shortest_cutoff(positions: Tensor, lattice: Tensor, decay: float, tol: float, logit_range: float) -> float:
    """The shortest cutoff, a distance between atoms, at which the true worst error is at most tol."""
    oracle = Converged(positions, lattice, decay, tol, logit_range)
    d = np.sqrt(oracle.d2)
    weight = np.exp(-decay * oracle.d2)
    whole = pair_sums(oracle.pair, weight, oracle.n)
    # Distances 1e-7 Å apart are one shell, of which the last counts.
    shells = np.sort(d)
    shells = shells[np.diff(shells, append=np.inf) > 1e-7]
    low, high = -1, len(shells) - 1
    while high - low > 1:
        middle = (low + high) // 2
        tail = pair_sums(oracle.pair, np.where(d > shells[middle] + 1e-9, weight, 0), oracle.n)
        enough = worst_fraction(tail, whole, logit_range) <= tol
        low, high = (low, middle) if enough else (middle, high)
    return float(shells[high])


@pytest.mark.parametrize(
    ("decay", "tol", "limit"), [(0.1276, 1e-6, 257), (0.05, 1e-3, 60), (0.3, 1e-10, 60), (1.0, 1e-6, 100)]
)
def test_the_cutoff_is_at_most_ten_percent_too_long(decay: float, tol: float, limit: int) -> None:
    structures = aflow_prototypes(limit=limit, max_atoms=24)
    assert len(structures) == limit
    crystals = [geometry(s) for s in structures]
    images = cf.build_images(*pack(crystals), decay_min=decay, tol=tol, logit_range=LOGIT_RANGE)
    shortest = np.array([shortest_cutoff(*crystal, decay, tol, LOGIT_RANGE) for crystal in crystals])
    ratio = images.cutoff.numpy() / shortest
    k = int(ratio.argmax())
    assert ratio.max() <= 1.10, f"{structures[k].formula}: {images.cutoff[k]} Å is {ratio[k]} times the shortest"
    # Shorter than the shortest would break the certificate.
    assert ratio.min() > 1 - 1e-6, f"{structures[int(ratio.argmin())].formula}: {ratio.min()}"


@pytest.mark.parametrize("kind", KINDS)
def test_random_cells_are_tight_too(kind: str) -> None:
    for seed in range(3):
        positions, lattice = random_crystal(kind, seed, num_atoms=2 + seed)
        images = cf.build_images(*pack([(positions, lattice)]), decay_min=0.1276, tol=1e-6)
        ratio = float(images.cutoff) / shortest_cutoff(positions, lattice, 0.1276, 1e-6, LOGIT_RANGE)
        assert 1 - 1e-6 < ratio <= 1.10, f"{kind} {seed}: {ratio}"


def test_a_decay_that_sees_nothing_keeps_only_the_atom_itself() -> None:
    positions, lattice = random_crystal("cubic", 0, num_atoms=1)
    images = cf.build_images(*pack([(positions, lattice)]), decay_min=50.0, tol=1e-3)
    assert images.num_images == 1
    assert images.shift.tolist() == [[0, 0, 0]]


# Every pair -----------------------------------------------------------------------------------------------------------


def alpha(pair: np.ndarray, d2: np.ndarray, decay: float, num_atoms: int) -> tuple[np.ndarray, np.ndarray]:
    """log sum exp(-a d²) of each pair (n²), as its largest term and the rest."""
    nearest = np.full(num_atoms**2, np.inf)
    np.minimum.at(nearest, pair, d2)
    return -decay * nearest, np.log(np.bincount(pair, np.exp(-decay * (d2 - nearest[pair])), num_atoms**2))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", KINDS)
def test_every_pair_has_its_own_sum(kind: str, seed: int) -> None:
    decay, tol = case(kind, seed)
    n = 2 + seed % 3
    positions, lattice = random_crystal(kind, seed, num_atoms=n)
    images = cf.build_images(*pack([(positions, lattice)]), decay_min=decay, tol=tol, every_pair=True)
    pair, _, d2 = list_images(images, positions, lattice)
    assert np.bincount(pair, minlength=n * n).min() > 0
    # The nearest image of the list is no nearer than the nearest image, so this reaches whatever matters.
    farthest = max(d2[pair == k].min() for k in range(n * n))
    radius = math.sqrt(farthest + (CONVERGED - math.log(tol)) / decay)
    every_pair, _, every_d2 = box_images(positions, lattice, radius)
    for factor in (1.0, 1.5, 5.0):
        top, rest = alpha(pair, d2, decay * factor, n)
        true_top, true_rest = alpha(every_pair, every_d2, decay * factor, n)
        # The nearest image is there, so only the rests differ; the difference of large tops would drown it.
        np.testing.assert_allclose(top, true_top, rtol=1e-9, atol=1e-9)
        left_out = -np.expm1(rest - true_rest)
        assert left_out.max() <= tol * (1 + ROUNDING) + 1e-15
    count = np.bincount(pair).reshape(n, n)
    assert (count == count.T).all(), "not symmetric"


def test_every_pair_where_the_weights_underflow() -> None:
    """Half a needle of 90 Å away, exp(-3 d²) is e^-6075: zero in fp64, yet the pair's alpha is as exact as any."""
    positions = torch.tensor([[0, 0, 0], [0, 0, 45.0]], dtype=torch.float64)
    lattice = torch.diag(torch.tensor([3, 3, 90.0], dtype=torch.float64))
    images = cf.build_images(*pack([(positions, lattice)]), decay_min=3.0, every_pair=True)
    row = torch.repeat_interleave(images.row_ptr.diff())
    found = sorted(zip(row.tolist(), images.col.tolist(), map(tuple, images.shift.tolist()), strict=True))
    assert found == [
        (0, 0, (0, 0, 0)), (0, 1, (0, 0, -1)), (0, 1, (0, 0, 0)),
        (1, 0, (0, 0, 0)), (1, 0, (0, 0, 1)), (1, 1, (0, 0, 0)),
    ]  # fmt: skip


@pytest.mark.parametrize("decay", [0.1276, 0.5, 3.0])
def test_every_pair_where_the_nearest_plane_is_far_from_the_nearest_image(decay: float) -> None:
    """Nearest planes lead to an image 46 Å away, the nearest is 15 Å away: exp(3·(46² - 15²)) overflows."""
    angle = math.radians(20)
    lattice = torch.tensor(
        [[3, 0, 0], [0, 60 * math.sin(angle), 60 * math.cos(angle)], [0, 0, 90]], dtype=torch.float64
    )
    positions = torch.tensor([[0, 0, 0], [0, 10.2, 44.9]], dtype=torch.float64)
    images = cf.build_images(*pack([(positions, lattice)]), decay_min=decay, every_pair=True)
    pair, _, d2 = list_images(images, positions, lattice)
    every_pair, _, every_d2 = box_images(positions, lattice, math.sqrt(30**2 + (CONVERGED - math.log(1e-6)) / decay))
    top, rest = alpha(pair, d2, decay, 2)
    true_top, true_rest = alpha(every_pair, every_d2, decay, 2)
    np.testing.assert_allclose(top, true_top, rtol=1e-9)
    assert (-np.expm1(rest - true_rest)).max() <= 1e-6 * (1 + ROUNDING)


# The bounds -----------------------------------------------------------------------------------------------------------


def random_lattices(seed: int) -> tuple[Tensor, list[np.ndarray]]:
    lattices = [random_crystal(kind, seed, 1)[1] for kind in KINDS]
    return triangular(torch.stack(lattices))[0], [x.numpy() for x in lattices]


def sum_around(lattice: np.ndarray, r: np.ndarray, a: float, beyond: float | None = None) -> float:
    """sum over n of exp(-a |r + n·L|²), of all n or of those with |r + n·L| > beyond."""
    two = torch.from_numpy(np.stack([np.zeros(3), r]))
    pair, _, d2 = box_images(two, torch.from_numpy(lattice), math.sqrt((beyond or 0) ** 2 + 60 / a))
    d2 = d2[pair == 1]
    return float(np.exp(-a * (d2 if beyond is None else d2[d2 > beyond**2])).sum())


@pytest.mark.parametrize("seed", range(4))
def test_gaussian_sum_bound_holds(seed: int) -> None:
    t, lattices = random_lattices(seed)
    rng = np.random.default_rng(seed)
    for a in (0.05, 0.4, 3.0):
        bound = gaussian_sum_bound(t, torch.full((len(t),), a, dtype=torch.float64))
        for k, lattice in enumerate(lattices):
            for r in (np.zeros(3), np.full(3, 0.5) @ lattice, rng.uniform(-1, 1, 3) @ lattice):
                true = sum_around(lattice, r, a)
                assert true <= math.exp(bound[k]) * (1 + 1e-12)
                # At a lattice point the sum is at least its largest term.
                assert true >= 1 or r.any()


def test_gaussian_sum_bound_is_near_the_sum() -> None:
    """At a lattice point of an orthogonal cell each axis sums to at least max(1, x), and 1 + x is the bound."""
    for edges in ([3.0, 3.0, 3.0], [2.0, 2.0, 60.0], [2.0, 60.0, 60.0]):
        t = torch.diag(torch.tensor(edges, dtype=torch.float64))[None]
        for a in (0.05, 0.4, 3.0):
            true = math.log(sum_around(t[0].numpy(), np.zeros(3), a))
            bound = float(gaussian_sum_bound(t, torch.tensor([a], dtype=torch.float64)))
            assert true < bound <= true + 3 * math.log(2)


@pytest.mark.parametrize("seed", range(3))
def test_tail_radius_holds(seed: int) -> None:
    t, lattices = random_lattices(seed)
    rng = np.random.default_rng(seed)
    for a, slack in ((0.05, -7.0), (0.4, -30.0), (3.0, -12.0)):
        radius = tail_radius2(t, a, torch.full((len(t),), slack, dtype=torch.float64)).sqrt()
        for k, lattice in enumerate(lattices):
            for r in (np.zeros(3), rng.uniform(-0.5, 0.5, 3) @ lattice):
                true = sum_around(lattice, r, a, beyond=float(radius[k]))
                assert true <= math.exp(slack)
        # Not needlessly far: images beyond the cutoff are enumerated up to here.
        assert (radius**2 * a <= 2 * -slack + 10).all()


def test_tail_radius_of_a_loose_slack_is_zero() -> None:
    t = torch.diag(torch.full((3,), 50.0, dtype=torch.float64))[None]
    assert tail_radius2(t, 1.0, torch.tensor([5.0], dtype=torch.float64)).tolist() == [0.0]


def test_what_is_never_enumerated_counts_as_left_out() -> None:
    """Shells of 1, 2e^-2, 2e^-8, 2e^-18 and a bound on the rest: what it takes of tol the shells must give up."""
    d2 = torch.tensor([0.0, 2, 2, 8, 8, 18, 18], dtype=torch.float64)
    weight = torch.exp(-d2)
    one, outer2 = torch.zeros(1, dtype=torch.int64), torch.tensor([20.0], dtype=torch.float64)
    pair = torch.zeros(7, dtype=torch.int64)
    # Just enough for the last two shells: 2e^-8 + 2e^-18 of the whole.
    tol = 1.01 * float(weight[3:].sum() / weight.sum())
    for share, shells in ((0.0, 2), (0.005, 2), (0.02, 8), (0.9, 8)):
        beyond = share * tol * weight.sum()[None]
        for chosen in (
            row_cutoff2(weight, d2, pair, one, one, outer2, beyond, tol, LOGIT_RANGE),
            pair_cutoff2(weight, d2, pair, outer2, beyond, tol),
        ):
            assert shells <= float(chosen) < shells + 0.01


def test_triangular_factors_the_lattice() -> None:
    lattice = torch.stack([random_crystal(kind, 1, 1)[1] for kind in KINDS])
    t, q = triangular(lattice)
    torch.testing.assert_close(t @ q, lattice, rtol=0, atol=1e-12)
    torch.testing.assert_close(q @ q.mT, torch.eye(3, dtype=torch.float64).expand(5, 3, 3), rtol=0, atol=1e-14)
    assert (t.tril(-1) == 0).all()
    assert (torch.diagonal(t, dim1=1, dim2=2) > 0).all()
    assert (torch.linalg.det(lattice) < 0).tolist() == [False, False, False, False, True]


def test_points_in_spheres_of_a_very_skewed_cell() -> None:
    lattice = cell([2.0, 3.0, 4.0], [20.0, 35.0, 50.0])
    assert lattice is not None
    lattice = lattice @ rotation(np.random.default_rng(0))
    t, q = triangular(torch.from_numpy(lattice)[None])
    r = torch.tensor([[0.7, -3.0, 1.1]], dtype=torch.float64)
    _, n, d2 = points_in_spheres(t, torch.tensor([0]), r @ q[0].mT, torch.tensor([81.0], dtype=torch.float64))
    pair, shift, true = box_images(torch.cat([torch.zeros_like(r), r]), torch.from_numpy(lattice), 9.0)
    assert n.tolist() == shift[pair == 1].tolist()
    np.testing.assert_allclose(d2.numpy(), true[pair == 1], rtol=1e-10)
