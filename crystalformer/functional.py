"""The public functions: checked arguments, then one op of the chosen backend."""

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import checks
from .backends import choose_backend
from .basis import RadialBasis
from .images import ImageList
from .layouts import layout as make_layout
from .two_spaces import cheaper_alpha
from .wave_vectors import WaveVectors, build_wave_vectors

HALF = (torch.bfloat16, torch.float16)
Precision = Literal["exact", "tf32"]


@overload
def periodic_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    positions: Tensor,
    lattice: Tensor,
    images: ImageList,
    edge_weight: Tensor | None = ...,
    basis: RadialBasis | None = ...,
    backend: str = ...,
    return_lse: Literal[False] = ...,
    precision: Precision = ...,
) -> Tensor: ...
@overload
def periodic_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    positions: Tensor,
    lattice: Tensor,
    images: ImageList,
    edge_weight: Tensor | None = ...,
    basis: RadialBasis | None = ...,
    backend: str = ...,
    *,
    return_lse: Literal[True],
    precision: Precision = ...,
) -> tuple[Tensor, Tensor]: ...
def periodic_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    positions: Tensor,
    lattice: Tensor,
    images: ImageList,
    edge_weight: Tensor | None = None,
    basis: RadialBasis | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    precision: Precision = "exact",
) -> Tensor | tuple[Tensor, Tensor]:
    """Infinitely connected attention: every atom attends to every periodic image of every atom of its crystal.

        s_e = q_i·k_j / sqrt(D) - a_i d_e²        e = (i, j, n), d_e = |p_j + n·L - p_i|
        y_i = sum_e softmax_e(s_e) ( v_j + W b(d_e) )

    Equations (2) to (5) of docs/math.md (Taniai et al., ICLR 2024). Nothing of the size of the
    image list times the heads is stored. Differentiable in all floating-point arguments, any number of times, by
    torch.autograd (backward, grad; not by forward-mode derivatives or torch.func transforms). Besides what the list
    leaves out, a kernel may leave out as much again, `images.tol`; where positions or lattice are differentiated it
    does not, so that the energy has no steps.

    Args:
        q, k: (N,H,D) queries and keys.
        v: (N,H,Dv) values.
        decay: (N,H), Å^-2, at least the `decay_min` that images were built for. The paper's 1/(2 sigma_i²).
        positions: (N,3), Cartesian, Å.
        lattice: (C,3,3), rows are the lattice vectors, Å.
        images: from `build_images`, for the same N and C.
        edge_weight: (H,Dv,K), W, or None for the paper's simplified model, without the value encoding.
        basis: b, with `basis.num` = K; needed with edge_weight.
        backend: "auto", "triton", "cpu" or "reference"; see `available_backends`.
        return_lse: also return log sum_e exp(s_e), differentiable too.
        precision: "exact", or "tf32" to allow tf32 products with the basis: faster with triton, with relative errors
            of about 2e-4 in y and 1e-3 in gradients. Backends without tf32 compute exactly.

    All tensors have one device and one dtype, fp32 or fp64. Beside fp32, q, k and v may be bf16 or fp16, as they are
    under autocast: their products are summed in fp32, and y and the gradients of q, k and v rounded once, at the end.

    Returns:
        y (N,H,Dv), of v's dtype, or y and lse (N,H), of decay's.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
        RuntimeError: for a backend that is not available, with the reason.
    """
    known: dict[str, int] = {}
    checks.check_tensor("q", q, "N H D", known)
    checks.check_dtype("q", q, torch.float32, torch.float64, *HALF)
    checks.check_tensor("k", k, "N H D", known, like=q)
    checks.check_tensor("v", v, "N H Dv", known, like=q)
    like = q
    if q.dtype in HALF:
        checks.check_tensor("decay", decay, "N H", known)
        checks.check_dtype("decay", decay, torch.float32)
        like = q.new_empty(0, dtype=torch.float32)
    _check_atoms("decay", decay, positions, lattice, known, like)
    _check_images(images, decay, known)
    weight, numbers = _check_value_encoding(edge_weight, basis, known, decay)
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.check_finite(name, x)
    _refuse_forward_mode(q, k, v, decay, positions, lattice, edge_weight)
    backend = choose_backend(backend, positions.device, "attention", positions.dtype)
    run, lists, settings = _op("attention", backend, images, positions, lattice, weight.shape[2], numbers, precision)
    dtype = v.dtype
    if backend != "triton":  # the only one that reads half precision
        q, k, v = (x.to(decay.dtype) for x in (q, k, v))
    y, lse, _ = run(q, k, v, decay, weight, positions, lattice, *lists, *settings)
    y = y.to(dtype)
    return (y, lse) if return_lse else y


