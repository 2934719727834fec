"""What a provider has ready to run on a problem, and the errors of its results against fp64.

An operation is a function of the problem's inputs; a `Case` holds the calls that are timed, by direction, and the
results that are checked before any of them is.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

import crystalformer as cf

from . import truth as equations
from .problems import Problem

Results = dict[str, Tensor]
# What is differentiated besides positions and lattice, in real and in reciprocal space.
WEIGHTS = ("q", "k", "v", "decay", "weight")
RECIPROCAL = ("q", "k", "v", "decay_reciprocal")
GEOMETRY = ("positions", "lattice")
# The truth leaves out no more than this of an atom's weight.
TRUTH_TOL = 1e-10


class Absent(Exception):
    """A provider that cannot do a problem here; the message says why."""


@dataclass(frozen=True)
class Case:
    """Calls by direction; the results to check; and what they must be, if not the truth of the problem."""

    calls: dict[str, Callable[[], object]]
    results: Callable[[], Results]
    truth: Callable[[], Results] | None = None
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Provider:
    """One way to compute an operation.

    Attributes:
        op: "attention", "encoding", "alpha", "reciprocal", "images" or "training".
        bound: largest error of any result, relative to the largest value of that result; more is not timed.
        prepare: makes the case of a problem, or raises Absent.
        graph: time the replay of a CUDA graph.
        instructions: by direction, that a warp issues for a shell of a problem of the paper's size, as compiled.
    """

    name: str
    op: str
    bound: float
    prepare: Callable[[Problem], Case]
    graph: bool = False
    instructions: Mapping[str, float] = field(default_factory=dict)

    @property
    def replays(self) -> int:
        """How many are timed together, for their mean: to start a graph takes as long as a small one."""
        return 20 if self.graph else 1


def function_case(
    x: Problem,
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    names: Sequence[str],
    outputs: Sequence[str],
    geometry: bool = False,
    backward: bool = True,
) -> Case:
    """The case of a differentiable function of some inputs of a problem.

    Args:
        function: of the inputs `names` as keywords.
        outputs: names of its results.
        geometry: whether it can be differentiated in positions and lattice; backward: whether at all.
    """
    names = [name for name in names if x.inputs[name] is not None]

    def run(wanted: Sequence[str]) -> Results:
        inputs = {name: x.inputs[name].detach().requires_grad_(name in wanted) for name in names}
        y = function(**inputs)
        y = (y,) if isinstance(y, Tensor) else y
        results = {name: t.detach()[: x.checked] for name, t in zip(outputs, y, strict=False) if t is not None}
        if wanted:
            made = [t for t in y if t is not None]
            gradients = torch.autograd.grad(made, [inputs[name] for name in wanted], upstream_like(x, made))
            results |= {f"d {name}": g for name, g in zip(wanted, gradients, strict=True)}
        return results

    weights = [name for name in names if name not in GEOMETRY]
    calls: dict[str, Callable[[], object]] = {"forward": lambda: run([])}
    if backward:
        calls["forward and backward"] = lambda: run(weights)
    if geometry:
        calls["with positions and lattice"] = lambda: run([*weights, *GEOMETRY])
    last = list(calls)[-1]
    return Case(calls, calls[last])


def upstream_like(x: Problem, outputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients for the outputs: the problem's own for y, seeded ones for others."""
    return [x.upstream if y.shape == x.upstream.shape else _seeded(y.shape, y.dtype, y.device) for y in outputs]


