"""Packing of the image list for the kernels, with torch operations on the list's device.

Images of one pair (i, j) at one distance, the same number in fp32, are one shell, with the logarithm of their count: a
perovskite has a fifth as many shells as images. Attention reads them in tiles of BG groups of G shells of one pair,
nearest first, so that k_j and v_j are gathered once for G. A tile is one record of R words: BG atoms j, the BG groups
of the mirror images (j, i, -n), G·BG distances and as many logarithms. Empty places have the distance FAR, whose weight
is zero; empty groups have the mirror -1. All distances are x = d sqrt(log2(e)/2) / w, so that b(d) = 2^-(x - mu)², and
logarithms are to the base 2.

A layout is one tensor, so that it passes through an operator: rows of one record each, and behind them the centres mu
of the basis, the first tile of each atom, and at which place each image of the list and its mirror are. The encoding
reads plain rows of one shell each, a distance and a logarithm, sorted by pair, then distance.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from crystalformer.attention.settings import Settings
from crystalformer.common.ragged import crystal_of_atom, offsets
from crystalformer.geometry.image_list import ImageList

from .launch import padded

# (G, BG): many shells a pair in small cells, one in large ones. R = 2 BG + 2 G BG tells them apart.
SHAPES = ((8, 4), (4, 4), (2, 8), (1, 16))
# Instructions of a group (two gathers, the content score) over those of a shell, counted in the compiled kernels.
GROUP_COST = 3.0
FAR = 1e18
FAR_BITS = int(torch.tensor(FAR).view(torch.int32))
# Words of a row of the encoding: a distance and a logarithm.
SHELL = 2


@dataclass(frozen=True)
class Layout:
    """A layout, unpacked: views, no copies.

    Attributes:
        records: (T,R) int32, or two words a shell for the encoding.
        mu: (BK) fp32, centres of the basis in units of x.
        first: (N+1), first record of each atom; (P+1), of each pair, for the encoding.
        place, mirror: (M) at which of the T·G·BG places, or rows, each image of the list and its mirror are.
        atom: (P) atom i of each pair, for the encoding.
    """

    records: Tensor
    mu: Tensor
    first: Tensor
    place: Tensor
    mirror: Tensor
    atom: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(G, BG)."""
        return next(shape for shape in SHAPES if _words(*shape) == self.records.shape[1])


def _words(group: int, groups: int) -> int:
    return groups * (2 + 2 * group)


# Words of a row, of any layout.
ROWS = {SHELL, *(_words(*shape) for shape in SHAPES)}


def scale(num: int, settings: Settings) -> float:
    """x / d, Å^-1, for K = num basis functions."""
    if not num:
        return 1.0
    return math.sqrt(0.5 * math.log2(math.e)) * num / (settings.width * settings.r_max)