def periodic_encoding(
    decay: Tensor,
    positions: Tensor,
    lattice: Tensor,
    images: ImageList,
    edge_weight: Tensor | None = None,
    basis: RadialBasis | None = None,
    backend: str = "auto",
    precision: Precision = "exact",
) -> tuple[Tensor, Tensor | None]:
    """The paper's periodic spatial and value encodings of every pair of atoms, to use in an attention of your own.

        alpha_ij = log sum_n exp(-a_i d_ijn²)
        beta_ij  = W sum_n [ exp(-a_i d_ijn²) / exp(alpha_ij) ] b(d_ijn)
        y_i      = softmax_j( q_i·k_j / sqrt(D) + alpha_ij ) · ( v_j + beta_ij )

    The last line gives what `periodic_attention` gives. Equations (6) and (7) of docs/math.md (Taniai et al., ICLR
    2024).

    Args:
        decay: (N,H), Å^-2, at least the `decay_min` that images were built for.
        positions, lattice, edge_weight, basis, backend, precision: as for `periodic_attention`.
        images: from `build_images` with every_pair=True, so that each pair's own sum is within `tol`. With
            reciprocal=True too, alpha without edge_weight is summed in the cheaper of the two spaces; for the sum over
            wave vectors "triton" takes the reference's matrix products.

    Returns:
        alpha (P,H) and beta (P,H,Dv), or None in its place without edge_weight. P = sum_c n_c² pairs, crystal by
        crystal, row-major: pair (i, j) of a crystal that starts at pair p and has n atoms is p + n i + j.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
        RuntimeError: for a backend that is not available, with the reason.
    """
    known: dict[str, int] = {}
    checks.check_tensor("decay", decay, "N H", known)
    checks.check_dtype("decay", decay, torch.float32, torch.float64)
    _check_atoms("decay", decay, positions, lattice, known, like=decay)
    _check_images(images, decay, known, reciprocal=edge_weight is None)
    if not images.every_pair:
        raise ValueError("images must be built with every_pair=True for periodic_encoding, not with every_pair=False")
    weight, numbers = _check_value_encoding(edge_weight, basis, known, decay)
    _refuse_forward_mode(decay, positions, lattice, edge_weight)
    backend = choose_backend(backend, positions.device, "encoding", positions.dtype)

    def real(decay: Tensor) -> tuple[Tensor, Tensor]:
        run, lists, settings = _op("encoding", backend, images, positions, lattice, weight.shape[2], numbers, precision)
        return run(decay, weight, positions, lattice, *lists, images.num_pairs, *settings)

    if edge_weight is None and images.crossover is not None:
        checks.check_geometry(positions, lattice)
        spectral = backend if backend != "triton" else "reference"
        return cheaper_alpha(decay, positions, lattice, images, spectral, lambda a: real(a)[0]), None
    alpha, beta = real(decay)
    return alpha, None if edge_weight is None else beta


