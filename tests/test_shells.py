"""Images at one distance, up to a spread, are summed as one shell: which shells are summed, and what that may cost."""

import math

import pytest
import torch
from problems import problem

import crystalformer as cf

if cf.available_backends()["cpu"] is not True:
    pytest.skip(cf.available_backends()["cpu"], allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poison_cpp")

TOLS = [10.0**-k for k in range(1, 9)]


class TwoAtomsAtTheEdge:
    """The first atom sees two others, of one shell, that are at the edge of what matters for some decay."""

    def __init__(self, tol: float, dtype: torch.dtype) -> None:
        basis = cf.RadialBasis()
        # Half of what a shell may spread, or what fp32 positions resolve.
        apart = max(tol * basis.r_max / basis.num / 8, 1e-6)
        far = torch.tensor([[0.0, 0, 0], [0, 5, 0], [5.4, 0, 0], [0, 0, 5.4 + apart]], dtype=torch.float64)
        self.positions, self.lattice = (far + 10).to(dtype), 30 * torch.eye(3, dtype=dtype)[None]
        self.images = cf.build_images(
            self.positions, self.lattice, torch.tensor([0, 4]), decay_min=0.5, tol=tol, logit_range=80
        )
        zero = torch.zeros(4, 1, 1, dtype=dtype)
        self.q = zero.index_fill(0, torch.tensor(0), 1.0)
        self.k = math.log(2) * torch.tensor([60.0, 100, 99, 99], dtype=dtype)[:, None, None]
        self.v, self.weight, self.basis = zero + 1, torch.ones(1, 1, basis.num, dtype=dtype), basis

    def results(self, decay: float, backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        """y of the first atom, up to about 3, and its gradients of v, q and decay, up to 1, 12 and 11."""
        decays = torch.full_like(self.q[..., 0], decay)
        q, k, v, decays, *rest = (
            x.to(dtype) for x in (self.q, self.k, self.v, decays, self.positions, self.lattice, self.weight)
        )
        leaves = [x.requires_grad_() for x in (v, q, decays)]
        y = cf.periodic_attention(q, k, v, decays, *rest[:2], self.images, rest[2], self.basis, backend=backend)
        return [y[0].detach(), *torch.autograd.grad(y[0].sum(), leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tol", TOLS)
def test_both_sides_of_the_edge_are_within_tol(tol, dtype):
    """Bisects the decay to two numbers, 1e-8 apart, of which one sums the shell and the other does not."""
    x = TwoAtomsAtTheEdge(tol, dtype)
    low, high = 0.6, 3.0
    outcomes = set()
    for _ in range(28):
        decay = float(torch.tensor((low + high) / 2, dtype=dtype))
        found, exact = x.results(decay, "cpu", dtype), x.results(decay, "reference", torch.float64)
        for one, other in zip(found, exact, strict=True):
            assert (one - other).abs().max() < 20 * tol + 300 * torch.finfo(dtype).eps, f"decay {decay}"
        summed = bool(found[1][2] != 0)
        outcomes.add(summed)
        low, high = (decay, high) if summed else (low, decay)
    assert outcomes == {True, False}


def test_a_slot_just_out_of_reach_is_not_summed():
    """As it was found: y = 5.4e15 in the place of 2.47."""
    positions = torch.tensor([[0.0, 0, 0], [0, 5, 0], [5.4, 0, 0], [0, 0, 5.4025]]) + 10
    lattice, ptr = 30 * torch.eye(3)[None], torch.tensor([0, 4])
    images = cf.build_images(positions, lattice, ptr, decay_min=0.5, tol=0.05, logit_range=80)
    q = torch.tensor([1.0, 0, 0, 0])[:, None, None]
    k = math.log(2) * torch.tensor([60.0, 100, 99, 99])[:, None, None]
    for decay in torch.linspace(1.12, 1.13, 6).tolist():
        y = [
            cf.periodic_attention(
                q, k, torch.ones(4, 1, 1), torch.full((4, 1), decay), positions, lattice, images,
                torch.ones(1, 1, 64), cf.RadialBasis(), backend=backend,
            )
            for backend in ("cpu", "reference")
        ]  # fmt: skip
        torch.testing.assert_close(*y, rtol=0.01, atol=0.0)


@pytest.mark.parametrize("tol", [0.0, 1e-4, 1e-2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("op", ["attention", "encoding"])
def test_forces_between_atoms_that_almost_coincide(op, dtype, tol):
    """An atom's image of itself, at d = 0, is no member of the shell of another atom's, whose force has a direction."""
    by_pair = op == "encoding"
    x = problem(kinds=(("cubic", 2),), heads=3, num_basis=20).to(dtype)
    apart = torch.tensor([[0.0, 0, 0], [0.6, 0, -0.8]], dtype=torch.float64)
    images = cf.build_images(1e-2 * apart, x.lattice.double(), x.ptr, decay_min=0.5, every_pair=by_pair)
    packed, settings = images.packed(), x.settings._replace(tol=tol)
    pairs = (images.num_pairs,) if by_pair else ()

    def forces(backend, distance, dtype):
        geometry = (apart.to(x.q) * distance, x.lattice)
        inputs = (x.decay, x.edge_weight, *geometry) if by_pair else (*x.op_inputs[:5], *geometry)
        inputs = tuple(t.to(dtype) for t in inputs)
        layout = torch.ops.crystalformer.cpu_layout(*inputs[-2:], packed, x.basis.num, settings, by_pair, False)
        arguments = (*inputs, packed, layout, *pairs, settings)
        run, backward = (getattr(torch.ops.crystalformer, f"{backend}_{op}{end}") for end in ("", "_backward"))
        outputs = run(*arguments)
        grads = [torch.cos(torch.arange(y.numel()).to(y)).view_as(y) for y in outputs[:2]]
        return backward(*grads, *arguments, *outputs, True)[-2:]

    bound = 10 * tol + (1e-5 if dtype == torch.float32 else 1e-12)
    scale = max(float(grad.abs().max()) for grad in forces("reference", 1e-2, torch.float64))
    for distance in (0.0, 1e-16, 3e-15, 1e-14, 1e-10, 1e-7, 1e-6, 3e-6, 1e-5, 1e-4, 1e-3, 1e-2):
        found, wanted = forces("cpu", distance, dtype), forces("reference", distance, torch.float64)
        for one, other in zip(found, wanted, strict=True):
            assert (one - other).abs().max() < bound * scale, f"{distance} Å"
