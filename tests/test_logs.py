"""What a training shows while it runs: history.csv, event files of TensorBoard, lines."""

import contextlib
import csv
import re
import signal
from pathlib import Path

import pytest
from command_line import SIZES, refused
from crystal_files import write_csv
from lightning.pytorch.callbacks import Callback
from small_training import Stop, train

from crystalformer.app import cli
from crystalformer.app.run_folder import HISTORY, TENSORBOARD, run_folder
from crystalformer.common.folder_lock import LOCK
from crystalformer.data.ionic import ionic_crystals
from crystalformer.data.samples import DataError
from crystalformer.training import Progress

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:pymatgen.*")


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> list[str]:
    rows = [["id", "energy", "cif"]]
    for number, x in enumerate(ionic_crystals(12, seed=1)):
        rows.append([f"salt-{number}", x.energy, x.structure.remove_oxidation_states().to(fmt="cif")])
    path = write_csv(tmp_path_factory.mktemp("logs") / "salts.csv", rows)
    options = ["--epochs=2", "--batch-size=3", "--lr=0.02", *(f"--model.{x}" for x in SIZES.split())]
    return ["train", "--data", str(path), "--target", "energy", *options]


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


class Reader(Callback):
    """Reads the history in the first step of every epoch, as somebody who looks in."""

    def __init__(self, path: Path) -> None:
        self.path, self.seen = path, []

    def on_train_batch_start(self, trainer, pl_module, batch, index):
        if index == 0:
            self.seen.append([int(row["epoch"]) for row in rows(self.path)] if self.path.exists() else [])


def test_history_is_there_while_the_training_runs(tmp_path):
    path, reader = tmp_path / "history.csv", Reader(tmp_path / "history.csv")
    options = {"checkpoints": tmp_path / "checkpoints", "history_file": path}
    with pytest.raises(SystemExit):
        train(epochs=4, callbacks=[reader, Stop(2, signal.SIGTERM)], **options)
    assert reader.seen == [[], [1], [1, 2]]
    path.write_text(path.read_text() + "3,9,not what the checkpoint has\n")
    history, _ = train(epochs=4, callbacks=[reader], **options)
    assert reader.seen[3:] == [[1, 2], [1, 2, 3]]
    assert [{name: float(x) for name, x in row.items()} for row in rows(path)] == history
    path.unlink()
    train(epochs=4, **options)  # complete
    assert len(rows(path)) == 4


def test_lines_have_the_time_left(capsys):
    train(epochs=2, callbacks=[Progress("target", "eV")])
    first, last = capsys.readouterr().out.splitlines()
    pattern = r"  epoch   1 of 2   validation MAE of target [\d.]+ eV, [\d.e-]+ s an epoch, \d\d:\d\d left"
    assert re.fullmatch(pattern, first)
    assert last.endswith(" 00:00 left")


def test_event_files(command, tmp_path):
    pytest.importorskip("tensorboard", reason="writes and reads event files")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    assert cli.main([*command, "--out", str(out), "--tensorboard"]) == 0
    events = EventAccumulator(str(out / TENSORBOARD)).Reload()
    history = rows(out / HISTORY)
    for name in ("train_loss", "val_loss", "val_mae/energy"):
        assert [x.value for x in events.Scalars(name)] == pytest.approx([float(row[name]) for row in history], rel=1e-5)


def test_a_package_that_is_missing(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("crystalformer.app.train.find_spec", lambda name: None)
    line = refused(capsys, *command, "--out", tmp_path / "out", "--tensorboard")
    assert "tensorboard must be installed to write its files: pip install 'crystalformer[tensorboard]'" in line
    assert not (tmp_path / "out").exists()


def test_what_a_start_that_fails_has_shown_is_taken_away(tmp_path):
    def fill(out: Path) -> None:
        (out / TENSORBOARD).mkdir(parents=True)
        for name in (HISTORY, f"{TENSORBOARD}/events.out.tfevents.1.host.2.0", f"{TENSORBOARD}/hparams.yaml"):
            (out / name).touch()

    with contextlib.suppress(DataError), run_folder(tmp_path / "out", resume=False):
        fill(tmp_path / "out")
        raise DataError("no data")
    assert not (tmp_path / "out").exists()
    fill(tmp_path / "killed")
    (tmp_path / "killed" / LOCK).touch()
    with run_folder(tmp_path / "killed", resume=False):
        assert {x.name for x in (tmp_path / "killed").iterdir()} == {LOCK}
    fill(tmp_path / "others")
    for name in (LOCK, f"{TENSORBOARD}/notes.txt"):
        (tmp_path / "others" / name).touch()
    with pytest.raises(FileExistsError), run_folder(tmp_path / "others", resume=False):
        pass
    assert (tmp_path / "others" / TENSORBOARD / "notes.txt").exists()