def reciprocal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay_reciprocal: Tensor,
    positions: Tensor,
    lattice: Tensor,
    ptr: Tensor,
    tol: float = 1e-6,
    backend: str = "auto",
    decay_min: float | None = None,
    wave_vectors: WaveVectors | None = None,
) -> Tensor:
    """Attention whose weight decays with the wave vector, not with the distance: it sees the long range.

        alpha_ij = log max( sum_G exp(-c_i |G|²) cos(G·r_ij), 1e-6 ) + 1.5 log(4 pi c_i) - log V
        y_i      = softmax_j( q_i·k_j / sqrt(D) + alpha_ij ) v_j

    G runs over the reciprocal lattice, V = |det L|. Equation (13) of docs/math.md (Taniai et al., ICLR 2024, appendix).
    The clamp is the paper's; the gradient of a clamped pair is zero. No transcendental is computed for a pair of
    atoms, and nothing of the size of the pairs times the vectors is stored. Differentiable as `periodic_attention`.

    Args:
        q, k: (N,H,D).  v: (N,H,Dv).
        decay_reciprocal: (N,H), c > 0, Å².
        positions: (N,3), Cartesian, Å.  lattice: (C,3,3), Å, either handedness.
        ptr: (C+1) int64, the first atom of each crystal and, last, N.
        tol: how much of the sum over G may be left out, absolutely; its G = 0 term is 1.
        backend: "auto", "triton", "cpu" or "reference"; see `available_backends`. Cells of more than some 1,300 atoms
            have the reference's matrix products in the place of "triton".
        decay_min: smallest c that the choice of G must serve, Å². Default: the smallest in decay_reciprocal, which
            costs a GPU synchronisation and lets the choice vary with the data.
        wave_vectors: the G, from `build_wave_vectors` for these crystals, made once for many calls; tol and decay_min
            are then those that it was made for.

    Returns:
        y (N,H,Dv).

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
        RuntimeError: for a backend that is not available, with the reason.
    """
    known: dict[str, int] = {}
    checks.check_tensor("q", q, "N H D", known)
    checks.check_dtype("q", q, torch.float32, torch.float64)
    checks.check_tensor("k", k, "N H D", known, like=q)
    checks.check_tensor("v", v, "N H Dv", known, like=q)
    checks.check_ptr("ptr", ptr, known["N"])
    known["C"] = len(ptr) - 1
    _check_atoms("decay_reciprocal", decay_reciprocal, positions, lattice, known, like=q)
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.check_finite(name, x)
    checks.check_geometry(positions, lattice)
    tol = checks.check_number("tol", tol, high=1.0)
    if decay_min is not None:
        decay_min = checks.check_number("decay_min", decay_min)
    _refuse_forward_mode(q, k, v, decay_reciprocal, positions, lattice)
    backend = choose_backend(backend, q.device, "reciprocal", q.dtype)
    if wave_vectors is None:
        if torch.compiler.is_compiling():
            raise ValueError("wave_vectors must be built before compiling: build_wave_vectors(lattice, ptr)")
        if decay_min is None:
            decay_min = float(decay_reciprocal.detach().min()) if known["N"] else 1.0
        wave_vectors = build_wave_vectors(lattice, ptr, decay_min, tol)
    else:
        _check_wave_vectors(wave_vectors, ptr, decay_reciprocal)
    lists = (ptr, wave_vectors.g_ptr, wave_vectors.g, wave_vectors.max_atoms, wave_vectors.max_vectors)
    run = getattr(torch.ops.crystalformer, f"{backend}_reciprocal")
    return run(q, k, v, decay_reciprocal, positions, lattice, *lists)


def _op(
    name: str,
    backend: str,
    images: ImageList,
    positions: Tensor,
    lattice: Tensor,
    num: int,
    basis: tuple[float, ...],
    precision: Precision,
) -> tuple[Any, tuple[Tensor, ...], tuple[Any, ...]]:
    """A backend's op, the list as the op takes it, and its settings: basis, tol and tf32."""
    if precision not in ("exact", "tf32"):
        raise ValueError(f"precision must be 'exact' or 'tf32', not {precision!r}")
    # An image left out as the atoms move would be a step in the energy, so then only rounding may leave any out.
    moving = positions.requires_grad or lattice.requires_grad
    tol = 0.0 if moving else images.tol or 0.0
    layout = make_layout(backend, images, positions, lattice, num, basis, tol, name == "encoding", merge=not moving)
    run = getattr(torch.ops.crystalformer, f"{backend}_{name}")
    return run, (images.ptr, images.row_ptr, images.col, images.shift, layout), (basis, tol, precision == "tf32")


