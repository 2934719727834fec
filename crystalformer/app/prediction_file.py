"""The table of predictions: CSV that grows, and is gone on with after its last whole row."""

import csv
import json
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ..common import storage
from .user_errors import Stop, user_errors

# Behind the name of a table that is not complete: what it was made with.
UNFINISHED = ".unfinished.json"


class PredictionFile:
    """Rows are written as they come; all that are in the file are whole unless the program is killed.

    Beside an unfinished file stands another, named as it with `.unfinished.json` behind, which says what it was made
    with. An older file stays until the first rows are written.

    Args:
        out: the file; "-" is stdout.
        columns: of the table, the first of them the id.
        made_with: JSON values that must be the same to go on.
        resume: go on with the file, if it is there.

    Attributes:
        done: ids of the rows that were there before, in order.

    Raises:
        Stop: if the file cannot be gone on with.
    """

    def __init__(self, out: str, columns: Sequence[str], made_with: Mapping[str, Any], resume: bool) -> None:
        self.out, self.columns, self.made_with = out, list(columns), dict(made_with)
        self.state = Path(out + UNFINISHED)
        self.done: deque[str] = deque()
        self._file: IO[bytes] | None = None
        self._keep, self._begun = 0, False
        if resume:
            self._look()

    @property
    def _is_regular(self) -> bool:
        return self.out != "-" and (Path(self.out).is_file() or not Path(self.out).exists())

    def write(self, rows: Sequence[Sequence[object]]) -> None:
        """Writes rows, whole, to where others can see them."""
        header = [] if self._begun else [self.columns]
        text = storage.csv_text([*header, *rows])
        try:
            if self.out == "-":
                sys.stdout.write(text)
                sys.stdout.flush()
            else:
                self._file = self._file or self._open()
                self._file.write(text.encode())
                self._file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise Stop(f"{'stdout' if self.out == '-' else self.out}: {error}", 1) from error
        self._begun = True

    def _open(self) -> IO[bytes]:
        file = open(self.out, "ab" if self._keep else "wb")  # noqa: SIM115, closed by `close`
        if self._keep:
            file.truncate(self._keep)
        elif self._is_regular:
            storage.write(self.state, json.dumps(storage.sealed(self.made_with), indent=2) + "\n")
        return file

    def close(self, complete: bool) -> None:
        """If it is complete, nothing says any more that it is not; an older file, if no row was written, stays."""
        if self._file is not None:
            self._file.close()
        if complete and self._begun and self._is_regular:
            self.state.unlink(missing_ok=True)

    # Going on ---------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """What is there of the file."""
        if not self._is_regular:
            raise Stop(f"out must be a file with resume, not {self.out}")
        if not Path(self.out).exists():
            return
        if not self.state.exists():
            raise Stop(f"resume must find {self.state} beside {self.out}: it is complete, or nobody knows its model")
        with user_errors():
            before = storage.read_json(self.state)
        for name, value in self.made_with.items():
            if not isinstance(before, dict) or before.get(name) != value:
                raise Stop(f"{name} must be the same as when {self.out} was begun: give what it was, or another out")
        with user_errors():
            for cells, end in whole_rows(self.out):
                if not self._keep and cells != self.columns:
                    raise Stop(f"{self.out} must have the columns {', '.join(self.columns)}, not {', '.join(cells)}")
                if self._keep:
                    self.done.append(cells[0])
                self._keep, self._begun = end, True


def whole_rows(path: str | Path) -> Iterator[tuple[list[str], int]]:
    """The cells of each row of a CSV file and the byte behind it, without a last row that is cut."""
    end, row = 0, b""
    with open(path, "rb") as file:
        for line in file:
            row += line
            if row.endswith(b"\n") and row.count(b'"') % 2 == 0:  # else a newline in a cell, or the end is missing
                end += len(row)
                (cells,) = csv.reader([row.decode()]) if row.strip() else ([],)
                yield cells, end
                row = b""
