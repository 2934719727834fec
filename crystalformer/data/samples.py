"""Crystals with their ids and targets, and what could not be read."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common import storage


class DataError(ValueError):
    """Data that cannot be used, in one line that says where and why."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Crystals as they were read.

    Attributes:
        ids: of the crystals, each once.
        structures: pymatgen Structures or ase Atoms.
        targets: (C,T) fp64, NaN where a value is not known; T = 0 where none were asked for.
        names: of the T targets.
        forces: (n,3) fp64 of each crystal, eV/Å; none where they were not asked for.
        stress: (3,3) fp64 of each crystal, eV/Å³, likewise.
    """

    ids: tuple[str, ...]
    structures: tuple[Any, ...]
    targets: Tensor
    names: tuple[str, ...] = ()
    forces: tuple[Tensor, ...] = ()
    stress: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.ids)) != len(self.ids):
            raise ValueError(f"ids must differ, but {first_repeated(self.ids)!r} is there twice")
        if len(self.structures) != len(self.ids):
            raise ValueError(f"structures must be {len(self.ids)}, as ids, not {len(self.structures)}")
        shape = (len(self.ids), len(self.names))
        if self.targets.dtype != torch.float64 or tuple(self.targets.shape) != shape:
            wanted = f"fp64 of shape {shape}, as ids and names"
            raise ValueError(f"targets must be {wanted}, not {self.targets.dtype} of {tuple(self.targets.shape)}")

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, ids: Sequence[str]) -> "Samples":
        """The samples of these ids, in their order.

        Raises:
            ValueError: for ids that are not there or are named twice.
        """
        place = {id: i for i, id in enumerate(self.ids)}
        unknown = [id for id in ids if id not in place]
        if unknown:
            shown = ", ".join(map(str, unknown[:10])) + (", ..." if len(unknown) > 10 else "")
            raise ValueError(f"ids must be among those of the samples, not {shown} ({len(unknown)} of {len(ids)})")
        index = [place[id] for id in ids]
        of_atoms = (tuple(x[i] for i in index) if x else () for x in (self.forces, self.stress))
        return Samples(tuple(ids), tuple(self.structures[i] for i in index), self.targets[index], self.names, *of_atoms)


@dataclass(frozen=True)
class Problem:
    """A row that could not be used.

    Attributes:
        id: of the row, "#4" for the fourth row where it has none.
        source: where it stands, as "data.csv, row 4".
        reason: why it cannot be used, in one line.
    """

    id: str
    source: str
    reason: str

    def __str__(self) -> str:
        return f"{self.source}: {self.id}: {self.reason}"


def usable(ids: Iterable[str], samples: Samples, problems: Iterable[Problem]) -> list[str]:
    """The ids of a set without those of bad rows; an id that a bad row repeats is that of a good one."""
    bad = {problem.id for problem in problems} - {*samples.ids}
    return [id for id in ids if id not in bad]


def write_problems(path: str | Path, problems: Iterable[Problem]) -> None:
    """Writes the report of bad rows: CSV with the columns id, source, reason."""
    storage.write(path, storage.csv_text([("id", "source", "reason"), *((x.id, x.source, x.reason) for x in problems)]))


def first_repeated(ids: Iterable[str]) -> str | None:
    seen: set[str] = set()
    return next((id for id in ids if id in seen or seen.add(id)), None)  # type: ignore[func-returns-value]


def writable(text: str) -> str:
    """What no file in UTF-8 can hold, as half of a surrogate pair, by its number."""
    return text.encode("utf-8", "backslashreplace").decode()
