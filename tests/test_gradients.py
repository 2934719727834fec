"""Every op is differentiable in every floating-point input, to any order, and exactly."""

from dataclasses import replace

import pytest
import torch
from problems import problem, relative_error

import crystalformer as cf

SMALL = (("cubic", 2), ("left_handed", 2))
# All inputs of a small problem, with few images: finite differences go through each number.
TINY = dict(kinds=SMALL, heads=2, dim=2, value_dim=2, num_basis=3, decay_min=1.0, tol=1e-3)


def tiny(**options):
    x = problem(**TINY, **options)
    return x, [t.requires_grad_() for t in x.inputs]


def encoding_inputs(inputs):
    _, _, _, decay, positions, lattice, edge_weight = inputs
    return decay, positions, lattice, edge_weight


def test_attention(backend):
    x, inputs = tiny()
    run = lambda *t: x.attention(*t, backend=backend, return_lse=True)  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_attention_without_edge_weight(backend):
    x, inputs = tiny()
    run = lambda *t: x.attention(*t, t[0].new_zeros(0), backend=backend, edge_weight=None, basis=None)  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs[:6])
    assert torch.autograd.gradgradcheck(run, inputs[:6])


def test_encoding(backend):
    x, inputs = tiny(every_pair=True)
    run = lambda *t: x.encoding(*t, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(run, encoding_inputs(inputs))
    assert torch.autograd.gradgradcheck(run, encoding_inputs(inputs))


def test_encoding_without_edge_weight(backend):
    x, (_, _, _, *inputs, _) = tiny(every_pair=True)
    run = lambda *t: cf.periodic_encoding(*t, x.images, backend=backend)[0]  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_reciprocal(backend):
    x, inputs = tiny()
    waves = cf.build_wave_vectors(x.lattice, x.ptr, decay_min=1.0)
    run = lambda *t: x.reciprocal(*t, backend=backend, wave_vectors=waves)  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs[:6])
    assert torch.autograd.gradgradcheck(run, inputs[:6])


def test_reciprocal_finds_its_decay_min_itself(backend):
    x, inputs = tiny()
    exact = x.reciprocal(*inputs, backend=backend, decay_min=float(x.decay.detach().min()))
    torch.testing.assert_close(x.reciprocal(*inputs, backend=backend), exact, rtol=0.0, atol=0.0)


