"""What an operator of real space is told besides its tensors, as one group."""

from collections.abc import Sequence
from typing import NamedTuple


class Settings(NamedTuple):
    """The numbers of the group, in order; csrc/settings.h reads them in C++.

    Attributes:
        tol: largest fraction of the weight that the op may leave out.
        tf32: whether a backend may multiply in tf32, 0 or 1.
        r_max, width: of the radial basis; its number of functions is the last dimension of edge_weight.
        of_orbits: whether the image list is one of orbits, 0 or 1.
    """

    tol: float = 0.0
    tf32: float = 0.0
    r_max: float = 1.0
    width: float = 1.0
    of_orbits: float = 0.0

    @classmethod
    def read(cls, numbers: Sequence[float]) -> "Settings":
        """The settings that an operator was called with."""
        if len(numbers) != len(cls._fields):
            raise ValueError(f"settings must be {', '.join(cls._fields)}, not {list(numbers)}")
        return cls(*numbers)
