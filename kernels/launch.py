"""Blocks and warps of the attention kernels by shape: a fixed rule, nothing is tuned at run time.

A program keeps everything of its BH heads in registers, so their number decides. The rule counts the elements that are
live in the loop; tests/test_aot.py compiles the kernels over the range of shapes and sees that nothing spills.
"""

from torch import Tensor

# More heads than this go to several programs: the operand u of a product is held whole by every warp.
HEADS = 8
# Basis functions whose u fits in the registers, and how many are taken at a time when there are more.
BASIS = 64
BASIS_BLOCK = 32
# Wave vectors that are taken at a time.
VECTORS = 32
# Live elements a thread; the rest of its 255 registers is addresses, and what the count leaves out.
ELEMENTS = 150
# Registers of a multiprocessor.
MULTIPROCESSOR = 1 << 16
# Registers of attention_fwd for (BH, BD, BV, BK, G, BG) where fewer than it would take cost nothing: more warps fit.
FORWARD_REGISTERS: dict[tuple[int, ...], int] = {(8, 16, 16, 64, 8, 4): 168, (4, 32, 32, 64, 8, 4): 168}


def power_of_2(num: int) -> int:
    """The first that is not below num >= 1. Triton's own takes 1.8 µs, not 0.05, and a call asks for a dozen."""
    return 1 << (num - 1).bit_length()


def padded(num: int) -> int:
    """K padded to what a matrix product takes, or 0 for no basis."""
    return max(16, power_of_2(num)) if num else 0


def head_blocks(heads: int) -> int:
    """Programs per atom."""
    return -(-heads // HEADS)


def _sizes(q: Tensor, v: Tensor, shape: tuple[int, ...] = ()) -> dict[str, int]:
    """Sizes of q and v, plain and padded, and the (G, BG) of the tiles."""
    heads, dim, value_dim = q.shape[1], q.shape[2], v.shape[2]
    return {
        "H": heads,
        "D": dim,
        "DV": value_dim,
        "BH": min(power_of_2(heads), HEADS),
        "BD": power_of_2(dim),
        "BV": power_of_2(value_dim),
        **dict(zip(("G", "BG"), shape, strict=False)),
    }


def _launch(elements: int, registers: int = 255) -> dict[str, int]:
    """Warps, and a limit of registers: without one the assembler spills a few for more warps, in the loop."""
    warps = max(1, power_of_2(-(-elements // (32 * ELEMENTS))))
    return {"num_warps": warps, "num_stages": 1, "maxnreg": min(registers, MULTIPROCESSOR // (32 * warps))}


def forward_blocks(q: Tensor, v: Tensor, num: int, shape: tuple[int, int]) -> dict[str, int]:
    """Compile-time arguments of `attention_fwd`, for tiles of (G, BG)."""
    s = _sizes(q, v, shape) | {"K": num, "BK": padded(num)}
    shells = s["G"] * s["BG"]
    gathered = s["BG"] * s["BH"] * (s["BD"] + 2 * s["BV"])
    registers = FORWARD_REGISTERS.get(tuple(s[name] for name in ("BH", "BD", "BV", "BK", "G", "BG")), 255)
    return s | _launch(gathered + s["BK"] * (s["BH"] + shells) + shells * s["BH"], registers)


def row_blocks(q: Tensor, v: Tensor, num: int, shape: tuple[int, int], geometry: bool) -> dict[str, int]:
    """Compile-time arguments of `attention_bwd_rows`."""
    s = _sizes(q, v, shape)
    shells = s["G"] * s["BG"]
    # The derivative of the basis doubles what is held; tiles of few shells have the most of everything else.
    whole = BASIS if not geometry or shells > 16 else BASIS_BLOCK
    basis = padded(num) if num <= whole else BASIS_BLOCK
    s |= {"K": num, "BU": basis, "GEOMETRY": geometry}
    gathered = (s["BG"] * ((2 + geometry) * s["BD"] + s["BV"]) + s["BD"] + s["BV"]) * s["BH"]
    return s | _launch(gathered + (1 + geometry) * (s["BU"] + s["BH"]) * shells)


def column_blocks(q: Tensor, v: Tensor, shape: tuple[int, int]) -> dict[str, int]:
    """Compile-time arguments of `attention_bwd_columns`."""
    s = _sizes(q, v, shape)
    return s | _launch(2 * s["BG"] * s["BH"] * (s["BD"] + s["BV"]))


def encoding_blocks(decay: Tensor, num: int) -> dict[str, int]:
    """Compile-time arguments of `encoding_fwd`: 16 shells at a time, most pairs have fewer."""
    heads = decay.shape[1]
    s = {"H": heads, "K": num, "BH": min(power_of_2(heads), HEADS), "BK": padded(num), "BE": 16}
    return s | _launch(0)


def encoding_backward_blocks(decay: Tensor, beta: Tensor, num: int) -> dict[str, int]:
    """Compile-time arguments of `encoding_bwd`."""
    s = encoding_blocks(decay, num)
    s["BU"] = min(s.pop("BK"), BASIS)
    return s | {"DV": beta.shape[2], "BV": power_of_2(max(1, beta.shape[2]))}


def reciprocal_blocks(q: Tensor, v: Tensor) -> dict[str, int]:
    """Compile-time arguments of `reciprocal_fwd` and its backward: 16 atoms a tile, the fewest that a matrix product
    takes, because most crystals have few."""
    s = _sizes(q, v) | {"BN": 16, "BW": VECTORS}
    return s | _launch(2 * s["BN"] * s["BH"] * max(s["BD"], s["BV"]) + s["BD"] * s["BV"])


def reciprocal_geometry_blocks(decay: Tensor) -> dict[str, int]:
    """Compile-time arguments of `reciprocal_forces`, where a matrix product sums over the heads: 16, no fewer."""
    s = {"H": decay.shape[1], "BH": 16, "BN": 16, "BW": VECTORS}
    return s | _launch(12 * s["BN"] * s["BW"])


def image_blocks(atoms: int, crystals: int) -> dict[str, int]:
    """Compile-time arguments of the kernels of the image list: an element a thread.

    A pair has the fewer images, the more atoms its cell has; how many is known on the GPU alone. No products are fused
    with sums, so that the kernel that counts and the one that writes, compiled apart, round alike.
    """
    candidates = 32 if atoms < 64 * crystals else 4
    return {"BJ": 128 // candidates, "BC": candidates, "num_warps": 4, "maxnreg": 255, "enable_fp_fusion": False}
