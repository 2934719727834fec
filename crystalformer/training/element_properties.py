"""First weights of an embedding that are alike where elements are: a small data set has few crystals of each."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from ..common.elements import SYMBOLS
from ..model.model import Crystalformer

# Attributes of pymatgen's Element.
PROPERTIES = (
    "row",
    "group",
    "mendeleev_no",
    "X",
    "atomic_radius",
    "van_der_waals_radius",
    "average_ionic_radius",
    "ionization_energy",
    "electron_affinity",
    "max_oxidation_state",
    "min_oxidation_state",
    "melting_point",
    "molar_volume",
    "atomic_mass",
)
LOGARITHMIC = ("atomic_mass",)
# Of the variance of the first weights; the rest is drawn for each element alone, so that no two are the same.
SHARE = 0.8


def element_properties() -> Tensor:
    """(98,14) fp64, the properties of the elements by atomic number, each of mean 0 and deviation 1 over those that
    have it, and 0 where it is not known."""
    from pymatgen.core import Element

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pymatgen warns of each value that it does not have
        rows = [[_value(Element(symbol), name) for name in PROPERTIES] for symbol in SYMBOLS]
    found = torch.tensor(rows, dtype=torch.float64)
    known = found.isfinite()
    mean = found.nanmean(0)
    deviation = (found - mean).square().nanmean(0).sqrt()
    return ((found - mean) / deviation).where(known, 0.0)


@torch.no_grad()
def embed_properties(model: Crystalformer) -> None:
    """Makes the first weights of a model's embedding a random linear map of the properties of the elements, in place.

    A fifth of their variance stays as it was drawn, and all of it together as large. Before `calibrate`.
    """
    weight = model.embedding.weight
    properties = element_properties()
    number, width = properties.shape[1], weight.shape[1]
    directions = torch.randn(number, width, dtype=torch.float64) * (float(weight.std()) / math.sqrt(number))
    weight.copy_(math.sqrt(SHARE) * (properties @ directions) + math.sqrt(1 - SHARE) * weight.double())


def _value(element: Any, name: str) -> float:
    value = getattr(element, name)
    value = math.nan if value is None else float(value)
    return math.log(value) if name in LOGARITHMIC else value
