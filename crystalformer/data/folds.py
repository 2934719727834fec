"""Which fold each crystal is in: of a column of a file, or at random."""

import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path

from .formats import read_table
from .rows import missing
from .samples import DataError, first_repeated
from .splits import split

FOLD = "fold"
FEWEST, MOST = 2, 1000


def random_folds(ids: Sequence[str], number: int, seed: int = 0) -> dict[str, str]:
    """The fold of each id, "0" to "number - 1", of sizes that differ by one at most.

    The ids are sorted by the SHA-256 of seed and id and dealt out: the same on any machine, in whatever order they
    come.

    Raises:
        ValueError: for repeated ids, or fewer of them than folds.
    """
    if first_repeated(ids) is not None:
        raise ValueError(f"ids must differ, but {first_repeated(ids)!r} is there twice")
    if not FEWEST <= number <= min(len(ids), MOST):
        raise ValueError(f"folds must be from {FEWEST} to {min(len(ids), MOST)}, not {number}, of {len(ids)} crystals")
    order = sorted(ids, key=lambda id: (hashlib.sha256(f"{seed}:{id}".encode()).digest(), id))
    return {id: str(place % number) for place, id in enumerate(order)}


def read_folds(path: str | Path, id_column: str | None = None) -> dict[str, str]:
    """The fold of each id, of a table with a column `fold`: any that `read_samples` reads, as the data themselves.

    Raises:
        DataError: for a file without such a column, an id in two folds, names that make no folders, or a single fold.
    """
    table = read_table(path, (FOLD,), id_column)
    if FOLD not in table.columns:
        raise DataError(f"{path}: has no column {FOLD!r}")
    found: dict[str, str] = {}
    for row in table.rows:
        if missing(row.values.get(FOLD)):
            continue
        # pandas writes whole numbers as 0.0 where some are missing.
        fold = re.sub(r"^(\d+)\.0$", r"\1", str(row.values[FOLD]).strip())
        if found.setdefault(row.id, fold) != fold:
            raise DataError(
                f"{path}: must have one fold for each crystal, but {row.id!r} is in {found[row.id]} and {fold}"
            )
    if (odd := next((x for x in found.values() if not re.fullmatch(r"[\w-]{1,60}", x)), None)) is not None:
        raise DataError(f"{path}: folds must be numbers or short names, which become names of folders, not {odd!r}")
    names = {x.casefold(): x for x in found.values()}
    if (two := next((x for x in found.values() if names[x.casefold()] != x), None)) is not None:
        raise DataError(f"{path}: folds must differ by more than case, but there are {two} and {names[two.casefold()]}")
    if not FEWEST <= len(set(found.values())) <= MOST:
        raise DataError(f"{path}: must have from {FEWEST} to {MOST} folds, not {len(set(found.values()))}")
    return found


def split_of_fold(fold_of: dict[str, str], fold: str, val_fraction: float, seed: int = 0) -> dict[str, list[str]]:
    """The ids of a fold as "test", the others at random as "train" and "val", as `split` does.

    Raises:
        ValueError: for a val_fraction that leaves no crystal for "train".
    """
    rest = [id for id, x in fold_of.items() if x != fold]
    sets = split(rest, (1 - val_fraction, val_fraction, 0.0), seed)
    return sets | {"test": [id for id, x in fold_of.items() if x == fold]}


def in_order(folds: Sequence[str]) -> list[str]:
    """Each fold once, numbers by their size and before names."""

    def key(fold: str) -> tuple[float, str]:
        return (int(fold), fold) if fold.isdecimal() else (math.inf, fold)

    return sorted(set(folds), key=key)
