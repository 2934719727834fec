"""The C++ kernels alone: the same bits on any number of threads, every instruction set, blocks of rows, layouts.

What every backend promises is tested for this one, too, in tests/contract.
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from problems import problem, relative_error
from sums import MAIN, RECIPROCAL, exact, results

import crystalformer as cf
from crystalformer.attention import reference

if cf.available_backends()["cpu"] is not True:
    pytest.skip(cf.available_backends()["cpu"], allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poison_cpp")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("op", MAIN, ids=str)
def test_same_bits_on_any_number_of_threads(op, dtype):
    kinds = (("cubic", 40), ("skewed", 30), ("left_handed", 7))
    x = op.problem(kinds=kinds, heads=9, dim=6, value_dim=5, num_basis=20, decay_min=1.0).to(dtype)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            fresh = replace(x, images=replace(x.images))  # packed again, too
            found.append(results(op, fresh, "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(y, other[name]) for name, y in found[0].items())


def test_instruction_sets_agree(tmp_path):
    script = (
        "import torch; from problems import problem; import sys\n"
        "x = problem(heads=8, dim=16, value_dim=16, num_basis=64)\n"
        "run = lambda x: [x.attention(backend='cpu'), x.reciprocal(backend='cpu', decay_min=0.5)]\n"
        "torch.save([run(x), run(x.to(torch.float32))], sys.argv[1])\n"
    )
    found = {}
    for level in ("baseline", "v3", "v4"):
        path = tmp_path / level
        paths = os.pathsep.join([os.path.dirname(__file__), os.path.dirname(os.path.dirname(cf.__file__))])
        environment = {**os.environ, "CRYSTALFORMER_CPU": level, "PYTHONPATH": paths}
        subprocess.run([sys.executable, "-c", script, str(path)], check=True, env=environment)
        found[level] = torch.load(path)
    for level in ("v3", "v4"):
        for bound, one, other in zip((1e-13, 1e-5), found[level], found["baseline"], strict=True):
            assert all(relative_error(*pair) < bound for pair in zip(one, other, strict=True))


def test_backward_in_blocks_of_rows():
    """400 atoms have more pairs than a block of reciprocal attention's backward holds."""
    x = problem(kinds=(("cubic", 400), ("skewed", 3)), heads=4, dim=2, value_dim=2, decay_min=20.0)
    found, wanted = (results(RECIPROCAL, x, backend) for backend in ("cpu", "reference"))
    for name, y in wanted.items():
        assert relative_error(found[name], y) < 1e-10, name


def test_layout_follows_positions_that_change_unseen():
    x = exact(problem())
    before = x.attention(backend="cpu")
    x.positions.data[1] += 1e-3  # leaves the version of the tensor as it was
    after = x.attention(backend="cpu")
    assert relative_error(after, x.attention()) < 1e-12
    assert relative_error(after, before) > 1e-5


def test_operators_refuse_what_they_cannot_read():
    """Called directly, past the checks of the public functions."""
    x = exact(problem(heads=3, dim=4, value_dim=4, num_basis=8))
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


def of_orbits(x, orbit):
    """y and the gradients of all but the geometry as a function of the backend, where rows are orbits of the atoms."""
    first = [orbit.tolist().index(i) for i in range(int(orbit[-1]) + 1)]
    ptr = torch.cat([orbit[x.ptr[:-1]], orbit[-1:] + 1])
    waves = cf.build_wave_vectors(x.lattice, ptr, float(x.decay.min()), positions=x.positions, orbit=orbit)

    def run(backend):
        leaves = [t[first].requires_grad_() for t in x.inputs[:4]]
        options = {"backend": backend, "wave_vectors": waves}
        y = cf.reciprocal_attention(*leaves, x.positions[first], x.lattice, ptr, **options)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_orbits_have_the_same_bits_on_two_threads(dtype):
    x = problem(kinds=(("cubic", 40), ("skewed", 7)), heads=9, decay_min=2.0).to(dtype)
    orbit = torch.arange(47) // 3 + (torch.arange(47) >= 40)  # three atoms each, but for the ends of the crystals
    run, before = of_orbits(x, orbit), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run("cpu")
        torch.set_num_threads(2)
        assert all(map(torch.equal, run("cpu"), alone))
    finally:
        torch.set_num_threads(before)


def test_backward_of_orbits_in_blocks_of_rows(monkeypatch):
    """And the reference in parts."""
    x = problem(kinds=(("skewed", 3), ("cubic", 400), ("cubic", 5)), heads=8, dim=2, value_dim=2, decay_min=20.0)
    run = of_orbits(x, (torch.arange(408) + 1) // 2)  # a row each begins with the crystals, at 3 and 403
    found, wanted = run("cpu"), run("reference")
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 1 << 12)
    for y, whole, in_parts in zip(found, wanted, run("reference"), strict=True):
        assert relative_error(y, whole) < 1e-10
        assert relative_error(in_parts, whole) < 1e-12
