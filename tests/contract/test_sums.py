"""Every backend computes the sums of the theory, whatever the sizes, the crystal and how its inputs lie in memory.

In fp64 to its last digits; in fp32 with at most twice the error of the plain reference.
"""

import math
from dataclasses import replace

import pytest
import torch
from problems import problem, relative_error
from sums import (
    ATTENTION,
    DUAL_SPACE,
    ENCODING,
    GEOMETRY,
    MAIN,
    RECIPROCAL,
    SIMPLE_DUAL_SPACE,
    SUMS,
    assert_as_good_as_the_reference,
    exact,
    results,
)
from written_out import crystals, reciprocal_written_out, written_out

import crystalformer as cf

SMALL = dict(kinds=(("cubic", 2), ("skewed", 1)), decay_min=1.0)


def assert_equal(found, expected, way, double=1e-12, single=5e-6):
    """Relatively, within what the dtype allows."""
    assert relative_error(found.cpu(), expected.cpu()) < (double if way.double else single)


class TestTheory:
    """Against sums that are written out image by image, in numpy."""

    def test_attention_is_the_written_out_sum(self, way):
        x = problem(tol=1e-14)
        y, lse = way.place(x).attention(backend=way.backend, return_lse=True)
        exact_y, exact_lse, _, _ = written_out(x)
        assert_equal(y.flatten(0, 1), exact_y, way)
        assert_equal(lse.flatten(), exact_lse, way)

    def test_encoding_is_the_written_out_sum(self, way):
        x = problem(tol=1e-14, every_pair=True)
        alpha, beta = way.place(x).encoding(backend=way.backend)
        _, _, exact_alpha, exact_beta = written_out(x, radius=14.0)
        assert_equal(alpha.flatten(), exact_alpha, way)
        assert_equal(beta.flatten(0, 1), exact_beta, way)

    def test_reciprocal_is_the_written_out_sum(self, way):
        x = problem(kinds=(("cubic", 2), ("left_handed", 3)))
        y = way.place(x).reciprocal(backend=way.backend, tol=1e-14)
        assert_equal(y.flatten(0, 1), reciprocal_written_out(x), way)

    def test_pair_form_equals_image_form(self, way):
        """softmax_j(q·k/sqrt(D) + alpha)(v + beta) of the paper is the attention over images."""
        x = way.problem(tol=1e-14, every_pair=True)
        alpha, beta = x.encoding(backend=way.backend)
        first, y = 0, []
        for atoms in crystals(x):
            n = atoms.stop - atoms.start
            pairs = slice(first, first + n * n)
            first += n * n
            content = torch.einsum("ihd,jhd->ijh", x.q[atoms], x.k[atoms]) / math.sqrt(x.q.shape[2])
            p = torch.softmax(content + alpha[pairs].view(n, n, -1), 1)
            values = x.v[atoms][None] + beta[pairs].view(n, n, *x.v.shape[1:])
            y.append(torch.einsum("ijh,ijhd->ihd", p, values))
        assert_equal(x.attention(backend=way.backend), torch.cat(y), way)

    def test_without_edge_weight_is_the_simplified_model(self, way):
        x = way.problem(every_pair=True)
        zero = torch.zeros_like(x.edge_weight)
        y = x.attention(backend=way.backend, edge_weight=None, basis=None)
        assert_equal(y, x.attention(*x.inputs[:6], zero, backend=way.backend), way, 1e-14, 1e-6)
        alpha, beta = cf.periodic_encoding(x.decay, x.positions, x.lattice, x.images, backend=way.backend)
        assert beta is None
        assert_equal(alpha, x.encoding(backend=way.backend)[0], way)

    def test_poisson_summation_joins_the_two_spaces(self, way):
        """The same Gaussian sum in both spaces, c = 1/(4a), so the same attention."""
        x = way.problem(kinds=(("cubic", 2),), decay_min=0.1, tol=1e-14)
        real = x.attention(backend=way.backend, edge_weight=None, basis=None)
        inputs = (*x.inputs[:3], 1 / (4 * x.decay), *x.inputs[4:])
        assert_equal(x.reciprocal(*inputs, backend=way.backend, tol=1e-15), real, way, 1e-10, 2e-5)

    def test_one_atom_attends_to_its_own_images(self, way):
        """Its content score is the same for all images, so only the value encoding tells them apart."""
        x = way.problem(kinds=(("cubic", 1),))
        torch.testing.assert_close(x.attention(backend=way.backend, edge_weight=None, basis=None), x.v)
        assert relative_error(x.attention(backend=way.backend), x.v) > 0.01

    @pytest.mark.parametrize(("op", "real"), [(DUAL_SPACE, 1), (DUAL_SPACE, 2), (SIMPLE_DUAL_SPACE, 1)], ids=str)
    def test_heads_in_both_spaces_are_the_two_ops(self, op, real, way):
        """Outputs, and gradients, which are added where both ops share an input."""

        def one_by_one(x, given, backend, real):
            heads = {name: given.pop(name) for name in ("q", "k", "v", "decay")}
            first, rest = ({name: t[:, half] for name, t in heads.items()} for half in (slice(real), slice(real, None)))
            encoding = {name: t[:real] for name, t in given.items() if name == "edge_weight"}
            geometry = {name: given[name] for name in GEOMETRY}
            y, _ = ATTENTION.run(x, first | geometry | encoding, backend=backend)
            return (torch.cat((y, *RECIPROCAL.run(x, rest | geometry, backend=backend)), 1),)

        x = op.problem(way, heads=3, **SMALL)
        expected = results(replace(op, run=one_by_one), x, way.backend, real=real)
        for name, y in results(op, x, way.backend, real=real).items():
            assert_equal(y, expected[name], way, 1e-14, 1e-6)


