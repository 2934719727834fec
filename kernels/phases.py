"""What the kernels of reciprocal attention read: cos and sin of G·p, atoms times the wave vectors, made once a call.

So no cosine is computed for a pair of atoms. Only batches that do not fit in SCRATCH wait for the device.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from crystalformer.common.ragged import crystal_of_atom
from crystalformer.common.tensor_struct import join_words
from crystalformer.geometry.wave_vectors import WaveVectors

from .launch import VECTORS

# Numbers of 32 bits that a call may keep between its kernels, 256 MiB.
SCRATCH = 1 << 26


@triton.jit
def cross(a_0, a_1, a_2, b_0, b_1, b_2):
    return a_1 * b_2 - a_2 * b_1, a_2 * b_0 - a_0 * b_2, a_0 * b_1 - a_1 * b_0


@triton.jit
def cos_sin(turns):
    """cos and sin of 2 pi turns, fp64 to fp32: an eighth of a turn to either side of a quarter, by their series.

    tl.cos and tl.sin would keep a table of 2/pi on the stack, for arguments larger than there are.
    """
    quarter = tl.floor(turns * 4 + 0.5)
    x = ((turns * 4 - quarter) * 1.5707963267948966).to(tl.float32)
    quarter = quarter.to(tl.int64) & 3
    x2 = x * x
    cos = 1 + x2 * (-0.5 + x2 * (1 / 24 + x2 * (-1 / 720 + x2 * (1 / 40320))))
    sin = x + x * x2 * (-1 / 6 + x2 * (1 / 120 + x2 * (-1 / 5040 + x2 * (1 / 362880))))
    turned = (quarter & 1) == 1
    return (
        tl.where(turned, sin, cos) * tl.where((quarter == 1) | (quarter == 2), -1.0, 1.0),
        tl.where(turned, cos, sin) * tl.where(quarter >= 2, -1.0, 1.0),
    )


@triton.jit
def phases(
    positions_p, lattice_p, crystal_p, ptr_p, g_ptr_p, g_p, phase_p, vector_p, inverse_p, stride, BP: tl.constexpr,
    BW: tl.constexpr,
):  # fmt: skip
    """Of one atom: cos and sin of G·p for each G of its crystal; the crystal's first atom writes G, |G|² and L^-T, too.

    In fp64, because G·p is large where the atom is far from the origin. Zeros fill the last block of BW vectors.
    """
    i = tl.program_id(0).to(tl.int64)
    crystal = tl.load(crystal_p + i)
    cell_p = lattice_p + crystal * 9
    a_0 = tl.load(cell_p).to(tl.float64)
    a_1 = tl.load(cell_p + 1).to(tl.float64)
    a_2 = tl.load(cell_p + 2).to(tl.float64)
    b_0 = tl.load(cell_p + 3).to(tl.float64)
    b_1 = tl.load(cell_p + 4).to(tl.float64)
    b_2 = tl.load(cell_p + 5).to(tl.float64)
    c_0 = tl.load(cell_p + 6).to(tl.float64)
    c_1 = tl.load(cell_p + 7).to(tl.float64)
    c_2 = tl.load(cell_p + 8).to(tl.float64)
    # The reciprocal lattice over 2 pi, times the volume.
    u_0, u_1, u_2 = cross(b_0, b_1, b_2, c_0, c_1, c_2)
    v_0, v_1, v_2 = cross(c_0, c_1, c_2, a_0, a_1, a_2)
    w_0, w_1, w_2 = cross(a_0, a_1, a_2, b_0, b_1, b_2)
    inverse = 1 / (a_0 * u_0 + a_1 * u_1 + a_2 * u_2)
    x = tl.load(positions_p + i * 3).to(tl.float64) * inverse
    y = tl.load(positions_p + i * 3 + 1).to(tl.float64) * inverse
    z = tl.load(positions_p + i * 3 + 2).to(tl.float64) * inverse
    f_0 = x * u_0 + y * u_1 + z * u_2
    f_1 = x * v_0 + y * v_1 + z * v_2
    f_2 = x * w_0 + y * w_1 + z * w_2
    first = tl.load(g_ptr_p + crystal)
    number = tl.load(g_ptr_p + crystal + 1) - first
    is_first = i == tl.load(ptr_p + crystal)
    row_p = inverse_p + crystal * 9
    tl.store(row_p, (u_0 * inverse).to(tl.float32), mask=is_first)
    tl.store(row_p + 1, (u_1 * inverse).to(tl.float32), mask=is_first)
    tl.store(row_p + 2, (u_2 * inverse).to(tl.float32), mask=is_first)
    tl.store(row_p + 3, (v_0 * inverse).to(tl.float32), mask=is_first)
    tl.store(row_p + 4, (v_1 * inverse).to(tl.float32), mask=is_first)
    tl.store(row_p + 5, (v_2 * inverse).to(tl.float32), mask=is_first)
    tl.store(row_p + 6, (w_0 * inverse).to(tl.float32), mask=is_first)
    tl.store(row_p + 7, (w_1 * inverse).to(tl.float32), mask=is_first)
    tl.store(row_p + 8, (w_2 * inverse).to(tl.float32), mask=is_first)
    scale = inverse * 6.283185307179586
    for start in range(0, number, BP):
        g = start + tl.arange(0, BP)
        m_g = g < number
        m_block = g < (number + BW - 1) // BW * BW
        n_0 = tl.load(g_p + (first + g) * 3, mask=m_g, other=0).to(tl.float64)
        n_1 = tl.load(g_p + (first + g) * 3 + 1, mask=m_g, other=0).to(tl.float64)
        n_2 = tl.load(g_p + (first + g) * 3 + 2, mask=m_g, other=0).to(tl.float64)
        cos, sin = cos_sin(n_0 * f_0 + n_1 * f_1 + n_2 * f_2)
        tl.store(phase_p + (2 * i) * stride + g, tl.where(m_g, cos, 0.0), mask=m_block)
        tl.store(phase_p + (2 * i + 1) * stride + g, tl.where(m_g, sin, 0.0), mask=m_block)
        g_0 = (n_0 * u_0 + n_1 * v_0 + n_2 * w_0) * scale
        g_1 = (n_0 * u_1 + n_1 * v_1 + n_2 * w_1) * scale
        g_2 = (n_0 * u_2 + n_1 * v_2 + n_2 * w_2) * scale
        length2 = g_0 * g_0 + g_1 * g_1 + g_2 * g_2
        o_g = (4 * crystal) * stride + g
        tl.store(vector_p + o_g, g_0.to(tl.float32), mask=m_block & is_first)
        tl.store(vector_p + o_g + stride, g_1.to(tl.float32), mask=m_block & is_first)
        tl.store(vector_p + o_g + 2 * stride, g_2.to(tl.float32), mask=m_block & is_first)
        tl.store(vector_p + o_g + 3 * stride, length2.to(tl.float32), mask=m_block & is_first)


@dataclass(frozen=True)
class Phases:
    """Phases of a batch, G padded to whole blocks.

    Attributes:
        phase: (P,2,G) cos and sin of G·p, zero in the padding of the crystal's last block.
        vector: (C,4,G) the vectors, Å^-1, and their squared lengths.
        inverse: (C,3,3) L^-T.
        crystal: (N) the crystal of each row; ptr and g_ptr (C+1) as in WaveVectors.
        atom_ptr: (N+1) as there; where rows are atoms something that is not read.
    """

    phase: Tensor
    vector: Tensor
    inverse: Tensor
    crystal: Tensor
    ptr: Tensor
    g_ptr: Tensor
    atom_ptr: Tensor

    @property
    def stride(self) -> int:
        return self.phase.shape[2]

    @property
    def read(self) -> tuple[Tensor, ...]:
        """What every kernel reads, in the order of their arguments."""
        return self.phase, self.vector, self.crystal, self.ptr, self.g_ptr


def padded(number: int) -> int:
    """A stride of whole blocks of vectors."""
    return -(-number // VECTORS) * VECTORS


def fits(num_atoms: int, heads: int, max_atoms: int, max_vectors: int) -> bool:
    """Whether phases, vectors of up to as many crystals, and a backward's p, ds, dS and F of pairs fit in SCRATCH."""
    return num_atoms * (6 * padded(max_vectors) + 3 * padded(max_atoms) * (heads + 1)) <= SCRATCH


