"""The paper's own code (github.com/omron-sinicx/crystalformer), from the checkout that OFFICIAL points to.

`paper` is its PyTorch path: a box of ±2 cells, distances made once per batch. `paper-cuda` is its CuPy kernels, which
cut at 3.5 sigma or ±2 cells, whichever is more. Both have the paper's sizes of heads and basis.
`paper-boxN` is the PyTorch path in reciprocal space with a box of ±N reciprocal cells: ±2 leaves out much, and what it
takes to leave out less is the fair comparison.
"""

import contextlib
import io
import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import crystalformer as cf

from ..cases import (
    TRUTH_TOL,
    Absent,
    Case,
    Provider,
    Results,
    attention_case,
    by_layer,
    encoding_case,
    model_results,
    reciprocal_case,
    require_memory,
    training_case,
)
from ..problems import Problem

BOX = 2
BOUND = 2e-2
# Of boxes of reciprocal cells, as they are on W32: the worst is the gradient of the decays.
RECIPROCAL_BOUNDS = {2: 0.6, 3: 0.5, 4: 0.2, 6: 0.03}


def _checkout() -> Path:
    folder = os.environ.get("OFFICIAL")
    if not folder:
        raise Absent("OFFICIAL names no checkout of the paper's code")
    if not (Path(folder) / "models" / "latticeformer.py").is_file():
        raise Absent(f"OFFICIAL={folder} is no checkout of the paper's code")
    if folder not in sys.path:
        sys.path.append(folder)
    return Path(folder)


def _require_cuda(x: Problem) -> None:
    if x.device.type != "cuda":
        raise Absent("its kernels need an NVIDIA GPU")
    if x.dtype != torch.float32:
        raise Absent("its kernels are fp32")
    try:
        import cupy  # noqa: F401, its code needs it
        import pytorch_pfn_extras  # noqa: F401, its code needs it
    except ImportError as error:
        raise Absent(f"its kernels need CuPy and pytorch-pfn-extras: {error}") from error


def _batch(x: Problem) -> types.SimpleNamespace:
    """The problem as the paper's code takes it."""
    crystals = x.crystals
    sizes = crystals.ptr.diff()
    return types.SimpleNamespace(
        x=crystals.occupancies().to(x.dtype),
        pos=crystals.positions,
        trans_vec=crystals.lattice,
        sizes=sizes,
        batch=torch.repeat_interleave(sizes),
    )


def _fits(x: Problem) -> None:
    """Its PyTorch path holds the basis of all images at once, and some tensors of images times heads."""
    pairs = int(x.crystals.ptr.diff().square().sum())
    images, size = (2 * BOX + 1) ** 3, x.size
    require_memory(pairs * images * (2 * size.num_basis + 8 * size.heads) * x.upstream.itemsize, x.device)


def _encode(x: Problem) -> tuple[Callable[..., tuple[Tensor, Tensor | None]], Tensor, Tensor]:
    """alpha and beta of its PyTorch path as a function of decay and weight; its pairs, and the crystal of each atom."""
    _checkout()
    _fits(x)
    from models import indexed_lattice_multi_head_attention as theirs
    from models.indexed_latticeformer_encoder import compute_lattice_distances

    data, basis = _batch(x), x.size.basis
    distance, *_, pairs, _ = compute_lattice_distances(data.pos, data.batch, data.trans_vec, data.sizes, BOX)
    d2 = distance.square()

    def encode(decay: Tensor, weight: Tensor | None = None, **geometry: Tensor) -> tuple[Tensor, Tensor | None]:
        alpha = theirs.compute_real_domain_attn(-decay, d2, pairs[0])
        if basis is None:
            return alpha, None
        exponent = -decay[pairs[0]][:, :, None, None]
        beta = theirs.AverageGaussiansBySoftmaxXYFunc_.apply(
            basis.r_max, basis.num, d2[:, None, :, None], exponent, -2, weight, basis.width
        )
        return alpha, beta

    return encode, pairs, data.batch


def _encoding(x: Problem) -> Case:
    return encoding_case(x, _encode(x)[0])


def _attention(x: Problem) -> Case:
    encoded = _encode(x)
    from models import indexed_lattice_multi_head_attention as theirs

    return _attention_with(x, theirs, *encoded)


def _attention_with(x: Problem, theirs: Any, encode: Callable[..., Any], pairs: Tensor, batch: Tensor) -> Case:
    def attend(
        q: Tensor, k: Tensor, v: Tensor, decay: Tensor, weight: Tensor | None = None, **geometry: Tensor
    ) -> Tensor:
        alpha, beta = encode(decay, weight)
        return theirs._scaled_dot_product_attention(q, k, v, batch, batch, pairs, alpha, beta)[0]

    return attention_case(x, attend)


