"""Any launch of a kernel gives what any other does: shapes of tiles, parts that fit into memory, chunks. And dtypes."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from operators import inputs_of, operator, settings_of
from problems import problem, relative_error
from sums import ATTENTION, ENCODING, RECIPROCAL, assert_as_good_as_the_reference, exact, results
from ways import DEVICE, Way

import crystalformer as cf

TRITON = Way("triton", torch.float32, DEVICE)
pytestmark = pytest.mark.usefixtures("poison")


def test_shapes_of_tiles(monkeypatch):
    """Any shape serves any list."""
    module = import_module("crystalformer.kernels.layout")
    for shape in module.SHAPES:
        monkeypatch.setattr(module, "SHAPES", (shape,))
        x = problem(kinds=(("cubic", 1), ("skewed", 4)), decay_min=2.0, heads=2, dim=8, value_dim=8, num_basis=16)
        assert_as_good_as_the_reference(ATTENTION, exact(x), TRITON, geometry=(True,))


def test_reciprocal_in_parts(monkeypatch):
    """Crystals in parts that fit are what they are together; one that does not fit alone is the reference's."""
    module = import_module("crystalformer.kernels.phases")

    x = TRITON.problem(kinds=(("cubic", 1), ("skewed", 2), ("cubic", 5), ("cubic", 1)))
    whole = {geometry: results(RECIPROCAL, x, "triton", geometry) for geometry in (True, False)}
    waves, (max_atoms, max_vectors) = x.wave_vectors()
    g_ptr = cf.WaveVectors.views(waves, len(x.lattice))[1]
    single = max(module.padded(n) for n in g_ptr.diff().tolist())
    monkeypatch.setattr(module, "SCRATCH", 5 * (6 * single + 3 * module.padded(max_atoms) * 3))
    assert not module.fits(9, 2, max_atoms, max_vectors)
    for geometry, expected in whole.items():
        for name, value in results(RECIPROCAL, x, "triton", geometry).items():
            assert relative_error(value, expected[name]) < 1e-6, name  # compiled apart, for parts that are not aligned
    monkeypatch.setattr(module, "SCRATCH", 1)
    monkeypatch.setattr(module, "phases", None)  # no kernel
    for name, value in results(RECIPROCAL, x, "triton").items():
        assert relative_error(value, whole[True][name]) < 1e-5, name


def test_reciprocal_of_orbits_in_parts(monkeypatch):
    module = import_module("crystalformer.kernels.phases")
    x = TRITON.problem(kinds=(("cubic", 2), ("skewed", 3), ("cubic", 5), ("cubic", 1)))
    orbit = torch.tensor([0, 0, 1, 2, 1, 3, 4, 3, 5, 4, 6], device=DEVICE)
    first, ptr = [0, 2, 3, 5, 6, 8, 10], torch.tensor([0, 1, 3, 6, 7], device=DEVICE)
    waves = cf.build_wave_vectors(x.lattice, ptr, float(x.decay.min()), positions=x.positions, orbit=orbit)
    found = []
    for scratch in (module.SCRATCH, 5 * (6 * module.padded(waves.max_vectors) + 3 * module.padded(5) * 3), 1):
        monkeypatch.setattr(module, "SCRATCH", scratch)
        leaves = [t[first].requires_grad_() for t in x.inputs[:4]]
        options = {"backend": "triton", "wave_vectors": waves}
        y = cf.reciprocal_attention(*leaves, x.positions[first], x.lattice, ptr, **options)
        found.append([y.detach(), *torch.autograd.grad(y.sin().sum(), leaves)])
    for parts in found[1:]:
        for one, whole in zip(parts, found[0], strict=True):
            assert relative_error(one, whole) < 1e-5


def test_encoding_in_chunks(monkeypatch):
    module = import_module("crystalformer.kernels.encoding")

    x = ENCODING.problem(TRITON)
    whole = results(ENCODING, x, "triton")
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 5 * x.decay.shape[1] * x.basis.num)
    for name, value in results(ENCODING, x, "triton").items():
        assert relative_error(value.cpu(), whole[name].cpu()) < 1e-6, name


@torch.no_grad()
def test_model_in_tf32():
    x = TRITON.problem(kinds=(("cubic", 2),), decay_min=2.0)
    batch = cf.CrystalBatch(torch.arange(1, 3).to(DEVICE), x.positions, x.lattice, x.ptr)
    config = cf.CrystalformerConfig(num_blocks=1, model_dim=16, num_heads=2, ff_dim=16, num_basis=16)
    outputs = []
    for precision in ("exact", "tf32"):
        torch.manual_seed(0)
        outputs.append(cf.Crystalformer(config, "triton", precision).to(DEVICE)(batch))
    assert 0 < relative_error(*outputs) < 4 * 2**-11


@pytest.mark.parametrize("domain", ["real", "multihead"])
def test_fp64_is_refused(domain):
    x = problem(kinds=(("cubic", 2),)).to(torch.float64, DEVICE)
    message = r"backend 'triton' takes torch.float32, not torch.float64"
    for run in (x.attention, x.reciprocal):
        with pytest.raises(TypeError, match=message):
            run(backend="triton")
    config = cf.CrystalformerConfig(domain=domain, num_blocks=1, model_dim=16, num_heads=4, num_basis=8, ff_dim=16)
    batch = cf.CrystalBatch(torch.arange(1, 3).to(DEVICE), x.positions, x.lattice, x.ptr)
    with pytest.raises(TypeError, match=message):
        cf.Crystalformer(config, "triton").to(DEVICE).double()(batch)


def test_a_layout_of_something_else_is_refused():
    """As far as its shape tells; on a GPU its values are not looked at."""
    x = ENCODING.problem(TRITON)
    _, pairs, *_ = settings_of("encoding", x, "triton")
    packed, _, told = settings_of("attention", x, "triton")
    for layout in (pairs.new_zeros(8, dtype=torch.uint8), pairs.view(-1), pairs[:, :1], pairs[:8]):
        with pytest.raises(ValueError, match=r"^layout must be made by triton_layout"):
            operator("triton", "attention")(*inputs_of("attention", x).values(), packed, layout, told)


def test_layout_follows_the_geometry():
    x = TRITON.problem()
    x = replace(x, images=replace(x.images, geometry=None))  # for any positions
    before = x.attention(backend="triton")
    x.positions.add_(0.1 * torch.ones_like(x.positions).cumsum(0))
    after = x.attention(backend="triton")
    assert relative_error(after.cpu(), x.to(torch.float64).attention()) < 1e-5
    assert relative_error(after, before) > 1e-3
