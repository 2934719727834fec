"""The reference computes the sums of the theory: held against sums written out with numpy, image by image."""

import itertools
import math

import numpy as np
import pytest
import torch
from crystals import box_images
from problems import problem, relative_error

import crystalformer as cf
from crystalformer.attention import reference


def crystals(x):
    """The atoms of each crystal of a problem."""
    return [slice(i, j) for i, j in itertools.pairwise(x.ptr.tolist())]


def written_out(x, radius: float = 8.0):
    """y, lse, alpha and beta of a problem, image by image, equations (2) to (7)."""
    k, w = x.basis.num, x.basis.width * x.basis.r_max / x.basis.num
    mu = np.arange(1, k + 1) * x.basis.r_max / k
    y, lse, alpha, beta = [], [], [], []
    for c, atoms in enumerate(crystals(x)):
        q, key, v, a = (t[atoms].numpy() for t in (x.q, x.k, x.v, x.decay))
        n, heads, _ = q.shape
        pair, _, d2 = box_images(x.positions[atoms], x.lattice[c], radius)
        i, j = pair // n, pair % n
        b = np.exp(-((np.sqrt(d2)[:, None] - mu) ** 2) / (2 * w**2))
        for row, h in itertools.product(range(n), range(heads)):
            mine = i == row
            s = key[j[mine], h] @ q[row, h] / math.sqrt(q.shape[2]) - a[row, h] * d2[mine]
            p = np.exp(s) / np.exp(s).sum()
            y.append(p @ (v[j[mine], h] + b[mine] @ x.edge_weight[h].numpy().T))
            lse.append(np.log(np.exp(s).sum()))
        for p, h in itertools.product(range(n * n), range(heads)):
            e = np.exp(-a[p // n, h] * d2[pair == p])
            alpha.append(np.log(e.sum()))
            beta.append((e / e.sum()) @ b[pair == p] @ x.edge_weight[h].numpy().T)
    return [torch.from_numpy(np.array(z)) for z in (y, lse, alpha, beta)]


def test_attention_is_the_written_out_sum(backend):
    x = problem(tol=1e-14)
    y, lse = x.attention(backend=backend, return_lse=True)
    exact, exact_lse, _, _ = written_out(x)
    assert relative_error(y.flatten(0, 1), exact) < 1e-12
    assert relative_error(lse.flatten(), exact_lse) < 1e-12


def test_encoding_is_the_written_out_sum(backend):
    x = problem(tol=1e-14, every_pair=True)
    alpha, beta = x.encoding(backend=backend)
    _, _, exact_alpha, exact_beta = written_out(x, radius=14.0)
    assert relative_error(alpha.flatten(), exact_alpha) < 1e-12
    assert relative_error(beta.flatten(0, 1), exact_beta) < 1e-12


def test_pair_form_equals_image_form(backend):
    """softmax_j(q·k/sqrt(D) + alpha)(v + beta) of the paper is the attention over images."""
    x = problem(tol=1e-14, every_pair=True)
    alpha, beta = x.encoding(backend=backend)
    first, y = 0, []
    for atoms in crystals(x):
        n = atoms.stop - atoms.start
        pairs = slice(first, first + n * n)
        first += n * n
        content = torch.einsum("ihd,jhd->ijh", x.q[atoms], x.k[atoms]) / math.sqrt(x.q.shape[2])
        p = torch.softmax(content + alpha[pairs].view(n, n, -1), 1)
        values = x.v[atoms][None] + beta[pairs].view(n, n, *x.v.shape[1:])
        y.append(torch.einsum("ijh,ijhd->ihd", p, values))
    assert relative_error(x.attention(backend=backend), torch.cat(y)) < 1e-12


def test_without_edge_weight_is_the_simplified_model(backend):
    x = problem(every_pair=True)
    zero = torch.zeros_like(x.edge_weight)
    y = x.attention(backend=backend, edge_weight=None, basis=None)
    assert relative_error(y, x.attention(*x.inputs[:6], zero, backend=backend)) < 1e-14
    alpha, beta = cf.periodic_encoding(x.decay, x.positions, x.lattice, x.images, backend=backend)
    assert beta is None
    torch.testing.assert_close(alpha, x.encoding(backend=backend)[0])


def test_tf32_is_a_permission_that_these_backends_do_not_use(backend):
    x = problem(every_pair=True).to(torch.float32)
    assert torch.equal(x.attention(backend=backend, precision="tf32"), x.attention(backend=backend))
    args = (x.decay, x.positions, x.lattice, x.images, x.edge_weight, x.basis, backend)
    for one, other in zip(cf.periodic_encoding(*args, precision="tf32"), cf.periodic_encoding(*args), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(backend, dtype):
    def run(x):
        inputs = [t.clone().requires_grad_() for t in x.inputs]
        y, lse = x.attention(*inputs, backend=backend, return_lse=True)
        ones = [torch.ones_like(y), torch.ones_like(lse)]
        return y.detach(), lse.detach(), *torch.autograd.grad((y, lse), inputs, ones)

    x = problem().to(torch.float32).half(dtype)
    dtypes = [dtype, torch.float32, *[dtype] * 3, *[torch.float32] * 4]
    for found, expected, kind in zip(run(x), run(x.to(torch.float32)), dtypes, strict=True):
        assert torch.equal(found, expected.to(kind))
        assert found.dtype == kind


def test_autocast_does_not_reach_the_sums(backend):
    def run():
        inputs = [t.clone().requires_grad_() for t in x.inputs]
        y = x.attention(*inputs, backend=backend)
        first = torch.autograd.grad(y.sum(), inputs, create_graph=True)
        # Not through square or sum of y, which autocast may do in half precision.
        second = torch.autograd.grad(first[0], inputs[1:], torch.ones_like(first[0]))
        return y.detach(), *(g.detach() for g in first), *second

    x = problem().to(torch.float32)
    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for one, other in zip(run(), expected, strict=True):
            assert torch.equal(one, other)


def test_reciprocal_is_the_written_out_sum(backend):
    x = problem(kinds=(("cubic", 2), ("left_handed", 3)))
    y, exact = x.reciprocal(backend=backend, tol=1e-14), []
    for c, atoms in enumerate(crystals(x)):
        lattice = x.lattice[c].numpy()
        vectors = 2 * math.pi * np.linalg.inv(lattice).T
        g = np.array(list(itertools.product(range(-12, 13), repeat=3))) @ vectors
        r = x.positions[atoms].numpy()
        for i, h in itertools.product(range(len(r)), range(x.q.shape[1])):
            decay = x.decay[atoms][i, h].item()
            total = (np.exp(-decay * (g**2).sum(1)) * np.exp(1j * (r - r[i]) @ g.T)).sum(1).real
            alpha = np.log(np.maximum(total, 1e-6)) + 1.5 * np.log(4 * math.pi * decay)
            alpha -= math.log(abs(np.linalg.det(lattice)))
            s = x.k[atoms][:, h].numpy() @ x.q[atoms][i, h].numpy() / math.sqrt(x.q.shape[2]) + alpha
            exact.append(np.exp(s) / np.exp(s).sum() @ x.v[atoms][:, h].numpy())
    assert relative_error(y.flatten(0, 1), torch.from_numpy(np.array(exact))) < 1e-12


def test_poisson_summation_joins_the_two_spaces(backend):
    """The same Gaussian sum in both spaces, c = 1/(4a), so the same attention."""
    x = problem(kinds=(("cubic", 2), ("skewed", 2)), decay_min=0.1, tol=1e-14)
    real = x.attention(backend=backend, edge_weight=None, basis=None)
    reciprocal = x.reciprocal(*x.inputs[:3], 1 / (4 * x.decay), *x.inputs[4:], backend=backend, tol=1e-15)
    assert relative_error(reciprocal, real) < 1e-10


def test_clamped_pairs_have_the_weight_of_the_clamp(backend):
    """In a needle, far pairs have less than 1e-6 of the mean density: the paper's code clamps them."""
    x = problem(kinds=(("needle", 4),), decay_min=2.0, tol=1e-14)
    waves = cf.build_wave_vectors(x.lattice, x.ptr, 2.0, 1e-14)
    _, crystal = next(reference.padded_crystals(len(x.q), x.q.shape[1], waves))
    total = reference.reciprocal_sums(x.decay, x.positions, x.lattice, crystal).total
    assert (total < 1e-6).any()
    assert (total > 1e-6).any()
    assert torch.isfinite(x.reciprocal(backend=backend)).all()


@pytest.mark.parametrize("name", ["CHUNK_IMAGES", "CHUNK_ELEMENTS"])
def test_chunks_do_not_change_the_result(monkeypatch, name):
    x = problem(every_pair=True)
    whole = (x.attention(), *x.encoding(), x.reciprocal())
    monkeypatch.setattr(reference, name, 1)
    assert len(list(reference.attention_parts(x.q, x.v, x.images, x.basis))) == len(x.q)
    if name == "CHUNK_ELEMENTS":
        waves = cf.build_wave_vectors(x.lattice, x.ptr, 0.5)
        assert len(list(reference.reciprocal_parts(x.q, waves))) == len(x.q)
        monkeypatch.setattr(reference, name, 2 * 3 * 2 * waves.max_vectors)  # two of the crystals at once
        assert 1 < len(list(reference.reciprocal_parts(x.q, waves))) < len(x.q)
    for one, many in zip(whole, (x.attention(), *x.encoding(), x.reciprocal()), strict=True):
        assert relative_error(many, one) < 1e-14


def test_fp32_is_as_good_as_fp32_can_be():
    x = problem(heads=4, dim=8, value_dim=8, num_basis=16, decay_min=0.2, every_pair=True)
    single = x.to(torch.float32)
    for one, exact in ((single.attention(), x.attention()), (single.reciprocal(), x.reciprocal())):
        assert one.dtype == torch.float32
        assert relative_error(one, exact) < 5e-6
    for one, exact in zip(single.encoding(), x.encoding(), strict=True):
        assert relative_error(one, exact) < 5e-6


def test_no_atoms(backend):
    x = problem(kinds=(), every_pair=True)
    inputs = [t.requires_grad_() for t in x.inputs]
    y = x.attention(*inputs, backend=backend)
    assert y.shape == (0, 2, 4)
    assert [z.shape for z in x.encoding(backend=backend)] == [(0, 2), (0, 2, 4)]
    assert x.reciprocal(*inputs, backend=backend).shape == (0, 2, 4)
    y = y.sum() + x.reciprocal(*inputs, backend=backend).sum()
    grads = torch.autograd.grad(y.sum(), inputs, create_graph=True, allow_unused=True)
    assert [None if g is None else g.shape for g in grads] == [t.shape for t in inputs]


def test_one_atom_attends_to_its_own_images(backend):
    """Its content score is the same for all images, so only the value encoding tells them apart."""
    x = problem(kinds=(("cubic", 1),))
    torch.testing.assert_close(x.attention(backend=backend, edge_weight=None, basis=None), x.v)
    assert relative_error(x.attention(backend=backend), x.v) > 0.01