def _reciprocal(box: int) -> Callable[[Problem], Case]:
    """Its cosines are made beforehand, as it does once a batch for all blocks."""

    def prepare(x: Problem) -> Case:
        _checkout()
        pairs = int(x.crystals.ptr.diff().square().sum())
        vectors = (2 * box + 1) ** 3
        # The cosines, and weights and their gradients of pairs, vectors and heads, some at the same time.
        require_memory(pairs * vectors * (4 + 5 * x.size.heads) * x.upstream.itemsize, x.device)
        from models import indexed_lattice_multi_head_attention as theirs
        from models.indexed_latticeformer_encoder import compute_lattice_distances

        data = _batch(x)
        _, cosine, k2, volume, _, edges, _ = compute_lattice_distances(
            data.pos, data.batch, data.trans_vec, data.sizes, box, output_dis=False, output_rec=True
        )
        volume = volume.abs()  # it is for right-handed cells

        def attend(q: Tensor, k: Tensor, v: Tensor, decay_reciprocal: Tensor, **geometry: Tensor) -> Tensor:
            alpha = theirs.compute_reci_domain_attn(-decay_reciprocal, cosine, k2, volume, edges[0], data.batch)
            return theirs._scaled_dot_product_attention(q, k, v, data.batch, data.batch, edges, alpha)[0]

        return reciprocal_case(x, attend)

    return prepare


def _model(x: Problem, cuda: bool) -> Case:
    """A training step of its model; checked against ours with the same weights."""
    params: dict[str, Any] = json.loads((_checkout() / "params/latticeformer/default.json").read_text())
    size, config = x.size, x.size.config
    params |= {"use_cuda_code": cuda, "targets": "energy", "value_pe_dist_real": size.num_basis}
    params |= {"head_num": size.heads, "num_layers": size.blocks, "model_dim": config.model_dim}
    params |= {"ff_dim": config.ff_dim, "embedding_dim": list(config.readout_dims)}
    with contextlib.redirect_stdout(io.StringIO()):
        from models.latticeformer import Latticeformer

        torch.manual_seed(0)
        model = Latticeformer(types.SimpleNamespace(**params)).to(x.device, x.dtype)
        data = _batch(x)
        model(data)  # the first forward sets the scale and shift of the decays

    def truth() -> Results:
        crystals = x.crystals.to(torch.float64)
        crystals.images = cf.build_images(crystals.positions, crystals.lattice, crystals.ptr, tol=TRUTH_TOL)
        ours = cf.convert.from_official(_state(model), params).to(x.device, torch.float64)
        for block in ours.blocks:
            block.attention.backend = "reference"
        return model_results(ours, lambda: ours(crystals))

    def results() -> Results:
        output = model_results(model, lambda: model(data))["output"]
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        as_ours = cf.convert.from_official(_state(model) | gradients, params)  # gradients in the place of weights
        return {"output": output} | by_layer(dict(as_ours.named_parameters()))

    case = training_case(model, lambda: model(data))
    return Case(case.calls, results, truth)


def _state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _training(x: Problem) -> Case:
    _fits(x)
    return _model(x, cuda=False)


def _training_cuda(x: Problem) -> Case:
    _require_cuda(x)
    return _model(x, cuda=True)


def _encode_cuda(x: Problem) -> tuple[Callable[..., tuple[Tensor, Tensor | None]], Tensor, Tensor]:
    """As `_encode`, by its CuPy kernels."""
    _require_cuda(x)
    _checkout()
    from models import indexed_lattice_multi_head_attention_cuda as theirs
    from models.cuda_funcs import compile_kernels
    from models.indexed_latticeformer_encoder import compute_lattice_distances_for_cuda

    size, data, basis = x.size, _batch(x), x.size.basis
    compile_kernels(BOX, size.heads, size.dim, size.num_basis, size.dim, True)
    found = compute_lattice_distances_for_cuda(
        data.pos, data.batch, data.trans_vec, data.sizes, BOX, -1, output_real=True
    )
    displacement, nearest2, _, reciprocal, _, pairs = found
    r_max, width = (basis.r_max, basis.width) if basis else (1.0, 1.0)

    def encode(decay: Tensor, weight: Tensor | None = None, **geometry: Tensor) -> tuple[Tensor, Tensor | None]:
        return theirs.compute_real_domain_attn_low_memory(
            -decay, displacement, nearest2, data.trans_vec, data.batch, pairs, weight,
            size.num_basis, r_max, width, reciprocal, -3.5,
        )  # fmt: skip

    return encode, pairs, data.batch


def _encoding_cuda(x: Problem) -> Case:
    return encoding_case(x, _encode_cuda(x)[0])


def _attention_cuda(x: Problem) -> Case:
    encoded = _encode_cuda(x)
    from models import indexed_lattice_multi_head_attention_cuda as theirs

    return _attention_with(x, theirs, *encoded)


PROVIDERS = [
    *(
        Provider("paper" if box == BOX else f"paper-box{box}", "reciprocal", bound, _reciprocal(box))
        for box, bound in RECIPROCAL_BOUNDS.items()
    ),
    Provider("paper", "attention", BOUND, _attention),
    Provider("paper", "encoding", BOUND, _encoding),
    Provider("paper", "training", BOUND, _training),
    Provider("paper-cuda", "attention", BOUND, _attention_cuda),
    Provider("paper-cuda", "encoding", BOUND, _encoding_cuda),
    Provider("paper-cuda", "training", BOUND, _training_cuda),
]
