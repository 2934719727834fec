"""The C++ kernels: the reference's numbers, the same bits on any number of threads, on every instruction set.

What every backend promises (gradcheck, opcheck, compiling, no atoms) is tested for this one too, in the other files.
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from crystals import pack, random_crystal
from problems import MIXED, problem, relative_error

import crystalformer as cf
from crystalformer.geometry import images as images_module

if cf.available_backends()["cpu"] is not True:
    pytest.skip(cf.available_backends()["cpu"], allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poison_cpp")

# heads, dim, value_dim, num_basis: padded groups of eight, several groups, one of everything, no value encoding.
SIZES = [(8, 16, 16, 64), (3, 5, 7, 11), (13, 9, 17, 33), (1, 1, 1, 1), (2, 4, 3, 0)]
OPS = ("attention", "encoding", "reciprocal")
KINDS = {"mixed": MIXED, "one_atom": (("cubic", 1),), "needle": (("needle", 3),)}


def gradients(x, op, backend, geometry=True, scale=1.0):
    """Outputs and gradients of all inputs, with random cotangents."""
    inputs = [t.clone() for t in x.inputs]
    inputs[0] *= scale
    for i, t in enumerate(inputs):
        t.requires_grad_(geometry or i not in (4, 5))
    if op == "attention":
        weight = {} if x.edge_weight.numel() else {"edge_weight": None, "basis": None}
        outputs = x.attention(*inputs, backend=backend, return_lse=True, **weight)
    elif op == "reciprocal":
        outputs = (x.reciprocal(*inputs, backend=backend, decay_min=float(x.decay.min()) * (1 - 1e-6)),)
    else:
        decay, positions, lattice, edge_weight = inputs[3:]
        weight = (edge_weight, x.basis) if x.edge_weight.numel() else (None, None)
        outputs = cf.periodic_encoding(decay, positions, lattice, x.images, *weight, backend)
        outputs = tuple(y for y in outputs if y is not None)
    rng = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, generator=rng, dtype=torch.float64).to(y.dtype) for y in outputs]
    leaves = [t for t in inputs if t.requires_grad]
    grads = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
    return [y.detach() for y in (*outputs, *(g for g in grads if g is not None))]


def make(kinds, sizes, **options):
    heads, dim, value_dim, num_basis = sizes
    x = problem(kinds=kinds, heads=heads, dim=dim, value_dim=value_dim, num_basis=max(num_basis, 1), **options)
    return x if num_basis else replace(x, edge_weight=x.edge_weight[..., :0])


def exact(x):
    """The problem with a list that allows an op to leave out nothing but what rounding loses."""
    return replace(x, images=replace(x.images, tol=None))


@pytest.mark.parametrize("geometry", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("op", OPS)
def test_fp64_is_the_reference(op, kinds, sizes, geometry):
    x = exact(make(KINDS[kinds], sizes, every_pair=op == "encoding"))
    found, wanted = (gradients(x, op, backend, geometry) for backend in ("cpu", "reference"))
    assert len(found) == len(wanted)
    # Some gradients of one atom vanish but for rounding, hence the scale of all of them.
    scale = max(1.0, *(float(w.abs().max()) for w in wanted))
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() < 1e-12 * scale
        assert float(other.abs().max()) < 1e-6 * scale or relative_error(one, other) < 1e-9


@pytest.mark.parametrize("op", ["attention", "encoding"])
@pytest.mark.parametrize("tol", [1e-3, 1e-6])
def test_what_is_left_out_is_within_tol(op, tol):
    x = make(MIXED, (4, 8, 8, 16), tol=tol, every_pair=op == "encoding", decay_min=0.3)
    found, wanted = (gradients(x, op, backend, geometry=False) for backend in ("cpu", "reference"))
    errors = [relative_error(one, other) for one, other in zip(found, wanted, strict=True)]
    assert max(errors) < 3 * tol
    assert max(errors) > 1e-13  # it did leave something out


@pytest.mark.parametrize("geometry", [True, False])
@pytest.mark.parametrize("op", OPS)
def test_fp32_is_as_good_as_the_reference(op, geometry):
    """Error-ratio rule: at most twice the error that the plain fp32 reference has against fp64, and tol."""
    x = make(MIXED, (8, 16, 16, 64), every_pair=op == "encoding", decay_min=0.2).to(torch.float32)
    best = gradients(x.to(torch.float64), op, "reference", geometry)
    plain, found = (gradients(x, op, backend, geometry) for backend in ("reference", "cpu"))
    for one, reference, ideal in zip(found, plain, best, strict=True):
        assert one.dtype == torch.float32
        assert relative_error(one, ideal) < 2 * relative_error(reference, ideal) + x.images.tol


@pytest.mark.parametrize("op", ["attention", "reciprocal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [30.0, 300.0])
def test_scores_that_differ_by_more_than_the_exponent_range(op, dtype, scale):
    x = exact(make(MIXED, (3, 8, 4, 8))).to(dtype)
    best = gradients(x.to(torch.float64), op, "reference", scale=scale)
    plain, found = (gradients(x, op, backend, scale=scale) for backend in ("reference", "cpu"))
    for one, reference, ideal in zip(found, plain, best, strict=True):
        assert relative_error(one, ideal) < 2 * relative_error(reference, ideal) + torch.finfo(dtype).eps * 1e4


@pytest.mark.parametrize("op", ["attention", "reciprocal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e6, 1e19, 1e30])
def test_scores_of_any_size(op, dtype, scale):
    """One atom has all of a row, its images share it by their distances, and the weights add up to one."""
    x = exact(make(MIXED, (3, 8, 4, 8))).to(dtype)
    best = gradients(x.to(torch.float64), op, "reference", scale=scale)
    for backend in ("cpu", "reference"):
        for one, ideal in zip(gradients(x, op, backend, scale=scale), best, strict=True):
            bound = 100 * torch.finfo(dtype).eps * float(ideal.abs().max())  # 0 where a score has no gradient
            torch.testing.assert_close(one.double(), ideal, rtol=0.0, atol=bound)
            assert op == "reciprocal" or bound > 0


@pytest.mark.parametrize("decay", [1e-2, 50.0, 1e6])
def test_decays_far_from_what_the_list_is_for(decay):
    x = exact(make(MIXED, (3, 4, 4, 8)))
    x = replace(x, images=replace(x.images, decay_min=None))  # as if with a cutoff of one's own
    x = replace(x, decay=torch.full_like(x.decay, decay)).to(torch.float32)
    best = gradients(x.to(torch.float64), "attention", "reference")
    plain, found = (gradients(x, "attention", backend) for backend in ("reference", "cpu"))
    scale = max(float(t.abs().max()) for t in best)
    for one, reference, ideal in zip(found, plain, best, strict=True):
        assert (one - ideal).abs().max() < 2 * (reference - ideal).abs().max() + 1e-6 * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("op", OPS)
def test_same_bits_on_any_number_of_threads(op, dtype):
    kinds = (("cubic", 40), ("skewed", 30), ("left_handed", 7))
    x = make(kinds, (9, 6, 5, 20), every_pair=op == "encoding", decay_min=1.0).to(dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            fresh = replace(x, images=replace(x.images))  # packed again, too
            results.append(gradients(fresh, op, "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_instruction_sets_agree(tmp_path):
    script = (
        "import torch; from problems import problem; import sys\n"
        "x = problem(heads=8, dim=16, value_dim=16, num_basis=64)\n"
        "run = lambda x: [x.attention(backend='cpu'), x.reciprocal(backend='cpu', decay_min=0.5)]\n"
        "torch.save([run(x), run(x.to(torch.float32))], sys.argv[1])\n"
    )
    results = {}
    for level in ("baseline", "v3", "v4"):
        path = tmp_path / level
        paths = os.pathsep.join([os.path.dirname(__file__), os.path.dirname(os.path.dirname(cf.__file__))])
        environment = {**os.environ, "CRYSTALFORMER_CPU": level, "PYTHONPATH": paths}
        subprocess.run([sys.executable, "-c", script, str(path)], check=True, env=environment)
        results[level] = torch.load(path)
    for level in ("v3", "v4"):
        for bound, found, wanted in zip((1e-13, 1e-5), results[level], results["baseline"], strict=True):
            assert all(relative_error(*pair) < bound for pair in zip(found, wanted, strict=True))


def test_backward_in_blocks_of_rows():
    """400 atoms have more pairs than a block of reciprocal attention's backward holds."""
    x = make((("cubic", 400), ("skewed", 3)), (4, 2, 2, 1), decay_min=20.0)
    found, wanted = (gradients(x, "reciprocal", backend) for backend in ("cpu", "reference"))
    for one, other in zip(found, wanted, strict=True):
        assert relative_error(one, other) < 1e-10


