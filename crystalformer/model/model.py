"""The Crystalformer (Taniai et al., ICLR 2024): a crystal in, its properties out."""

import itertools
import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..attention.argument_checks import check_crystals, check_precision
from ..attention.functional import Precision
from ..common import storage
from ..common.backends import check_backend
from ..common.elements import NUM_ELEMENTS
from ..common.words import some
from ..geometry.image_list import ImageList
from ..geometry.images import build_images
from ..geometry.orbit_images import build_orbit_images
from ..geometry.wave_vectors import WaveVectors
from .batch import CrystalBatch
from .config import CrystalformerConfig
from .layers import ACTIVATIONS, Block, Embedding, max_pool, mean_of_elements, mean_pool

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


class Crystalformer(nn.Module):
    """Predicts properties of crystals.

        batch = CrystalBatch.from_structures(structures)
        model.calibrate(batch)                      # once, before training
        out = model(batch)                          # (C, num_targets)

    Args:
        config: sizes and physics; the paper's by default.
        backend, precision: of the attention, see `periodic_attention`.
    """

    def __init__(
        self, config: CrystalformerConfig | None = None, backend: str = "auto", precision: Precision = "exact"
    ) -> None:
        super().__init__()
        check_precision(precision)
        check_backend(backend)
        config = CrystalformerConfig() if config is None else config
        if not isinstance(config, CrystalformerConfig):
            raise TypeError(f"config must be a CrystalformerConfig, not {type(config).__name__}")
        self.config = config
        self.embedding = Embedding(NUM_ELEMENTS, config)
        self.blocks = nn.ModuleList(Block(config, block, backend, precision) for block in range(config.num_blocks))
        widths = (config.model_dim, *config.readout_dims)
        activation = ACTIVATIONS[config.activation]
        hidden = [layer for i, o in itertools.pairwise(widths) for layer in (nn.Linear(i, o), activation())]
        self.readout = nn.Sequential(*hidden, nn.Linear(widths[-1], config.num_targets))

    def forward(self, batch: CrystalBatch) -> Tensor:
        """(C, num_targets), the predictions for the crystals of the batch.

        Of a trained model in the targets' units, or probabilities, and fp64, whatever the dtype of its weights; else in
        that dtype.
        """
        outputs = self.outputs(batch)
        return outputs.sigmoid() if self.config.probabilities else outputs

    def outputs(self, batch: CrystalBatch) -> Tensor:
        """(C, num_targets), what a loss takes: the predictions, or the logits of those that are probabilities."""
        y = self.in_units(self.readout(self.pool(self.encode(batch), batch)))
        return y + mean_of_elements(batch, self.element_energies) if self.config.element_energies else y

    def in_units(self, y: Tensor) -> Tensor:
        """Outputs (C, num_targets) of the network in the targets' units and fp64, once `rescale_` has given them."""
        config = self.config
        return in_units(y, config.target_mean, config.target_deviation) if config.target_mean else y

    @property
    def element_energies(self) -> Tensor:
        """(98) fp64, eV, `config.element_energies` by atomic number: 0 where the model has none, and for an element
        that the training never saw the mean of the others."""
        config = self.config
        if not config.element_energies:
            return torch.zeros(NUM_ELEMENTS, dtype=torch.float64)
        known = torch.tensor(config.element_energies, dtype=torch.float64)
        return known.mean().repeat(NUM_ELEMENTS).index_copy(0, torch.tensor(config.elements) - 1, known)

    def encode(self, batch: CrystalBatch) -> Tensor:
        """(N, model_dim), the features of the batch's rows, atoms or orbits of them, after the last block."""
        batch = self.prepare(batch)
        x = self.embedding(batch.species)
        for block in self.blocks:
            x = block(x, batch)
        return x

    def pool(self, x: Tensor, batch: CrystalBatch) -> Tensor:
        """(C, model_dim), the features of the crystals of a batch, of those of its rows, x (N, model_dim)."""
        if self.config.pooling == "max":
            return max_pool(x, batch.ptr)
        return mean_pool(x, batch.ptr, batch.multiplicity)

    @torch.no_grad()
    def calibrate(self, batch: CrystalBatch) -> None:
        """Sets the shift and scale of every block's decay from a batch (see `Decay`): once, before training.

        Raises:
            ValueError: if all atoms of the batch have the same features.
        """
        batch = self.prepare(batch)
        x, orbits = self.embedding(batch.species), batch.orbit_atoms
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attention.calibrate(x if orbits is None else x[orbits.row])  # of all atoms
            x = block(x, batch)

    def rescale_(self, mean: Tensor, deviation: Tensor) -> "Crystalformer":
        """Makes the predictions y into y·deviation + mean, in place: from standardised targets to their units.

        The numbers become part of `config`, in fp64: the weights, in fp32, would lose the last digits of targets far
        from 0.

        Args:
            mean, deviation: (num_targets), of the targets that the model was trained on.

        Raises:
            ValueError: if they are not num_targets finite numbers, the deviations above 0.
        """
        mean, deviation = mean.detach().cpu().double(), deviation.detach().cpu().double()
        before = self.config
        energies = tuple(x * float(deviation[0]) for x in before.element_energies)
        if before.target_mean:
            mean = torch.tensor(before.target_mean, dtype=torch.float64) * deviation + mean
            deviation = torch.tensor(before.target_deviation, dtype=torch.float64) * deviation
        means, deviations = tuple(mean.tolist()), tuple(deviation.tolist())
        self.config = replace(before, target_mean=means, target_deviation=deviations, element_energies=energies)
        return self

    def build_images(self, batch: CrystalBatch) -> ImageList:
        """The image list that this model certifies for these crystals; keep it in `batch.images` to build it once."""
        config = self.config
        certified = (config.decay_min, config.tol, config.logit_range)
        if (x := batch.orbit_atoms) is not None:
            return build_orbit_images(x.positions, x.lattice, x.ptr, x.orbit, *certified, symmetry_tol=x.symmetry_tol)
        return build_images(batch.positions, batch.lattice, batch.ptr, *certified)

    def build_wave_vectors(self, batch: CrystalBatch) -> WaveVectors:
        """The wave vectors that this model certifies for these crystals, to keep in `batch.wave_vectors`."""
        config = self.config
        return batch.build_wave_vectors(config.decay_reciprocal_min, config.tol)

    def prepare(self, batch: CrystalBatch) -> CrystalBatch:
        """The batch with the images and wave vectors that this model needs, built where they are missing.

        The model does this itself each time; keep the result to build them once.

        Raises:
            ValueError: for images or wave vectors of other crystals, or of a weaker certificate than the model's.
        """
        if not isinstance(batch, CrystalBatch):
            raise TypeError(f"batch must be a CrystalBatch, not {type(batch).__name__}")
        config, images, waves = self.config, batch.images, batch.wave_vectors
        for name, lists in (("batch.images", images), ("batch.wave_vectors", waves)):
            if lists is not None:
                check_crystals(name, lists, "batch.ptr", batch.ptr)
                if lists.of_orbits != (batch.orbit_atoms is not None):
                    raise ValueError(f"{name} must be of orbits if, and only if, the batch is: see model.prepare")
        if config.needs_images:
            if images is None:
                _check_not_compiling("images")
                images = self.build_images(batch)
            elif images.decay_min is not None:
                _check_built("images.decay_min", images.real_decay_min, config.decay_min)
                _check_built("images.tol", images.tol, config.tol)
                _check_built("images.logit_range", images.logit_range, config.logit_range, least=True)
        if config.needs_wave_vectors:
            if waves is None:
                _check_not_compiling("wave_vectors")
                waves = self.build_wave_vectors(batch)
            else:
                _check_built("wave_vectors.decay_min", waves.decay_min, config.decay_reciprocal_min)
                _check_built("wave_vectors.tol", waves.tol, config.tol)
        return replace(batch, images=images, wave_vectors=waves)

    def save_pretrained(self, path: str | Path) -> None:
        """Writes model.safetensors and config.json into the folder `path`, made if missing.

        model.safetensors is the whole model, the config and a checksum of all of it included; config.json is a copy to
        read. So a model that is there already is replaced as a whole: whatever stops this, `from_pretrained` gives the
        one before or the new one.

        Raises:
            ValueError: for weights that are not finite, which `from_pretrained` would not take.
            OSError: if a file cannot be written.
        """
        path, config = Path(path), self.config.to_json()
        weights = self.state_dict()
        _check_finite(path / WEIGHTS_FILE, weights)
        path.mkdir(parents=True, exist_ok=True)
        storage.write_tensors(path / WEIGHTS_FILE, weights, {"config": json.loads(config)})
        storage.write(path / CONFIG_FILE, config)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, backend: str = "auto", precision: Precision = "exact"
    ) -> "Crystalformer":
        """The model that `save_pretrained` wrote into the folder `path`, in eval mode.

        The config is that in model.safetensors; a config.json that says something else is ignored, with a warning.
        Where model.safetensors has none, of an older version or from elsewhere, the config is that of config.json.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if they do not fit this version or each other, are damaged, or hold numbers that are not finite.
        """
        weights_file, config_file = Path(path) / WEIGHTS_FILE, Path(path) / CONFIG_FILE
        _check_file(weights_file)
        weights, about = storage.read_tensors(weights_file)
        if about is None:
            _check_file(config_file)
            source, values = config_file, storage.read_json(config_file)
        else:
            source, values = weights_file, about.get("config")
            _warn_of_another(config_file, values)
        try:
            config = CrystalformerConfig.from_dict(values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{source}: {error}") from error
        # More weights than the file holds take no memory: such a model is there only to say which are missing.
        too_large = config.num_layer_weights > sum(x.numel() for x in weights.values())
        with torch.device("meta") if too_large else nullcontext():
            model = cls(config, backend, precision)
        _check_fit(weights_file, weights, model.state_dict())
        _check_finite(weights_file, weights)
        model.to(next(iter(weights.values())).dtype).load_state_dict(weights)
        return model.eval()


def in_units(y: Tensor, mean: Sequence[float], deviation: Sequence[float]) -> Tensor:
    """y·deviation + mean in fp64: (C,T) outputs of a network, of any dtype, in the units of its T targets."""
    # By numbers, not tensors: these would go to fp32 with the network, or wait for their copy to a GPU.
    columns = zip(y.double().unbind(1), mean, deviation, strict=True)
    return torch.stack([column * factor + offset for column, offset, factor in columns], 1)


def _check_file(file: Path) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"path must be a folder with {CONFIG_FILE} and {WEIGHTS_FILE}: no {file}")