def in_parts(
    run: Callable[..., tuple[Tensor, ...]],
    reference: Callable[..., tuple[Tensor, ...]],
    by_row: Sequence[Tensor],
    lattice: Tensor,
    waves: Tensor,
    largest: Sequence[int],
) -> tuple[Tensor, ...]:
    """run(*by_row, lattice, lists, largest), of as many consecutive crystals at a time as fit, joined; lists are the
    views of `waves`. `reference`, which takes packed lists, serves a crystal that is too large by itself.

    Only if one part does not hold them all is the device asked for the sizes of the crystals.

    Args:
        by_row: tensors (N,...), the first one (N,H,...).
    """
    num_rows, heads = by_row[0].shape[:2]
    lists = WaveVectors.views(waves, len(lattice), largest)
    ptr, g_ptr, *orbits, g = lists
    if fits(len(orbits[1]) if orbits else num_rows, heads, *largest[:2]):
        return run(*by_row, lattice, lists, largest)
    row, vector = ptr.tolist(), g_ptr.tolist()
    atom = orbits[0][ptr].tolist() if orbits else row
    made: list[tuple[Tensor, ...]] = []
    first = 0
    while first < len(lattice):
        last, size = first, (0, 0)
        while last < len(lattice):
            larger = max(size[0], atom[last + 1] - atom[last]), max(size[1], vector[last + 1] - vector[last])
            if last > first and not fits(atom[last + 1] - atom[first], heads, *larger):
                break
            last, size = last + 1, larger
        a, b, s, t, u, v = (x[at] for x in (row, atom, vector) for at in (first, last))
        inputs = (*(x[a:b] for x in by_row), lattice[first:last])
        here, part = [ptr[first : last + 1] - a, g_ptr[first : last + 1] - u], [*size]
        if orbits:
            here += [orbits[0][a : b + 1] - s, orbits[1][s:t]]
            part += [max(y - x for x, y in itertools.pairwise(row[first : last + 1])), b - a, t - s]
        here.append(g[u:v])
        if fits(t - s, heads, *size):
            made.append(run(*inputs, here, part))
        else:
            made.append(reference(*inputs, join_words(here), part))
        first = last
    return tuple(map(torch.cat, zip(*made, strict=True)))


