"""The folder of a training belongs to one at a time, and a start that fails leaves it as it was."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import small_training

from crystalformer.app import cli, train
from crystalformer.app.run_folder import CHECKPOINTS, CONFIG, PROBLEMS, run_folder
from crystalformer.common.folder_lock import LOCK
from crystalformer.data.ionic import ionic_crystals
from crystalformer.data.samples import DataError
from crystalformer.training.checkpoints import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:pymatgen.*")
SIZES = "model_dim=4 num_heads=2 num_blocks=1 ff_dim=4 readout_dims=2 num_basis=2 r0=0.7 tol=1e-2"


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    rows = [f'{i},{x.energy},"{x.structure.to(fmt="cif")}"' for i, x in enumerate(ionic_crystals(8, seed=1))]
    (tmp_path / "salts.csv").write_text("\n".join(["id,energy,cif", *rows]))
    options = ["train", "--data", str(tmp_path / "salts.csv"), "--target", "energy", "--epochs=1"]
    return [*options, "--out", str(tmp_path / "new" / "run"), *(f"--model.{x}" for x in SIZES.split())]


def holder(out: Path) -> subprocess.Popen:
    """Another process that holds the folder as a training does, until it is killed; without the time of the imports."""
    out.mkdir(parents=True)
    code = f"import fcntl, time; f = open({str(out / LOCK)!r}, 'ab'); fcntl.flock(f, fcntl.LOCK_EX)"
    code += "; print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def test_one_training_at_a_time_and_none_behind_a_kill(tmp_path, arguments, capsys):
    out = tmp_path / "new" / "run"
    with holder(out) as process:
        try:
            assert cli.main(arguments) == 2
            line = f"crystalformer: out must be a folder in which no training runs, but one does in {out}\n"
            assert capsys.readouterr().err == line
            (out / CONFIG).touch()
            with pytest.raises(FileExistsError, match="but one does"), run_folder(out, resume=True):
                pytest.fail("two at once")
            for name in (PROBLEMS, unfinished := f".{CONFIG}.0.tmp"):
                (out / name).touch()
        finally:
            process.kill()
    assert {path.name for path in out.iterdir()} == {LOCK, CONFIG, PROBLEMS, unfinished}
    assert cli.main(arguments) == 0
    assert not (out / LOCK).exists()
    assert not {PROBLEMS, unfinished} & {path.name for path in out.iterdir()}


def test_a_kill_while_the_first_checkpoint_is_written_costs_no_folder(tmp_path, arguments):
    out = tmp_path / "new" / "run"
    (out / CHECKPOINTS).mkdir(parents=True)
    for name in (LOCK, CONFIG, f"{CHECKPOINTS}/{LOCK}", f"{CHECKPOINTS}/.last.ckpt.0.tmp"):
        (out / name).touch()
    with contextlib.suppress(DataError), run_folder(out, resume=False):
        assert not (out / CHECKPOINTS).exists()
        raise DataError("no data")
    assert not out.exists() or not any(out.iterdir())
    (out / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    for name in (LOCK, f"{CHECKPOINTS}/last.ckpt"):
        (out / name).touch()
    with pytest.raises(FileExistsError, match="must be a new or an empty folder"), run_folder(out, resume=False):
        pass
    assert (out / CHECKPOINTS / "last.ckpt").exists()


def test_one_fit_at_a_time_in_a_folder_of_checkpoints(tmp_path):
    out = tmp_path / "checkpoints"
    with holder(out) as process:
        try:
            with pytest.raises(FileExistsError, match=r"^checkpoints must be a folder in which no training runs, but"):
                small_training.train(epochs=1, checkpoints=out)
        finally:
            process.kill()
    assert len(small_training.train(epochs=1, checkpoints=out)[0]) == 1
    assert [path.name for path in out.iterdir()] == ["last.ckpt"]
    with pytest.raises(ValueError, match=r"^epochs must be an integer, at least 1 and at most 2147483647, not 0"):
        small_training.train(epochs=0, checkpoints=tmp_path / "new" / "checkpoints")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("wrong", ["source", "recipe", "model"])
def test_arguments_of_another_type_are_named(tmp_path, wrong):
    given = {"source": train.DataSource(data="salts.csv"), "recipe": None, "model": None} | {wrong: 3}
    with pytest.raises(TypeError, match=rf"^{wrong} must be a (DataSource|Recipe|CrystalformerConfig), not int"):
        train.train(tmp_path / "run", "energy", **given)
    assert not (tmp_path / "run").exists()


def test_within_a_process_too(tmp_path):
    with run_folder(tmp_path / "run", resume=False):
        with pytest.raises(FileExistsError, match="but one does"), run_folder(tmp_path / "run", resume=False):
            pytest.fail("two at once")
        assert (tmp_path / "run" / LOCK).exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [ValueError("no Trainer of this kind"), KeyboardInterrupt(), SystemExit(143)])
@pytest.mark.parametrize("where", ["fit", "write_split"])
def test_a_start_that_fails_leaves_nothing_and_can_be_corrected(tmp_path, arguments, monkeypatch, where, error, capsys):
    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(train, where, fail)
        try:
            assert cli.main(arguments) == (143 if isinstance(error, SystemExit) else 130)
            assert capsys.readouterr().err.endswith("crystalformer: stopped; nothing was kept: no epoch was done\n")
        except ValueError as raised:
            assert raised is error  # noqa: PT017, exit codes are right, too
        assert [path.name for path in tmp_path.iterdir()] == ["salts.csv"]
    if where == "fit" and isinstance(error, ValueError):
        assert cli.main(arguments) == 0


@pytest.mark.parametrize("wrong", [["--nodes", "0"], ["--devices", "0"], ["--lr", "1e30", "--batch-size", "1"]])
def test_options_that_are_wrong_leave_nothing(tmp_path, arguments, wrong):
    with contextlib.suppress(Exception):
        assert cli.main([*arguments, *wrong]) != 0
    assert [path.name for path in tmp_path.iterdir()] == ["salts.csv"]


def test_what_was_there_stays(tmp_path, arguments):
    """A training that is resumed keeps its files, whatever happens; so does one with a checkpoint."""
    out = tmp_path / "run"
    out.mkdir()
    with pytest.raises(CheckpointError, match=r"no .*config.yaml"), run_folder(out, resume=True):
        pass
    (out / CONFIG).write_text("a: 1")
    with pytest.raises(FileExistsError, match="must be a new or an empty folder"), run_folder(out, resume=False):
        pass
    with pytest.raises(DataError, match="no data"), run_folder(out, resume=True):
        raise DataError("no data")
    assert [path.name for path in out.iterdir()] == [CONFIG]
    (out / CONFIG).unlink()
    with contextlib.suppress(DataError), run_folder(out, resume=False):
        (out / CHECKPOINTS).mkdir()
        (out / CHECKPOINTS / "last.ckpt").touch()
        (out / CONFIG).touch()
        raise DataError("no data")
    assert sorted(path.name for path in out.iterdir()) == [CHECKPOINTS, CONFIG]


def test_a_file_system_without_locks_warns(tmp_path, monkeypatch):
    import fcntl

    def unknown(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unknown)
    warns = pytest.warns(UserWarning, match=r"cannot be locked \(Function not implemented\): start no second")
    with warns, run_folder(tmp_path / "run", resume=False):
        (tmp_path / "run" / "model").mkdir()
    assert (tmp_path / "run" / "model").is_dir()


def test_a_system_without_fcntl_warns(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.warns(UserWarning, match=r"cannot be locked \(.*fcntl"), run_folder(tmp_path / "run", resume=False):
        pass
