"""A training step of our model with another provider's attention: the network around it costs the same for all."""

from collections.abc import Callable
from unittest import mock

from torch import Tensor

from crystalformer.model import layers

from ..cases import Case, seeded_model, training_case
from ..problems import Problem


def training_with(make: Callable[[Problem], Callable[..., Tensor]]) -> Callable[[Problem], Case]:
    """`Provider.prepare` of the step for `make(problem)` -> attend(q, k, v, decay, weight, positions, lattice)."""

    def prepare(x: Problem) -> Case:
        attend, model, batch = make(x), seeded_model(x, x.dtype, "reference"), x.crystals.to(x.dtype)
        batch.images = x.images

        def instead(
            q: Tensor, k: Tensor, v: Tensor, decay: Tensor, positions: Tensor, lattice: Tensor, images, weight, *_, **__
        ) -> Tensor:
            return attend(q=q, k=k, v=v, decay=decay, weight=weight, positions=positions, lattice=lattice)

        def forward() -> Tensor:
            with mock.patch.object(layers, "periodic_attention", instead):
                return model(batch)

        return training_case(model, forward)

    return prepare
