"""Compiles every kernel that the launchers start, for GPUs that are not here: `python ahead_of_time.py ARCH ...`.

With --few for some of the cases alone, and with --loops=PREFIX only kernels of such names are disassembled, which takes
as long as to compile.

The launchers run on the CPU with a stand-in that notes which kernel they would start with what; then Triton compiles it
for the architecture, and the tools that come with Triton say what it takes. One line of JSON a kernel.
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from problems import problem
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from crystalformer import kernels
from crystalformer.attention.settings import Settings
from crystalformer.geometry.limits import MAX_IMAGES
from crystalformer.geometry.wave_vectors import build_wave_vectors
from crystalformer.kernels import layout as packing

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
PAPER, TILE = (8, 16, 16, 64), (8, 4)
LARGEST, FP32 = (16, 64, 64, 128), torch.float32
# Shape, tile, dtype of q, k, v, and whether tf32 is allowed. The paper's shape for all tiles; the ends of the range of
# shapes, tf32 and half precision for one.
FEW = [
    *((shape, TILE, FP32, False) for shape in (PAPER, LARGEST)),
    (PAPER, TILE, torch.bfloat16, False),
    (PAPER, TILE, FP32, True),
]
CASES = [
    *FEW,
    *((PAPER, tile, FP32, False) for tile in packing.SHAPES if tile != TILE),
    *((shape, TILE, FP32, False) for shape in ((8, 16, 16, 0), (1, 8, 8, 16), (6, 24, 40, 90))),
    (LARGEST, TILE, torch.bfloat16, False),
    (PAPER, TILE, torch.float16, True),
]


def argument_type(x, annotation):
    """Triton's name of its type; of a pointer or an integer also what is left when 16 divides it."""
    if isinstance(x, torch.Tensor):
        return TYPES[x.dtype], x.data_ptr() % 16
    if annotation:
        return annotation, None
    return ("i32", x % 16) if isinstance(x, int) else ("fp32", None)


def launches(cases):
    """Name, function, arguments and keywords of all different launches of the cases."""
    noted = {}

    def note(function, *args, grid, warmup, **kwargs):
        types = tuple(argument_type(x, p.annotation_type) for x, p in zip(args, function.params, strict=False))
        noted[function.__name__, types, tuple(kwargs.items())] = (function, types, kwargs)

    JITFunction.run = note
    for (heads, dim, value_dim, num), tile, dtype, tf32 in cases:
        packing.SHAPES = (tile,)
        x = (
            problem(kinds=(("cubic", 2),), heads=heads, dim=dim, value_dim=value_dim, num_basis=max(num, 1))
            .to(torch.float32)
            .half(dtype)
        )
        geometry = (x.positions, x.lattice, x.images.packed())
        c = x.decay.new_zeros(*x.decay.shape, num)
        y, weight, settings = (
            torch.zeros_like(x.v, dtype=torch.float32),
            x.edge_weight[..., :num],
            Settings(tf32=tf32, r_max=6.0),
        )
        layout = packing.pack(*geometry, x.images.num_pairs, num, settings, by_pair=False)
        inputs = (x.q, x.k, x.v, x.decay, weight, *geometry, layout, settings)
        kernels.OPERATORS["attention"](*inputs)
        for moving in (False, True):
            kernels.OPERATORS["attention_backward"](y, x.decay, *inputs, y, x.decay, c, moving)
        if tile != TILE:
            continue
        if dtype == FP32 and not tf32:
            launch_reciprocal(x)
        layout = packing.pack(*geometry, x.images.num_pairs, num, settings, by_pair=True)
        inputs = (x.decay, weight, *geometry, layout, x.images.num_pairs, settings)
        alpha, beta = kernels.OPERATORS["encoding"](*inputs)
        for moving in (False, True):
            kernels.OPERATORS["encoding_backward"](alpha, beta, *inputs, alpha, beta, moving)
    for dim, value_dim in ((8, 64), (64, 8)):
        launch_reciprocal(problem(kinds=(("cubic", 2),), heads=8, dim=dim, value_dim=value_dim).to(torch.float32))
    for kind, size in (("cubic", 2), ("cubic", 80)):  # many images a pair, and few
        x = problem(kinds=((kind, size),), decay_min=5.0)
        for cutoff, every_pair in ((None, False), (2.0, False), (None, True)):
            inputs = (x.positions, x.lattice, x.ptr, x.lattice[:, 0, 0])
            kernels.OPERATORS["images"](*inputs, 1e-6, 4.0, 0.01, cutoff, every_pair, MAX_IMAGES)
    return noted.values()


