"""Where the crystals of a training come from."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from ..common import checks
from ..data.forces import per_atom
from ..data.readers import read_samples
from ..data.samples import DataError, Problem, Samples, usable
from ..data.splits import read_split, split
from ..geometry.orbits import SYMMETRY_TOL

MOST_SEED = 2**64 - 1  # of torch


@dataclass(frozen=True)
class DataSource:
    """Where the crystals come from and which of them train, validate and test.

    Attributes:
        data: file or folder with all crystals: CSV, JSON, CIF, POSCAR, extxyz, an ase database. Split at random by
            `fractions` and the seed, or as `split` says.
        train: file or folder with the crystals to learn from, instead of `data`.
        val: those to validate on, after each epoch; with `train`.
        test: those to test the trained model on; with `train`, may be missing.
        split: JSON file with the ids of "train", "val" and "test".
        fractions: shares of train, val and test.
        split_seed: of the random split; that of the training if None.
        id_column: name of the column with the ids; found by itself where it has a usual name.
        forces: learn the forces, too, eV/Å, from extxyz, an ase database or a column `forces` of JSON. The target is
            then the energy of the cell, eV; what is learnt and predicted is that of an atom. Every atom has its row.
        stress: with forces, learn the stress, too, eV/Å³, positive where the cell would shrink, as in ase.
        primitive: learn from primitive cells. The model's predictions do not depend on the cell; small ones are faster.
        strict: stop at the first crystal that cannot be read; else they are listed in problems.csv and left out.
        cache: folder that keeps parsed structures and image lists for other trainings.
        symmetry_tol: learn from one row for each orbit of atoms that the symmetry makes equivalent within this, Å: the
            same model from fewer rows. 0, and forces, give every atom its row.
        workers: processes that parse structures, which pays from some ten thousand on, and threads that build the image
            lists; 0 parses in this process and builds with torch's threads.
    """

    data: Path | None = None  # strings too, as for the other paths
    train: Path | None = None
    val: Path | None = None
    test: Path | None = None
    split: Path | None = None
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    split_seed: int | None = None
    id_column: str | None = None
    forces: bool = False
    stress: bool = False
    primitive: bool = False
    symmetry_tol: float = SYMMETRY_TOL
    strict: bool = False
    cache: Path | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("data", "train", "val", "test", "split", "cache"):
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, Path(value))
        object.__setattr__(self, "fractions", tuple(self.fractions))
        if (self.data is None) == (self.train is None):
            raise DataError("give the crystals with either data or train, val and test")
        if self.data is None and self.val is None:
            raise DataError("val must be given with train: a training validates behind each epoch")
        if self.data is None and self.split is not None:
            raise DataError("split must be given with data: train and val are split already")
        if self.data is None or self.split is not None:
            for name, default in (("fractions", DataSource.fractions), ("split_seed", None)):
                if (value := getattr(self, name)) != default:
                    raise DataError(f"{name} must be of data without split, not {value} for sets that are chosen")
        if self.split_seed is not None:
            checks.check_integer("split_seed", self.split_seed, 0, MOST_SEED)
        if self.stress and not self.forces:
            raise DataError("forces must be given with stress")
        if self.forces and self.primitive:
            raise DataError("primitive must not be given with forces, which are those of the cell's own atoms")
        if self.forces:  # orbits of equivalent atoms have no gradients
            object.__setattr__(self, "symmetry_tol", 0.0)
        if self.cache is not None and self.cache.exists() and not self.cache.is_dir():
            raise DataError(f"cache must be a folder, not the file {self.cache}")

    def read_file(self, path: Path, targets: Sequence[str], classes: bool = False) -> tuple[Samples, list[Problem]]:
        """The crystals of a file, and the rows that cannot be used; see `read_samples`.

        Raises:
            DataError: if there are no crystals.
        """
        with progress_bar(f"  reading {path.name}") as advance:
            read, bad = read_samples(
                path,
                targets,
                id_column=self.id_column,
                forces=self.forces,
                stress=self.stress,
                primitive=self.primitive,
                strict=self.strict,
                workers=self.workers,
                cache=self.cache,
                progress=advance,
                classes=classes,
            )
        if not len(read):
            raise DataError(f"{path}: no crystal can be used" + (f": {bad[0]}" if bad else ""))
        return per_atom(read) if self.forces else read, bad

    def read(
        self, targets: Sequence[str], seed: int, classes: bool = False
    ) -> tuple[dict[str, Samples], list[Problem]]:
        """The crystals of train, val and test, and the rows that cannot be used.

        Raises:
            DataError: for data that cannot be used.
        """
        problems: list[Problem] = []

        def samples(path: Path) -> Samples:
            read, bad = self.read_file(path, targets, classes)
            problems.extend(bad)
            return read

        try:
            if self.data is None:
                given = {"train": self.train, "val": self.val, "test": self.test}
                return {name: samples(path) for name, path in given.items() if path is not None}, problems
            everything = samples(self.data)
            seed = seed if self.split_seed is None else self.split_seed
            chosen = split(everything.ids, self.fractions, seed) if self.split is None else read_split(self.split)
            good = {name: usable(ids, everything, problems) for name, ids in chosen.items()}
            parts = {name: everything.select(ids) for name, ids in good.items() if ids}
        except ValueError as error:
            raise DataError(str(error)) from error
        for name in ("train", "val"):
            if name not in parts:
                raise DataError(f"{name} must hold at least one crystal, not none: see the split or its fractions")
        return parts, problems


@contextmanager
def progress_bar(text: str) -> Iterator[Callable[[int, int], object]]:
    """A progress bar; yields what to call with the numbers done and in all. On a terminal only."""
    hidden = not sys.stderr.isatty() or process_rank() > 0
    with tqdm(desc=text, unit=" crystals", disable=hidden, leave=False) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance


def process_rank() -> int:
    """This process's number, before lightning has started the others too."""
    return getattr(rank_zero_only, "rank", 0)
