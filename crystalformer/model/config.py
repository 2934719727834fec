"""What defines a Crystalformer, apart from its weights."""

import dataclasses
import itertools
import json
import math
from dataclasses import dataclass
from typing import Any

from ..attention.basis import MOST_FUNCTIONS, R_MAX, WIDTH, RadialBasis
from ..common import checks
from ..common.elements import NUM_ELEMENTS
from ..common.version import version
from ..geometry.truncation import MAX_LOGIT_RANGE

# The version of config.json. It is raised when an older program could not read the file, or would read it wrongly.
FORMAT = 1
# The rounding of fp64 is no smaller.
LEAST_TOL = 1e-16
# The most blocks, and the most layers after the pooling. A config may come from a damaged file, hence the bounds.
MAX_LAYERS = 128
# The most trained numbers, some thousand times the paper's: 4 GB in fp32.
MAX_WEIGHTS = 10**9
# Å, between which no decay leaves the range of its numbers.
LENGTHS = (1e-6, 1e6)
DOMAINS = ("real", "reciprocal", "multihead", "real_reciprocal")
ACTIVATIONS = ("relu", "silu")
POOLINGS = ("mean", "max")
# Attributes that a user does not choose: they come from the data of a training, or from the training itself.
FROM_TRAINING = (
    "num_targets",
    "target_names",
    "target_units",
    "target_mean",
    "target_deviation",
    "elements",
    "probabilities",
    "element_energies",
    "largest_cell",
    "atom_volumes",
)


def smallest_decay(r0: float, bound: float = 0.5) -> float:
    """The smallest decay, Å^-2, of a real head with the length scale r0, Å, and rho >= bound: bound / (2 r0²).

    It is the `decay_min` of `build_images` for such heads; the paper's r0 = 1.4 Å gives 0.12755.

    Raises:
        TypeError, ValueError: for an r0 outside 1e-6 to 1e6 Å, or a bound that is not between 0 and 1.
    """
    checks.check_between("r0", r0, *LENGTHS)
    return checks.check_number("bound", bound, high=1.0) / (2 * r0**2)


