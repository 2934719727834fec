"""The public functions: checked arguments, then one op of the chosen backend."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..common import checks
from ..common.backends import choose_backend
from ..geometry.image_list import ImageList
from ..geometry.lattice import check_geometry
from ..geometry.wave_vectors import WaveVectors, build_wave_vectors
from .alpha import cheaper_alpha
from .argument_checks import (
    check_atoms,
    check_heads,
    check_images,
    check_precision,
    check_value_encoding,
    check_wave_vectors,
    refuse_forward_mode,
)
from .basis import RadialBasis
from .dual_space import DUAL_SPACE
from .layouts import layout as make_layout
from .ops import ATTENTION, ENCODING, RECIPROCAL, Op
from .settings import Settings

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
        images: from `build_images` for these positions and this lattice, or for ones whose distances differ by no more
            than `images.bearable`.
        edge_weight: (H,Dv,K), W, or None for the paper's simplified model, without the value encoding.
        basis: b, with `basis.num` = K; needed with edge_weight.
        backend: "auto", "triton", "cpu" or "reference"; see `available_backends`.
        return_lse: also return log sum_e exp(s_e), differentiable too.
        precision: "exact", or "tf32" to allow tf32 products with the basis: faster with triton, with relative errors
            of about 2e-4 in y and 1e-3 in gradients. Backends without tf32 compute exactly.

    Scores q_i·k_j / sqrt(D) may be of any size, but fp32 rounds them: weights of different atoms are good to about
    1e-7 times the largest score, and gradients with triton to 2e-7 times it.

    All tensors have one device and one dtype, fp32 or fp64. Beside fp32, q, k and v may be bf16 or fp16, as they are
    under autocast: their products are summed in fp32, and y and the gradients of q, k and v rounded once, at the end.

    Returns:
        y (N,H,Dv), of v's dtype, or y and lse (N,H), of decay's.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
        RuntimeError: for a backend that is not available, with the reason.
    """
    known = check_heads(q, k, v)
    check_atoms("decay", decay, positions, lattice, known, like=q)
    check_images(images, decay, known)
    weight, settings = check_value_encoding(edge_weight, basis, known, decay)
    refuse_forward_mode(q, k, v, decay, positions, lattice, edge_weight)
    backend = choose_backend(backend, positions.device, ATTENTION.name, positions.dtype)
    run, lists, settings = _op(ATTENTION, backend, images, positions, lattice, weight.shape[2], settings, precision)
    dtype = v.dtype
    q, k, v = _as_read(backend, decay, q, k, v)
    y, lse, _ = run(q, k, v, decay, weight, positions, lattice, *lists, settings)
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
    check_atoms("decay", decay, positions, lattice, known, like=decay)
    check_images(images, decay, known, reciprocal=edge_weight is None)
    if not images.every_pair:
        raise ValueError("images must be built with every_pair=True for periodic_encoding, not with every_pair=False")
    weight, settings = check_value_encoding(edge_weight, basis, known, decay)
    refuse_forward_mode(decay, positions, lattice, edge_weight)
    backend = choose_backend(backend, positions.device, ENCODING.name, positions.dtype)

    def real(decay: Tensor) -> tuple[Tensor, Tensor]:
        run, lists, told = _op(ENCODING, backend, images, positions, lattice, weight.shape[2], settings, precision)
        return run(decay, weight, positions, lattice, *lists, images.num_pairs, told)

    if edge_weight is None and images.crossover is not None:
        check_geometry(positions, lattice)
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

    In fp32 each sum over G is wrong by at most 2e-5 of its value at r = 0, in cells up to 40 Å: much for atoms far
    apart there. So content scores that differ by Λ move at most 2e-5 (1 + (n-1) exp(Λ)) of an atom's attention in a
    cell of n atoms; where scores are as large as ±50, use fp64. Section 7 of docs/math.md has the tighter bound.

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
            are then those that it was made for. Of orbits, N is their number, positions are the first atom of each,
            and there are no gradients of positions and lattice.

    The dtypes are those of `periodic_attention`.

    Returns:
        y (N,H,Dv), of v's dtype.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
        RuntimeError: for a backend that is not available, with the reason.
    """
    known = check_heads(q, k, v)
    checks.check_ptr("ptr", ptr, known["N"])
    ptr = ptr.contiguous()
    known["C"] = len(ptr) - 1
    check_atoms("decay_reciprocal", decay_reciprocal, positions, lattice, known, like=q)
    check_geometry(positions, lattice)
    tol = checks.check_number("tol", tol, high=1.0)
    if decay_min is not None:
        decay_min = checks.check_number("decay_min", decay_min)
    refuse_forward_mode(q, k, v, decay_reciprocal, positions, lattice)
    backend = choose_backend(backend, positions.device, RECIPROCAL.name, positions.dtype)
    if wave_vectors is None:
        if torch.compiler.is_compiling():
            raise ValueError("wave_vectors must be built before compiling: build_wave_vectors(lattice, ptr)")
        if decay_min is None:
            decay_min = float(decay_reciprocal.detach().min()) if known["N"] else 1.0
        wave_vectors = build_wave_vectors(lattice, ptr, decay_min, tol)
    else:
        check_wave_vectors(wave_vectors, "ptr", ptr, decay_reciprocal, positions, lattice)
    lists = (wave_vectors.packed(), wave_vectors.largest)
    run = getattr(torch.ops.crystalformer, f"{backend}_{RECIPROCAL.name}")
    y = run(*(x.to(decay_reciprocal.dtype) for x in (q, k, v)), decay_reciprocal, positions, lattice, *lists)
    return y.to(v.dtype)


def dual_space_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    decay_reciprocal: Tensor,
    positions: Tensor,
    lattice: Tensor,
    images: ImageList,
    wave_vectors: WaveVectors,
    edge_weight: Tensor | None = None,
    basis: RadialBasis | None = None,
    backend: str = "auto",
    precision: Precision = "exact",
) -> Tensor:
    """`periodic_attention` of the first heads and `reciprocal_attention` of the rest, in one call.

    The same numbers, with the same bounds in fp32, sooner: a model's block calls it once. Of H heads, H1 decay in real
    and H2 = H - H1 in reciprocal space (Taniai et al., ICLR 2024, appendix: dual space attention). Differentiable as
    the two are.

    Args:
        q, k: (N,H,D).  v: (N,H,Dv).
        decay: (N,H1), Å^-2, at least the `decay_min` that images were built for.
        decay_reciprocal: (N,H2), Å², at least the `decay_min` that wave_vectors were built for.
        positions: (N,3), Cartesian, Å.  lattice: (C,3,3), Å.
        images: from `build_images`.  wave_vectors: from `build_wave_vectors`, for the same crystals.
        edge_weight: (H1,Dv,K), W, or None.
        basis, backend, precision: as for `periodic_attention`; so are the dtypes. The heads in reciprocal space are
            always exact.

    Returns:
        y (N,H,Dv), of v's dtype.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
        RuntimeError: for a backend that is not available, with the reason.
    """
    known = check_heads(q, k, v)
    checks.check_tensor("decay", decay, "N H1", known)
    if not 0 < known["H1"] < known["H"]:
        raise ValueError(
            f"decay must have from 1 to H-1={known['H'] - 1} heads, those in real space, not {known['H1']}"
        )
    real, other = (known | {"H": heads} for heads in (known["H1"], known["H"] - known["H1"]))
    check_atoms("decay", decay, positions, lattice, real, like=q)
    check_images(images, decay, real)
    check_atoms("decay_reciprocal", decay_reciprocal, positions, lattice, other, like=q)
    check_wave_vectors(wave_vectors, "images", images.ptr, decay_reciprocal, positions, lattice)
    if wave_vectors.of_orbits != images.of_orbits:
        raise ValueError("wave_vectors must be of orbits if, and only if, images are")
    weight, settings = check_value_encoding(edge_weight, basis, real, decay)
    refuse_forward_mode(q, k, v, decay, decay_reciprocal, positions, lattice, edge_weight)
    backend = choose_backend(backend, positions.device, DUAL_SPACE.name, positions.dtype)
    run, lists, settings = _op(DUAL_SPACE, backend, images, positions, lattice, weight.shape[2], settings, precision)
    waves = (wave_vectors.packed(), wave_vectors.largest)
    dtype = v.dtype
    q, k, v = _as_read(backend, decay, q, k, v)
    y, _, _ = run(q, k, v, decay, decay_reciprocal, weight, positions, lattice, *lists, *waves, settings)
    return y.to(dtype)


def _as_read(backend: str, decay: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Of decay's dtype, but for the one backend that reads half precision."""
    return list(tensors) if backend == "triton" else [x.to(decay.dtype) for x in tensors]


def _op(
    op: Op,
    backend: str,
    images: ImageList,
    positions: Tensor,
    lattice: Tensor,
    num: int,
    settings: Settings,
    precision: Precision,
) -> tuple[Any, tuple[Tensor, Tensor], Settings]:
    """A backend's op, the list as the op takes it, and its settings."""
    check_precision(precision)
    # An image left out as the atoms move would be a step in the energy, so then only rounding may leave any out.
    moving = positions.requires_grad or lattice.requires_grad
    if moving and images.of_orbits:
        raise ValueError(
            "images must be of all atoms, from build_images, not of orbits, where positions or lattice require grad"
        )
    settings = settings._replace(
        tol=0.0 if moving else images.tol or 0.0, tf32=precision == "tf32", of_orbits=images.of_orbits
    )
    layout = make_layout(backend, images, positions, lattice, num, settings, op is ENCODING, merge=not moving)
    run = getattr(torch.ops.crystalformer, f"{backend}_{op.name}")
    return run, (images.packed(), layout), settings
