"""Batches of crystals with their targets, bounded in crystals and images, the same for any number of processes."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..common import checks
from ..model.batch import CrystalBatch
from .crystals import build_crystals

if TYPE_CHECKING:
    from ..model.model import Crystalformer


class Example(NamedTuple):
    """What one process computes of a batch.

    Attributes:
        crystals: with their images.
        targets: (C,T), fp64, NaN where a value is not known.
        weight: (C) so that sum_ct weight_c loss_ct over the known values is this process's part of their mean loss over
            the whole batch, times the number of processes, because data parallel training takes the mean of their
            gradients. 0 for a crystal that only keeps a process busy for which the batch has no crystal.
    """

    crystals: CrystalBatch
    targets: Tensor
    weight: Tensor


class Shard(NamedTuple):
    """Which crystals of a data set make up an `Example`, and their weights."""

    indices: tuple[int, ...]
    weights: tuple[float, ...]


class BoundedBatches(Sampler[Shard]):
    """Draws every crystal exactly once an epoch, in batches of bounded size.

    Batches are made for all processes together, from seed and epoch alone, so a training has the same batches on any
    number of processes. Each batch is then shared out so that every process gets about equally many images. All
    processes get equally many batches. Where a batch has fewer crystals than there are processes, the rest of them
    get its smallest crystal with weight 0.

    It has no length: where the images bound the batches, their number differs from epoch to epoch.

    Args:
        sizes: of each crystal, in images.
        batch_size: crystals in a batch, at most.
        max_images: in a batch, at most; a crystal with more is alone in its batch.
        seed: of the order; None for the order of the crystals.
        counts: known targets of each crystal, which its weight is for; None for one each.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int,
        max_images: int | None = None,
        seed: int | None = None,
        counts: Sequence[int] | None = None,
    ) -> None:
        if batch_size < 1 or (max_images is not None and max_images < 1):
            raise ValueError(f"batch_size and max_images must be at least 1, not {batch_size} and {max_images}")
        self.sizes, self.batch_size, self.max_images, self.seed = list(sizes), batch_size, max_images, seed
        self.counts = [1] * len(self.sizes) if counts is None else list(counts)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Makes the batches of an epoch; lightning calls this before each."""
        self.batches = self._batches(epoch)

    def steps(self, epochs: int) -> int:
        """How many batches so many epochs have."""
        if self.seed is None or self.max_images is None or self.batch_size * max(self.sizes) <= self.max_images:
            return epochs * len(self.batches)  # each has as many
        return sum(len(self._batches(epoch)) for epoch in range(epochs))

    def _batches(self, epoch: int) -> list[list[int]]:
        order: Sequence[int] = range(len(self.sizes))
        if self.seed is not None:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.sizes)).tolist()
        batches: list[list[int]] = []
        images = 0
        for index in order:
            images += self.sizes[index]
            full = not batches or len(batches[-1]) == self.batch_size
            if full or (self.max_images is not None and images > self.max_images):
                batches.append([])
                images = self.sizes[index]
            batches[-1].append(index)
        return batches

    def __iter__(self) -> Iterator[Shard]:
        rank, world = 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return (self.shard(batch, rank, world) for batch in self.batches)

    def shard(self, batch: list[int], rank: int, world: int) -> Shard:
        """A process's part of a batch: the largest crystals first, each to the process with the fewest images."""
        weight = world / sum(self.counts[index] for index in batch)
        if world == 1:
            return Shard(tuple(batch), (weight,) * len(batch))
        shards: list[list[int]] = [[] for _ in range(world)]
        images = [0] * world
        for index in sorted(batch, key=lambda index: (-self.sizes[index], index)):
            least = images.index(min(images))
            shards[least].append(index)
            images[least] += self.sizes[index]
        mine = shards[rank]
        if not mine:
            return Shard((min(batch, key=self.sizes.__getitem__),), (0.0,))
        return Shard(tuple(mine), (weight,) * len(mine))


