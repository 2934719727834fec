"""Which crystals train, validate and test: a seeded split, or the lists of a file."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..common import storage
from ..common.user_files import read_text
from .samples import DataError, first_repeated

SETS = ("train", "val", "test")


def split(ids: Sequence[str], fractions: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 0) -> dict[str, list[str]]:
    """A random split of the ids into "train", "val" and "test".

    The ids are sorted by the SHA-256 of seed and id, and cut: the same seed and ids give the same sets on any machine,
    in whatever order the ids come. A set of a fraction above 0 gets at least one id.

    Raises:
        ValueError: for fractions that are not three numbers from 0 that add up to 1, repeated ids, or too few of them.
    """
    fractions = tuple(fractions)
    if len(fractions) != 3 or not all(0 <= x <= 1 for x in fractions) or not math.isclose(sum(fractions), 1):
        raise ValueError(f"fractions must be three numbers from 0 that add up to 1, not {fractions}")
    repeated = first_repeated(ids)
    if repeated is not None:
        raise ValueError(f"ids must differ, but {repeated!r} is there twice")
    val, test = (max(1, round(x * len(ids))) if x > 0 else 0 for x in fractions[1:])
    train = len(ids) - val - test
    if train < 0 or (train == 0 and fractions[0] > 0):
        raise ValueError(f"ids must be enough for the fractions {fractions}, not {len(ids)}")
    order = sorted(ids, key=lambda id: (hashlib.sha256(f"{seed}:{id}".encode()).digest(), id))
    return {"train": order[:train], "val": order[train : train + val], "test": order[train + val :]}


def write_split(path: str | Path, split: Mapping[str, Sequence[str]]) -> None:
    """Writes JSON {"train": [...], "val": [...], "test": [...]} of ids, the file whole or not at all.

    Raises:
        ValueError: for other sets than these, or an id that is there twice.
    """
    _check(split, "split")
    sets = storage.sealed({name: list(split.get(name, ())) for name in SETS})
    storage.write(path, json.dumps(sets, indent=1) + "\n")


def read_split(path: str | Path) -> dict[str, list[str]]:
    """The split of a JSON file, with lists of ids or dictionaries with the ids as keys, or of a folder of lists.

    The sets are "train", "val", "test" as `write_split` and the JARVIS leaderboard name them, or "id_train", "id_val",
    "id_test" as ALIGNN's ids_train_val_test.json does. In a folder they are train.txt, val.txt, test.txt with an id a
    line. A set that is missing is empty.

    Raises:
        DataError: for a missing file, other sets, or an id that is there twice.
    """
    path = Path(path)
    try:
        if path.is_dir():
            found = {x.stem: _read_list(x) for x in sorted(path.glob("*.txt"))}
        else:
            found = storage.read_json(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except DataError:
        raise
    except ValueError as error:  # which names the file
        raise DataError(str(error)) from error
    if found == {} and path.is_dir():
        raise DataError(f"{path}: has none of {', '.join(f'{name}.txt' for name in SETS)}")
    if not isinstance(found, dict) or not all(isinstance(x, (list, dict)) for x in found.values()):
        raise DataError(f"{path}: must be a dictionary with lists of ids, {', '.join(SETS)}")
    named = {name.removeprefix("id_"): [str(id) for id in ids] for name, ids in found.items()}
    if len(named) < len(found):
        raise DataError(f"{path}: must name each set once, not {', '.join(found)}")
    try:
        _check(named, "the split")
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    return {name: named.get(name, []) for name in SETS}


def _read_list(path: Path) -> list[str]:
    try:
        lines = read_text(path).split("\n")
    except ValueError as error:
        raise DataError(f"{path}: no list of ids: {error}") from error
    return [id.strip() for id in lines if id.strip()]


def _check(split: Mapping[str, Sequence[str]], name: str) -> None:
    unknown = [x for x in split if x not in SETS]
    if unknown:
        raise ValueError(f"{name} must have the sets {', '.join(SETS)}, not {', '.join(map(str, unknown))}")
    of: dict[str, str] = {}
    for part, ids in split.items():
        for id in ids:
            if id in of:
                where = f"twice in {part}" if of[id] == part else f"in {of[id]} and in {part}"
                raise ValueError(f"{name} must have each id once, but {id!r} is {where}")
            of[id] = part
