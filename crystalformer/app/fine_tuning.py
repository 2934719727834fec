"""A training that starts from a trained model: its weights, its sizes, and which of its parts learn."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from ..common import storage
from ..data.samples import DataError
from ..model.config import FROM_TRAINING, CrystalformerConfig
from ..model.model import Crystalformer
from ..training.checkpoints import CheckpointError
from .predictor import load
from .run_folder import CONFIG, has_checkpoint

PARTS = ("embedding", "blocks", "readout")
# Of a model's config: what is no size of it.
ADJUSTABLE = (*FROM_TRAINING, "dropout")


@dataclass(frozen=True)
class Start:
    """A trained model that a training starts from. Its last layer is kept where targets and units are the same.

    Attributes:
        folder: of a training or a model.
        freeze: its parts that do not learn: "embedding", "blocks", "readout".
        sha256: of its weights, where they must be certain ones.
    """

    folder: str | Path
    freeze: tuple[str, ...] = ()
    sha256: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        object.__setattr__(self, "freeze", tuple(self.freeze))
        for part in self.freeze:
            if part not in PARTS:
                raise DataError(f"freeze must name parts among {', '.join(PARTS)}, not {part!r}")
        if set(self.freeze) == set(PARTS):
            raise DataError(f"freeze must leave a part of {', '.join(PARTS)} that learns")

    def begin(
        self, out: Path, resume: bool, model: CrystalformerConfig | None
    ) -> tuple[CrystalformerConfig, Crystalformer | None, str]:
        """The config of the network, the trained model, None where a checkpoint holds its place, and its SHA-256.

        Args:
            out: folder of the training.
            resume: it is gone on with.
            model: must be of the trained model's sizes; None takes these.

        Raises:
            DataError: for a model that cannot be read, or has other sizes or weights.
            CheckpointError: if the training in `out` started from another model.
        """
        if resume and has_checkpoint(out):
            before = yaml.safe_load((out / CONFIG).read_text())
            if "from" not in before:
                raise CheckpointError(f"from must not be given: the training in {out} did not start from a model")
            for name, value in (("from", str(self.folder)), ("from_sha256", self.sha256 or before["from_sha256"])):
                if before[name] != value:
                    raise CheckpointError(
                        f"{name} must be {before[name]}, as when the training in {out} began, not {value}"
                    )
            return model or CrystalformerConfig(**before["model"]), None, before["from_sha256"]
        trained = read_model(self.folder)
        digest = storage.sha256({}, trained.state_dict())
        if self.sha256 not in (None, digest):
            raise DataError(
                f"from must have the weights of SHA-256 {self.sha256}, as from_sha256 says, but those in {self.folder} "
                f"have {digest}"
            )
        sizes = dataclasses.asdict(trained.config)
        for name, value in (dataclasses.asdict(model) if model else {}).items():
            if name not in ADJUSTABLE and value != sizes[name]:
                raise DataError(f"model.{name} must be {sizes[name]}, as of the model in {self.folder}, not {value}")
        return model or trained.config, trained, digest


def read_model(folder: str | Path) -> Crystalformer:
    """The trained model of a folder of a training or a model; DataError where there is none."""
    try:
        return load(folder, "cpu").single("to start from")
    except (OSError, ValueError) as error:
        raise DataError(f"from must be the folder of a training or a model: {error}") from error


def keeps_last_layer(trained: CrystalformerConfig, new: CrystalformerConfig, forces: bool) -> bool:
    """Whether a training keeps the last layer of the model it starts from: of the same targets in the same units, both
    or neither of them trained with forces, beside energies of the elements. Else it is new."""
    names = ("target_names", "target_units", "probabilities")
    same = all(getattr(trained, name) == getattr(new, name) for name in names)
    return same and bool(trained.target_mean) and bool(trained.element_energies) == forces


@torch.no_grad()
def take_weights(
    network: Crystalformer, trained: Crystalformer, mean: Tensor, deviation: Tensor, forces: bool = False
) -> None:
    """Gives a network the weights of a trained model of its sizes, the scales of the decays included.

    Args:
        mean, deviation: (T) fp64, by which the network's targets are standardised. Where the last layer is kept, the
            network predicts what the trained model does.
        forces: the network is trained with forces.
    """
    last, kept = network.readout[-1], trained.config
    assert isinstance(last, nn.Linear)
    weights = trained.state_dict()
    same = keeps_last_layer(kept, network.config, forces)
    if not same:
        weights = {
            name: x for name, x in weights.items() if not name.startswith(f"readout.{len(network.readout) - 1}.")
        }
    network.load_state_dict(weights, strict=same)
    if same:
        before, factor = (torch.tensor(x, dtype=torch.float64) for x in (kept.target_mean, kept.target_deviation))
        last.weight.copy_(last.weight * (factor / deviation)[:, None])
        last.bias.copy_((last.bias * factor + before - mean) / deviation)