def _refuse_forward_mode(*inputs: Tensor | None) -> None:
    """torch.library has no forward-mode formulas: without this the tangents would be dropped without a word."""
    if torch.compiler.is_compiling():
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise NotImplementedError("forward-mode derivatives (jvp, jacfwd) must be taken with torch.autograd instead")


def _check_atoms(
    name: str, decay: Tensor, positions: Tensor, lattice: Tensor, known: dict[str, int], like: Tensor
) -> None:
    checks.check_tensor(name, decay, "N H", known, like=like)
    checks.check_tensor("positions", positions, "N 3", known, like=like)
    checks.check_tensor("lattice", lattice, "C 3 3", known, like=like)
    checks.check_positive(name, decay)


def _check_images(images: ImageList, decay: Tensor, known: dict[str, int], reciprocal: bool = False) -> None:
    """Checks the list; `reciprocal`: its wave vectors serve, too."""
    if not isinstance(images, ImageList):
        raise TypeError(f"images must be an ImageList, from build_images, not {type(images).__name__}")
    if (images.num_atoms, images.num_crystals) != (known["N"], known["C"]):
        raise ValueError(
            f"images must be of {known['N']} atoms in {known['C']} crystals, as positions and lattice, "
            f"not of {images.num_atoms} atoms in {images.num_crystals} crystals"
        )
    if images.device != decay.device:
        raise ValueError(f"images must be on {decay.device}, as the other arguments, not on {images.device}")
    if images.decay_min is not None and checks.values_visible(decay):
        decay_min = images.decay_min if reciprocal else images.real_decay_min
        assert decay_min is not None
        _check_smallest("decay", decay, decay_min, "images")


def _check_wave_vectors(waves: WaveVectors, ptr: Tensor, decay: Tensor) -> None:
    if not isinstance(waves, WaveVectors):
        raise TypeError(f"wave_vectors must be WaveVectors, from build_wave_vectors, not {type(waves).__name__}")
    if waves.device != decay.device:
        raise ValueError(f"wave_vectors must be on {decay.device}, as the other arguments, not on {waves.device}")
    same = waves.ptr.shape == ptr.shape
    if not same or (checks.values_visible(ptr) and not torch.equal(waves.ptr, ptr)):
        raise ValueError(f"wave_vectors must be of the crystals of ptr, {ptr.tolist()}, not of {waves.ptr.tolist()}")
    _check_smallest("decay_reciprocal", decay, waves.decay_min, "wave_vectors")


def _check_smallest(name: str, decay: Tensor, decay_min: float, built: str) -> None:
    """Decays below those that a list is certified for would be summed too short."""
    if not checks.values_visible(decay) or not decay.numel():
        return
    smallest = float(decay.detach().min())
    if smallest < decay_min * (1 - 1e-6):  # a model's decay at its bound, in fp32
        raise ValueError(
            f"{name} must be at least {decay_min:g}, the decay_min that {built} were built for, "
            f"but its smallest value is {smallest:g}"
        )


def _check_value_encoding(
    edge_weight: Tensor | None, basis: RadialBasis | None, known: dict[str, int], like: Tensor
) -> tuple[Tensor, tuple[float, ...]]:
    """The weight and the basis as the op takes them: of no functions and no numbers without an edge_weight."""
    if edge_weight is None:
        return like.new_empty(known["H"], known.get("Dv", 0), 0), ()
    if not isinstance(basis, RadialBasis):
        raise TypeError(f"basis must be a RadialBasis when edge_weight is given, not {type(basis).__name__}")
    known["K"] = basis.num
    checks.check_tensor("edge_weight", edge_weight, "H Dv K", known, like=like)
    checks.check_finite("edge_weight", edge_weight)
    return edge_weight, (float(basis.r_max), float(basis.width))
