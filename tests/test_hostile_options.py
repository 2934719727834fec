"""Options and surroundings that nobody means: one line, an exit code, no traceback, nothing left behind."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command_line import SIZES, refused
from crystal_files import cif, pair

import crystalformer
from crystalformer.app import cli
from crystalformer.common.process import DEFAULTS, _is_program, uninterrupted
from crystalformer.training.machine import check_machine

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:pymatgen.*")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[str, str]:
    """The folder of a model that has not been trained, and a CIF."""
    folder = tmp_path_factory.mktemp("hostile")
    sizes = {name: float(x) if name in ("r0", "tol") else int(x) for name, x in (x.split("=") for x in SIZES.split())}
    sizes |= {name: (sizes[name],) for name in ("r0", "readout_dims")}
    crystalformer.Crystalformer(crystalformer.CrystalformerConfig(**sizes)).save_pretrained(folder / "model")
    (folder / "a.cif").write_text(cif(pair()[0]))
    return str(folder / "model"), str(folder / "a.cif")


@pytest.fixture
def alone(monkeypatch):
    """No cluster, no GPU, two cores."""
    for name in ("MASTER_ADDR", "TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("crystalformer.training.machine.cores", lambda: 2)


def test_wrong_options_are_refused_in_one_line(alone, model, capsys, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    configs = {
        "deep": "a: " + "[" * 5000,
        "bomb": "a: &a [x, x]\nb: &b [*a, *a]\ntarget: *b\n",
        "odd": "model: 3\ntarget: {a: b}\n",
        "list": "[1]",
        "bytes": "\0",
        "long": "x" * (1 << 21),
    }
    for name, text in configs.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    train = ("train", "--data", model[1], "--target", "energy", "--out", tmp_path / "out")
    predict = ("predict", *model)
    for arguments, text in (
        ((*train, "--devices", "-1"), "devices must be an integer, at least 1, not -1"),
        ((*train, "--devices", "500"), "devices must be at most 2, the cores of this machine, not 500"),
        ((*train, "--nodes", "0"), "nodes must be an integer, at least 1 and at most 65536, not 0"),
        ((*train, "--nodes", 10**9), "nodes must be an integer, at least 1 and at most 65536, not 1000000000"),
        ((*train, "--epochs", 10**30), "epochs must be an integer, at least 1 and at most 2147483647, not 1"),
        ((*train, "--model.tol", "1e-300"), "tol must be at least 1e-16 and smaller than 1, not 1e-300"),
        ((*train, "--cache", tmp_path / "out" / "cache"), "cache must be a folder outside of out"),
        ((*train, "--nodes", "2"), "nodes must be 1, not 2, where nothing says how to find the others"),
        ((*train, "--accelerator", "mps"), "accelerator must be cpu or auto, not mps: lists are certified in fp64"),
        ((*train, "--accelerator", "abacus"), "accelerator must be auto, cpu or gpu, not 'abacus'"),
        ((*predict, "--workers", 10**6), "workers must be an integer, at least 0 and at most 1024, not 1000000"),
        ((*predict, "--resume"), "out must be a file with resume, not -"),
        ((*predict, "--device", "mps"), "device must be cpu, not 'mps': lists are certified in fp64"),
        ((*train, "--seed", 10**22), "seed must be an integer, at least 0 and at most"),
        ((*train, "--split", "s.json", "--fractions", 0.6, 0.2, 0.2), "fractions must be of data without split"),
        ((*train, "--split", "s.json", "--split_seed", 0), "split_seed must be of data without split"),
        ((*train, "--workers", 10**6), "workers must be an integer, at least 0 and at most 1024, not 1000000"),
        ((*train, "--loaders", 10**6), "loaders must be an integer, at least 0 and at most 1024, not 1000000"),
        ((*train, "--config"), "argument --config: expected one argument"),
        ((*train, "--preset"), "argument --preset: expected one argument"),
        ((*train, "--resume=yes"), "argument --resume: ignored explicit argument 'yes'"),
        ((*train, "--config", tmp_path / "deep.yaml"), "deep.yaml: nested deeper than 8"),
        ((*train, "--config", tmp_path / "bomb.yaml"), "bomb.yaml: it has an alias (*)"),
        ((*train, "--config", tmp_path / "odd.yaml"), "see crystalformer train --help"),
        ((*train, "--config", tmp_path / "list.yaml"), "list.yaml: it has no names of options"),
        ((*train, "--config", tmp_path / "bytes.yaml"), "bytes.yaml: not a text in UTF-8"),
        ((*train, "--config", tmp_path / "long.yaml"), "long.yaml: longer than"),
        ((*train, "--config", tmp_path / "pipe"), "pipe: must be a file, not a pipe"),
        ((*predict, "--config", tmp_path), "must be a file, not a folder"),
        ((*predict, tmp_path / "pipe"), "must be a file, not a pipe"),
        ((*predict, "/dev/zero"), "must be a file, not a device"),
        ((*predict, "\x1b[31m\udcff"), r"\x1b[31m\udcff: no such file or folder"),
        ((*predict, "--device", "x" * 5000), "device"),
        (("convert", tmp_path / "pipe", "--out", tmp_path / "out"), "must be a checkpoint"),
        (("convert", model[1], "--out", tmp_path / "out", "--params", "{"), "params must be JSON"),
        (("doctor", "now"), "unrecognized arguments: now: see crystalformer doctor --help"),
        (("\x1b[31m",), r"not '\x1b[31m'"),
    ):
        line = refused(capsys, *arguments)
        assert text in line, arguments
        assert len(line) < 2100
        assert line[:-1].isprintable()
    assert not (tmp_path / "out").exists()


def test_other_machines_that_can_be_found(alone, monkeypatch):
    with pytest.raises(ValueError, match=r"^nodes must be 1, not 2, where nothing says"):
        check_machine("cpu", 1, 2)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    check_machine("cpu", 2, 2)


def test_memory_that_is_not_there(model, capsys, monkeypatch):
    from crystalformer.app.predictor import Predictor

    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")):

        def predict(self, *_, error=error):
            raise error

        monkeypatch.setattr(Predictor, "predict", predict)
        assert cli.main(["predict", *model]) == 1
        assert capsys.readouterr().err.splitlines()[-1].startswith("crystalformer: out of memory")


def test_streams_that_are_full_or_gone(model, capsys, monkeypatch):
    """A full disk, a reader that has left, no stdout at all, and one that cannot hold a name."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["--help"]) == 1
    assert capsys.readouterr().err == "crystalformer: stdout: [Errno 28] No space left on device\n"
    with open("/dev/full", "w") as full:  # also where each line is written at once, and where a result fills the disk
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(full.buffer.raw, write_through=True))
        for arguments in (["--help"], ["info", model[0]], ["predict", *model]):
            assert cli.main(arguments) == 1
            last = capsys.readouterr().err.splitlines()[-1]
            assert last == "crystalformer: stdout: [Errno 28] No space left on device"
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.main(["--help"]) == 1
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["predict", *model]) == 2
    assert capsys.readouterr().err == "crystalformer: out must be a file: stdout is closed\n"
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    path = Path(model[1]).with_name("é.cif")
    path.write_bytes(Path(model[1]).read_bytes())
    assert cli.main(["predict", model[0], str(path)]) == 0
    assert narrow.buffer.getvalue().splitlines()[1].startswith(b"\\xe9,")


