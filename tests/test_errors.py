"""Bad input to the ops: each error names the argument, what it must be and what it was."""

import asyncio
import dataclasses
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from problems import problem, relative_error

import crystalformer as cf

X = problem(every_pair=True)
NAN, INF = float("nan"), float("inf")


def spoiled(x: torch.Tensor, value: float) -> torch.Tensor:
    x = x.clone()
    x.view(-1)[1] = value
    return x


# What is wrong with an argument of all three ops that have it, and what the error says.
CASES = [
    ("q", X.q.numpy(), TypeError, "q must be a torch.Tensor, not ndarray"),
    ("q", X.q.to_sparse(), TypeError, "q must be a dense tensor, not of layout torch.sparse_coo"),
    ("v", X.v.to_sparse(), TypeError, "v must be a dense tensor, not of layout torch.sparse_coo"),
    ("positions", X.positions.to_sparse(), TypeError, "positions must be a dense tensor, not of layout torch.sparse_c"),
    ("q", X.q.to("meta"), ValueError, "q must have values, not be on the device meta|k must be on meta"),
    ("q", X.q[0], ValueError, r"q must have shape \(N, H, D\), not \(2, 3\)"),
    ("q", X.q.int(), TypeError, r"q must be torch.float32 or torch.float64\b.*, not torch.int32"),
    ("q", spoiled(X.q, NAN), ValueError, r"q must be finite, but q\[0, 0, 1\] is nan"),
    ("k", X.k[:, :, :2], ValueError, r"k must have shape \(N=6, H=2, D=3\), not \(6, 2, 2\)"),
    ("k", X.k.float(), TypeError, "k must be torch.float64, as the other arguments, not torch.float32"),
    ("k", spoiled(X.k, INF), ValueError, r"k must be finite, but k\[0, 0, 1\] is inf"),
    ("v", X.v[:5], ValueError, r"v must have shape \(N=6, H=2, Dv\), not \(5, 2, 4\)"),
    ("v", spoiled(X.v, NAN), ValueError, r"v must be finite, but v\[0, 0, 1\] is nan"),
    ("v", X.v.to("meta"), ValueError, "v must be on cpu, as the other arguments, not on meta"),
    ("decay", X.decay[:, 0], ValueError, r"decay\w* must have shape \(N(=6)?, H(=2)?\), not \(6,\)"),
    ("decay", spoiled(X.decay, -0.5), ValueError, r"decay\w* must be positive, but its smallest value is -0\.5"),
    ("decay", spoiled(X.decay, NAN), ValueError, r"decay\w* must be finite, but decay\w*\[0, 1\] is nan"),
    ("positions", X.positions[:, :2], ValueError, r"positions must have shape \(N=6, 3\), not \(6, 2\)"),
    ("positions", spoiled(X.positions, NAN), ValueError, r"positions must be finite, but positions\[0, 1\] is nan"),
    ("lattice", X.lattice[0], ValueError, r"lattice must have shape \(C(=3)?, 3, 3\), not \(3, 3\)"),
    ("lattice", X.lattice * 0, ValueError, r"lattice must have a volume, but lattice\[0\] is singular: \[\[-?0\.0, "),
    ("lattice", spoiled(X.lattice, INF), ValueError, r"lattice must be finite, but lattice\[0, 0, 1\] is inf"),
    ("images", None, TypeError, "images must be an ImageList, from build_images, not NoneType"),
    (
        "images",
        cf.build_images(X.positions[:1], X.lattice[:1], X.ptr[:2]),
        ValueError,
        "images must be of 6 atoms in 3 crystals, as positions and lattice, not of 1 atoms in 1 crystals",
    ),
    (
        "edge_weight",
        X.edge_weight[:1],
        ValueError,
        r"edge_weight must have shape \(H=2, Dv(=4)?, K=5\), not \(1, 4, 5\)",
    ),
    (
        "edge_weight",
        spoiled(X.edge_weight, NAN),
        ValueError,
        r"edge_weight must be finite, but edge_weight\[0, 0, 1\] is",
    ),
    ("basis", None, TypeError, "basis must be a RadialBasis when edge_weight is given, not NoneType"),
    ("ptr", [0, 6], TypeError, "ptr must be a torch.Tensor, not list"),
    ("ptr", X.ptr.int(), TypeError, "ptr must be torch.int64, not torch.int32"),
    ("ptr", X.ptr[None], ValueError, r"ptr must have shape \(C\+1\), not \(1, 4\)"),
    ("ptr", X.ptr + 1, ValueError, "ptr must run from 0 to the number of atoms 6, not from 1 to 7"),
    (
        "ptr",
        torch.tensor([0, 4, 4, 6]),
        ValueError,
        r"ptr must rise by at least one atom a crystal, but it is \[0, 4, 4, 6\]",
    ),
    ("tol", 0.0, ValueError, r"tol must be larger than 0 and smaller than 1, not 0\.0"),
    ("tol", "small", TypeError, "tol must be a number, not str"),
    ("precision", "fast", ValueError, "precision must be 'exact' or 'tf32', not 'fast'"),
    ("decay_min", -1.0, ValueError, r"decay_min must be larger than 0 and finite, not -1\.0"),
]
ARGUMENTS = {
    "attention": ("q", "k", "v", "decay", "positions", "lattice", "images", "edge_weight", "basis", "precision"),
    "encoding": ("decay", "positions", "lattice", "images", "edge_weight", "basis", "precision"),
    "reciprocal": ("q", "k", "v", "decay", "positions", "lattice", "ptr", "tol", "decay_min"),
}