def unpack(layout: Tensor, num_rows: int, num_images: int, num: int) -> Layout:
    """Views of what `pack` joined, for N atoms or P pairs, M images and K basis functions.

    Raises:
        ValueError: for what `pack` cannot have made. Its values are on the device, and not looked at.
    """
    if layout.dtype != torch.int32 or layout.dim() != 2 or layout.shape[1] not in ROWS:
        raise ValueError(f"layout must be made by triton_layout, not be {layout.dtype} of shape {tuple(layout.shape)}")
    sizes = (padded(num), num_rows + 1, num_images, num_images, num_rows if layout.shape[1] == SHELL else 0)
    spaces = [space for size in sizes for space in (size, _aligned(size) - size)]
    tail = sum(spaces)
    num_records = layout.shape[0] - -(-tail // layout.shape[1])
    if num_records < (num_images if layout.shape[1] == SHELL else 0):
        raise ValueError(f"layout must be made by triton_layout for this list and basis, not have {len(layout)} rows")
    rest = (layout.shape[0] - num_records) * layout.shape[1] - tail
    records, mu, _, first, _, place, _, mirror, _, atom, _, _ = layout.view(-1).split(
        (num_records * layout.shape[1], *spaces, rest)
    )
    return Layout(records.view(num_records, layout.shape[1]), mu.view(torch.float32), first, place, mirror, atom)


def _aligned(size: int) -> int:
    """Words that a part takes: each starts at a multiple of 16 bytes, which loads are faster from."""
    return -(-size // 4) * 4


def _join(records: Tensor, num: int, settings: Settings, *tables: Tensor) -> Tensor:
    width = settings.width
    centers = torch.arange(1, padded(num) + 1, device=records.device)
    mu = torch.where(centers <= num, centers * (math.sqrt(0.5 * math.log2(math.e)) / width), -FAR)
    parts = [records.flatten(), mu.float().view(torch.int32), *(x.int() for x in tables)]
    joined = torch.cat([pad(part, (0, _aligned(len(part)) - len(part))) for part in parts])
    width_of_row = records.shape[1]
    return pad(joined, (0, -len(joined) % width_of_row)).view(-1, width_of_row)


@dataclass(frozen=True)
class _Sorted:
    """The images sorted by pair, then distance, and the shells that they belong to.

    Attributes:
        order: (M) the image in the list.
        i, j, x: (M) of each image.
        shell: (M) of all shells, which one it belongs to.
        rank: (M) how many shells of its pair are nearer.
        log_count: (M) log2 of how many images its shell has.
        is_first: (M) whether it is the first image of its shell.
        first_mirror: (M) the nearest image of the pair (j, i).
    """

    order: Tensor
    i: Tensor
    j: Tensor
    x: Tensor
    shell: Tensor
    rank: Tensor
    log_count: Tensor
    is_first: Tensor
    first_mirror: Tensor


def _sort(images: ImageList, positions: Tensor, lattice: Tensor, scale: float) -> _Sorted:
    n, m = images.num_atoms, images.num_images
    i = torch.repeat_interleave(images.row_ptr.diff(), output_size=m)
    if images.distance is None or images.repeats is None:
        d, each = _distances(images, positions.double(), lattice.double(), i), None
    else:
        d, each = images.distance, images.repeats
    pair = i * n + images.col
    order = torch.argsort(d, stable=True)
    order = order[torch.argsort(pair[order], stable=True)]
    i, j, pair, x = i[order], images.col[order].long(), pair[order], (d[order] * scale).float()
    is_first = pad((pair.diff() != 0) | (x.diff() != 0), (1, 0), value=True)[:m]
    shell = is_first.cumsum(0) - 1
    if each is None:
        count = torch.searchsorted(shell, shell, right=True) - torch.searchsorted(shell, shell)
    else:
        count = torch.zeros_like(each).index_add_(0, shell, each[order])[shell]
    return _Sorted(
        order=order,
        i=i,
        j=j,
        x=x,
        shell=shell,
        rank=shell - shell[torch.searchsorted(pair, pair)],
        log_count=count.log2().float(),
        is_first=is_first,
        first_mirror=torch.searchsorted(pair, j * n + i),
    )


def _distances(images: ImageList, positions: Tensor, lattice: Tensor, i: Tensor) -> Tensor:
    """(M), Å, in fp64: the rounding of d would be the largest error of the scores. Every step changes with the sign of
    its inputs alone, so an image and its mirror have the same d, bit for bit, and are in shells of the same rank."""
    crystal = crystal_of_atom(images.ptr, images.num_atoms)
    r = positions[images.col] - positions[i]
    for axis, n_axis in enumerate(images.shift.double().unbind(1)):
        r.addcmul_(n_axis[:, None], lattice[crystal[i], axis])
    return r.square().sum(-1).sqrt()


def _back(order: Tensor, x: Tensor) -> Tensor:
    """x in the order of the list."""
    return torch.empty_like(x).index_copy_(0, order, x)


def _expected_cost(images: ImageList, group: int, groups: int) -> float:
    """What tiles of this shape would cost if each image were a shell, expected from what the host knows."""
    m, pairs = images.num_images, min(images.num_pairs, images.num_images)  # no more pairs have an image
    full = max(pairs, (m + pairs * (group - 1) / 2) / group)  # half a group is empty at the end of a pair
    return (full / groups + images.num_atoms / 2) * groups * (group + GROUP_COST)


def _most_tiles(images: ImageList, group: int, groups: int) -> int:
    """As many tiles as a list of this size can need."""
    m, pairs = images.num_images, min(images.num_pairs, images.num_images)
    return (min(m, (m + pairs * (group - 1)) // group) + images.num_atoms * (groups - 1)) // groups


def pack(
    positions: Tensor,
    lattice: Tensor,
    images: Tensor,
    num_pairs: int,
    num: int,
    settings: Sequence[float],
    by_pair: bool,
) -> Tensor:
    """The layout of a list: (rows, R) int32, the operator `triton_layout`.

    Nothing waits for the device: there are as many records as a list of this size can need, and those that this one
    does not need come last and are never read. A layout serves with and without the gradients of the geometry: images
    of one shell have the same force.
    """
    told = Settings.read(settings)
    found = ImageList.unpack(images, len(positions), len(lattice), num_pairs, bool(told.of_orbits))
    e = _sort(found, positions, lattice, scale(num, told))
    if by_pair:
        return _pack_pairs(e, found, num, told)
    group, groups = min(SHAPES, key=lambda shape: _expected_cost(found, *shape))

    before = (e.is_first & (e.rank % group == 0)).cumsum(0)  # groups up to each image, of all atoms
    begin = pad(before, (1, 0))[found.row_ptr]
    first = offsets(-(-begin.diff() // groups))
    position = first[e.i] * groups + before - 1 - begin[e.i]
    tile, column = position // groups, position % groups
    mirror = position[e.first_mirror] + e.rank // group
    records = position.new_zeros(_most_tiles(found, group, groups), _words(group, groups), dtype=torch.int32)
    records[:, groups : 2 * groups] = -1
    records[:, 2 * groups : (2 + group) * groups] = FAR_BITS
    # In a record the shells stand by their place in the group, the groups side by side.
    start = e.rank % group * groups
    records[tile, column] = e.j.int()
    records[tile, groups + column] = mirror.int()
    records[tile, 2 * groups + start + column] = e.x.view(torch.int32)
    records[tile, (2 + group) * groups + start + column] = e.log_count.view(torch.int32)
    place = tile * (group * groups) + start + column
    mirror_place = mirror // groups * (group * groups) + start + mirror % groups
    return _join(records, num, told, first, _back(e.order, place), _back(e.order, mirror_place), first[:0])


def _pack_pairs(e: _Sorted, images: ImageList, num: int, settings: Settings) -> Tensor:
    """The encoding's layout."""
    crystal = crystal_of_atom(images.ptr, images.num_atoms)
    partners = images.ptr.diff()[crystal]
    first_pair = partners.cumsum(0) - partners - images.ptr[crystal]
    pair = torch.arange(images.num_pairs + 1, device=e.i.device)
    first_image = torch.searchsorted(first_pair[e.i] + e.j, pair)
    first = offsets(e.is_first)[first_image]
    atom = torch.repeat_interleave(partners, output_size=images.num_pairs)
    records = e.order.new_zeros(len(e.x), SHELL, dtype=torch.int32)
    records[e.shell] = torch.stack((e.x, e.log_count), 1).view(torch.int32)
    mirror = e.shell[e.first_mirror] + e.rank
    return _join(records, num, settings, first, _back(e.order, e.shell), _back(e.order, mirror), atom)