def _warn_of_another(config_file: Path, values: object) -> None:
    """Warns if config.json is not the config of the weights: it was edited or damaged, or writing was stopped."""
    if not config_file.exists():
        return
    try:
        same = storage.read_json(config_file) == values
    except (OSError, ValueError):
        same = False
    if not same:
        warnings.warn(
            f"{config_file} is not the config that {WEIGHTS_FILE} was saved with, which counts: to change it, save a "
            "model of another config",
            stacklevel=3,
        )


def _check_fit(file: Path, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuses weights other than those that the config implies."""
    wrong = f"{file} must hold weights that fit its config"
    if missing := sorted(expected.keys() - weights.keys()):
        raise ValueError(f"{wrong}, but has no {some(missing, 3)}")
    if unknown := sorted(weights.keys() - expected.keys()):
        raise ValueError(f"{wrong}, which has no {some(unknown, 3)}")
    dtype = next(iter(weights.values())).dtype
    for name, x in weights.items():
        if x.shape != expected[name].shape:
            raise ValueError(f"{wrong}, where {name} is of shape {tuple(expected[name].shape)}, not {tuple(x.shape)}")
        if not x.is_floating_point() or x.dtype != dtype:
            raise ValueError(f"{wrong}, floating-point numbers of one dtype, but {name} is {x.dtype}, not {dtype}")


def _check_finite(file: Path, weights: Mapping[str, Tensor]) -> None:
    for name, x in weights.items():
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{file} must hold finite numbers, but {name} does not")


def _check_not_compiling(name: str) -> None:
    if torch.compiler.is_compiling():
        raise ValueError(f"batch.{name} must be built before the model is compiled: batch = model.prepare(batch)")


def _check_built(name: str, built: float | None, needed: float, least: bool = False) -> None:
    """Refuses lists built for a weaker certificate than the model's."""
    assert built is not None
    if built < needed if least else built > needed * (1 + 1e-9):
        wanted = f"{name.rpartition('.')[2]} {'at least' if least else 'at most'} {needed:g}"
        raise ValueError(f"batch.{name.split('.')[0]} must be built for {wanted}, as the model's, not for {built:g}")
