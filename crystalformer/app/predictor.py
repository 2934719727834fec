"""A trained model, from structures to numbers.

model = crystalformer.load("run")
model.predict(structures)           # (C,T), in the units of the targets
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common import checks, storage
from ..common.checks import NotFinite
from ..common.storage import sha256
from ..common.words import one_line
from ..data import CrystalBatch
from ..data.crystals import ImageSettings, expected_images
from ..data.dataset import BoundedBatches
from ..data.equivalent_atoms import orbits_of_all
from ..geometry.limits import NO_MPS
from ..geometry.orbits import SYMMETRY_TOL
from ..model.config import CrystalformerConfig
from ..model.model import WEIGHTS_FILE, Crystalformer
from ..model.structures import Crystal, read_structure
from .outside import Outside

MODEL_FOLDER = "model"
ENSEMBLE = "ensemble.json"
BATCH_SIZE, MAX_IMAGES = 256, 1 << 22
# Structures of which batches are made at once.
STRUCTURES_AT_ONCE = 1024


class Refused(ValueError):
    """A structure of which the model's lists cannot be made: `place` among those that were given, and the reason."""

    def __init__(self, place: int, reason: object) -> None:
        super().__init__(f"structures[{place}]: {reason}")
        self.place, self.reason = place, str(reason)