def test_ctrl_c_and_sigterm_wherever_they_come(model, capsys, monkeypatch, tmp_path):
    """While files are read, structures predicted, a training has no checkpoint yet, and while its report is written."""
    for number, default in ((signal.SIGINT, signal.getsignal(signal.SIGINT)), (signal.SIGTERM, signal.SIG_DFL)):
        monkeypatch.setitem(DEFAULTS, number, default)
    rows = [f'{i},{i},"{cif(pair()[0])}"' for i in range(4)]
    (tmp_path / "pairs.csv").write_text("\n".join(["id,x,cif", *rows]))
    sizes = [f"--model.{x}" for x in SIZES.split()]
    train = ["train", "--data", str(tmp_path / "pairs.csv"), "--target", "x", "--epochs", "1", *sizes]
    train += ["--fractions", ".5", ".25", ".25", "--out", str(tmp_path / "out")]
    resume = f"; go on with: crystalformer train --out {tmp_path / 'out'} --resume"
    nothing = "; nothing was kept: no epoch was done"
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):

        def stop(*_, number=number, **__):
            os.kill(os.getpid(), number)
            time.sleep(9)

        for place, arguments, kept in (
            ("crystalformer.data.streams.read_table", ["predict", *model], ""),
            ("crystalformer.app.predictor.expected_images", ["predict", *model], ""),
            ("crystalformer.app.data_source.read_samples", train, nothing),
            ("crystalformer.app.report.plots.parity", train, resume),
        ):
            before = signal.getsignal(number)
            with monkeypatch.context() as patch:
                patch.setattr(place, stop)
                assert cli.main(arguments) == code, (number, place)
            assert signal.getsignal(number) is before
            assert capsys.readouterr().err.splitlines()[-1] == f"crystalformer: stopped{kept}"
            assert (tmp_path / "out").exists() == bool(kept == resume)
        assert cli.main(["train", "--out", str(tmp_path / "out"), "--resume"]) == 0
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_when_all_is_written_changes_nothing(number):
    """After its last line Python no longer knows handlers: a signal would kill it, and the exit code be another."""
    code = f"""
import os, sys
class Last:
    def __del__(self, kill=os.kill, process=os.getpid()):
        kill(process, {number:d})
last = Last()
sys.argv = ["crystalformer", "--version"]
from crystalformer.app.cli import program
sys.exit(program())
"""
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_torch_is_imported(number, code):
    program = f"""
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which jobs in the background do not have
sys.argv = ["crystalformer", "train", "--help"]
class Hook:
    @staticmethod
    def find_spec(name, *_):
        if name == "torch":
            os.kill(os.getpid(), {number:d})
            time.sleep(9)
sys.meta_path.insert(0, Hook)
from crystalformer.app.cli import program
sys.exit(program())
"""
    done = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, "crystalformer: stopped\n")
    # To those who only import the library a signal is what it always is.
    program = program.replace('["cr', '["my-cr')
    done = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == -number
    assert ("KeyboardInterrupt" in done.stderr) == (number == signal.SIGINT)


