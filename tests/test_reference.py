"""The reference, which the kernels are held against: its chunks, its rounding, and its written-out backward."""

import pytest
import torch
from operators import OPS, call, inputs_of, settings_of
from problems import problem, relative_error

import crystalformer as cf
from crystalformer.attention import reference


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


@pytest.mark.parametrize("geometry", [True, False])
@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.part_backward])
def test_written_out_backward_is_the_derivative_of_the_reference(name, geometry):
    """reference_backward against autograd through the reference, where finite differences are too coarse."""
    x = problem(heads=3, dim=5, value_dim=4, num_basis=7, every_pair=True)
    op, inputs, settings = OPS[name], inputs_of(name, x), settings_of(name, x, "reference")
    grads = []
    found = call(name, "reference", inputs, settings, geometry, spoil=grads.extend)
    leaves = [t.requires_grad_() for t in inputs.values()]
    pieces = [part.forward(*leaves) for part in op.parts(*leaves, *settings)]
    whole = [torch.cat(piece) for piece in zip(*pieces, strict=True)][: len(grads)]
    for one, exact in zip(op.inputs, torch.autograd.grad(whole, leaves, grads), strict=True):
        if geometry or one not in ("positions", "lattice"):
            assert relative_error(found[f"d {one}"], exact) < 1e-12, one
        else:
            assert found[f"d {one}"].numel() == 0