class CrystalDataset(Dataset[Example]):
    """Crystals with their targets; the images of each crystal are built once, here.

    Args:
        crystals: pymatgen Structures or ase Atoms, or what `build_crystals` made of them for this model.
        targets: (C,T), kept in fp64; NaN where a value is not known.
        model: the model whose certified image lists are wanted.

    Raises:
        ValueError: if crystals and targets are not equally many, a target is infinite, or none of a crystal is known.
    """

    def __init__(self, crystals: Sequence[Any], targets: Tensor, model: "Crystalformer") -> None:
        if targets.dim() != 2 or len(targets) != len(crystals):
            raise ValueError(f"targets must be ({len(crystals)}, T), as crystals, not {tuple(targets.shape)}")
        check_targets(targets)
        self.targets = targets.double()
        built = all(isinstance(crystal, CrystalBatch) for crystal in crystals)
        dtype = next(model.parameters()).dtype
        self.crystals = list(crystals) if built else build_crystals(crystals, model, dtype=dtype)

    def __len__(self) -> int:
        return len(self.crystals)

    @property
    def num_atoms(self) -> int:
        """Of the crystals as they were given, whose batches may have fewer rows: one for each orbit."""
        return sum(x.num_atoms if x.orbit_atoms is None else len(x.orbit_atoms.row) for x in self.crystals)

    @property
    def elements(self) -> tuple[int, ...]:
        """The atomic numbers in the crystals, in order."""
        found: set[int] = set()
        for crystal in self.crystals:
            species = crystal.species
            found.update((species if species.dim() == 1 else species.sum(0).nonzero()[:, 0] + 1).tolist())
        return tuple(sorted(found))

    @property
    def seen(self) -> dict[str, Any]:
        """What the crystals have, by the names of `CrystalformerConfig`: elements, largest_cell, atom_volumes."""
        cells = [x if x.orbit_atoms is None else x.orbit_atoms for x in self.crystals]
        atoms = torch.tensor([len(x.positions) for x in cells])
        volumes = torch.cat([x.lattice for x in cells]).double().det().abs() / atoms
        least, largest = torch.stack(volumes.aminmax()).tolist()
        return {"elements": self.elements, "largest_cell": int(atoms.max()), "atom_volumes": (least, largest)}

    def __getitem__(self, shard: Shard) -> Example:
        indices = list(shard.indices)
        crystals = CrystalBatch.cat([self.crystals[index] for index in indices])
        return Example(crystals, self.targets[indices], crystals.positions.new_tensor(shard.weights))

    def loader(
        self, batch_size: int, seed: int | None = None, max_images: int | None = None, workers: int = 0
    ) -> DataLoader[Example]:
        """Batches of crystals in order, or shuffled anew each epoch if a seed is given; see `BoundedBatches`.

        Args:
            workers: processes that join the crystals of coming batches; 0 joins those of each when it is its turn.
        """
        counts = (~self.targets.isnan()).sum(1).tolist()
        return DataLoader(
            self,
            batch_size=None,  # the sampler gives whole batches
            sampler=BoundedBatches(sizes(self.crystals), batch_size, max_images, seed, counts),
            collate_fn=_as_it_is,
            num_workers=workers,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # else starting an epoch would draw from the one that dropout has
            pin_memory=torch.cuda.is_available(),
        )


def check_targets(targets: Tensor) -> None:
    """Raises ValueError for targets (C,T) that are infinite, and for a crystal that has none; NaN are not known."""
    unknown = targets.isnan()
    checks.check_finite("targets", targets.masked_fill(unknown, 0))
    if unknown.all(1).any():
        row = int(unknown.all(1).nonzero()[0])
        raise ValueError(f"targets must have a known value in each row, but targets[{row}] is {targets[row].tolist()}")


def sizes(crystals: Sequence[CrystalBatch]) -> list[int]:
    """Images of each crystal; where the model has no use for them its pairs of atoms, which then take the memory."""
    return [x.images.num_images if x.images is not None else x.num_atoms**2 for x in crystals]


def _as_it_is(example: Any) -> Any:
    return example