@pytest.mark.parametrize(
    ("argv", "options", "expected"),
    [
        (["-m", "info", "x"], ["-m", "crystalformer", "info", "x"], True),
        (["-m"], ["-um", "crystalformer"], True),
        (["-m", "info"], ["-mcrystalformer", "info"], True),
        (["-m", "-m"], ["-umcrystalformer", "-m"], True),
        (["-m"], ["-m", "crystalformer.app.demo"], False),
        (["-m", "crystalformer"], ["-mcrystalformer.app.demo", "crystalformer"], False),
        (["/bin/crystalformer", "info"], ["/bin/crystalformer", "info"], True),
        (["crystalformer.exe"], ["crystalformer.exe"], True),
        (["crystalformer.py"], ["crystalformer.py"], False),
        (["-c"], ["-c", "import crystalformer"], False),
        ([], [], False),
    ],
)
def test_which_program_runs(argv, options, expected):
    assert _is_program(argv, ["python", *options]) is expected


def test_a_module_of_the_package_keeps_its_ctrl_c(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which jobs in the background do not have
        "atexit.register(lambda: print(signal.getsignal(signal.SIGINT) is signal.default_int_handler))\n"
    )
    environment = ENVIRONMENT | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ENVIRONMENT['PYTHONPATH']}"}
    command = [sys.executable, "-um", "crystalformer.app.demo", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "True"), done.stderr


def test_processes_that_parse_hear_no_ctrl_c():
    """Else each of them would print a traceback, for a terminal tells all."""
    code = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    with uninterrupted():
        started = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    after = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (started.stdout, after.stdout) == ("True\n", "False\n")
