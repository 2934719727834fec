"""What the Triton kernels of the sums promise, held against the reference in fp32: on a GPU, or in the interpreter.

`make gpu` and test_triton.py run this file; pytest does not collect it by itself.
"""

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from problems import problem, relative_error
from test_dual_space import both
from test_not_finite import OPS, inputs_of, results
from triton_device import DEVICE, MARKS, on_device

import crystalformer as cf

pytestmark = MARKS

SIZES = {
    "plain": dict(heads=4, dim=8, value_dim=8, num_basis=16),
    "odd": dict(heads=3, dim=5, value_dim=9, num_basis=20),
    "head blocks": dict(heads=12, dim=8, value_dim=16, num_basis=16, decay_min=1.0),
    "basis blocks": dict(heads=2, dim=16, value_dim=8, num_basis=70, decay_min=1.0),
    "one head": dict(kinds=(("skewed", 1), ("cubic", 2)), decay_min=2.0, heads=1, dim=64, value_dim=8, num_basis=16),
    "one image a pair": dict(
        kinds=(("cubic", 12), ("plate", 1)), heads=2, dim=8, value_dim=8, num_basis=16, decay_min=2.0
    ),
}
RECIPROCAL_SIZES = {
    "plain": dict(heads=4, dim=8, value_dim=8),
    "odd": dict(heads=3, dim=5, value_dim=9),
    "head blocks": dict(heads=12, dim=8, value_dim=16, decay_min=1.0),
    "one head": dict(heads=1, dim=64, value_dim=8),
    "tiles of atoms": dict(kinds=(("cubic", 2), ("cubic", 19)), dim=8, value_dim=8, decay_min=2.5),
    "clamped": dict(kinds=(("needle", 4),), decay_min=2.0, tol=1e-9),
}