def test_clamped_reciprocal_pairs_have_no_gradient(backend):
    x = problem(kinds=(("needle", 4),), dim=2, value_dim=2, decay_min=2.0)
    waves = cf.build_wave_vectors(x.lattice, x.ptr, decay_min=2.0, tol=1e-13)
    inputs = [t.requires_grad_() for t in x.inputs[:6]]
    run = lambda *t: x.reciprocal(*t, backend=backend, wave_vectors=waves)  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_third_derivative(backend):
    """A gradient of a gradient of a gradient, against a difference of second derivatives."""
    x, inputs = tiny()
    direction = torch.randn_like(x.positions)

    def curvature(decay):
        arguments = [*inputs[:3], decay, *inputs[4:]]
        y = x.attention(*arguments, backend=backend).square().sum()
        (first,) = torch.autograd.grad(y, x.positions, create_graph=True)
        (second,) = torch.autograd.grad((first * direction).sum(), x.positions, create_graph=True)
        return (second * direction).sum()

    (third,) = torch.autograd.grad(curvature(x.decay), x.decay)
    step, along = 1e-5, torch.randn_like(x.decay)
    difference = (curvature(x.decay + step * along) - curvature(x.decay - step * along)) / (2 * step)
    torch.testing.assert_close((third * along).sum(), difference, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("geometry", [True, False])
def test_written_out_backward_is_the_derivative_of_the_reference(geometry):
    """reference_backward against autograd through the reference, where finite differences are too coarse."""
    from crystalformer.attention import ops

    x = problem(heads=3, dim=5, value_dim=4, num_basis=7, every_pair=True)
    lists, settings = x.lists("reference"), x.settings
    cases = (
        (ops.ATTENTION, x.op_inputs, (*lists, settings)),
        (ops.ENCODING, (x.decay, x.edge_weight, x.positions, x.lattice), (*lists, x.images.num_pairs, settings)),
        (ops.RECIPROCAL, x.inputs[:6], x.wave_vectors()),
        (ops.RECIPROCAL_SUM, x.inputs[3:6], (*x.wave_vectors(), x.images.num_pairs)),
    )
    for op, inputs, settings in cases:
        with torch.no_grad():
            outputs = getattr(torch.ops.crystalformer, f"reference_{op.name}")(*inputs, *settings)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = [torch.randn_like(y) for y in outputs[: len(op.outputs)]]
        run = getattr(torch.ops.crystalformer, f"reference_{op.name}_backward")
        found = run(*grads, *inputs, *settings, *outputs, geometry)
        leaves = [t.clone().requires_grad_() for t in inputs]
        pieces = [part.forward(*leaves) for part in op.parts(*leaves, *settings)]
        whole = [torch.cat(piece) for piece in zip(*pieces, strict=True)][: len(grads)]
        exact = torch.autograd.grad(whole, leaves, grads)
        for name, one, other in zip(op.inputs, found, exact, strict=True):
            if geometry or name not in ("positions", "lattice"):
                assert relative_error(one, other) < 1e-12, f"{op.name}: {name}"
            else:
                assert one.numel() == 0


@pytest.mark.parametrize("op", ["attention", "reciprocal"])
def test_fp32_gradients_are_as_good_as_the_reference(op, backend):
    """Error-ratio rule: at most twice the error that the plain fp32 reference has against fp64."""
    x = problem(heads=4, dim=8, value_dim=8, num_basis=16, decay_min=0.2)
    weight = torch.randn(x.v.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def gradients(p, name):
        inputs = [t.clone().requires_grad_() for t in p.inputs]
        if op == "reciprocal":
            inputs = inputs[:6]
            y = p.reciprocal(*inputs, backend=name, decay_min=0.2)
        else:
            y = p.attention(*inputs, backend=name)
        return torch.autograd.grad((y * weight.to(y.dtype)).sum(), inputs)

    exact = gradients(x, "reference")
    plain = gradients(x.to(torch.float32), "reference")
    for one, reference, best in zip(gradients(x.to(torch.float32), backend), plain, exact, strict=True):
        assert one.dtype == torch.float32
        assert relative_error(one, best) < 2 * relative_error(reference, best) + 5e-7


def test_nothing_has_to_lie_in_memory_in_order(backend):
    """A lattice often comes as columns."""
    x, inputs = tiny(every_pair=True)
    turned = [t.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for t in inputs]
    ptr = torch.stack((x.ptr, x.ptr + 9), 1)[:, 0]
    waves = cf.build_wave_vectors(x.lattice, ptr, decay_min=1.0)
    assert torch.equal(waves.g, cf.build_wave_vectors(x.lattice, x.ptr, decay_min=1.0).g)
    images = cf.build_images(x.positions, x.lattice, ptr, decay_min=1.0, tol=1e-3, every_pair=True)
    assert torch.equal(images.col, x.images.col)
    found, exact = [], []
    for leaves, results in ((turned, found), (inputs, exact)):
        y = x.attention(*leaves, backend=backend).square().sum()
        y = y + x.reciprocal(*leaves, backend=backend, wave_vectors=waves).square().sum()
        y = y + sum(z.square().sum() for z in x.encoding(*encoding_inputs(leaves), backend=backend))
        results += torch.autograd.grad(y, leaves)
    for one, other in zip(found, exact, strict=True):
        assert relative_error(one, other) < 1e-12


def test_shifting_all_atoms_changes_nothing(backend):
    x, inputs = tiny()
    y = x.attention(*inputs, backend=backend).square().sum() + x.reciprocal(*inputs, backend=backend).square().sum()
    (forces,) = torch.autograd.grad(y, x.positions)
    per_crystal = torch.stack([f.sum(0) for f in forces.split(x.ptr.diff().tolist())])
    assert forces.abs().max() > 1e-3
    assert per_crystal.abs().max() < 1e-12 * forces.abs().max()


def test_atoms_at_one_place_have_finite_gradients(backend):
    """At d = 0 the distance has no derivative; the gradient is finite, at all orders."""
    x = problem(**TINY)
    positions = x.positions.clone()
    positions[1] = positions[0]
    x = replace(x, images=cf.build_images(positions, x.lattice, x.ptr, decay_min=TINY["decay_min"]))
    inputs = [*x.inputs[:4], positions, *x.inputs[5:]]
    inputs = [t.clone().requires_grad_() for t in inputs]
    y = x.attention(*inputs, backend=backend).square().sum()
    first = torch.autograd.grad(y, inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
    assert all(torch.isfinite(g).all() for g in (*first, *second))
    assert all(g.abs().max() > 0 for g in (*first, *second))


def test_forces_and_stress_of_the_model_are_differences_of_its_output():
    torch.manual_seed(0)
    model = cf.Crystalformer(cf.CrystalformerConfig(num_blocks=2, model_dim=16, num_heads=2, ff_dim=16)).double()
    x = problem(kinds=SMALL)
    species = torch.arange(1, 1 + len(x.positions))
    batch = cf.CrystalBatch(species, x.positions.clone(), x.lattice.clone(), x.ptr)
    batch.images = model.build_images(batch)
    batch.positions.requires_grad_()
    batch.lattice.requires_grad_()
    forces, stress = torch.autograd.grad(model(batch).sum(), (batch.positions, batch.lattice))
    step = 1e-5
    for leaf, grad in ((batch.positions, forces), (batch.lattice, stress)):
        along = torch.randn_like(leaf)
        energies = []
        for sign in (1, -1):
            with torch.no_grad():
                leaf += sign * step * along
                energies.append(model(batch).sum())
                leaf -= sign * step * along
        difference = (energies[0] - energies[1]) / (2 * step)
        torch.testing.assert_close((grad * along).sum(), difference, rtol=1e-6, atol=0.0)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own forward mode uses it
def test_forward_mode_is_refused_not_dropped(backend):
    x = problem(**TINY)
    along = lambda p: x.attention(*x.inputs[:4], p, *x.inputs[5:], backend=backend)  # noqa: E731
    with pytest.raises(NotImplementedError, match="forward-mode derivatives"):
        torch.func.jvp(along, (x.positions,), (x.positions,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.positions, x.positions)
        with pytest.raises(NotImplementedError, match="forward-mode derivatives"):
            along(dual)