# heads, dim, value_dim and num_basis: the paper's, padded ones, several blocks of each, and one of everything.
SIZES = {
    "paper": dict(heads=8, dim=16, value_dim=16, num_basis=64, decay_min=0.5),
    "padded": dict(heads=3, dim=5, value_dim=7, num_basis=11),
    "head blocks": dict(heads=13, dim=9, value_dim=17, num_basis=33, **SMALL),
    "one head": dict(kinds=(("skewed", 1), ("cubic", 2)), decay_min=2.0, heads=1, dim=64, value_dim=8, num_basis=16),
    "ones": dict(heads=1, dim=1, value_dim=1, num_basis=1),
    "one atom": dict(kinds=(("cubic", 1),), heads=3, dim=5, value_dim=7, num_basis=11),
    "needle": dict(kinds=(("needle", 3),), heads=3, dim=5, value_dim=7, num_basis=11),
}
SIZES_OF_IMAGES = SIZES | {
    "basis blocks": dict(heads=2, dim=16, value_dim=8, num_basis=70, **SMALL),
    "one image a pair": dict(
        kinds=(("cubic", 8), ("plate", 1)), heads=2, dim=8, value_dim=8, num_basis=16, decay_min=2.0
    ),
}
# The encoding is of each pair by itself, however far apart. Kernels multiply decays and squared distances as they are,
# 10⁴ Å² in the needle, where the reference takes the smallest of the pair off first: that costs digits in fp32.
FAR = {"needle": 1e-4, "one image a pair": 1e-5}
RECIPROCAL_SIZES = SIZES | {
    "tiles of atoms": dict(kinds=(("cubic", 2), ("cubic", 17)), dim=8, value_dim=8, decay_min=2.5),
    "clamped": dict(kinds=(("needle", 4),), decay_min=2.0, tol=1e-9),
}