def of_atoms(lists: Sequence[Tensor], *by_row: Tensor) -> tuple[Tensor, ...]:
    """What is by row, as it is for each atom."""
    _, _, *orbits, _ = lists
    if not orbits:
        return by_row
    atom_ptr, positions = orbits
    return tuple(x.repeat_interleave(atom_ptr.diff(), 0, output_size=len(positions)) for x in by_row)


def make_phases(positions: Tensor, lattice: Tensor, lists: Sequence[Tensor], max_vectors: int) -> Phases:
    ptr, g_ptr, *orbits, g = lists
    row_crystal = crystal = crystal_of_atom(ptr, len(positions))
    atom_ptr = column_ptr = ptr
    if orbits:
        atom_ptr, positions = orbits[0], orbits[1].to(positions.dtype)
        column_ptr = atom_ptr[ptr]
        crystal = crystal_of_atom(column_ptr, len(positions))
    phase = positions.new_empty(len(positions), 2, padded(max_vectors))
    vector = positions.new_empty(len(lattice), 4, phase.shape[2])
    x = Phases(phase, vector, lattice.new_empty(lattice.shape), row_crystal, ptr, g_ptr, atom_ptr)
    inputs = (positions.contiguous(), lattice.contiguous(), crystal, column_ptr, g_ptr, g)
    phases[(len(positions),)](*inputs, phase, vector, x.inverse, x.stride, BP=256, BW=VECTORS, num_warps=4)
    return x