def weights(outputs, seed=1):
    """Random numbers that turn outputs into one, the same in every dtype."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(y.shape, generator=rng, dtype=torch.bfloat16).to(y) for y in outputs]


def attention(x, backend, with_basis=True, geometry=True, **options):
    """y, lse and their gradients, by name."""
    names = ["q", "k", "v", "decay", *(["positions", "lattice"] if geometry else []), *(["W"] if with_basis else [])]
    given = dict(zip(["q", "k", "v", "decay", "positions", "lattice", "W"], x.inputs, strict=True))
    given |= {name: given[name].clone().requires_grad_() for name in names}
    options |= {} if with_basis else {"edge_weight": None, "basis": None}
    outputs = x.attention(*given.values(), backend=backend, return_lse=True, **options)
    grads = torch.autograd.grad(outputs, [given[name] for name in names], weights(outputs))
    return dict(zip(["y", "lse", *names], (*(y.detach() for y in outputs), *grads), strict=True))


def encoding(x, backend, with_basis=True, geometry=True, **options):
    """alpha, beta and their gradients, by name."""
    names = ["decay", *(["positions", "lattice"] if geometry else []), *(["W"] if with_basis else [])]
    given = dict(decay=x.decay, positions=x.positions, lattice=x.lattice, W=x.edge_weight)
    given |= {name: given[name].clone().requires_grad_() for name in names}
    if not with_basis:
        given["W"] = None
    outputs = cf.periodic_encoding(*list(given.values())[:3], x.images, given["W"], x.basis, backend, **options)
    outputs = outputs if with_basis else outputs[:1]
    grads = torch.autograd.grad(outputs, [given[name] for name in names], weights(outputs))
    return dict(
        zip([*["alpha", "beta"][: len(outputs)], *names], (*(y.detach() for y in outputs), *grads), strict=True)
    )


def reciprocal(x, backend, geometry=True):
    """y and its gradients, by name; decay is that of wave vectors."""
    names = ["q", "k", "v", "decay", *(["positions", "lattice"] if geometry else [])]
    given = dict(zip(["q", "k", "v", "decay", "positions", "lattice"], x.inputs[:6], strict=True))
    given |= {name: given[name].clone().requires_grad_() for name in names}
    waves = cf.build_wave_vectors(x.lattice, x.ptr, float(x.decay.min()) if len(x.q) else 1.0)
    y = x.reciprocal(*given.values(), backend=backend, wave_vectors=waves)
    grads = torch.autograd.grad(y, [given[name] for name in names], weights([y])[0])
    return {"y": y.detach()} | dict(zip(names, grads, strict=True))


def assert_as_good_as_the_reference(function, x, **options):
    """Error-ratio rule: at most twice the error of the plain fp32 reference against fp64.

    Four times for the decay in reciprocal space: there the kernels take the mean of a row's gradient from dy·y, which
    is rounded, and the reference sums it again.
    """
    exact, plain = function(x, "reference", **options), function(x.to(torch.float32), "reference", **options)
    for name, found in function(on_device(x), "triton", **options).items():
        assert torch.isfinite(found).all(), name
        factor = 4 if function is reciprocal and name == "decay" else 2
        assert relative_error(found.cpu(), exact[name]) < factor * relative_error(plain[name], exact[name]) + 1e-6, name


@pytest.mark.parametrize("size", SIZES)
def test_attention(size):
    assert_as_good_as_the_reference(attention, problem(**SIZES[size]))


def test_shapes_of_tiles(monkeypatch):
    """Any shape serves any list."""
    module = import_module("crystalformer.kernels.layout")
    for shape in module.SHAPES:
        monkeypatch.setattr(module, "SHAPES", (shape,))
        x = problem(kinds=(("cubic", 1), ("skewed", 5)), decay_min=1.0, heads=2, dim=8, value_dim=8, num_basis=16)
        assert_as_good_as_the_reference(attention, x)


@pytest.mark.parametrize("size", ["plain", "odd", "head blocks"])
def test_encoding(size):
    assert_as_good_as_the_reference(encoding, problem(**SIZES[size], every_pair=True))


@pytest.mark.parametrize("function", [attention, encoding])
def test_images_at_one_distance(function):
    """In a tetragonal cell four and more images of a pair are at most distances; so a force is that of each of them."""
    x = problem(kinds=(("cubic", 2),), heads=4, dim=8, value_dim=8, num_basis=16)
    lattice = 4.125 * torch.eye(3).to(x.lattice)[None]
    positions = torch.tensor([[0, 0, 0], [0.5, 0.5, 0.375]]).to(lattice) @ lattice[0]
    images = cf.build_images(positions, lattice, x.ptr, decay_min=0.5, every_pair=True)
    x = replace(x, positions=positions, lattice=lattice, images=images)
    rows = on_device(x).lists("triton", by_pair=True)[-1][: images.num_images]
    images_of_shell = rows[rows[:, 0] + rows[:, 1] != 0, 1].view(torch.float32).exp2()
    assert images_of_shell.median() >= 4
    assert_as_good_as_the_reference(function, x)


@pytest.mark.parametrize("geometry", [True, False])
@pytest.mark.parametrize("size", RECIPROCAL_SIZES)
def test_reciprocal(size, geometry):
    x = problem(**RECIPROCAL_SIZES[size])
    if size == "clamped":
        sums = torch.ops.crystalformer.reference_reciprocal_sum(*x.inputs[3:6], *x.wave_vectors(2.0), 16)
        assert (sums < 1e-7).any()
    assert_as_good_as_the_reference(reciprocal, x, geometry=geometry)


@pytest.mark.parametrize("function", [attention, encoding, reciprocal])
def test_any_strides(function):
    """Nothing has to lie in memory in the order of its dimensions: a lattice often comes as columns."""
    x = on_device(problem(kinds=(("cubic", 2), ("skewed", 1)), decay_min=1.0, every_pair=True))
    names = ("q", "k", "v", "decay", "positions", "lattice", "edge_weight")
    turned = {name: getattr(x, name).transpose(0, -1).contiguous().transpose(0, -1) for name in names}
    ptr = torch.stack((x.ptr, x.ptr + 9), 1)[:, 0]
    images = cf.build_images(x.positions, x.lattice, ptr, decay_min=1.0, every_pair=True)
    turned |= {"ptr": ptr, "images": images}
    exact = function(x, "triton")
    for name, found in function(replace(x, **turned), "triton").items():
        assert relative_error(found, exact[name]) < 1e-6, name


def test_reciprocal_far_from_the_origin():
    """A translation by lattice vectors changes nothing, although G·p is large then."""
    x = problem(kinds=(("cubic", 2),), decay_min=1.0)
    x = replace(x, lattice=x.lattice.round(), positions=(x.positions * 64).round() / 64)
    far = replace(x, positions=x.positions + 20 * x.lattice.sum(1))
    here, there = (reciprocal(on_device(y), "triton", geometry=False) for y in (x, far))
    for name in here:
        assert relative_error(there[name], here[name]) < 1e-6, name


def test_reciprocal_in_parts(monkeypatch):
    """Crystals in parts that fit are what they are together; one that does not fit alone is the reference's."""
    module = import_module("crystalformer.kernels.phases")

    x = on_device(problem(kinds=(("cubic", 1), ("skewed", 2), ("cubic", 5), ("cubic", 1))))
    whole = {geometry: reciprocal(x, "triton", geometry) for geometry in (True, False)}
    waves, (max_atoms, max_vectors) = x.wave_vectors()
    g_ptr = cf.WaveVectors.views(waves, len(x.lattice))[1]
    single = max(module.padded(n) for n in g_ptr.diff().tolist())
    monkeypatch.setattr(module, "SCRATCH", 5 * (6 * single + 3 * module.padded(max_atoms) * 3))
    assert not module.fits(9, 2, max_atoms, max_vectors)
    for geometry, exact in whole.items():
        for name, value in reciprocal(x, "triton", geometry).items():
            assert relative_error(value, exact[name]) < 1e-6, name  # compiled apart, for parts that are not aligned
    monkeypatch.setattr(module, "SCRATCH", 1)
    monkeypatch.setattr(module, "phases", None)  # no kernel
    for name, value in reciprocal(x, "triton").items():
        assert relative_error(value, whole[True][name]) < 1e-5, name