def call(op: str, **change):
    values = {field.name: getattr(X, field.name) for field in dataclasses.fields(X)}
    values |= {"tol": 1e-6, "decay_min": 0.5, "precision": "exact"}
    values = {name: change.get(name, values[name]) for name in ARGUMENTS[op]}
    if op == "reciprocal":
        return cf.reciprocal_attention(decay_reciprocal=values.pop("decay"), **values)
    return (cf.periodic_attention if op == "attention" else cf.periodic_encoding)(**values)


EACH = [
    pytest.param(op, *case, id=f"{op}-{case[0]}-{i}")
    for op, names in ARGUMENTS.items()
    for i, case in enumerate(CASES)
    if case[0] in names
]


@pytest.mark.parametrize(("op", "name", "value", "error", "message"), EACH)
def test_error(op, name, value, error, message):
    with pytest.raises(error, match=message):
        call(op, **{name: value})


def test_decays_below_what_the_images_are_for():
    """They would be summed too short, without a certificate; with a cutoff of one's own that is one's own business."""
    decay = X.decay * 0.5
    message = r"decay must be at least 0\.5, the decay_min that images were built for, but its smallest value is 0\.\d+"
    for op in ("attention", "encoding"):
        with pytest.raises(ValueError, match=message):
            call(op, decay=decay)
    call("attention", decay=decay, images=cf.build_images(X.positions, X.lattice, X.ptr, cutoff=6.0))


@pytest.mark.skipif(cf.available_backends()["cpu"] is not True, reason="the compiled CPU kernels are not here")
def test_number_of_pairs_is_that_of_the_crystals():
    x = problem(kinds=(("cubic", 2), ("cubic", 1)))
    x = dataclasses.replace(x, images=dataclasses.replace(x.images, num_pairs=4))
    with pytest.raises(ValueError, match=r"^images.num_pairs must be 5, the sum of squared sizes, not 4$"):
        x.attention(backend="cpu")


def test_half_precision_is_for_q_k_and_v():
    half = {name: getattr(X, name).bfloat16() for name in ("q", "k", "v", "decay", "positions", "lattice")}
    with pytest.raises(TypeError, match=r"k must be torch.bfloat16, as the other arguments, not torch.float16"):
        call("attention", **half | {"k": X.k.half()})
    with pytest.raises(TypeError, match=r"decay must be torch.float32, not torch.bfloat16"):
        call("attention", **half)
    full = {name: getattr(X, name).float() for name in ("decay", "positions", "lattice")}
    with pytest.raises(TypeError, match=r"edge_weight must be torch.float32, as the other arguments, not torch.bfloat"):
        call("attention", **half | full, edge_weight=X.edge_weight.bfloat16())