def test_layout_follows_positions_that_change_unseen():
    x = exact(make(MIXED, (2, 3, 4, 5)))
    before = x.attention(backend="cpu")
    x.positions.data[1] += 1e-3  # leaves the version of the tensor as it was
    after = x.attention(backend="cpu")
    assert relative_error(after, x.attention()) < 1e-12
    assert relative_error(after, before) > 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"every_pair": True},
        {"every_pair": True, "decay_min": 0.5},
        {"cutoff": 7.0},
        {"decay_min": 0.5, "tol": 1e-3, "logit_range": 0.0},
        {"tol": 1e-9, "logit_range": 10.0},
    ],
    ids=str,
)
def test_build_images_is_the_same_in_torch(options, monkeypatch):
    for seed in range(12):
        kinds = ("cubic", "skewed", "left_handed", "needle", "plate")
        geometry = pack([random_crystal(kind, seed, 1 + (seed + i) % 5) for i, kind in enumerate(kinds)])
        compiled = cf.build_images(*geometry, **options)
        with monkeypatch.context() as patch:
            patch.setattr(images_module, "choose_backend", lambda *_: "reference")
            plain = cf.build_images(*geometry, **options)
        for name in ("row_ptr", "col", "shift", "ptr"):
            assert torch.equal(getattr(compiled, name), getattr(plain, name)), f"seed {seed}: {name}"
        torch.testing.assert_close(compiled.cutoff, plain.cutoff, rtol=1e-12, atol=0.0)
        assert compiled.num_images > 0
        for name in ("num_pairs", "decay_min", "tol", "logit_range", "every_pair"):
            assert getattr(compiled, name) == getattr(plain, name)