@functools.lru_cache(maxsize=4)
def _seeded(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Made once: it would be timed."""
    rng = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=rng, dtype=torch.float64).to(device, dtype)


def attention_case(x: Problem, attend: Callable[..., Tensor], geometry: bool = False, backward: bool = True) -> Case:
    """The case of attend(q, k, v, decay, weight, positions, lattice) -> y; the last two to be ignored if the provider
    has made its distances beforehand."""
    return function_case(x, attend, (*WEIGHTS, *GEOMETRY), ("y",), geometry, backward)


def reciprocal_case(x: Problem, attend: Callable[..., Tensor], geometry: bool = False) -> Case:
    """The case of attend(q, k, v, decay_reciprocal, positions, lattice) -> y."""
    return function_case(x, attend, (*RECIPROCAL, *GEOMETRY), ("y",), geometry)


def encoding_case(x: Problem, encode: Callable[..., tuple[Tensor, ...]], geometry: bool = False) -> Case:
    """The case of encode(decay, weight, positions, lattice) -> (alpha, beta or None)."""
    return function_case(x, encode, ("decay", "weight", *GEOMETRY), ("alpha", "beta"), geometry)


def training_case(
    model: torch.nn.Module, forward: Callable[[], Tensor], truth: Callable[[], Results] | None = None
) -> Case:
    """Forward, backward and AdamW of a model, and its output and gradients."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)

    def step() -> None:
        optimizer.zero_grad()
        forward().abs().mean().backward()
        optimizer.step()

    def inference() -> None:
        with torch.no_grad():
            forward()

    return Case({"forward": inference, "step": step}, lambda: model_results(model, forward), truth)


def model_results(model: torch.nn.Module, forward: Callable[[], Tensor]) -> Results:
    """The output, and the gradient of its mean absolute value."""
    model.zero_grad()
    y = forward()
    y.abs().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": y.detach()} | by_layer(gradients)


def by_layer(gradients: dict[str, Tensor]) -> Results:
    """The gradients of each layer of our model as one vector: some weights alone, as the bias of k, have none."""
    layers: dict[str, list[Tensor]] = {}
    for name, gradient in gradients.items():
        layers.setdefault(".".join(name.split(".")[:3]).removesuffix(".weight"), []).append(gradient.detach().flatten())
    return {f"d {name}": torch.cat(parts) for name, parts in layers.items()}


def seeded_model(x: Problem, dtype: torch.dtype, backend: str = "auto", domain: str = "real") -> cf.Crystalformer:
    """The model of the problem's size, calibrated on it: the same numbers for every provider."""
    served = cf.Crystalformer(replace(x.size.config, domain=domain), backend).double()
    served.load_state_dict(_calibrated(x, domain))
    return served.to(x.device, dtype)


@functools.lru_cache(maxsize=2)
def _calibrated(x: Problem, domain: str) -> dict[str, Tensor]:
    """Its weights and scales, made once a problem: in fp64 they take seconds."""
    torch.manual_seed(0)
    model = cf.Crystalformer(replace(x.size.config, domain=domain), backend="reference").double()
    model.calibrate(x.crystals.to(torch.float64).to(torch.device("cpu")))
    return model.state_dict()


def truth(x: Problem, op: str, domain: str = "real") -> Results:
    """Results of the fp64 reference, with a list that leaves out next to nothing.

    Args:
        domain: of the model, for "training".

    Raises:
        Absent: for cells so big that only their attention has a truth.
    """
    if x.checked is not None and op != "attention":
        raise Absent("has no truth for so big a cell")
    exact = exact_problem(x)
    crystals = exact.crystals
    if x.checked is not None:
        return _truth_of_checked(exact)
    if op == "training":
        crystals.images = exact.images
        model = seeded_model(x, torch.float64, "reference", domain)
        return model_results(model, lambda: model(crystals))
    if op == "reciprocal":
        return reciprocal_case(exact, functools.partial(equations.reciprocal, crystals.ptr), geometry=True).results()
    if op == "encoding":
        return encoding_case(exact, library_encoding(exact, "reference"), geometry=True).results()
    return attention_case(exact, library_attention(exact, "reference"), geometry=True).results()


def exact_problem(x: Problem) -> Problem:
    """The problem in fp64, with a list that leaves out next to nothing."""
    crystals = x.crystals.to(torch.float64)
    return Problem(
        x.name,
        x.size_name,
        crystals,
        cf.build_images(crystals.positions, crystals.lattice, crystals.ptr, tol=TRUTH_TOL),
        {name: value if value is None else value.double() for name, value in x.inputs.items()},
        x.upstream.double(),
        x.checked,
    )


def _truth_of_checked(exact: Problem) -> Results:
    """The attention of the atoms that are checked, from their images alone."""
    assert exact.checked is not None
    images = equations.Images.of(exact.images).of_rows(exact.checked)
    attend = functools.partial(equations.attention, images, exact.size.basis)
    return attention_case(exact, attend, geometry=True).results()


def library_attention(x: Problem, backend: str, **options: str) -> Callable[..., Tensor]:
    """`periodic_attention` on a problem's images."""

    def attend(weight: Tensor | None = None, **inputs: Tensor) -> Tensor:
        arguments = {"images": x.images, "edge_weight": weight, "basis": x.size.basis, "backend": backend}
        return cf.periodic_attention(**inputs, **arguments, **options)

    return attend


def library_encoding(x: Problem, backend: str) -> Callable[..., tuple[Tensor, ...]]:
    """`periodic_encoding` on a problem's images."""

    def encode(weight: Tensor | None = None, **inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        arguments = {"images": x.pair_images, "edge_weight": weight, "basis": x.size.basis, "backend": backend}
        return cf.periodic_encoding(**inputs, **arguments)

    return encode


def library_reciprocal(x: Problem, backend: str) -> Callable[..., Tensor]:
    """`reciprocal_attention` on a problem's wave vectors."""
    lists = {"ptr": x.crystals.ptr, "wave_vectors": x.wave_vectors, "backend": backend}
    return lambda **inputs: cf.reciprocal_attention(**inputs, **lists)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """The largest error over the largest value; 1 for zeros, infinite for NaN."""
    error = (found.double() - exact).abs().max() / exact.abs().max()
    return float(error) if bool(error.isfinite()) else float("inf")


def require_backend(backend: str) -> None:
    """Raises Absent, in short, for a backend of the library that is not there."""
    missing = cf.available_backends()[backend]
    if missing is not True:
        raise Absent("needs an NVIDIA GPU" if str(missing).startswith("no CUDA") else missing)


def require_memory(needed: float, device: torch.device) -> None:
    """Raises Absent for a provider that would not fit.

    Args:
        needed: bytes, estimated.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps is free, too
        free = torch.cuda.mem_get_info(device)[0]
    else:
        found = [line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable")]
        free = int(found[0].split()[1]) * 1024
    if needed > 0.8 * free:
        raise Absent(f"would take about {needed / 2**30:.0f} GiB of memory")
