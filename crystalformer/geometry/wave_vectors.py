"""The reciprocal lattice vectors that sums in reciprocal space run over, with a certificate of what they leave out."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..common import checks
from ..common.ragged import cat_ptr, offsets, ordinals
from ..common.tensor_struct import TensorStruct, cat_known, check_parts, split_words
from .lattice import check_lattice, points_in_spheres, reciprocal, triangular
from .limits import INT32, MAX_VECTORS, check_vectors
from .movement import strain
from .truncation import BEYOND, tail_radius2

# Wave vectors that are looked at at once, but for a crystal that has more: the sums that choose them take 32 MiB.
VECTORS_AT_ONCE = 1 << 22


@dataclass(frozen=True, eq=False)
class WaveVectors(TensorStruct):
    """Half of the reciprocal lattice vectors G of each crystal: of G and -G one, and first the zero vector.

    It holds integers: G = 2 pi g L^-T, so gradients flow through the lattice. The certificate holds for the lattices
    that it was made for, and ops refuse others: what is left out may grow to twice `tol` as cells are strained.

    In a list of orbits a row stands for equivalent atoms: its sums are those of the first one, over all atoms of the
    primitive cell. It serves the positions and the lattice that it was made for, and no others.

    Attributes:
        g: (M,3) int32, crystal by crystal, by length.
        g_ptr: (C+1) int64, the vectors of crystal c are entries g_ptr[c] to g_ptr[c+1].
        ptr: (C+1) int64, the first row of each crystal; rows are atoms, but in a list of orbits.
        max_atoms, max_vectors: largest number of atoms and of vectors of a crystal, known without asking a GPU.
        decay_min, tol: what it is certified for (see `build_wave_vectors`).
        lattice: (C,3,3) fp64, Å, what it was made for, or None where that is not known: then any lattice is taken.
        bearable: (C) how much of itself a length of each cell may change before the vectors have to be built again.
        atom_ptr: (R+1) int64, of a list of orbits: row I stands for the atoms atom_ptr[I] to atom_ptr[I+1]. None in a
            list of atoms, as the next two.
        positions: (P,3) fp64, Å, these atoms.
        max_rows: largest number of rows of a crystal.
        accepted: another lattice, the last that the vectors were found to serve; of orbits with the positions.

    Raises:
        TypeError, ValueError: for tensors that do not make valid wave vectors, naming the attribute.
    """

    PACKED = ("ptr", "g_ptr", "atom_ptr", "positions", "g")

    g: Tensor
    g_ptr: Tensor
    ptr: Tensor
    max_atoms: int
    max_vectors: int
    decay_min: float
    tol: float
    lattice: Tensor | None = None
    bearable: Tensor | None = None
    atom_ptr: Tensor | None = None
    positions: Tensor | None = None
    max_rows: int | None = None
    accepted: list[Tensor] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        known: dict[str, int] = {}
        atom_ptr: Any = self.atom_ptr
        positions: Any = self.positions
        checks.check_tensor("g", self.g, "M 3", known)
        checks.check_dtype("g", self.g, torch.int32)
        checks.check_segments("g_ptr", self.g_ptr, known["M"], "vectors", "C")
        if atom_ptr is None and positions is None:
            checks.check_ptr("ptr", self.ptr)
        else:
            checks.check_tensor("positions", positions, "P 3", known)
            checks.check_dtype("positions", positions, torch.float64)
            checks.check_segments("atom_ptr", atom_ptr, known["P"], "atoms", "R", 1, "rise by at least one atom a row")
            checks.check_ptr("ptr", self.ptr, len(atom_ptr) - 1)
            checks.check_integer("max_rows", self.max_rows, 0)
        if self.g_ptr.shape != self.ptr.shape:
            raise ValueError(f"g_ptr must have shape {tuple(self.ptr.shape)}, as ptr, not {tuple(self.g_ptr.shape)}")
        for name in ("g_ptr", "ptr", *(("atom_ptr", "positions") if self.of_orbits else ())):
            checks.check_device(name, getattr(self, name), like=self.g)
        checks.check_number("decay_min", self.decay_min, closed=True)
        checks.check_between("tol", self.tol, 0, 1)
        if self.lattice is not None:
            checks.check_tensor("lattice", self.lattice, "C 3 3", {"C": self.num_crystals})
            checks.check_dtype("lattice", self.lattice, torch.float64)
        if self.bearable is not None:
            checks.check_tensor("bearable", self.bearable, "C", {"C": self.num_crystals})
        if checks.values_visible(self.g) and self.num_crystals:
            self._check_values()

    def _check_values(self) -> None:
        count = self.g_ptr.diff()
        if not bool((count > 0).all()) or bool(self.g[self.g_ptr[:-1]].any()):
            raise ValueError("g must begin with the zero vector in each crystal, but it does not")
        sizes = {"max_atoms": self.column_ptr.diff(), "max_vectors": count}
        for name, size in (sizes | ({"max_rows": self.ptr.diff()} if self.of_orbits else {})).items():
            if getattr(self, name) != (largest := int(size.max())):
                raise ValueError(f"{name} must be {largest}, that of the largest crystal, not {getattr(self, name)}")

    def check_built_for(
        self,
        lattice: Tensor,
        positions: Tensor | None = None,
        name: str = "wave_vectors",
        build: str = "build_wave_vectors",
    ) -> None:
        """Refuses lattices (C,3,3) that the vectors were not made for, where they can be seen.

        Args:
            positions: (R,3), of the rows; a list of orbits refuses others, too.
            name, build: of the argument that they came with, and what makes it.

        Raises:
            ValueError: if cells have been strained too much since; for a list of orbits, if anything has moved.
        """
        if self.lattice is None or self.bearable is None or not checks.values_visible(lattice):
            return
        checks.check_tensor("lattice", lattice, "C 3 3", {"C": self.num_crystals})
        now = lattice.detach().double()
        if self.atom_ptr is not None and self.positions is not None and positions is not None:
            first = self.positions[self.atom_ptr[:-1]]
            checks.check_tensor("positions", positions, "R 3", {"R": len(first)})
            here = [now, positions.detach().double()]
            if len(self.accepted) == len(here) and all(map(torch.equal, self.accepted, here)):
                return
            if any(_moved(x, y) for x, y in zip(here, (self.lattice, first), strict=True)):
                raise ValueError(f"{name} must be built for these positions and lattice; call {build} again")
            self.accepted[:] = [x.clone() for x in here]
            return
        if any(torch.equal(x, now) for x in (self.lattice, *self.accepted)):
            return
        check_lattice(lattice)
        strained = strain(self.lattice, now)
        far = ~(strained <= self.bearable)
        if bool(far.any()):
            i = int(far.nonzero()[0])
            raise ValueError(
                f"{name} must be built for this lattice: cell {i} has been strained by {float(strained[i]):.3g} since, "
                f"and they serve up to {float(self.bearable[i]):.3g}; call {build} again"
            )
        self.accepted[:] = [now.clone()]

    @property
    def largest(self) -> tuple[int, ...]:
        """(max_atoms, max_vectors), and (max_rows, R, P) of a list of orbits: what an operator takes beside the packed
        tensors."""
        if self.atom_ptr is None or self.positions is None or self.max_rows is None:
            return self.max_atoms, self.max_vectors
        return self.max_atoms, self.max_vectors, self.max_rows, len(self.atom_ptr) - 1, len(self.positions)

    @staticmethod
    def views(words: Tensor, num_crystals: int, largest: Sequence[int] = ()) -> tuple[Tensor, ...]:
        """ptr, g_ptr, of a list of orbits atom_ptr and positions, and g, of what `packed` made of them."""
        sizes = [num_crystals + 1, num_crystals + 1]
        if len(largest) <= 2:
            ptr, g_ptr, rest = split_words(words, *sizes)
            return ptr, g_ptr, rest.view(-1, 3)
        *_, num_rows, num_atoms = largest
        ptr, g_ptr, atom_ptr, positions, rest = split_words(words, *sizes, num_rows + 1, 3 * num_atoms)
        return ptr, g_ptr, atom_ptr, positions.view(torch.float64).view(-1, 3), rest.view(-1, 3)

    @staticmethod
    def unpack(words: Tensor, num_crystals: int, largest: Sequence[int]) -> "WaveVectors":
        """The wave vectors that `packed` made one tensor of, in views; what they are certified for is not there."""
        ptr, g_ptr, *atoms, g = WaveVectors.views(words, num_crystals, largest)
        max_atoms, max_vectors, *rows = largest
        of_orbits: dict[str, Any] = {}
        if rows:
            of_orbits = {"atom_ptr": atoms[0], "positions": atoms[1], "max_rows": rows[0]}
        return WaveVectors(g, g_ptr, ptr, max_atoms, max_vectors, decay_min=0.0, tol=1.0, **of_orbits)

    @property
    def of_orbits(self) -> bool:
        """Whether rows are orbits of equivalent atoms."""
        return self.atom_ptr is not None

    @property
    def column_ptr(self) -> Tensor:
        """(C+1) the first of the atoms of each crystal that its rows sum over."""
        return self.ptr if self.atom_ptr is None else self.atom_ptr[self.ptr]

    @property
    def num_vectors(self) -> int:
        return len(self.g)

    @property
    def num_crystals(self) -> int:
        return len(self.ptr) - 1

    @property
    def device(self) -> torch.device:
        return self.g.device

    @staticmethod
    def cat(parts: "list[WaveVectors]") -> "WaveVectors":
        """Joins those of separate crystals, in order. The certificate of the result is the weakest of its parts.

        Raises:
            ValueError: if there are no parts, if they are on several devices, if only some know their lattice, or if
                only some are of orbits.
        """
        parts = list(parts)
        check_parts(parts, "parts", WaveVectors)
        for name in ("lattice", "bearable"):
            if 0 < sum(getattr(x, name) is None for x in parts) < len(parts):
                raise ValueError(f"parts must all know what they were built for, their {name}, or none of them")
        atom_ptrs = [x.atom_ptr for x in parts if x.atom_ptr is not None]
        if 0 < len(atom_ptrs) < len(parts):
            raise ValueError("parts must be all of orbits or all of atoms")
        return WaveVectors(
            g=torch.cat([x.g for x in parts]),
            g_ptr=cat_ptr([x.g_ptr for x in parts]),
            ptr=cat_ptr([x.ptr for x in parts]),
            max_atoms=max(x.max_atoms for x in parts),
            max_vectors=max(x.max_vectors for x in parts),
            decay_min=max(x.decay_min for x in parts),
            tol=max(x.tol for x in parts),
            lattice=cat_known([x.lattice for x in parts]),
            bearable=cat_known([x.bearable for x in parts]),
            atom_ptr=cat_ptr(atom_ptrs) if atom_ptrs else None,
            positions=cat_known([x.positions for x in parts]),
            max_rows=max(x.max_rows or 0 for x in parts) if atom_ptrs else None,
        )


def _moved(now: Tensor, before: Tensor) -> bool:
    """Whether coordinates in fp64 differ by more than fp32 rounds them, with some room."""
    return not bool(((now - before).abs() <= 2**-20 * before.abs()).all())


def build_wave_vectors(
    lattice: Tensor,
    ptr: Tensor,
    decay_min: float = 1.21,
    tol: float = 1e-6,
    max_vectors: int = MAX_VECTORS,
    positions: Tensor | None = None,
    orbit: Tensor | None = None,
) -> WaveVectors:
    """The reciprocal lattice vectors that `reciprocal_attention` sums over, as few as the certificate allows.

    What is left out of sum_G exp(-c |G|²) cos(G·r) is at most `tol`, absolutely, for every c >= decay_min and every r;
    the term of G = 0 is 1. Equation (14) of docs/math.md.

    Args:
        lattice: (C,3,3) fp32 or fp64, rows are the lattice vectors, Å. Either handedness.
        ptr: (C+1) int64, the first row of each crystal and, last, N; rows are atoms, or orbits with the last arguments.
        decay_min: smallest c that will be used, Å². The default serves the paper's model, whose reciprocal decays are
            at least 0.5·2.2²/2.
        tol: largest part of the sum that may be left out, smaller than 1.
        max_vectors: how many may be looked at in each crystal, both G and -G and those that are left out again, and
            eight times as many in all. More are refused, by an estimate, before time or memory goes into them. By
            default 2^23, for which Ctrl-C waits no more than a second; at most 2^31 - 1.
        positions, orbit: (P,3), Å, and (P) int64, for features that are equal on equivalent atoms: all atoms of the
            primitive cells and the row of each. `lattice` is the primitive cells then, and ops take one row for each
            orbit in q, k, v and decay, and in positions the first atom of each. They have no gradients of positions
            and lattice.

    Returns:
        WaveVectors on the device of lattice; on a GPU it waits for the device.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was; for more than max_vectors, too.
    """
    known: dict[str, int] = {}
    checks.check_tensor("lattice", lattice, "C 3 3", known)
    checks.check_dtype("lattice", lattice, torch.float32, torch.float64)
    with checks.debug_checks(True):  # it waits for a GPU anyway
        check_lattice(lattice)
    checks.check_ptr("ptr", ptr)
    if len(ptr) - 1 != len(lattice):
        raise ValueError(f"ptr must have shape (C+1={len(lattice) + 1}), as lattice, not {tuple(ptr.shape)}")
    decay_min, tol = checks.check_number("decay_min", decay_min), checks.check_number("tol", tol, high=1.0)
    checks.check_integer("max_vectors", max_vectors, 1, INT32 - 1)
    certified = torch.tensor([decay_min, tol], dtype=torch.float64, device=lattice.device).expand(len(lattice), 2)
    waves = choose_wave_vectors(
        lattice.detach().double(), ptr.contiguous(), certified[:, 0], certified[:, 1], max_vectors
    )
    return waves if positions is None and orbit is None else _of_orbits(waves, positions, orbit)


@torch.inference_mode(False)
@torch.no_grad()
def _of_orbits(waves: WaveVectors, positions: Any, orbit: Any) -> WaveVectors:
    """The same for rows that are orbits of these atoms, which come sorted by row."""
    known: dict[str, int] = {}
    checks.check_tensor("positions", positions, "P 3", known)
    checks.check_dtype("positions", positions, torch.float32, torch.float64)
    checks.check_tensor("orbit", orbit, "P", known)
    checks.check_dtype("orbit", orbit, torch.int64)
    for name, x in (("positions", positions), ("orbit", orbit)):
        checks.check_device(name, x, like=waves.g)
    with checks.debug_checks(True):
        checks.check_finite("positions", positions)
    number = int(waves.ptr[-1])
    if not torch.equal(orbit.unique(), torch.arange(number, device=orbit.device)):
        raise ValueError(f"orbit must hold each row of ptr, 0 to {number - 1}, but it is {orbit.tolist()}")
    atom_ptr = offsets(torch.bincount(orbit, minlength=number))
    size = atom_ptr[waves.ptr].diff()
    return replace(
        waves,
        max_atoms=int(size.max()) if len(size) else 0,
        max_rows=waves.max_atoms,
        atom_ptr=atom_ptr,
        positions=positions[torch.argsort(orbit, stable=True)].double(),
    )


@torch.inference_mode(False)  # they outlive this call, and may be saved for a backward
@torch.no_grad()
def choose_wave_vectors(
    lattice: Tensor, ptr: Tensor, decay_min: Tensor, tol: Tensor, max_vectors: int = MAX_VECTORS
) -> WaveVectors:
    """`build_wave_vectors` of checked arguments, lattice in fp64, with a decay_min and a tol (C) for each crystal."""
    t, _ = triangular(reciprocal(lattice))
    outer2 = tail_radius2(t, decay_min, (tol * BEYOND).log())
    expected = check_vectors(torch.diagonal(t, dim1=-2, dim2=-1), outer2, max_vectors)
    if not len(lattice) or bool(len(lattice) * expected.max() <= VECTORS_AT_ONCE):
        return _choose(lattice, ptr, decay_min, tol, t, outer2)
    first, parts = 0, []
    for last, count in enumerate(itertools.pairwise([*expected.tolist(), math.inf]), 1):
        # As many as the largest of these, in a table with a row for each.
        if (last + 1 - first) * max(expected[first:last].max().item(), count[1]) > VECTORS_AT_ONCE:
            here = slice(first, last)
            arguments = (x[here] for x in (decay_min, tol, t, outer2))
            parts.append(_choose(lattice[here], ptr[first : last + 1] - ptr[first], *arguments))
            first = last
    return WaveVectors.cat(parts)


def _choose(lattice: Tensor, ptr: Tensor, decay_min: Tensor, tol: Tensor, t: Tensor, outer2: Tensor) -> WaveVectors:
    """Of as many crystals as are looked at at once; t (C,3,3) and outer2 (C): triangular lattices, squared radii."""
    number, device = len(lattice), lattice.device
    everyone = torch.arange(number, device=device)
    crystal, g, length2 = points_in_spheres(t, everyone, t.new_zeros(number, 3), outer2)
    # Sorted, the zero vector is in the middle of its crystal's and the rest is its mirror image.
    count = torch.bincount(crystal, minlength=number)
    place = ordinals(count, crystal)
    half = place >= count[crystal] // 2
    crystal, g, length2 = crystal[half], g[half], length2[half]
    by_length = torch.argsort(length2, stable=True)
    order = by_length[torch.argsort(crystal[by_length], stable=True)]
    crystal, g, length2 = crystal[order], g[order], length2[order]

    # What is left out by stopping at each vector, the smallest terms added first.
    count = count - count // 2
    place = ordinals(count, crystal)
    term = lattice.new_zeros(number, int(count.max()) if number else 0)
    term[crystal, place] = 2 * torch.exp(-decay_min[crystal] * length2)
    tail = term.flip(1).cumsum(1).flip(1)[crystal, place]
    kept = (place == 0) | (tail > (1 - BEYOND) * tol[crystal])
    count = torch.bincount(crystal[kept], minlength=number)
    return WaveVectors(
        g=g[kept].to(torch.int32),
        g_ptr=offsets(count),
        ptr=ptr,
        max_atoms=int(ptr.diff().max()) if number else 0,
        max_vectors=int(count.max()) if number else 0,
        decay_min=float(decay_min.max()) if number else 0.0,
        tol=float(tol.max()) if number else 0.0,
        lattice=lattice.clone(),
        bearable=math.log(2) / (2 * decay_min * outer2),
    )
