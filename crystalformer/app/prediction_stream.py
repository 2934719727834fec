"""Predictions of any number of crystals: read, predicted and written some at a time."""

import sys
from collections.abc import Iterator, Sequence

import torch
from tqdm import tqdm

from ..common.backends import describe_backend
from ..common.process import cores
from ..common.words import count
from ..data.samples import Problem
from ..data.streams import Read, read_ids, read_stream
from ..model.structures import Crystal
from .outside import Guesses
from .prediction_file import PredictionFile
from .predictor import STRUCTURES_AT_ONCE, Predictor, Refused
from .user_errors import Stop, say


def predict_files(
    predictor: Predictor, files: Sequence[str], out: str, resume: bool, id_column: str | None, workers: int
) -> tuple[int, int]:
    """Predicts the crystals of files into a CSV, and says on stderr what cannot be predicted and what are guesses.

    Memory holds the ids of all rows, but the structures of some only.

    Returns:
        How many rows could not be predicted, and how many there are.
    """
    columns = list(predictor.names)
    deviations = [f"{name}_deviation" for name in predictor.names] if len(predictor.members) > 1 else []
    for column in (*deviations, "outside"):
        while column in columns:
            column += "_"
        columns.append(column)
    made_with = {"model": predictor.digest, "symmetry_tol": predictor.symmetry_tol}
    made_with |= {"files": list(files), "id_column": id_column}
    threads = torch.get_num_threads()
    table = PredictionFile(out, ["id", *columns], made_with, resume)
    complete = False
    if workers:  # their cores are not the network's, whose threads would wait for each other
        torch.set_num_threads(max(1, min(threads, cores() - workers)))
    try:
        prefixed = len(files) > 1 and _repeat_an_id(files, id_column, workers)
        with tqdm(desc="predicting", unit=" crystals", disable=not sys.stderr.isatty(), leave=False) as bar:
            run = _Run(predictor, table, bar)
            for number, read in _different(read_stream(files, id_column, workers)):
                run.add(f"{files[number]}:{read.id}" if prefixed else read.id, read)
            run.predict()
        run.say_at_the_end()
        complete = True
    finally:
        torch.set_num_threads(threads)
        table.close(complete)
    return run.bad, run.number


def _repeat_an_id(files: Sequence[str], id_column: str | None, workers: int) -> bool:
    """Whether two files have rows of one id."""
    file_of: dict[str, int] = {}
    return any(
        file_of.setdefault(id, number) != number for number, ids in read_ids(files, id_column, workers) for id in ids
    )


def _different(stream: Iterator[tuple[int, list[Read]]]) -> Iterator[tuple[int, Read]]:
    """The crystals of all files; one whose id its file has had before is a bad row."""
    file, first = -1, dict[str, str]()
    for number, part in stream:
        if number != file:
            file, first = number, {}
        for read in part:
            if read.crystal is not None and first.setdefault(read.id, read.source) != read.source:
                read = read._replace(crystal=None, reason=f"the same id as {first[read.id]}")
            yield number, read


class _Run:
    """Attributes: number of rows so far, and how many of them are bad."""

    def __init__(self, predictor: Predictor, table: PredictionFile, bar: "tqdm[None]") -> None:
        self.predictor, self.table, self.bar = predictor, table, bar
        self.number = self.bad = self.left_out_before = self.notes = 0
        self.first_note, self.described = "", False
        self.pending: list[tuple[str, Crystal]] = []
        self.guesses = Guesses(predictor.seen)

    def add(self, id: str, read: Read) -> None:
        """Takes a row, which is predicted in its turn."""
        self.number += 1
        if read.crystal is None:
            self._leave_out(Problem(read.id, read.source, read.reason))
            return
        if read.note:
            self.notes += 1
            self.first_note = self.first_note or f"{id}: {read.note}"
        if self.table.done:  # of a prediction that is resumed
            if id == self.table.done[0]:
                self.table.done.popleft()
            else:
                self.left_out_before += 1
            self.bar.update()
            return
        self.pending.append((id, read.crystal))
        if len(self.pending) == STRUCTURES_AT_ONCE:
            self.predict()

    def _leave_out(self, reason: object) -> None:
        self.bad += 1
        with tqdm.external_write_mode(file=sys.stderr):
            say(reason)

    def predict(self) -> None:
        """Predicts and writes the rows that wait for it."""
        if self.pending and not self.described:
            weight = next(self.predictor.model.parameters())
            say(describe_backend(weight.device, weight.dtype))
            self.described = True
        while self.pending:
            ids, crystals = zip(*self.pending, strict=True)
            try:
                if len(self.predictor.members) == 1:
                    predictions = self.predictor.predict(crystals, self.bar.update)
                else:
                    predictions = torch.cat(self.predictor.predict_deviation(crystals, self.bar.update), 1)
            except Refused as error:
                self._leave_out(f"{ids[error.place]}: {error.reason}")
                del self.pending[error.place]
                continue
            outside = self.predictor.outside(crystals)
            self.guesses.add(ids, outside)
            rows = []
            finite = predictions.isfinite().all(1).tolist()
            for id, values, words, good in zip(ids, predictions.tolist(), outside, finite, strict=True):
                if good:
                    rows.append([id, *values, words])
                else:
                    self._leave_out(f"{id}: the prediction is not finite")
            self.table.write(rows)
            self.pending = []

    def say_at_the_end(self) -> None:
        """What is to be said of all rows.

        Raises:
            Stop: if the rows that a resumed prediction had are not those of the files.
        """
        if self.table.done:
            raise Stop(
                f"{self.table.out} cannot be resumed: its row {self.table.done[0]!r} is not in the files, or not in "
                "their order"
            )
        if self.left_out_before:
            self.bad += self.left_out_before
            say(f"{count(self.left_out_before, 'row')} had no finite prediction before")
        if self.notes:
            say(f"{count(self.notes, 'CIF')} differ from their formulas, first {self.first_note}")
        for line in self.guesses.lines():
            say(line)
