"""Batches and lists as other libraries have them: ptr, edges, PyTorch Geometric and MACE."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from crystals import import_or_skip
from problems import problem

import crystalformer as cf

X = problem()
PAGE = Path(__file__).parents[1] / "docs" / "other_code.md"
SPECIES = torch.arange(1, len(X.positions) + 1)
BATCH = torch.repeat_interleave(X.ptr.diff())


def as_pyg(**changes):
    """What a Batch of PyG has."""
    values = {"pos": X.positions, "cell": X.lattice, "z": SPECIES, "batch": BATCH, "ptr": X.ptr}
    return SimpleNamespace(**{name: x for name, x in (values | changes).items() if x is not None})


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_ptr(dtype):
    for ptr in (
        cf.ptr_from_sizes(X.ptr.diff().tolist()),
        cf.ptr_from_sizes(X.ptr.diff().to(dtype)),
        cf.ptr_from_sizes(list(X.ptr.diff().to(dtype).numpy())),
        cf.ptr_from_batch(BATCH.to(dtype)),
        cf.ptr_from_batch(BATCH.to(dtype), len(X.lattice)),
    ):
        assert ptr.dtype == torch.int64
        assert torch.equal(ptr, X.ptr)
    assert cf.ptr_from_sizes([]).tolist() == cf.ptr_from_batch(BATCH[:0]).tolist() == [0]


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ([2, 0], ValueError, "sizes must be at least 1, the atoms of each crystal, but the smallest is 0"),
        ([2.0], TypeError, r"sizes must be integers, the atoms of each crystal, not \[2.0\]"),
        (torch.tensor([2.0]), TypeError, "sizes must be integers, not torch.float32"),
        (torch.tensor([[2]]), ValueError, r"sizes must have shape \(C\), not \(1, 1\)"),
    ],
)
def test_wrong_sizes(sizes, error, message):
    with pytest.raises(error, match=message):
        cf.ptr_from_sizes(sizes)


@pytest.mark.parametrize(
    ("batch", "number", "message"),
    [
        ([1, 1], None, r"no crystal left out, but batch\[0\] is 1$"),
        ([-1, 0], None, r"no crystal left out, but batch\[0\] is -1$"),
        ([0, 2], None, r"no crystal left out, but batch\[1\] is 2 behind 0$"),
        ([0, 1, 0], None, r"no crystal left out, but batch\[2\] is 0 behind 1$"),
        ([0, 1], 3, "batch must be of num_crystals=3 crystals, not of 2"),
    ],
)
def test_wrong_batch(batch, number, message):
    with pytest.raises(ValueError, match=message):
        cf.ptr_from_batch(torch.tensor(batch), number)


def test_edges_are_the_images():
    edges, every = (X.images.to_edges(X.positions, X.lattice, themselves=x) for x in (False, True))
    n = len(X.positions)
    assert every.edge_index.shape == (2, X.images.num_images)
    assert torch.equal(every.edge_index[1], X.images.col.long())
    assert torch.equal(every.unit_shifts, X.images.shift.double())
    own = every.distances == 0
    assert int(own.sum()) == n == every.edge_index.shape[1] - edges.edge_index.shape[1]
    for x, all_of in zip(edges, every, strict=True):
        assert torch.equal(x, all_of[..., ~own] if x is edges.edge_index else all_of[~own])
    i, j = edges.edge_index
    assert torch.equal(BATCH[i], BATCH[j])
    shifts = (edges.unit_shifts[:, :, None] * X.lattice[BATCH[i]]).sum(1)
    torch.testing.assert_close(edges.shifts, shifts)
    torch.testing.assert_close(edges.distances, (X.positions[j] - X.positions[i] + shifts).norm(dim=1))
    assert float(edges.distances.min()) > 0.01


def test_edges_are_those_of_ase():
    neighborlist = pytest.importorskip("ase.neighborlist", reason="needs ase")
    atoms = pytest.importorskip("ase").Atoms(positions=X.positions[1:4].numpy(), cell=X.lattice[1].numpy(), pbc=True)
    assert X.ptr.tolist()[1:3] == [1, 4]
    positions, lattice = X.positions[1:4], X.lattice[1:2]
    edges = cf.build_images(positions, lattice, cf.ptr_from_sizes([3]), cutoff=4.0).to_edges(positions, lattice)
    i, j, d, s = neighborlist.neighbor_list("ijdS", atoms, 4.0)
    found = {
        (*index, *shift) for index, shift in zip(edges.edge_index.T.tolist(), edges.unit_shifts.tolist(), strict=True)
    }
    assert found == set(zip(i.tolist(), j.tolist(), *s.T.tolist(), strict=True))
    torch.testing.assert_close(edges.distances.sort()[0], torch.from_numpy(d).sort()[0])


def test_edges_have_gradients():
    positions, lattice = (x.detach().clone().requires_grad_() for x in (X.positions, X.lattice))
    torch.autograd.gradcheck(
        lambda p, c: X.images.to_edges(p, c, themselves=False).distances[:40], (positions, lattice)
    )
    torch.autograd.gradgradcheck(
        lambda p, c: X.images.to_edges(p, c, themselves=True).distances[:20].square(), (positions, lattice)
    )
    assert (X.images.to_edges(positions, lattice, themselves=True).distances[:20] == 0).any()


def test_edges_are_of_the_lists_own_geometry():
    with pytest.raises(ValueError, match="images must be built for these positions and lattice"):
        X.images.to_edges(X.positions, 1.2 * X.lattice)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cell": X.lattice.reshape(-1, 3)},  # as MACE has it
        {"ptr": None},
        {"batch": None, "ptr": X.ptr.int()},
        {"pos": None, "positions": X.positions, "z": None, "atomic_numbers": SPECIES.int()},
        {"pbc": torch.tensor([True, True, True])},
    ],
)
def test_from_pyg(changes):
    batch = cf.CrystalBatch.from_pyg(as_pyg(**changes))
    for name, expected in (("species", SPECIES), ("positions", X.positions), ("lattice", X.lattice), ("ptr", X.ptr)):
        assert torch.equal(getattr(batch, name), expected), name


def test_from_pyg_of_one_crystal_with_an_exact_cell():
    data = SimpleNamespace(pos=X.positions[:1].float(), cell=X.lattice[0], kind=torch.tensor([7]))
    batch = cf.CrystalBatch.from_pyg(data, species="kind")
    assert (batch.ptr.tolist(), batch.species.tolist(), batch.lattice.dtype) == ([0, 1], [7], torch.float32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"z": None}, TypeError, "data must have z or atomic_numbers, but this SimpleNamespace has none"),
        ({"cell": None}, TypeError, "data must have cell or lattice"),
        ({"pos": [0.0]}, TypeError, "data.pos must be a torch.Tensor, not list"),
        ({"cell": X.lattice[:2]}, ValueError, "lattice must have shape"),
        ({"pbc": torch.tensor([True, True, False])}, ValueError, "data must be periodic in all three directions"),
        ({"pbc": (True, False, True)}, ValueError, "data must be periodic in all three directions"),
        ({"ptr": X.ptr.double()}, TypeError, "ptr must be torch.int64, not torch.float64"),
        ({"z": SPECIES - 1}, ValueError, "species must be atomic numbers from 1 to 98, not 0"),
    ],
)
def test_what_is_no_batch(changes, error, message):
    with pytest.raises(error, match=message):
        cf.CrystalBatch.from_pyg(as_pyg(**changes))


def test_to_pyg_and_back():
    import_or_skip("torch_geometric", reason="to_pyg needs PyTorch Geometric")
    batch = cf.CrystalBatch(SPECIES, X.positions, X.lattice, X.ptr, images=X.images)
    data = batch.to_pyg()
    edges = X.images.to_edges(X.positions, X.lattice)
    for name, expected in edges._asdict().items():
        assert torch.equal(getattr(data, name), expected), name
    assert torch.equal(data.batch, BATCH)
    assert data.num_graphs == len(X.lattice)
    again = cf.CrystalBatch.from_pyg(data)
    for name in ("species", "positions", "lattice", "ptr"):
        assert torch.equal(getattr(again, name), getattr(batch, name)), name


def test_smallest_decay_is_that_of_a_model():
    assert cf.smallest_decay(1.4) == pytest.approx(0.5 / (2 * 1.4**2), rel=1e-12)
    assert cf.CrystalformerConfig(r0=(1.4, 2.0), decay_bound=0.25).decay_min == cf.smallest_decay(2.0, 0.25)
    for arguments, message in (((0.0,), "r0 must be at least"), ((1.4, 0.0), "bound must be larger than 0")):
        with pytest.raises(ValueError, match=message):
            cf.smallest_decay(*arguments)


def test_messages_name_the_next_step():
    arguments = (X.q, X.k, X.v, X.decay, X.positions, X.lattice)
    with pytest.raises(TypeError, match=r"not list: join the lists of several crystals by ImageList\.cat"):
        cf.periodic_attention(*arguments, [X.images])
    with pytest.raises(ValueError, match=r"decay must be positive, .*: the weight is exp\(-decay d²\)"):
        cf.periodic_attention(X.q, X.k, X.v, -X.decay, X.positions, X.lattice, X.images)


def test_the_page_runs():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 3
    exec("\n".join(blocks), {})
