"""No op and no model of any backend sums over a list that is not its crystals', or that is none.

On a GPU values are looked at only when asked for, as here.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from crystals import pack, random_crystal
from problems import Problem, problem
from torch import Tensor
from ways import Way

import crystalformer as cf

X = problem(every_pair=True)
TURN = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
BUILT_FOR = r"^images must be built for these positions and lattice"


@pytest.fixture(autouse=True)
def _values_are_looked_at() -> Iterator[None]:
    with cf.debug_checks(True):
        yield


def problem_of(seed: int, sizes: tuple[int, ...] = (1, 3, 2)) -> Problem:
    return problem(tuple(("cubic", n) for n in sizes), seed=seed, every_pair=True)


def moved(by: float) -> Tensor:
    positions = X.positions.clone()
    positions[2, 0] += by
    return positions


def of_geometry(way: Way, positions: Tensor, lattice: Tensor) -> Problem:
    return way.place(dataclasses.replace(X, positions=positions, lattice=lattice))


def test_a_list_of_other_crystals_is_refused(way):
    x = problem_of(0)
    message = BUILT_FOR + r": in crystal \d distances have changed by up to .* Å; call build_images again$"
    for other in (problem_of(1), problem_of(0, sizes=(3, 1, 2))):  # the same number of atoms and of crystals
        y = way.place(dataclasses.replace(x, images=other.images))
        for op in (y.attention, y.encoding):
            with pytest.raises(ValueError, match=message):
                op(backend=way.backend)


def test_a_model_refuses_lists_of_other_crystals(way):
    config = cf.CrystalformerConfig(domain="multihead", num_blocks=1, model_dim=16, num_heads=2, ff_dim=16)
    model = cf.Crystalformer(config, way.backend).to(way.device, way.dtype)

    def batch(*sizes: int) -> cf.CrystalBatch:
        positions, lattice, ptr = pack([random_crystal("skewed", n, n) for n in sizes])
        crystals = cf.CrystalBatch(torch.ones(len(positions), dtype=torch.int64), positions, lattice, ptr)
        return model.prepare(crystals.to(way.dtype).to(way.device))

    one, other = batch(3, 1), batch(1, 3)
    for name in ("images", "wave_vectors"):
        mixed = dataclasses.replace(one, **{name: getattr(other, name)})
        message = rf"batch\.{name} must be of the crystals of batch\.ptr, \[0, 3, 4\], not of \[0, 1, 4\]"
        with pytest.raises(ValueError, match=message):
            model(mixed)


def test_a_little_movement_is_borne_and_more_is_not(way):
    small = 0.4 * float(X.images.bearable[1])
    for by in (small, -small):
        of_geometry(way, moved(by), X.lattice).attention(backend=way.backend)
    for positions, lattice in (
        (moved(6 * small), X.lattice),
        (X.positions + X.lattice[1, :1] * (torch.arange(6) == 2)[:, None], X.lattice),  # wrapped into another cell
        (X.positions, 1.05 * X.lattice),
    ):
        with pytest.raises(ValueError, match=BUILT_FOR):
            of_geometry(way, positions, lattice).attention(backend=way.backend)


def test_wave_vectors_of_another_lattice_are_refused(way):
    waves = cf.build_wave_vectors(X.lattice, X.ptr, 0.5).to(way.device)
    options = {"backend": way.backend, "wave_vectors": waves}
    of_geometry(way, X.positions @ TURN, X.lattice @ TURN).reciprocal(**options)
    of_geometry(way, X.positions * 1.001, X.lattice * 1.001).reciprocal(**options)
    with pytest.raises(ValueError, match=r"^wave_vectors must be built for this lattice: cell 0 has been strained by "):
        of_geometry(way, X.positions, X.lattice * 1.03).reciprocal(**options)


def test_a_list_that_was_written_is_packed_again(way):
    x = way.problem(seed=3)
    x.attention(backend=way.backend)
    x.images.shift.zero_()
    with pytest.raises(ValueError, match=r"^images must be sorted"):
        x.attention(backend=way.backend)


def edited(edit: Callable[[cf.ImageList], Any]) -> cf.ImageList:
    images = X.images
    images = dataclasses.replace(images, col=images.col.clone(), shift=images.shift.clone())
    changed = edit(images)
    return changed if isinstance(changed, cf.ImageList) else images


def without_selves(images: cf.ImageList) -> cf.ImageList:
    row = torch.repeat_interleave(images.row_ptr.diff())
    kept = (row != images.col) | images.shift.any(1)
    row_ptr = torch.nn.functional.pad(torch.bincount(row[kept], minlength=6).cumsum(0), (1, 0))
    return dataclasses.replace(images, row_ptr=row_ptr, col=images.col[kept], shift=images.shift[kept])


# The backends look in another order, so what is wrong in two ways may be called either.
USED: dict[str, tuple[Callable[[cf.ImageList], Any], str]] = {
    "far col": (lambda x: x.col.__setitem__(3, 1 << 30), ""),
    "negative col": (lambda x: x.col.__setitem__(3, -5), ""),
    "col of another crystal": (lambda x: x.col.__setitem__(-1, 0), ""),
    "unsorted col": (lambda x: x.col.copy_(x.col.flip(0)), ""),
    "twice": (lambda x: x.shift[6].copy_(x.shift[5]), r"be sorted by \(col, shift\) in each row, no image twice"),
    "unsorted shift": (lambda x: x.shift.copy_(-x.shift), r"be sorted by \(col, shift\) in each row, no image twice"),
    "not symmetric": (lambda x: x.shift[0].sub_(1), "be symmetric"),
    "extreme": (lambda x: x.shift[0].fill_(-(1 << 31)), "be symmetric"),
    "no selves": (without_selves, "hold each atom itself"),
}


@pytest.mark.parametrize("name", USED)
def test_a_list_checks_itself_when_used(name, way):
    edit, message = USED[name]
    x = way.place(dataclasses.replace(X, images=edited(edit)))
    for op in (x.attention, x.encoding):
        with pytest.raises(ValueError, match=f"^images must {message}.*, but they are not$"):
            op(backend=way.backend)