@pytest.mark.parametrize("function", [attention, encoding])
def test_without_basis(function):
    assert_as_good_as_the_reference(function, problem(every_pair=True), with_basis=False)


@pytest.mark.parametrize("function", [attention, encoding])
def test_tf32(function):
    """Within a few roundings of tf32, 2^-11; and not exact, or the mode would do nothing."""
    x = problem(**SIZES["plain"], every_pair=True)
    exact, found = function(x, "reference"), function(on_device(x), "triton", precision="tf32")
    errors = {name: relative_error(found[name].cpu(), exact[name]) for name in exact}
    assert max(errors.values()) < 4 * 2**-11
    assert errors["y" if function is attention else "beta"] > 2**-17


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """The error-ratio rule from the same rounded q, k, v; what has their dtype is rounded once, at the end."""
    x = problem(**SIZES["odd"]).half(dtype)
    exact, plain = (attention(x.to(other), "reference") for other in (torch.float64, torch.float32))
    # Triton's interpreter cuts bf16 off, a GPU rounds.
    rounding = torch.finfo(dtype).eps / (1 if DEVICE == "cpu" else 2)
    for name, found in attention(on_device(x).half(dtype), "triton").items():
        rounded = name in ("y", "q", "k", "v")
        assert found.dtype == (dtype if rounded else torch.float32), name
        bound = 2 * relative_error(plain[name], exact[name]) + (rounding if rounded else 1e-6)
        assert relative_error(found.cpu(), exact[name]) < bound, name


def test_second_derivatives_in_half_precision():
    """A loss on forces, of q, k, v in bf16."""

    def gradients(x, backend):
        inputs = [t.clone().requires_grad_() for t in x.inputs]
        y = x.attention(*inputs, backend=backend)
        (force,) = torch.autograd.grad(y, inputs[4], weights([y])[0], create_graph=True)
        return torch.autograd.grad(force.square().sum(), inputs)

    x = problem(kinds=(("skewed", 2),)).half(torch.bfloat16)
    found = gradients(on_device(x).half(torch.bfloat16), "triton")
    for one, other in zip(found, gradients(x.to(torch.float64), "reference"), strict=True):
        assert relative_error(one.cpu(), other) < (2**-8 if one.dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("function", [attention, encoding, reciprocal])
def test_autocast_does_not_reach_the_sums(function):
    x = on_device(problem(every_pair=True))
    expected = function(x, "triton")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        for name, value in function(x, "triton").items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("function", [attention, encoding, reciprocal])
def test_geometry_changes_no_other_gradient(function):
    x = on_device(problem(every_pair=True))
    all_of_them = function(x, "triton")
    for name, grad in function(x, "triton", geometry=False).items():
        assert relative_error(grad, all_of_them[name]) < 1e-6, name  # compiled apart: other roundings


@pytest.mark.parametrize("function", [attention, encoding, reciprocal])
def test_same_bits_every_time(function):
    x = on_device(problem(every_pair=True))
    first = function(x, "triton")
    x.images.layouts.clear()
    for name, value in function(x, "triton").items():
        assert torch.equal(value, first[name]), name


def test_a_layout_of_something_else_is_refused():
    """As far as its shape tells; on a GPU its values are not looked at."""
    x = on_device(problem(every_pair=True).to(torch.float32))
    packed = x.images.packed()
    make = torch.ops.crystalformer.triton_layout
    pairs = make(x.positions, x.lattice, packed, x.images.num_pairs, x.basis.num, x.settings, True)
    for layout in (pairs.new_zeros(8, dtype=torch.uint8), pairs.view(-1), pairs[:, :1], pairs[:8]):
        with pytest.raises(ValueError, match=r"^layout must be made by triton_layout"):
            torch.ops.crystalformer.triton_attention(*x.op_inputs, packed, layout, x.settings)


def test_encoding_in_chunks(monkeypatch):
    module = import_module("crystalformer.kernels.encoding")

    x = on_device(problem(every_pair=True))
    whole = encoding(x, "triton")
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 5 * x.decay.shape[1] * x.basis.num)
    for name, value in encoding(x, "triton").items():
        assert relative_error(value.cpu(), whole[name].cpu()) < 1e-6, name


