"""The benchmarks: that they run, say where, refuse what is wrong, and that the pages say what they found."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import crystals as shared
import numpy as np
import pytest
import torch

import crystalformer as cf
from bench import __main__ as program
from bench import cases, error, formulas, gradients, problems, report, results, speed
from bench.measure import alternate, peak_memory
from bench.providers import PROVIDERS
from bench.verify import Wrong, verify


def run(*arguments: str) -> int:
    return program.main(["--smoke" if a == "smoke" else a for a in arguments])


def provider(op: str, name: str) -> cases.Provider:
    return next(p for p in PROVIDERS if (p.op, p.name) == (op, name))


def test_w32_is_what_pymatgen_has():
    theirs = shared.aflow_prototypes(max_atoms=20)[:32]
    found = json.loads(problems.W32.read_text())
    assert [x["species"] for x in found] == [list(s.atomic_numbers) for s in theirs]
    for x, structure in zip(found, theirs, strict=True):
        np.testing.assert_allclose(x["lattice"], structure.lattice.matrix, atol=1e-9)
        np.testing.assert_allclose(x["fractional"], structure.frac_coords, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "number", "mean"),
    [("w32", 32, 9.47), ("jarvis256", 256, 10), ("mp128", 128, 30), ("tiny", 32, 1.5), ("needle", 1, 40)],
)
def test_problems_are_what_they_say(name, number, mean):
    x = problems.crystals(name)
    assert x.num_crystals == number
    assert x.num_atoms / number == pytest.approx(mean, rel=0.05)
    volume = torch.linalg.det(x.lattice).abs()
    if name != "w32":
        per_atom = volume / x.ptr.diff()
        assert per_atom.min() > 9.9
        assert per_atom.max() < 25.1
        images = cf.build_images(x.positions, x.lattice, x.ptr, cutoff=4.0)
        i = torch.repeat_interleave(images.row_ptr.diff())
        r = x.positions[images.col.long()] - x.positions[i]
        crystal = torch.repeat_interleave(x.ptr.diff())[i]
        d = (r + (images.shift.double()[:, None] @ x.lattice[crystal])[:, 0]).norm(dim=1)
        assert d[d > 0].min() > 0.99 * problems.NEAREST * float(per_atom.min()) ** (1 / 3)
    problems.crystals.cache_clear()
    assert torch.equal(problems.crystals(name).positions, x.positions)


def test_unknown_problem():
    with pytest.raises(ValueError, match="bigcell-N or a file of crystals, not 'nowhere'"):
        problems.crystals("nowhere")


@pytest.fixture(scope="module")
def small() -> problems.Problem:
    return problems.make("w32", "smoke", smoke=True)


@pytest.mark.parametrize(
    ("op", "name"),
    [
        *((op, name) for op in ("attention", "encoding", "training") for name in ("reference", "cpu", "paper")),
        *((op, name) for op in ("attention", "training") for name in ("dense", "edge-list")),
        *(("reciprocal", name) for name in ("reference", "cpu", "paper", "paper-box3", "paper-box4", "paper-box6")),
        *(("alpha", name) for name in ("cpu", "cpu-slow-decay")),
        ("training", "cpu-dual-space"),
    ],
)
def test_providers_are_right(small, op, name):
    it = provider(op, name)
    try:
        case = it.prepare(small)
    except cases.Absent as reason:
        pytest.skip(str(reason))
    assert 0 < verify(it, case.results(), case.truth() if case.truth else cases.truth(small, op)) <= it.bound


def test_radial_grid_is_right():
    x = problems.make("tiny", "paper", smoke=True)
    case = provider("attention", "radial-grid").prepare(x)
    assert 0 < verify(provider("attention", "radial-grid"), case.results(), cases.truth(x, "attention")) < 1e-5


@pytest.mark.parametrize("name", ["certified", "certified-reference", "given-cutoff", "vesin", "pymatgen"])
def test_lists_are_right(small, name):
    try:
        case = provider("images", name).prepare(small)
    except cases.Absent as reason:
        pytest.skip(str(reason))
    assert verify(provider("images", name), case.results(), case.truth()) == 0


def test_wrong_providers_are_not_timed(monkeypatch, capsys):
    """An output or a single gradient off by 1 %, zeros, NaN, and one that breaks: each has its row, none has a time."""

    def made(spoil):
        def prepare(x: problems.Problem) -> cases.Case:
            case = provider("attention", "reference").prepare(x)
            return replace(case, results=lambda: spoil(case.results()))

        return prepare

    def broken(x):
        raise RuntimeError("out of order")

    spoils = {
        "output": lambda r: r | {"y": r["y"] * 1.01},
        "gradient": lambda r: r | {"d lattice": r["d lattice"] * 1.01},
        "zeros": lambda r: r | {"d decay": r["d decay"] * 0},
        "nan": lambda r: r | {"d k": r["d k"] / 0},
        "shape": lambda r: r | {"y": r["y"][:1]},
    }
    wrong = [cases.Provider(name, "attention", 1e-3, made(spoil)) for name, spoil in spoils.items()]
    wrong.append(cases.Provider("broken", "attention", 1e-3, broken))
    monkeypatch.setattr(speed, "PROVIDERS", [*wrong, provider("attention", "reference")])
    plan = speed.Plan(("attention",), ("w32",), ("smoke",), seconds=1e-3, smoke=True)
    rows = list(speed.measure(plan))
    assert {row["provider"] for row in rows if "ms" in row} == {"reference"}
    notes = {row["provider"]: row["note"] for row in rows if "note" in row}
    assert set(notes) == {*spoils, "broken"}
    assert "y has an error" in notes["output"]
    assert "d lattice has an error of 1.0e-02, more than 1e-03" in notes["gradient"]
    assert "d decay" in notes["zeros"]
    assert "d k has an error of inf" in notes["nan"]
    assert "shape" in notes["shape"]
    assert notes["broken"] == "failed: RuntimeError: out of order"


def test_what_fails_while_it_is_timed_has_its_row(monkeypatch, capsys):
    def prepare(x: problems.Problem) -> cases.Case:
        case = provider("attention", "reference").prepare(x)

        def broken() -> None:
            raise MemoryError("too much")

        return replace(case, calls=case.calls | {"forward": broken})

    made = cases.Provider("broken", "attention", 1e-3, prepare)
    monkeypatch.setattr(speed, "PROVIDERS", [made, provider("attention", "reference")])
    rows = list(speed.measure(speed.Plan(("attention",), ("w32",), ("smoke",), seconds=1e-3, smoke=True)))
    (note,) = [row["note"] for row in rows if "note" in row]
    assert note == "failed: MemoryError: too much"
    assert [row["provider"] for row in rows if "ms" in row].count("reference") == 3


def test_all_goes_on_after_a_part_that_fails(monkeypatch, capsys):
    def broken(**options):
        raise RuntimeError("out of order")

    went = []
    monkeypatch.setattr(gradients, "measure", lambda *settings: iter(()))
    monkeypatch.setattr(error, "measure", broken)
    monkeypatch.setattr(speed, "measure", lambda plan: went.append(plan.ops) or iter(()))
    assert run("all", "smoke", "--device", "cpu") == 1
    assert ("training",) in went
    assert "out of order" in capsys.readouterr().err


def test_verify_raises(small):
    case = provider("attention", "reference").prepare(small)
    with pytest.raises(Wrong, match="more than 1e-12"):
        verify(
            replace(provider("attention", "reference"), bound=1e-12), case.results(), cases.truth(small, "attention")
        )


def test_smoke_of_speed_memory_and_training(tmp_path, capsys):
    chosen = ["--providers", "cpu", "reference", "dense", "certified", "triton"]
    assert run("speed", "smoke", "--out", str(tmp_path), *chosen) == 0
    assert run("memory", "smoke", "--out", str(tmp_path), "--problems", "bigcell-20", *chosen) == 0
    assert run("training", "smoke", "--out", str(tmp_path), *chosen) == 0
    for command in ("speed", "memory", "training"):
        (file,) = tmp_path.glob(f"{command}-*.csv")
        rows = results.read(file)
        assert list(rows[0]) == [*speed.COLUMNS, *results.ENVIRONMENT]
        assert all(row[name] for row in rows for name in ("op", "problem", "provider", "device", "torch", "date"))
        timed = [row for row in rows if row["ms"]]
        assert bool(timed) == (command != "memory")
        for row in timed:
            assert 0 < float(row["p20"]) <= float(row["ms"]) <= float(row["p80"])
            assert float(row["images_per_s"]) == pytest.approx(1e3 * int(row["images"]) / float(row["ms"]), rel=1e-2)
        if cf.available_backends()["triton"] is not True and command != "memory":
            assert "absent" in next(row["note"] for row in rows if row["provider"] == "triton")
    roofline = [row for row in rows if row["roofline_percent"]]
    assert not roofline  # no formula for a whole step


def test_share_of_the_issue_bound(small):
    """A GPU of 132 multiprocessors at 1.98 GHz that takes twice as long as its schedulers need."""
    pytest.importorskip("triton", reason="needs triton")
    assert small.pairs_in_reach < small.shells < small.images.num_images
    needed = 1e3 * small.shells * 22.7 / (4 * 132 * 1.98e9)
    assert formulas.issue_percent(small, 22.7, 2 * needed, 4 * 132 * 1.98e9) == pytest.approx(50)


def test_smoke_of_gradients_and_of_a_broken_bound(tmp_path, monkeypatch, capsys):
    arguments = ("gradients", "smoke", "--repeat", "2", "--out", str(tmp_path))
    assert run(*arguments) == 0
    (file,) = tmp_path.glob("gradients-*.csv")
    rows = results.read(file)
    assert list(rows[0]) == [*gradients.COLUMNS, *results.ENVIRONMENT]
    measured = {(row["op"], row["backend"], row["dtype"], row["result"]) for row in rows if row["error"]}
    for name in ("y", *(f"d {x}" for x in (*cases.WEIGHTS, *cases.GEOMETRY))):
        assert ("attention", "reference", "fp64", name) in measured
    assert {
        ("encoding", "reference", "fp32", "beta"),
        ("reciprocal", "reference", "fp64", "d decay_reciprocal"),
    } <= measured
    assert "BROKEN" not in capsys.readouterr().out
    monkeypatch.setitem(gradients.BOUNDS, ("fp32", "exact"), 1e-12)
    assert run(*arguments) == 1
    assert "BROKEN: attention reference fp32 exact y:" in capsys.readouterr().out


def test_gradients_sees_a_wrong_gradient(monkeypatch, capsys):
    right = cf.periodic_attention

    def wrong(q, k, *rest, **options):
        return right(q, k + 0.01 * (k - k.detach()), *rest, **options)

    monkeypatch.setattr(cf, "periodic_attention", wrong)
    rows = list(gradients.measure(size="smoke", repeat=1, smoke=True))
    broken = {(row["op"], row["result"]) for row in rows if not row.get("ok", True)}
    assert broken == {("attention", "d k")}


def test_smoke_of_forces(tmp_path):
    pytest.importorskip("lightning", reason="it measures a training")
    assert run("forces", "smoke", "--out", str(tmp_path)) == 0
    (file,) = tmp_path.glob("*.csv")
    rows = results.read(file)
    assert [row["second_order"] for row in rows] == ["differences", "reference"]
    assert all(0 < float(row["share"]) < 1 for row in rows)


def test_smoke_of_error(tmp_path, capsys):
    assert run("error", "smoke", "--out", str(tmp_path)) == 0
    (file,) = tmp_path.glob("error-*.csv")
    rows = results.read(file)
    assert list(rows[0]) == [*error.COLUMNS, *results.ENVIRONMENT]
    certified = [row for row in rows if row["rule"] == "tol"]
    assert all(float(row["max"]) < 10 * float(row["value"]) for row in certified)
    box = {(r["problem"], r["decay"]): float(r["max"]) for r in rows if (r["rule"], float(r["value"])) == ("box", 2)}
    assert min(box.values()) > 1e-9  # a box is not exact


def test_adaptive_reach():
    lattice = torch.diag(torch.tensor([2.0, 4.0, 40.0], dtype=torch.float64))[None]
    sigma = 2.0  # Å, decay 1/8
    assert error.adaptive_reach(lattice, 1 / (2 * sigma**2)).tolist() == [[4, 2, 2]]
    assert error.adaptive_reach(lattice, 1 / (2 * sigma**2), least=0).tolist() == [[4, 2, 1]]


def test_alternate_takes_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = alternate(calls, torch.device("cpu"), seconds=1e-9)
    assert [len(x) for x in times.values()] == [1, 1]
    order.clear()
    times = alternate(calls, torch.device("cpu"), seconds=1.0)
    assert [len(x) for x in times.values()] == [50, 50]
    assert "".join(order[4:]) == 50 * "aabb"  # each timed run right after one of its own


def test_peak_memory():
    found = peak_memory(lambda: torch.ones(2**22).add(1), torch.device("cpu"))
    if found != found:
        pytest.skip("the peak of the memory cannot be read here")
    assert 30 < found < 40  # twice 16 MiB


def test_report_of_made_up_rows(tmp_path):
    pytest.importorskip("matplotlib", reason="draws the plots")
    machine = dict.fromkeys(results.ENVIRONMENT, "x") | {"driver": "none"}
    row = {"op": "attention", "size": "paper", "dtype": "fp32", "direction": "forward and backward", "error": "1e-6"}
    rows = [
        row | {"problem": f"bigcell-{n}", "provider": name, "ms": ms * n, "peak_mib": n, "atoms": n}
        for n in (20, 1000)
        for name, ms in (("cpu", 1.0), ("paper", 2.0))
    ]
    rows.append(row | {"problem": "bigcell-1000", "provider": "paper-cuda", "atoms": 1000, "note": "absent: no GPU"})
    results.write(tmp_path / "speed-x.csv", speed.COLUMNS, rows, machine)
    about = {"problem": "w32", "decay": "0.1"}
    errors = [about | {"rule": "tol", "value": tol, "max": tol} for tol in (1e-8, 1e-2)]
    errors.append(about | {"rule": "box", "value": 2.0, "max": 1e-3})
    results.write(tmp_path / "error-x.csv", error.COLUMNS, errors, machine)
    pages = [tmp_path / "README.md", tmp_path / "benchmarks.md"]
    for page in pages:
        page.write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n")
    report.write(tmp_path, *pages)
    texts, plots = [page.read_text() for page in pages], [(tmp_path / name).read_bytes() for name in report.PLOTS]
    for text in texts:
        assert text.startswith("before\n")
        assert text.endswith("after\n")
        assert "old" not in text
        assert "| **`cpu`** | 1000 |" in text.replace("1e+03", "1000")
    readme, benchmarks = texts
    assert "`paper-cuda`: no GPU" in benchmarks
    assert "`paper-cuda`" not in readme
    assert "NVIDIA GPU**: absent" in benchmarks
    report.write(tmp_path, *pages)
    assert [page.read_text() for page in pages] == texts
    assert [(tmp_path / name).read_bytes() for name in report.PLOTS] == plots
    assert all(len(plot) < 100_000 for plot in plots)
    for wrong in ((pages[0], _without_markers(tmp_path)), (_without_markers(tmp_path), pages[1])):
        with pytest.raises(ValueError, match="each once"):
            report.write(tmp_path, *wrong)
    assert [page.read_text() for page in pages] == texts


def _without_markers(folder: Path) -> Path:
    (folder / "other.md").write_text("nothing")
    return folder / "other.md"


@pytest.mark.parametrize(
    ("page", "written"),
    [(report.README, report.first_table), (report.BENCHMARKS, report.tables)],
    ids=("README", "all"),
)
def test_pages_have_what_report_writes(page, written):
    text = page.read_text()
    assert text.split(report.START)[1].split(report.END)[0].strip() == written()
    for name in report.PLOTS if page == report.BENCHMARKS else report.PLOTS[:1]:
        assert (results.FOLDER / name).is_file()
        assert f"bench/results/{name}" in text


def test_results_say_where_they_are_from():
    files = sorted(results.FOLDER.glob("*.csv"))
    assert files
    for file in files:
        with file.open(newline="") as rows:
            for row in csv.DictReader(rows):
                assert all(row[name] for name in results.ENVIRONMENT), file.name
