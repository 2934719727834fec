"""Random problems, awkward ones, cpu against the fp64 reference. `pytest tests/test_fuzz.py --fuzz-examples 5000` looks
at many new ones; without the option these are always the same few."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from crystals import KINDS
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from problems import Problem, problem
from torch import Tensor

import crystalformer as cf

if cf.available_backends()["cpu"] is not True:
    pytest.skip(cf.available_backends()["cpu"], allow_module_level=True)

EXAMPLES = 30  # in five seconds
ROUNDING, CLAMP = 4e-6, 1e-6  # of reciprocal sums in fp32 (test_rounding.py), and the paper's


@dataclass(frozen=True)
class Case:
    """One op on one problem; `geometry`: with the gradients of positions and lattice."""

    op: str
    x: Problem
    geometry: bool

    def inputs(self) -> dict[str, Tensor]:
        names = ("q", "k", "v", "decay", "positions", "lattice", "edge_weight")
        return dict(zip(names, self.x.inputs, strict=True))

    def results(self, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Outputs and gradients, by name."""
        given = {name: t.to(dtype, copy=True) for name, t in self.inputs().items()}
        unused = {"encoding": ("q", "k", "v"), "reciprocal": ("edge_weight",)}.get(self.op, ())
        fixed = () if self.geometry else ("positions", "lattice")
        leaves = {name: t.requires_grad_() for name, t in given.items() if name not in (*unused, *fixed)}
        if self.op == "attention":
            outputs = self.x.attention(*given.values(), backend=backend, return_lse=True)
        elif self.op == "encoding":
            outputs = self.x.encoding(*list(given.values())[3:], backend=backend)
        else:
            x = self.x
            outputs = (x.reciprocal(*list(given.values())[:6], backend=backend, wave_vectors=self.wave_vectors()),)
        rng = torch.Generator().manual_seed(0)
        grads = [torch.randn(y.shape, generator=rng, dtype=torch.float64).to(y) for y in outputs]
        found = torch.autograd.grad(outputs, list(leaves.values()), grads)
        return {f"output {k}": y.detach() for k, y in enumerate(outputs)} | dict(zip(leaves, found, strict=True))

    def wave_vectors(self) -> cf.WaveVectors:
        return cf.build_wave_vectors(self.x.lattice, self.x.ptr, float(self.x.decay.min()) * 0.999, self.x.images.tol)

    def cancellation(self) -> tuple[float, float]:
        """By how much the rounding of reciprocal sums moves weights, and then gradients of the sums.

        Section 7 of docs/math.md; and a sum that rounding takes over the clamp gains or loses its whole gradient.
        """
        x, waves = self.x, self.wave_vectors()
        geometry = (y.double() for y in (x.decay, x.positions, x.lattice))
        all_sums = torch.ops.crystalformer.reference_reciprocal_sum(
            *geometry, waves.packed(), waves.largest, x.images.num_pairs
        )
        rounding = ROUNDING * torch.finfo(x.q.dtype).eps / torch.finfo(torch.float32).eps
        weights, gradients = 0.0, 0.0
        sizes = x.ptr.diff().tolist()
        for q, k, sums, n in zip(
            x.q.double().split(sizes),
            x.k.double().split(sizes),
            all_sums.split([n * n for n in sizes]),
            sizes,
            strict=True,
        ):
            s = sums.view(n, n, -1)  # (i,j,H)
            own = s.diagonal(dim1=0, dim2=1).T[:, None]  # (i,1,H)
            score = torch.einsum("ihd,jhd->ijh", q, k) / math.sqrt(q.shape[2])
            favour = torch.exp(score - score.amax(1, keepdim=True))
            share = own * favour / (s.clamp(min=CLAMP) * favour).sum(1, keepdim=True)
            moved = rounding * share.sum(1)
            jump = (share * ((s - CLAMP).abs() < rounding * own)).sum(1)
            weights = max(weights, float(moved.max()))
            gradients = max(gradients, float((moved + jump).max()))
        return weights, gradients

    def bounds(self) -> dict[str, float]:
        """How large an error may be: of what may be left out, of rounding, and of rounded scores."""
        x, eps = self.x, torch.finfo(self.x.q.dtype).eps
        decay, reach = float(x.decay.max()), float(x.images.cutoff.max())
        q, k = float(x.q.abs().max()), float(x.k.abs().max())
        score = 0.0 if self.op == "encoding" else q * k * math.sqrt(x.q.shape[2])
        error = 30 * x.images.tol * (not self.geometry) + 100 * eps * (1 + score + decay * reach**2)
        slope = 2 * decay * reach + x.basis.num / x.basis.r_max / x.basis.width
        value = max(float(x.v.abs().max()), 1) * x.q.shape[1] * len(x.q)
        weights, gradients = self.cancellation() if self.op == "reciprocal" else (0.0, 0.0)
        scale = {"q": k, "k": q, "decay": reach**2, "positions": slope, "lattice": slope * reach}
        moved = {"q": weights, "k": weights} | dict.fromkeys(("decay", "positions", "lattice"), gradients)
        bounds = {name: (error + moved[name]) * value * max(size, 1.0) for name, size in scale.items()}
        return bounds | {"": (error + weights) * value}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    op = draw(st.sampled_from(["attention", "attention", "encoding", "reciprocal"]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    kinds = draw(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 4)), min_size=1, max_size=3))
    sizes = {name: draw(st.integers(1, 9)) for name in ("heads", "dim", "value_dim")}
    tol = 10.0 ** draw(st.integers(-9, -1))
    x = problem(
        kinds,
        **sizes,
        num_basis=draw(st.sampled_from([1, 2, 15, 16, 17, 40])),
        decay_min=draw(st.sampled_from([0.4, 1.0, 3.0])),
        tol=tol,
        logit_range=draw(st.sampled_from([0.0, 4.0, 30.0])),
        seed=draw(st.integers(0, 1000)),
        every_pair=op == "encoding",
    )
    x = replace(x, basis=replace(x.basis, width=draw(st.sampled_from([0.3, 1.0, 4.0]))))
    x = replace(x, q=x.q * draw(st.sampled_from([0.0, 1.0, 10.0, 100.0])))
    x = replace(x, decay=x.decay * draw(st.sampled_from([1.0, 10.0])))
    return Case(op, x.to(dtype), draw(st.booleans()))


def check(case: Case) -> None:
    found, wanted = case.results("cpu", case.x.q.dtype), case.results("reference", torch.float64)
    bounds = case.bounds()
    outputs = [name for name in wanted if name.startswith("output")]
    # Zeros would pass where a bound is larger than what it bounds, as it may be at a tol of 0.1: no such problems.
    assume(any(bounds[""] < 0.5 * float(wanted[name].abs().max()) for name in outputs))
    for name, one in found.items():
        error = float((one.double() - wanted[name]).abs().max())
        assert error <= bounds.get(name, bounds[""]), f"{case.op}, {case.x.q.dtype}: {name} is off by {error}"


@pytest.mark.usefixtures("poison_cpp")
def test_random_problems(request: pytest.FixtureRequest) -> None:
    examples = request.config.getoption("--fuzz-examples")
    how = settings(
        max_examples=examples or EXAMPLES,
        derandomize=not examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    how(given(cases())(check))()