def test_no_atoms():
    x = on_device(problem(kinds=(), every_pair=True))
    assert attention(x, "triton")["y"].shape == (0, 2, 4)
    assert encoding(x, "triton")["beta"].shape == (0, 2, 4)
    assert reciprocal(x, "triton")["y"].shape == (0, 2, 4)


def test_takes_fp32_alone():
    x = on_device(problem(), torch.float64)
    with pytest.raises(TypeError, match=r"backend 'triton' takes torch.float32, not torch.float64"):
        x.attention(backend="triton")
    with pytest.raises(TypeError, match=r"backend 'triton' takes torch.float32, not torch.float64"):
        x.reciprocal(backend="triton")


def test_model_in_both_spaces():
    """backend="triton" serves the reciprocal heads, too, and says so in fp64."""
    torch.manual_seed(0)
    config = cf.CrystalformerConfig(domain="multihead", num_blocks=1, model_dim=16, num_heads=4, num_basis=8, ff_dim=16)
    x = problem(kinds=(("cubic", 2),))
    batch = cf.CrystalBatch(torch.arange(1, 1 + len(x.positions)), x.positions, x.lattice, x.ptr)
    models = {name: cf.Crystalformer(config, name) for name in ("triton", "reference")}
    models["triton"].load_state_dict(models["reference"].state_dict())
    prepared = {name: model.to(DEVICE).prepare(batch.to(torch.float32).to(DEVICE)) for name, model in models.items()}
    found, expected = (models[name](prepared[name]) for name in models)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(TypeError, match=r"backend 'triton' takes torch.float32, not torch.float64"):
        models["triton"].double()(batch.to(DEVICE))


def attention_arguments(x):
    """Inputs and settings of the operators `triton_attention` and `reference_attention`."""
    return x.op_inputs, (*x.lists("triton"), x.settings)


def encoding_arguments(x):
    settings = (*x.lists("triton", by_pair=True), x.images.num_pairs, x.settings)
    return (x.decay, x.edge_weight, x.positions, x.lattice), settings


def reciprocal_arguments(x):
    return x.inputs[:6], x.wave_vectors(decay_min=2.0)


@pytest.mark.parametrize(
    ("name", "arguments", "dtype"),
    [
        ("attention", attention_arguments, torch.float32),
        ("attention", attention_arguments, torch.float16),
        ("encoding", encoding_arguments, torch.float32),
        ("reciprocal", reciprocal_arguments, torch.float32),
    ],
)
def test_opcheck(name, arguments, dtype):
    x = on_device(problem(kinds=(("cubic", 2),), decay_min=2.0, every_pair=True)).half(dtype)
    inputs, settings = arguments(x)
    forward = getattr(torch.ops.crystalformer, f"triton_{name}").default
    torch.library.opcheck(forward, (*(t.clone().requires_grad_() for t in inputs), *settings))
    outputs = forward(*inputs, *settings)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    backward = getattr(torch.ops.crystalformer, f"triton_{name}_backward").default
    for geometry in (True, False):
        torch.library.opcheck(backward, (*map(torch.randn_like, outputs[:2]), *inputs, *settings, *outputs, geometry))


