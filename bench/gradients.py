"""Errors of every output and gradient of every backend against fp64, on real crystals: `gradients`.

The truth is bench/truth.py: the equations in fp64, plain PyTorch and autograd, over lists that leave out 1e-14. Its own
gradients are held against central differences. Errors are the largest of a result over its largest value. fp64 runs on
lists for tol 1e-13, fp32 on those of the paper's model, tol 1e-6. `bits` counts the runs that gave other bits than the
first one: a race. On a GPU they are counted on mp128, too, which keeps all of it busy. Exit code 1 if any is more than
its bound.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import crystalformer as cf

from . import truth
from .cases import (
    GEOMETRY,
    RECIPROCAL,
    WEIGHTS,
    Absent,
    Results,
    library_attention,
    library_reciprocal,
    relative_error,
    require_backend,
    upstream_like,
)
from .problems import CERTIFICATE, Problem, make

COLUMNS = ("op", "problem", "backend", "dtype", "precision", "result", "error", "bound", "ok", "note")
BOUNDS = {("fp64", "exact"): 1e-10, ("fp32", "exact"): 2e-5, ("fp32", "tf32"): 5e-3}
DIFFERENCES_BOUND, STEP = 1e-6, 1e-4
BUSY = "mp128"
TRUTH_TOL, FP64_TOL = 1e-14, 1e-13

Function = Callable[..., Tensor | tuple[Tensor | None, ...]]


def _inputs(x: Problem, op: str) -> dict[str, Tensor]:
    names = {"attention": (*WEIGHTS, *GEOMETRY), "encoding": ("decay", "weight", *GEOMETRY)}
    names["reciprocal"] = (*RECIPROCAL, *GEOMETRY)
    return {name: value for name in names[op] if (value := x.inputs[name]) is not None}


def results(x: Problem, function: Function, inputs: Mapping[str, Tensor]) -> Results:
    """Outputs and gradients of a function of the inputs."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    found = function(**leaves)
    outputs = [y for y in ((found,) if isinstance(found, Tensor) else found) if y is not None]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream_like(x, outputs))
    names = ("y",) if len(outputs) == 1 else ("alpha", "beta")
    made = {name: y.detach() for name, y in zip(names, outputs, strict=True)}
    return made | {f"d {name}": g for name, g in zip(leaves, gradients, strict=True)}


def _truth(x: Problem, op: str) -> Function:
    """The function of bench/truth.py on the converged list of a problem."""
    batch = x.crystals
    if op == "reciprocal":
        return lambda **inputs: truth.reciprocal(batch.ptr, **inputs)
    certificate = CERTIFICATE | {"tol": TRUTH_TOL}
    found = cf.build_images(batch.positions, batch.lattice, batch.ptr, **certificate, every_pair=op == "encoding")
    images = truth.Images.of(found)
    if op == "encoding":
        return lambda **inputs: truth.encoding(images, x.size.basis, batch.ptr, **inputs)
    return lambda **inputs: truth.attention(images, x.size.basis, **inputs)


def _library(x: Problem, op: str, backend: str, dtype: str, device: torch.device, **options: str) -> Function:
    """The library's function of a problem, from and to `device`."""
    batch, basis = x.crystals, x.size.basis
    if op == "reciprocal":
        return lambda **inputs: cf.reciprocal_attention(
            **inputs,
            ptr=batch.ptr.to(device),
            tol=FP64_TOL if dtype == "fp64" else 1e-6,
            backend=backend,
        )
    certificate = CERTIFICATE | ({"tol": FP64_TOL} if dtype == "fp64" else {})
    images = cf.build_images(batch.positions, batch.lattice, batch.ptr, **certificate, every_pair=op == "encoding")
    settings: dict[str, Any] = {"images": images.to(device), "basis": basis, "backend": backend, **options}
    run = cf.periodic_encoding if op == "encoding" else cf.periodic_attention
    return lambda weight=None, **inputs: run(**inputs, edge_weight=weight, **settings)


def variants(device: torch.device) -> Iterator[tuple[str, str, str]]:
    """Backend, dtype and precision of each combination there is."""
    for backend in ("reference", "cpu", "triton"):
        for dtype in ("fp64", "fp32"):
            if backend != "triton":
                yield backend, dtype, "exact"
            elif dtype == "fp32":
                yield backend, dtype, "exact"
                yield backend, dtype, "tf32"