class TestReference:
    """Outputs and gradients of all inputs against the reference in fp64."""

    @pytest.mark.parametrize("size", SIZES_OF_IMAGES)
    @pytest.mark.parametrize("op", [ATTENTION, ENCODING], ids=str)
    def test_any_size(self, op, size, kernels):
        floor = FAR.get(size, 1e-6) if op is ENCODING else 1e-6
        x = exact(op.problem(**{"decay_min": 1.0} | SIZES_OF_IMAGES[size]))
        # Triton's kernels are without the gradients of the geometry in test_any_form: the interpreter is slow.
        geometry = (True,) if kernels.backend == "triton" else (True, False)
        assert_as_good_as_the_reference(op, x, kernels, floor, geometry)

    @pytest.mark.parametrize("op", SUMS, ids=str)
    def test_any_form(self, op, kernels):
        x = op.problem(**SIZES["padded"] | SMALL)
        assert_as_good_as_the_reference(op, exact(x), kernels)

    @pytest.mark.parametrize("size", RECIPROCAL_SIZES)
    def test_any_size_in_reciprocal_space(self, size, kernels):
        x = problem(**{"decay_min": 1.0} | RECIPROCAL_SIZES[size])
        if size == "clamped":  # far pairs have less than 1e-6 of the mean density: the paper's code clamps them
            sums = torch.ops.crystalformer.reference_reciprocal_sum(*x.inputs[3:6], *x.wave_vectors(2.0), 16)
            assert (sums < 1e-7).any()
            assert (sums > 1e-6).any()
        geometry = (True,) if kernels.backend == "triton" else (True, False)
        assert_as_good_as_the_reference(RECIPROCAL, x, kernels, geometry=geometry)

    @pytest.mark.parametrize("op", [ATTENTION, ENCODING], ids=str)
    def test_images_at_one_distance(self, op, kernels):
        """In a tetragonal cell four and more images of a pair are at most distances, and a force is of each of them."""
        x = op.problem(kinds=(("cubic", 2),), heads=4, dim=8, value_dim=8, num_basis=16)
        lattice = 4.125 * torch.eye(3).to(x.lattice)[None]
        positions = torch.tensor([[0, 0, 0], [0.5, 0.5, 0.375]]).to(lattice) @ lattice[0]
        images = cf.build_images(positions, lattice, x.ptr, decay_min=0.5, every_pair=True)
        x = replace(x, positions=positions, lattice=lattice, images=images)
        row = torch.repeat_interleave(images.row_ptr.diff())
        apart = positions[images.col.long()] - positions[row] + images.shift.double() @ lattice[0]
        _, together = torch.stack([row + 2 * images.col, (1e6 * apart.norm(dim=1)).round().long()]).unique(
            dim=1, return_counts=True
        )
        assert together.double().median() >= 4
        assert_as_good_as_the_reference(op, exact(x), kernels)

    @pytest.mark.parametrize("op", [ATTENTION, ENCODING], ids=str)
    @pytest.mark.parametrize("tol", [1e-3, 1e-6])
    def test_what_is_left_out_is_within_tol(self, op, tol, kernels):
        x = op.problem(heads=4, dim=8, value_dim=8, num_basis=16, tol=tol, decay_min=0.3)
        found = results(op, kernels.place(x), kernels.backend, geometry=False)
        wanted = results(op, x, "reference", geometry=False)
        errors = [relative_error(y.cpu(), wanted[name]) for name, y in found.items()]
        assert max(errors) < 3 * tol + (0 if kernels.double else 1e-5)
        if kernels.backend == "cpu" and kernels.double:
            assert max(errors) > 1e-13  # it did leave something out

    @pytest.mark.parametrize("op", [ATTENTION, RECIPROCAL], ids=str)
    @pytest.mark.parametrize("scale", [30.0, 300.0])
    def test_scores_that_differ_by_more_than_the_exponent_range(self, op, scale, kernels):
        x = exact(op.problem(heads=3, dim=8, value_dim=4, num_basis=8))
        x = replace(x, q=scale * x.q)
        best, plain = (results(op, x.to(dtype), "reference") for dtype in (torch.float64, kernels.dtype))
        for name, y in results(op, kernels.place(x), kernels.backend).items():
            bound = 2 * relative_error(plain[name], best[name]) + 1e4 * torch.finfo(kernels.dtype).eps
            assert relative_error(y.cpu(), best[name]) < bound, name

    @pytest.mark.parametrize("op", [ATTENTION, RECIPROCAL], ids=str)
    @pytest.mark.parametrize("scale", [1e6, 1e19, 1e30])
    def test_scores_of_any_size(self, op, scale, way):
        """One atom has all of a row, its images share it by their distances, and the weights add up to one."""
        if way.backend == "triton":
            way.skip("its backward takes weights from lse, which fp32 rounds as a score: see test_large_scores")
        x = exact(op.problem(heads=3, dim=8, value_dim=4, num_basis=8)).to(way.dtype)
        x = replace(x, q=scale * x.q)
        best = results(op, x.to(torch.float64), "reference")
        for name, y in results(op, way.place(x), way.backend).items():
            bound = 100 * torch.finfo(way.dtype).eps * float(best[name].abs().max())  # 0 where there is no gradient
            torch.testing.assert_close(y.cpu().double(), best[name], rtol=0.0, atol=bound)
            assert op is RECIPROCAL or bound > 0

    @pytest.mark.parametrize("score", [1e4, 1e5])
    def test_large_scores(self, score, way):
        """Distances count at any score; gradients are as good as the score is rounded."""
        x = problem(kinds=(("cubic", 1), ("skewed", 3)), heads=4, dim=4, value_dim=8, num_basis=16, decay_min=1.0)
        rng = torch.Generator().manual_seed(0)
        # Quarters are exact, and so are all their products.
        q, k = (torch.randint(-4, 5, t.shape, generator=rng) / 4.0 for t in (x.q, x.k))
        q[..., 0], k[..., 0] = 2.0, score + k[..., 0]
        x = exact(replace(x, q=q.double(), k=k.double()))
        best = results(ATTENTION, x, "reference")
        for name, y in results(ATTENTION, way.place(x), way.backend).items():
            assert relative_error(y.cpu(), best[name]) < 2e-7 * score, name
        alike = replace(x, k=torch.full_like(x.k, 1e25 * score))
        y, wanted = way.place(alike).attention(backend=way.backend), alike.attention(backend="reference")
        assert relative_error(y.cpu(), wanted) < 1e-5

    @pytest.mark.parametrize("decay", [1e-2, 50.0, 1e6])
    @pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning")  # in Triton's interpreter
    def test_decays_far_from_what_the_list_is_for(self, decay, kernels):
        x = exact(problem(heads=3, dim=4, value_dim=4, num_basis=8))
        x = replace(x, images=replace(x.images, decay_min=None))  # as if with a cutoff of one's own
        x = replace(x, decay=torch.full_like(x.decay, decay))
        best, plain = (results(ATTENTION, x.to(dtype), "reference") for dtype in (torch.float64, torch.float32))
        scale = max(float(y.abs().max()) for y in best.values())
        for name, y in results(ATTENTION, kernels.place(x), kernels.backend).items():
            bound = 2 * (plain[name] - best[name]).abs().max() + 1e-6 * scale
            assert (y.cpu() - best[name]).abs().max() < bound, name