@pytest.mark.parametrize("name", ["attention", "reciprocal"])
def test_second_derivatives(name):
    def curvature(x, backend):
        inputs = [t.clone().requires_grad_() for t in x.inputs[: 7 if name == "attention" else 6]]
        y = getattr(x, name)(*inputs, backend=backend).square().sum()
        first = torch.autograd.grad(y, inputs, create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in first), inputs)

    x = problem(kinds=(("cubic", 2),))
    for found, exact in zip(curvature(on_device(x), "triton"), curvature(x, "reference"), strict=True):
        assert relative_error(found.cpu(), exact) < 2e-4


@pytest.mark.filterwarnings("ignore")
def test_compiles_whole():
    x = on_device(problem())
    compiled = torch.compile(lambda *t: x.attention(*t, backend="triton"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*x.inputs), x.attention(backend="triton"))


@torch.no_grad()
def test_model_in_tf32():
    x = on_device(problem(kinds=(("cubic", 2),), decay_min=2.0))
    batch = cf.CrystalBatch(torch.arange(1, 3).to(DEVICE), x.positions, x.lattice, x.ptr)
    config = cf.CrystalformerConfig(num_blocks=1, model_dim=16, num_heads=2, ff_dim=16, num_basis=16)
    outputs = []
    for precision in ("exact", "tf32"):
        torch.manual_seed(0)
        outputs.append(cf.Crystalformer(config, "triton", precision).to(DEVICE)(batch))
    assert 0 < relative_error(*outputs) < 4 * 2**-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("geometry", [True, False])
def test_dual_space(dtype, geometry):
    """Heads in both spaces in one op: what the two ops give, and their gradients added where they share an input."""
    x = both(kinds=(("cubic", 2), ("skewed", 1)), dim=8, value_dim=8, num_basis=16)
    x = replace(x, x=on_device(x.x).half(dtype), waves=x.waves.to(DEVICE))
    inputs = [t.detach().clone().requires_grad_(geometry or k not in (5, 6)) for k, t in enumerate(x.inputs)]
    leaves, results = [t for t in inputs if t.requires_grad], []
    for function in (x.together, x.one_by_one):
        y = function(*inputs, backend="triton")
        results.append([y.detach(), *torch.autograd.grad(y, leaves, weights([y])[0])])
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        assert relative_error(one, other) < (1e-6 if dtype == torch.float32 else 2**-7)


@pytest.mark.parametrize("name", ["attention", "encoding", "reciprocal"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter
def test_one_nan_shows_in_all_that_the_reference_shows_it_in(name):
    """On a GPU a plain maximum drops NaN; in the interpreter it does not."""
    op = OPS[name]
    x = on_device(problem(kinds=(("cubic", 2),), decay_min=2.0, tol=1e-3, every_pair=True))
    for spoiled in op.inputs:
        inputs = inputs_of(op, x)
        inputs[spoiled].view(-1)[0] = float("nan")
        found, wanted = (results(op, x, backend, inputs) for backend in ("triton", "reference"))
        for key, value in wanted.items():
            assert not (value.isnan() & ~found[key].isnan()).any(), f"{spoiled}: {key}"


@pytest.mark.parametrize("score", [1e4, 1e5])
def test_large_scores(score):
    """The forward keeps distances at any score; the backward takes weights from lse, which is rounded as a score is."""
    x = problem(kinds=(("cubic", 1), ("skewed", 3)), heads=4, dim=4, value_dim=8, num_basis=16, decay_min=1.0)
    rng = torch.Generator().manual_seed(0)
    q, k = (torch.randint(-4, 5, t.shape, generator=rng) / 4.0 for t in (x.q, x.k))  # exact, and so are all products
    q[..., 0], k[..., 0] = 2.0, score + k[..., 0]
    x = replace(x, q=q.double(), k=k.double())
    exact, found = attention(x, "reference"), attention(on_device(x), "triton")
    for name, one in found.items():
        assert relative_error(one.cpu(), exact[name]) < 2e-7 * score, name
    alike = replace(x, k=torch.full_like(x.k, 1e25 * score))
    y = on_device(alike).attention(backend="triton")
    assert relative_error(y.cpu(), alike.attention(backend="reference")) < 1e-5
