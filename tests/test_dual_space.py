"""Bad input to heads in both spaces: the errors are of this op."""

import pytest
import torch
from problems import problem

import crystalformer as cf


def test_errors():
    x = problem(heads=3, decay_min=1.0)
    q, k, v, decays, positions, lattice, edge_weight = x.inputs
    decay, decay_reciprocal = decays[:, :1], decays[:, 1:]
    good, geometry = (q, k, v, decay, decay_reciprocal), (positions, lattice)
    waves = cf.build_wave_vectors(lattice, x.ptr, 1.0)
    cases = (
        ((q, k, v, decays, decay_reciprocal), {}, r"decay must have from 1 to H-1=2 heads, .*, not 3"),
        ((q, k, v, decay, decay), {}, r"decay_reciprocal must have shape \(N=6, H=2\), not \(6, 1\)"),
        ((q, k, v, decay, -decay_reciprocal), {}, "decay_reciprocal must be positive, but its smallest value is -"),
        ((q, k, v, decay, 0.1 * decay_reciprocal), {}, r"decay_reciprocal must be at least 1, the decay_min that wave"),
        ((q, k, v, 0.1 * decay, decay_reciprocal), {}, r"decay must be at least 1, the decay_min that images were"),
        (good, {"precision": "fast"}, "precision must be 'exact' or 'tf32', not 'fast'"),
        (
            good,
            {"waves": cf.build_wave_vectors(lattice[:1], torch.tensor([0, 1]), 1.0)},
            r"wave_vectors must be of the crystals of images, \[0, 1, 4, 6\], not of \[0, 1\]",
        ),
    )
    for inputs, options, message in cases:
        lists = (x.images, options.pop("waves", waves))
        with pytest.raises(ValueError, match=message):
            cf.dual_space_attention(*inputs, *geometry, *lists, edge_weight[:1], x.basis, "reference", **options)