def test_operators_refuse_what_they_cannot_read():
    """Called directly, past the checks of the public functions."""
    x = exact(make(MIXED, (3, 4, 4, 8)))
    packed, settings = x.images.packed(), x.settings._replace(tol=1e-6)
    run, backward = torch.ops.crystalformer.cpu_attention, torch.ops.crystalformer.cpu_attention_backward
    with pytest.raises(ValueError, match="layout must be what cpu_layout makes of the image list, not 0 elements"):
        run(*x.op_inputs, packed, torch.empty(0, dtype=torch.uint8), settings)
    merged = torch.ops.crystalformer.cpu_layout(*x.inputs[4:6], packed, x.basis.num, settings, False, True)
    outputs = run(*x.op_inputs, packed, merged, settings)
    with pytest.raises(ValueError, match="gradients of positions and lattice, with merge=False, but it was not"):
        backward(*outputs[:2], *x.op_inputs, packed, merged, settings, *outputs, True)
    with pytest.raises(RuntimeError, match="needs contiguous CPU tensors"):
        run(*x.op_inputs, packed.repeat_interleave(2)[::2], merged, settings)
    waves, largest = x.wave_vectors()
    with pytest.raises(ValueError, match=r"waves must be what packed\(\) makes of a list for this geometry, but"):
        torch.ops.crystalformer.cpu_reciprocal(*x.inputs[:6], waves[:-1], largest)
    with pytest.raises(ValueError, match=r"waves must be what packed\(\) makes of a list .*, but it ends"):
        torch.ops.crystalformer.cpu_reciprocal_sum(*x.inputs[3:6], waves[:9], largest, 14)


def test_weights_of_thousands_of_images_add_up_to_one_in_fp32():
    """Then an atom alone in its cell passes its gradient on to v as it is.

    Added up from the nearest on, every image would round the whole sum: 2e-5.
    """
    x = problem(kinds=(("cubic", 1),), decay_min=0.01, heads=8).to(torch.float32)
    assert x.images.num_images > 5000
    v, positions = x.v.requires_grad_(), x.positions.requires_grad_()
    grad = torch.ones_like(v)
    y = x.attention(
        x.q, x.k, v, x.decay, positions, x.lattice, x.edge_weight, backend="cpu", edge_weight=None, basis=None
    )
    torch.testing.assert_close(torch.autograd.grad(y, v, grad)[0], grad, rtol=3e-6, atol=0.0)