@dataclass(frozen=True)
class CrystalformerConfig:
    """The paper's model by default (Taniai et al., ICLR 2024): 853,505 trained numbers. At most 10^9 of them.

    Attributes:
        num_targets: how many properties are predicted.
        model_dim: width of the atoms' features.
        num_heads: heads of each attention; model_dim is a multiple of it.
        num_blocks: attention blocks, at most 128.
        ff_dim: hidden width of the feed-forward layers.
        readout_dims: hidden widths of the layers after the pooling, at most 128 of them.
        dropout: probability, after both layers of each block.
        activation: between the feed-forward layers and between those after the pooling: "relu", as in the paper, or
            "silu", which is smooth: with "relu" the forces on atoms jump where one of its kinks is passed.
        pooling: of the atoms' features: "mean", as in the paper, or "max", for a property that is an extreme over the
            crystal, as its highest phonon frequency is.
        domain: where the attention's weight decays: "real" space, "reciprocal" space, "multihead" (the first half of
            the heads real, the second half reciprocal) or "real_reciprocal" (the blocks alternate, real first).
        num_basis: K, functions of the value encoding of real heads, at most 65,536; 0 is the paper's simplified model
            without it.
        r_max: centre of the last of them, 1e-3 to 1e6 Å; None takes 10 r0, which must be within that too.
        basis_width: their width, in units of their spacing, 1e-3 to 1000.
        r0: length scale of the real decay, 1e-6 to 1e6 Å; block l takes entry l modulo the number of entries.
        r0_reciprocal: that of the reciprocal decay, likewise.
        decay_bound: b, lower bound of rho(x), so that a >= b / (2 r0²).
        decay_bound_reciprocal: that of reciprocal heads, so that c >= b r0_reciprocal² / 2.
        tol: largest fraction of the attention's weight that the truncation may leave out, and in reciprocal heads the
            largest part of a sum over G. At least 1e-16: fp64 itself is no nearer.
        logit_range: largest difference of content scores for which that is certified; see `build_images`.
        target_names: of the properties that are predicted, all different; none if they are not known.
        target_units: theirs, "" for one without; none if they are not known.
        target_mean, target_deviation: what makes y·deviation + mean of the network's outputs y, in fp64; none before
            the model is trained, for targets that are standardised.
        elements: atomic numbers in the crystals of the training; none if they are not known.
        probabilities: predictions are the probabilities of class 1 of classes 0 and 1, the sigmoids of the outputs.
        element_energies: of a model of energies of an atom, that of each of `elements`, eV: their mean over the atoms
            of a crystal is added to the output. None for other models.
        largest_cell: the most atoms in a cell of the training, a primitive cell if it had a symmetry_tol; 0 if it is
            not known.
        atom_volumes: the least and the largest volume for an atom, Å³, of the crystals of the training; none if they
            are not known.
    """

    num_targets: int = 1
    model_dim: int = 128
    num_heads: int = 8
    num_blocks: int = 4
    ff_dim: int = 512
    readout_dims: tuple[int, ...] = (128,)
    dropout: float = 0.0
    activation: str = "relu"
    pooling: str = "mean"
    domain: str = "real"
    num_basis: int = 64
    r_max: float | None = None
    basis_width: float = 1.0
    r0: tuple[float, ...] = (1.4,)
    r0_reciprocal: tuple[float, ...] = (2.2,)
    decay_bound: float = 0.5
    decay_bound_reciprocal: float = 0.5
    tol: float = 1e-6
    logit_range: float = 4.0
    target_names: tuple[str, ...] = ()
    target_units: tuple[str, ...] = ()
    target_mean: tuple[float, ...] = ()
    target_deviation: tuple[float, ...] = ()
    elements: tuple[int, ...] = ()
    probabilities: bool = False
    element_energies: tuple[float, ...] = ()
    largest_cell: int = 0
    atom_volumes: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_targets", "model_dim", "num_heads", "ff_dim"):
            checks.check_integer(name, getattr(self, name), 1)
        checks.check_integer("num_blocks", self.num_blocks, 1, MAX_LAYERS)
        checks.check_integer("num_basis", self.num_basis, 0, MOST_FUNCTIONS)
        for name in ("readout_dims", "r0", "r0_reciprocal"):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)) or not value:
                raise TypeError(f"{name} must be a sequence of numbers, not {value!r}")
            object.__setattr__(self, name, tuple(value))
        if len(self.readout_dims) > MAX_LAYERS:
            raise ValueError(f"readout_dims must be at most {MAX_LAYERS} numbers, not {len(self.readout_dims)}")
        for width in self.readout_dims:
            checks.check_integer("readout_dims", width, 1)
        for name in ("r0", "r0_reciprocal"):
            for length in getattr(self, name):
                checks.check_between(name, length, *LENGTHS)
        if self.r_max is not None:
            checks.check_between("r_max", self.r_max, *R_MAX)
        checks.check_between("basis_width", self.basis_width, *WIDTH)
        checks.check_number("decay_bound", self.decay_bound, high=1.0)
        checks.check_number("decay_bound_reciprocal", self.decay_bound_reciprocal, high=1.0)
        checks.check_number("tol", self.tol, low=LEAST_TOL, high=1.0, closed=True)
        checks.check_number("logit_range", self.logit_range, high=MAX_LOGIT_RANGE, closed=True)
        checks.check_number("dropout", self.dropout, high=1.0, closed=True)
        checks.check_choice("domain", self.domain, DOMAINS)
        checks.check_choice("activation", self.activation, ACTIVATIONS)
        checks.check_choice("pooling", self.pooling, POOLINGS)
        if not isinstance(self.probabilities, bool):
            raise TypeError(f"probabilities must be True or False, not {self.probabilities!r}")
        targets = ("target_names", "target_units", "target_mean", "target_deviation")
        for name in (*targets, "elements", "element_energies", "atom_volumes"):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)):
                raise TypeError(f"{name} must be a sequence, not {value!r}")
            object.__setattr__(self, name, tuple(value))
        for text in self.target_names + self.target_units:
            if not isinstance(text, str):
                raise TypeError(f"target_names and target_units must be strings, not {text!r}")
        if len(set(self.target_names)) < len(self.target_names) or "" in self.target_names:
            raise ValueError(f"target_names must be different names, not {', '.join(map(repr, self.target_names))}")
        for name in ("target_names", "target_units", "target_mean", "target_deviation"):
            value = getattr(self, name)
            if value and len(value) != self.num_targets:
                listed = ", ".join(map(str, value))
                raise ValueError(f"{name} must be {self.num_targets}, as num_targets, not {listed}")
        if len(self.target_mean) != len(self.target_deviation):
            raise ValueError("target_mean and target_deviation must both be given, or none of them")
        for mean, deviation in zip(self.target_mean, self.target_deviation, strict=True):
            checks.check_number("target_mean", mean, low=-math.inf)
            checks.check_number("target_deviation", deviation)
        for number in self.elements:
            checks.check_integer("elements", number, 1, NUM_ELEMENTS)
        if self.element_energies and (self.num_targets != 1 or len(self.element_energies) != len(self.elements)):
            raise ValueError(
                f"element_energies must be {len(self.elements)}, as elements, of a model of one target, not "
                f"{len(self.element_energies)} of one of {self.num_targets}"
            )
        for energy in self.element_energies:
            checks.check_number("element_energies", energy, low=-math.inf)
        checks.check_integer("largest_cell", self.largest_cell, 0)
        if self.atom_volumes and (len(self.atom_volumes) != 2 or self.atom_volumes[0] > self.atom_volumes[1]):
            listed = ", ".join(map(str, self.atom_volumes))
            raise ValueError(f"atom_volumes must be two numbers, the least first, not {listed}")
        for volume in self.atom_volumes:
            checks.check_number("atom_volumes", volume)
        if self.model_dim % self.num_heads:
            raise ValueError(f"model_dim must be a multiple of num_heads={self.num_heads}, not {self.model_dim}")
        if self.domain == "multihead" and self.num_heads % 2:
            raise ValueError(f"num_heads must be even for domain='multihead', not {self.num_heads}")
        for block in range(self.num_blocks):
            try:
                self.block_basis(block)
            except ValueError as error:  # of an r_max that is 10 r0: all else has been looked at
                low, high = (x / 10 for x in R_MAX)
                raise ValueError(
                    f"r0 must be at least {low:g} and at most {high:g}, a tenth of r_max, where that is not given, "
                    f"not {self.block_r0(block)}"
                ) from error
        if self.num_layer_weights > MAX_WEIGHTS:
            raise ValueError(f"config must be of at most {MAX_WEIGHTS:,} weights, not {self.num_layer_weights:,}")

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def num_layer_weights(self) -> int:
        """The numbers that are trained, but for the features of the elements."""
        width, hidden, basis = self.model_dim, self.ff_dim, self.num_basis
        block = 4 * width * (width + 1) + width + 2 * width * hidden + hidden + width
        real = sum(self.num_real_heads(i) for i in range(self.num_blocks)) * self.head_dim * basis
        readout = itertools.pairwise((width, *self.readout_dims, self.num_targets))
        return self.num_blocks * block + real + sum((i + 1) * o for i, o in readout)

    @property
    def decay_min(self) -> float:
        """The smallest real decay that any block can have, Å^-2: b / (2 r0²)."""
        return min(smallest_decay(self.block_r0(block), self.decay_bound) for block in range(self.num_blocks))

    @property
    def decay_reciprocal_min(self) -> float:
        """The smallest reciprocal decay that any block can have, Å²: b r0² / 2."""
        return min(
            self.decay_bound_reciprocal * self.block_r0_reciprocal(block) ** 2 / 2 for block in range(self.num_blocks)
        )

    def block_r0(self, block: int) -> float:
        return self.r0[block % len(self.r0)]

    def block_r0_reciprocal(self, block: int) -> float:
        return self.r0_reciprocal[block % len(self.r0_reciprocal)]

    def block_basis(self, block: int) -> RadialBasis | None:
        """The basis of the value encoding of a block's real heads, None without one."""
        if not self.num_basis or not self.num_real_heads(block):
            return None
        r_max = 10 * self.block_r0(block) if self.r_max is None else self.r_max
        return RadialBasis(self.num_basis, r_max, self.basis_width)

    def num_real_heads(self, block: int) -> int:
        """How many heads of a block decay in real space; they come first."""
        if self.domain == "real_reciprocal":
            return self.num_heads if block % 2 == 0 else 0
        return {"real": self.num_heads, "reciprocal": 0, "multihead": self.num_heads // 2}[self.domain]

    @property
    def needs_images(self) -> bool:
        return any(self.num_real_heads(block) for block in range(self.num_blocks))

    @property
    def needs_wave_vectors(self) -> bool:
        return any(self.num_real_heads(block) < self.num_heads for block in range(self.num_blocks))

    def to_json(self) -> str:
        values = {"format": FORMAT, "crystalformer": version} | dataclasses.asdict(self)
        return json.dumps(values, indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CrystalformerConfig":
        """What `to_json` wrote.

        Raises:
            TypeError, ValueError: for values that the fields cannot have, and a format or names that this version does
                not know.
        """
        if not isinstance(values, dict):
            raise TypeError(f"config must be a dictionary, not {type(values).__name__}")
        values = dict(values)
        written, by = values.pop("format", FORMAT), values.pop("crystalformer", "an older version")
        if written != FORMAT:
            raise ValueError(
                f"config must be of format {FORMAT}, which crystalformer {version} reads, not {written}, written by "
                f"crystalformer {by}: use that version, pip install 'crystalformer=={by}'"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"config must have names among {', '.join(sorted(known))}, not {', '.join(unknown)}: it was written by "
                f"crystalformer {by}, this is {version}"
            )
        return cls(**values)