class Predictor:
    """Predictions and features of any number of crystals, in batches of bounded memory.

    Attributes:
        model: in eval mode, predicting in the units of the targets; of an ensemble its first.
        members: all models of an ensemble, whose mean predicts; else that one.
        names, units: of its T targets; a unit is "" where it is not known.
        labels: the names with their units, as "energy (eV)", where these are known.
        symmetry_tol: Å, within which atoms are equivalent and have one row; 0 gives every atom its own. 0 by default,
            for finding the symmetry takes longer than it saves, but 1e-5 for models with reciprocal heads, as in
            training: to these a supercell is not quite its primitive cell.
        deviation_scale: (T), what the deviation of the members is multiplied by, see `app/calibration.py`.

    Raises:
        ValueError: for members of different targets, or that need different lists of images or wave vectors.
    """

    def __init__(
        self,
        model: Crystalformer | Sequence[Crystalformer],
        symmetry_tol: float | None = None,
        deviation_scale: Tensor | None = None,
    ) -> None:
        self.members = (model.eval(),) if isinstance(model, Crystalformer) else tuple(x.eval() for x in model)
        _check_alike(self.members)
        self.model = self.members[0]
        config = self.model.config
        if symmetry_tol is None:
            symmetry_tol = SYMMETRY_TOL if config.needs_wave_vectors else 0.0
        self.symmetry_tol = symmetry_tol
        self.deviation_scale = torch.ones(config.num_targets) if deviation_scale is None else deviation_scale
        self.names = config.target_names or tuple(f"target_{i}" for i in range(1, config.num_targets + 1))
        self.units = config.target_units or ("",) * config.num_targets
        self.labels = labels_of(self.names, self.units)

    def single(self, use: str) -> Crystalformer:
        """The model, where an ensemble has no meaning yet.

        Raises:
            ValueError: for an ensemble.
        """
        if len(self.members) > 1:
            raise ValueError(f"the model {use} must be a single one, not an ensemble: give the folder of a member")
        return self.model

    @property
    def seen(self) -> CrystalformerConfig:
        """A config that says what all members have seen in their trainings."""
        configs = [x.config for x in self.members]
        if len(configs) == 1:
            return configs[0]
        elements = set.intersection(*({*x.elements} for x in configs))
        least, largest = (max(x.atom_volumes[:1] for x in configs), min(x.atom_volumes[1:] for x in configs))
        volumes = (*least, *largest) if all(x.atom_volumes for x in configs) else ()
        return replace(
            configs[0],
            elements=tuple(sorted(elements)),
            element_energies=(),
            largest_cell=min(x.largest_cell for x in configs),
            atom_volumes=volumes if volumes == tuple(sorted(volumes)) else (),
        )

    @property
    def digest(self) -> str:
        """SHA-256 of the model: its configuration and weights, of all members."""
        found = [sha256(asdict(x.config), {name: y.cpu() for name, y in x.state_dict().items()}) for x in self.members]
        return found[0] if len(found) == 1 else sha256({"members": found, "scale": self.deviation_scale.tolist()})

    def predict(self, structures: Sequence[Any], progress: Callable[[int], object] | None = None) -> Tensor:
        """(C,T) fp64, the predictions, in the units of the targets, on the CPU; NaN where the model has none.

        Args:
            structures: pymatgen Structures or ase Atoms, mixed as you like, or what `read_structure` made of them.
            progress: called with the number of crystals done, after each batch.

        Raises:
            TypeError, ValueError: as `CrystalBatch.from_structures`, naming the structure.
        """
        return self._of_members(structures, progress).mean(0)

    def predict_deviation(
        self, structures: Sequence[Any], progress: Callable[[int], object] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(C,T) fp64, the predictions of an ensemble, and (C,T), the deviations of its members, times their scale.

        Args:
            structures, progress: as for `predict`.

        Raises:
            ValueError: if there is one model only.
            TypeError, ValueError: as `predict`.
        """
        if len(self.members) == 1:
            raise ValueError("model must be an ensemble to say deviations, not a single model")
        found = self._of_members(structures, progress)
        return found.mean(0), found.std(0) * self.deviation_scale

    @torch.no_grad()
    def _of_members(self, structures: Sequence[Any], progress: Callable[[int], object] | None) -> Tensor:
        """(M,C,T) fp64."""
        results = []
        for crystals, batch in self._batches(structures):
            results.append(self._outputs(crystals, batch))
            if progress is not None:
                progress(len(crystals))
        return torch.cat(results, 1)

    def _outputs(self, crystals: Sequence[Crystal], batch: CrystalBatch) -> Tensor:
        """(M,C,T) fp64. A crystal whose features are not finite gets NaN; the others are predicted all the same."""
        try:
            return torch.stack([model(batch).cpu().double() for model in self.members])
        except NotFinite:
            pass
        if len(crystals) == 1:
            return torch.full((len(self.members), 1, len(self.names)), torch.nan, dtype=torch.float64)
        return torch.cat([self._outputs([x], self._prepared([x])) for x in crystals], 1)

    def outside(self, structures: Sequence[Any]) -> list[Outside]:
        """For each structure what no crystal of the training had: what the model predicts for those is a guess.

        Elements, more atoms in the primitive cell, less or more volume for an atom; of these what the model knows of
        its training. As strings they are the words of `crystalformer predict`, "" for those as in the training.

        Args:
            structures: as for `predict`.
        """
        crystals = (read_structure(x, f"structures[{i}]") for i, x in enumerate(structures))
        seen = self.seen
        return [Outside.of(x, seen) for x in crystals]

    def unseen_elements(self, structures: Sequence[Any]) -> list[tuple[int, ...]]:
        """For each structure its elements, as atomic numbers, that no crystal of the training had: of `outside`."""
        return [x.elements for x in self.outside(structures)]

    @torch.no_grad()
    def encode(self, structures: Sequence[Any], atoms: bool = False) -> Any:
        """Features for other models, on the CPU: (C, model_dim), pooled over the atoms of each crystal as the
        model pools them.

        Args:
            structures: pymatgen Structures or ase Atoms.
            atoms: give those of the atoms instead, a list of (n, model_dim), one for each crystal.
        """
        crystals: list[Tensor] = []
        for _, batch in self._batches(structures):
            features = self.model.encode(batch)
            if atoms:
                orbits = batch.orbit_atoms
                ptr, rows = (batch.ptr, features) if orbits is None else (orbits.row_ptr, features[orbits.row])
                crystals += rows.cpu().split(ptr.diff().tolist())
            else:
                crystals += self.model.pool(features, batch).cpu()
        return crystals if atoms else torch.stack(crystals)

    def _batches(self, structures: Sequence[Any]) -> Iterator[tuple[list[Crystal], CrystalBatch]]:
        """The crystals in order, as many at once as memory is for."""
        if not len(structures):
            raise ValueError("structures must hold at least one structure, not none")
        for start in range(0, len(structures), STRUCTURES_AT_ONCE):
            chunk = structures[start : start + STRUCTURES_AT_ONCE]
            crystals = [read_structure(x, f"structures[{i}]") for i, x in enumerate(chunk, start)]
            for batch in BoundedBatches(self._sizes(crystals), BATCH_SIZE, MAX_IMAGES).batches:
                yield from self._together([crystals[i] for i in batch], start + batch[0])

    def _sizes(self, crystals: Sequence[Crystal]) -> list[int]:
        """About the images of each crystal; where the model has no use for them its pairs of atoms."""
        settings = ImageSettings.of(self.model.config)
        if settings is None:
            return [len(x.positions) ** 2 for x in crystals]
        return expected_images(CrystalBatch.pack(crystals), settings).clamp(max=MAX_IMAGES).long().tolist()

    def _together(self, crystals: list[Crystal], first: int) -> Iterator[tuple[list[Crystal], CrystalBatch]]:
        """In one batch; if they are refused, each in one of its own, so that the error names the structure."""
        try:
            batch = self._prepared(crystals)
        except ValueError as error:
            if len(crystals) == 1:
                raise Refused(first, error) from error
            for i, crystal in enumerate(crystals, first):
                yield from self._together([crystal], i)
        else:
            yield crystals, batch

    def _prepared(self, crystals: Sequence[Crystal]) -> CrystalBatch:
        """With its lists, on the model's device."""
        weight = next(self.model.parameters())
        orbits = orbits_of_all(crystals, self.symmetry_tol) if self.symmetry_tol else None
        return self.model.prepare(CrystalBatch.pack(crystals, weight.dtype, orbits)).to(weight.device)


def labels_of(names: Sequence[str], units: Sequence[str]) -> tuple[str, ...]:
    """The names of targets with their units, where these are known."""
    pairs = zip(names, units or ("",) * len(names), strict=True)
    return tuple(f"{name} ({unit})" if unit else name for name, unit in pairs)


def not_finite(ids: Sequence[str], predictions: Tensor) -> list[str]:
    """The ids whose predictions (C,T) are not all finite."""
    return [id for id, good in zip(ids, predictions.isfinite().all(1).tolist(), strict=True) if not good]


def load(
    path: str | Path | Sequence[str | Path],
    device: str | torch.device = "auto",
    backend: str = "auto",
    symmetry_tol: float | None = None,
) -> Predictor:
    """A trained model: of the folder of a training (`crystalformer train --out`), or one with config.json and weights.

    Args:
        path: the folder, also of an ensemble (`--ensemble`); or several, for an ensemble of them.
        device: "auto" is the GPU if there is one, else the CPU; any other as torch names it.
        backend: of the attention, see `periodic_attention`.
        symmetry_tol: Å, within which atoms are equivalent, see `CrystalBatch.from_structures`; 0 for no reduction, None
            for what `Predictor` has by default.

    Raises:
        FileNotFoundError: if there is no model.
        ValueError: for a model of another version, or a damaged one, and a device that is not there.
    """
    device, scale = _device(device), None
    if symmetry_tol is not None:
        symmetry_tol = checks.check_number("symmetry_tol", symmetry_tol, closed=True)
    folders = [Path(path)] if isinstance(path, (str, Path)) else [Path(x) for x in path]
    if not folders:
        raise ValueError("path must be the folder of a model, or several, not none")
    scales: dict[str, float] | None = None
    if len(folders) == 1:
        folders, scales = read_ensemble(folders[0])
    elif among := [x for x in folders if (x / ENSEMBLE).is_file()]:
        raise ValueError(f"path must be folders of single models, not {among[0]}, which is one of an ensemble")
    models = [Crystalformer.from_pretrained(_model_folder(x), backend).to(device) for x in folders]
    if scales is not None:
        names = models[0].config.target_names
        if scales.keys() != {*names}:
            raise ValueError(f"{path}: {ENSEMBLE} must have the targets {', '.join(names)}, not {', '.join(scales)}")
        scale = torch.tensor([scales[name] for name in names], dtype=torch.float64)
    return Predictor(models, symmetry_tol, scale)


def _model_folder(path: Path) -> Path:
    """With the weights of the model that a path stands for."""
    if not (path / WEIGHTS_FILE).is_file() and (path / MODEL_FOLDER / WEIGHTS_FILE).is_file():
        path = path / MODEL_FOLDER
    elif not (path / WEIGHTS_FILE).is_file() and (path / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"path must be the folder of a complete training, but that in {path} was stopped; go on with: "
            f"crystalformer train --out {path} --resume"
        )
    elif not (path / WEIGHTS_FILE).is_file() and (path / "member-0").is_dir():
        raise FileNotFoundError(
            f"path must be the folder of a complete ensemble, but that in {path} was stopped; go on with: "
            f"crystalformer train --out {path} --resume"
        )
    return path


def _check_alike(members: Sequence[Crystalformer]) -> None:
    """One list of images and wave vectors serves all members, and one name is one target."""
    first = members[0].config
    for name in (
        *("num_targets", "target_names", "target_units"),
        *("needs_images", "needs_wave_vectors", "decay_min", "decay_reciprocal_min", "tol", "logit_range"),
    ):
        for x in members:
            if getattr(x.config, name) != getattr(first, name):
                raise ValueError(
                    f"the members of an ensemble must have the same {name}, not {getattr(first, name)} and "
                    f"{getattr(x.config, name)}"
                )


def read_ensemble(path: Path) -> tuple[list[Path], dict[str, float] | None]:
    """The folders of the members of the ensemble in a folder, and the scales of their deviations by target; the folder
    itself, and None, where there is no ensemble.

    Raises:
        FileNotFoundError: if a member is not there.
        ValueError: for a damaged file.
    """
    file = path / ENSEMBLE
    if not file.is_file():
        return [path], None
    about = storage.read_json(file)
    try:
        members, scales = [*map(str, about["members"])], {str(x): float(y) for x, y in about["deviation_scale"].items()}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{file} must say members and deviation_scale of an ensemble, as a training writes it"
        ) from error
    if missing := [x for x in members if not (path / x).is_dir()]:
        raise FileNotFoundError(f"{path} must have all members of its ensemble, but {', '.join(missing)} is not there")
    return [path / x for x in members], scales


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if str(device).partition(":")[0] == "mps":
        raise ValueError(f"device must be cpu, not {str(device)!r}: {NO_MPS}")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except Exception as error:  # torch has many, one for each kind of device that is not there
        raise ValueError(f"device must be one that torch has here, not {device!r}: {one_line(error, 200)}") from error
    if found.type == "meta":
        raise ValueError("device must be one that computes, not 'meta'")
    return found