class TestForm:
    """What changes nothing, and what is left when there is nothing."""

    @pytest.mark.parametrize("op", [*MAIN, DUAL_SPACE], ids=str)
    def test_nothing_has_to_lie_in_memory_in_order(self, op, way):
        """A lattice often comes as columns."""
        x = op.problem(way, **SMALL)
        turned = {name: getattr(x, name).transpose(0, -1).contiguous().transpose(0, -1) for name in op.inputs}
        ptr = torch.stack((x.ptr, x.ptr + 9), 1)[:, 0]
        images = cf.build_images(x.positions, x.lattice, ptr, decay_min=1.0, **dict(op.options))
        assert images.col.shape == x.images.col.shape
        expected = results(op, replace(x, images=images), way.backend)
        for name, y in results(op, replace(x, **turned, ptr=ptr, images=images), way.backend).items():
            assert_equal(y, expected[name], way, 1e-12, 1e-6)

    @pytest.mark.parametrize("op", SUMS, ids=str)
    def test_no_atoms(self, op, way):
        x = op.problem(way, kinds=(), heads=2)
        found = results(op, x, way.backend)
        assert set(found) == {*op.outputs, *(f"d {name}" for name in op.inputs)}
        for name in op.inputs:
            assert found[f"d {name}"].shape == getattr(x, name).shape
        assert [len(found[name]) for name in op.outputs] == [0] * len(op.outputs)

    @pytest.mark.parametrize("op", [*MAIN, DUAL_SPACE], ids=str)
    def test_same_bits_every_time(self, op, way):
        x = op.problem(way, **SMALL)
        first = results(op, x, way.backend)
        x.images.layouts.clear()
        for name, y in results(op, x, way.backend).items():
            assert torch.equal(y, first[name]), name

    def test_reciprocal_finds_its_decay_min_itself(self, way):
        x = way.problem(**SMALL)
        expected = x.reciprocal(backend=way.backend, decay_min=float(x.decay.min()))
        assert torch.equal(x.reciprocal(backend=way.backend), expected)

    def test_far_from_the_origin(self, way):
        """A translation by lattice vectors changes nothing, although G·p is large then."""
        x = problem(kinds=(("cubic", 2),), decay_min=1.0)
        x = replace(x, lattice=x.lattice.round(), positions=(x.positions * 64).round() / 64)
        far = replace(x, positions=x.positions + 20 * x.lattice.sum(1))
        here, there = (results(RECIPROCAL, way.place(y), way.backend, geometry=False) for y in (x, far))
        single = {"reference": 5e-5}.get(way.backend, 1e-6)  # whose G·p is in fp32
        for name in here:
            assert_equal(there[name], here[name], way, 1e-11, single)

    @pytest.mark.parametrize("op", MAIN, ids=str)
    def test_shifting_all_atoms_changes_nothing(self, op, way):
        x = op.problem(way, kinds=(("cubic", 2), ("left_handed", 2)), decay_min=1.0)
        forces = results(op, x, way.backend)["d positions"]
        per_crystal = torch.stack([f.sum(0) for f in forces.split(x.ptr.diff().tolist())])
        assert forces.abs().max() > 1e-3
        assert per_crystal.abs().max() < (1e-12 if way.double else 1e-5) * forces.abs().max()
