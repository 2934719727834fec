"""Image lists that the tests share: of one crystal, of one of each kind, and as tuples."""

from typing import Any

import torch
from crystals import pack, random_crystal
from torch import Tensor

import crystalformer as cf

Image = tuple[int, int, int, int, int]
# How many atoms a crystal of each kind has.
SIZES = {"cubic": 4, "skewed": 3, "needle": 2, "plate": 3, "left_handed": 5}
NEAR = 7.0  # Å, a cutoff


def image_tuples(images: cf.ImageList) -> list[Image]:
    """(i, j, n0, n1, n2) of each image, in order."""
    row = torch.repeat_interleave(images.row_ptr.diff())
    table = torch.cat([row[:, None], images.col.long()[:, None], images.shift.long()], 1)
    return [tuple(x) for x in table.tolist()]


def of_one(crystal: tuple[Tensor, Tensor], **options: Any) -> cf.ImageList:
    return cf.build_images(*pack([crystal]), **options)


def one_of_each() -> tuple[Tensor, Tensor, Tensor]:
    """A batch with a crystal of each kind."""
    return pack([random_crystal(kind, 3, n) for kind, n in SIZES.items()])


def cube(edge: float, positions: Any = ((0, 0, 0),)) -> tuple[Tensor, Tensor]:
    return torch.tensor(positions, dtype=torch.float64), edge * torch.eye(3, dtype=torch.float64)