def measure(
    problem: str = "w32", size: str = "paper", device: str = "cpu", repeat: int = 20, smoke: bool = False
) -> Iterator[dict[str, Any]]:
    """Rows of COLUMNS, printed as they come."""
    x = make(problem, size, torch.float64, "cpu", smoke)
    print(f"{problem}: {x.crystals.num_crystals} crystals, {x.crystals.num_atoms} atoms, {x.images.num_images} images")
    for op in ("attention", "encoding", "reciprocal"):
        inputs = _inputs(x, op)
        exact_function = _truth(x, op)
        exact = results(x, exact_function, inputs)
        about = {"op": op, "problem": problem}
        yield from _rows(
            about | {"backend": "differences", "dtype": "fp64", "precision": "exact"},
            _differences(x, exact_function, inputs, exact),
            DIFFERENCES_BOUND,
        )
        for backend, dtype, precision in variants(torch.device(device)):
            said = about | {"backend": backend, "dtype": dtype, "precision": precision}
            try:
                errors = _errors(x, op, backend, dtype, precision, torch.device(device), inputs, exact, repeat)
            except Absent as reason:
                row = said | {"note": f"absent: {str(reason).splitlines()[0]}"}
            except Exception as error:
                row = said | {"note": f"failed: {type(error).__name__}: {error}".splitlines()[0], "ok": False}
            else:
                yield from _rows(said, errors, BOUNDS[dtype, precision])
                continue
            print(f"  {op:10} {backend:11} {dtype} {precision:5} {row['note']}")
            yield row
    if torch.device(device).type == "cuda":
        busy = make(BUSY, size, torch.float32, device, smoke)
        for op, library in (("attention", library_attention), ("reciprocal", library_reciprocal)):
            said = {"op": op, "problem": BUSY, "backend": "triton", "dtype": "fp32", "precision": "exact"}
            yield from _rows(said, {"bits": _races(busy, library(busy, "triton"), _inputs(busy, op), repeat)}, 0.0)


def _races(x: Problem, function: Function, inputs: Mapping[str, Tensor], repeat: int) -> int:
    """How many of `repeat` runs on the GPU give other bits than the first."""
    first = results(x, function, inputs)
    again = (results(x, function, inputs) for _ in range(repeat))
    return sum(not all(torch.equal(y[name], first[name]) for name in first) for y in again)


def _errors(
    x: Problem,
    op: str,
    backend: str,
    dtype: str,
    precision: str,
    device: torch.device,
    inputs: Mapping[str, Tensor],
    exact: Results,
    repeat: int,
) -> dict[str, float]:
    require_backend(backend)
    options = {}
    if precision == "tf32":
        run = {"attention": cf.periodic_attention, "encoding": cf.periodic_encoding}.get(op, cf.reciprocal_attention)
        if "precision" not in inspect.signature(run).parameters:
            raise Absent(f"{run.__name__} has no argument 'precision'")
        options["precision"] = "tf32"
    where = torch.device("cpu") if backend == "cpu" else device
    number = torch.float64 if dtype == "fp64" else torch.float32
    function = _library(x, op, backend, dtype, where, **options)
    moved = {name: value.to(where, number) for name, value in inputs.items()}
    there = Problem(x.name, x.size_name, x.crystals, x.images, {}, x.upstream.to(where, number))
    found = results(there, function, moved)
    errors = {name: relative_error(value.cpu(), exact[name]) for name, value in found.items()}
    if backend != "reference":
        again = (results(there, function, moved) for _ in range(repeat))
        errors["bits"] = sum(not all(torch.equal(y[name], found[name]) for name in found) for y in again)
    return errors


def _differences(x: Problem, function: Function, inputs: Mapping[str, Tensor], exact: Results) -> dict[str, float]:
    """Errors of the truth's gradients: of the central difference along each of them."""
    errors = {}
    for name, value in inputs.items():
        gradient = exact[f"d {name}"]
        direction = gradient / gradient.norm()

        def objective(step: float, name: str = name, value: Tensor = value, direction: Tensor = direction) -> Tensor:
            with torch.no_grad():
                found = function(**{**inputs, name: value + step * direction})
            outputs = [y for y in ((found,) if isinstance(found, Tensor) else found) if y is not None]
            return sum((y * g).sum() for y, g in zip(outputs, upstream_like(x, outputs), strict=True))

        slope = (objective(STEP) - objective(-STEP)) / (2 * STEP)
        errors[f"d {name}"] = float((slope / gradient.norm() - 1).abs())
    return errors


def _rows(about: dict[str, str], errors: Mapping[str, float], bound: float) -> Iterator[dict[str, Any]]:
    title = f"  {about['op']:10} {about['backend']:11} {about['dtype']} {about['precision']:5} < {bound:.0e} "
    print(title + "  ".join(f"{name} {error:.0e}" if name != "bits" else f"{error} runs differ" for name, error in
          errors.items()), flush=True)  # fmt: skip
    for name, error in errors.items():
        limit = 0 if name == "bits" else bound
        yield about | {"result": name, "error": float(error), "bound": float(limit), "ok": error <= limit}