def launch_reciprocal(x):
    inputs, y = (*x.inputs[:6], *x.wave_vectors()), torch.zeros_like(x.v)
    kernels.OPERATORS["reciprocal"](*inputs)
    for moving in (False, True):
        kernels.OPERATORS["reciprocal_backward"](y, *inputs, y, moving)
    waves = build_wave_vectors(x.lattice, x.ptr, positions=x.positions, orbit=torch.arange(len(x.q)))
    inputs = (*x.inputs[:6], waves.packed(), waves.largest)
    kernels.OPERATORS["reciprocal"](*inputs)
    kernels.OPERATORS["reciprocal_backward"](y, *inputs, y, False)


def loop_instructions(sass):
    """Instructions of each loop, by where they begin, from the disassembly."""
    code = {int(at, 16): rest for at, rest in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass)}
    places = sorted(code)
    jumps = [(at, int(to.group(1), 16)) for at in places if (to := re.search(r"BRA.* 0x([0-9a-f]+)", code[at]))]
    return [sum(to <= place <= at for place in places) for to, at in sorted((to, at) for at, to in jumps if to < at)]


def narrow_offsets(ttir):
    """Integers of 32 bits, added or multiplied, that come from data or from the number of an atom's or pair's program.

    They overflow where arrays are large. Constants, a minimum with one, tl.arange and the number of the head block are
    bounded by the shape, and additions to pointers are wide whatever the offset.
    """
    constants, unbounded, narrow = set(), set(), 0
    # In order, for regions beside each other use the same names: what a name means is its last definition so far.
    for line in ttir.splitlines():
        code = line.partition(" loc(")[0]
        made, defines, source = code.partition(" = ")
        if not defines:
            continue
        comes_from = {name: re.findall(r"%\w+", source) for name in re.findall(r"%\w+", made)}
        if "scf.for" in code:  # the counter comes from the bounds, what is carried from before the loop
            bounds, _, carried = code.partition("iter_args")
            counter, *bounds = re.findall(r"%\w+", bounds.partition("scf.for")[2])
            comes_from |= {counter: bounds} | {
                name: [before] for name, before in re.findall(r"(%\w+) = (%\w+)", carried)
            }
        bounded = "tt.bitcast" in source  # the bits of a float
        bounded |= "arith.minsi" in source and not constants.isdisjoint(*comes_from.values())
        read = "tt.load" in source or "get_program_id x" in source
        for name, names in comes_from.items():
            constants.discard(name)
            unbounded.discard(name)
            if "arith.constant" in source:
                constants.add(name)
            if not bounded and (read or not unbounded.isdisjoint(names)):
                unbounded.add(name)
        offset = re.search(r"tt\.addptr %[\w#]+, (%\w+).* : .*(?:x|, )i32>?$", code)
        result = re.match(r"\s*(%\w+) = arith\.(?:muli|addi|subi) .* : (?:tensor<[\dx]+xi32>|i32)$", code)
        narrow += any(found and found[1] in unbounded for found in (offset, result))
    return narrow


def resources(function, types, kwargs, arch, disassembled=""):
    """What a launch takes on an architecture; loops are counted of kernels whose names begin with `disassembled`."""
    constants = {name: value for name, value in kwargs.items() if name not in OPTIONS}
    names = [name for name in function.arg_names if name not in constants]
    aligned = {(k,): [["tt.divisibility", 16]] for k, t in enumerate(types) if t[1] == 0}
    signature = {name: t[0] for name, t in zip(names, types, strict=True)}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    options = {name: kwargs[name] for name in OPTIONS if name in kwargs}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def dump(what):
            command = [TOOLS / "cuobjdump", f"--dump-{what}", file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = dump("resource-usage")
        paper = zip(("H", "D", "DV", "K", "G", "BG"), (*PAPER, *TILE), strict=True)
        counted = all(constants.get(name, size) == size for name, size in paper)
        counted &= function.__name__.startswith(disassembled)
        sass = dump("sass") if counted else ""
        loops = loop_instructions(sass)
    found = dict(word.split(":")[:2] for word in usage.split() if word.count(":") == 1 and word[-1].isdigit())
    shape = {name: value for name, value in constants.items() if name.isupper()}
    return {
        "kernel": function.__name__,
        "arch": arch,
        "registers": int(found["REG"]),
        "spilled": int(found["STACK"]) + int(found["LOCAL"]),
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "loop": max(loops, default=None),
        "loops": loops,
        "exponentials": sass.count("MUFU.EX2"),
        "narrow": narrow_offsets(compiled.asm["ttir"]),
        "inputs": signature.get("q_p", "*fp32")[1:],
        **shape,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("arch", type=int, nargs="+")
    parser.add_argument("--few", action="store_true")
    parser.add_argument("--loops", default="", metavar="PREFIX")
    options = parser.parse_args()
    found = list(launches(FEW if options.few else CASES))
    for arch in options.arch:
        for launch in found:
            print(json.dumps(resources(*launch, arch, options.loops)), flush=True)