def test_encoding_needs_the_images_of_every_pair():
    images = cf.build_images(X.positions, X.lattice, X.ptr)
    with pytest.raises(ValueError, match="images must be built with every_pair=True for periodic_encoding, not with"):
        call("encoding", images=images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": 0}, "num must be an integer, at least 1 and at most 65536, not 0"),
        ({"num": 2.5}, r"num must be an integer, at least 1 and at most 65536, not 2\.5"),
        ({"num": 1 << 17}, "num must be an integer, at least 1 and at most 65536, not 131072"),
        ({"r_max": -1.0}, r"r_max must be at least 0\.001 and at most 1e\+06, not -1\.0"),
        ({"r_max": 1.4e-9}, r"r_max must be at least 0\.001 and at most 1e\+06, not 1\.4e-09"),
        ({"r_max": 10**400}, r"r_max must be at least 0\.001 and at most 1e\+06, not an integer of 1329 bits"),
        ({"width": NAN}, r"width must be at least 0\.001 and at most 1000, not nan"),
        ({"width": 1e7}, r"width must be at least 0\.001 and at most 1000, not 10000000\.0"),
        ({"width": "1"}, "width must be a number, not str"),
    ],
)
def test_basis_says_what_is_wrong(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        cf.RadialBasis(**options)


@pytest.mark.skipif(cf.available_backends()["cpu"] is not True, reason="the compiled CPU kernels are not here")
@pytest.mark.parametrize("basis", [(1.4e-9, 1.0), (1e-10, 1.0), (6.0, 1e7), (6.0, NAN), (INF, 1.0)])
def test_the_op_refuses_a_basis_that_takes_memory_without_bound(basis):
    """Where an op is called by itself, too."""
    lists = X.lists("cpu")
    with pytest.raises(ValueError, match=r"^basis must have at most 65536 functions, r_max from 1e-3 to 1e6, width to"):
        torch.ops.crystalformer.cpu_attention(*X.op_inputs, *lists, (0.0, 0.0, *basis, 0.0))


@pytest.mark.parametrize("basis", [(1e-3, 1.0), (1e6, 1.0), (6.0, 1e-3), (6.0, 1e3)])
def test_a_basis_at_the_bounds_is_summed_as_any(basis, backend):
    x = dataclasses.replace(X, basis=cf.RadialBasis(X.basis.num, *basis))
    expected = x.attention()
    for dtype, error in ((torch.float64, 1e-5), (torch.float32, 1e-3)):
        assert relative_error(x.to(dtype).attention(backend=backend), expected) < error


def test_debug_checks_is_a_switch_and_a_context():
    from crystalformer.common import checks

    meta = torch.zeros(1, device="meta")
    assert not checks.values_visible(meta)
    with cf.debug_checks(True):
        assert checks.values_visible(meta)
        with cf.debug_checks(False):
            assert not checks.values_visible(meta)
        assert checks.values_visible(meta)
    assert not checks.values_visible(meta)
    cf.debug_checks(True)
    assert checks.values_visible(meta)
    cf.debug_checks(False)
    assert not checks.values_visible(meta)


def test_tensors_that_are_not_a_number_in_each_place():
    import torch.masked

    dims = (6, 2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that these are prototypes
        nested = torch.nested.nested_tensor([X.q[0], X.q[1]])
        jagged = torch.nested.nested_tensor([X.q[0], X.q[1]], layout=torch.jagged)
        masked = torch.masked.masked_tensor(X.q, torch.ones(dims, dtype=torch.bool))
    for q, what in ((nested, "a nested tensor"), (jagged, "a nested tensor"), (masked, "a MaskedTensor")):
        for op in ("attention", "reciprocal"):
            with pytest.raises(TypeError, match=f"^q must be a dense tensor, not {what}"):
                call(op, q=q)
    for x in (X.lattice.to_sparse(), X.lattice.to("meta")):
        with pytest.raises((TypeError, ValueError), match=r"^lattice must "):
            cf.build_wave_vectors(x, X.ptr, 0.5)
        with pytest.raises((TypeError, ValueError), match=r"^(positions|lattice) must "):
            cf.build_images(X.positions.to(x.device), x, X.ptr.to(x.device))
    y = call("attention", q=torch.nn.Parameter(X.q))  # a tensor like any other
    assert torch.equal(y, call("attention"))


def test_debug_checks_of_one_thread_are_not_those_of_another():
    """Two blocks that overlap in time: one ends while the other is open, which then puts back what it found."""
    from crystalformer.common import checks

    meta, step = torch.zeros(1, device="meta"), threading.Barrier(2, timeout=10)

    def first() -> bool:
        with cf.debug_checks(True):
            step.wait()  # the second opens its block
            step.wait()
        step.wait()  # the second closes its block
        step.wait()
        return checks.values_visible(meta)

    def second() -> list[bool]:
        step.wait()
        seen = [checks.values_visible(meta)]
        with cf.debug_checks(True):
            step.wait()
            step.wait()
            seen.append(checks.values_visible(meta))
        step.wait()
        return [*seen, checks.values_visible(meta)]

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.submit(first), pool.submit(second)
        assert one.result() is False
        assert other.result() == [False, True, False]
    assert not checks.values_visible(meta)


def test_debug_checks_of_one_task_are_not_those_of_another():
    from crystalformer.common import checks

    meta = torch.zeros(1, device="meta")

    async def task(enabled: bool) -> bool:
        cf.debug_checks(enabled)
        for _ in range(3):
            await asyncio.sleep(0)
        return checks.values_visible(meta)

    async def both() -> list[bool]:
        return await asyncio.gather(*(task(x) for x in (True, False, True)))

    assert asyncio.run(both()) == [True, False, True]
    assert not checks.values_visible(meta)
