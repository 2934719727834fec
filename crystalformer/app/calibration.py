"""Are the errors of an ensemble as large as its deviations say?

The deviation s of the members' predictions is multiplied by one number for each target, sqrt(mean (e/s)²) over the
errors e on the validation crystals (D. Levi et al., Sensors 22, 5540, 2022). If errors were normal, with these
deviations, a share of erf(z/√2) of them would be smaller than z deviations.
"""

import math

import torch
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

# The shares that are compared with those expected.
EXPECTED = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)


def scale(errors: Tensor, deviations: Tensor) -> float:
    """What deviations (C) are to be multiplied by to fit the errors (C); 1 where there are none.

    Raises:
        ValueError: if no two members differ.
    """
    if not len(errors):
        return 1.0
    apart = deviations > 0
    if not apart.any():
        raise ValueError("the members of an ensemble must differ, but all predict the same")
    return float((errors[apart] / deviations[apart]).square().mean().sqrt())


def within(errors: Tensor, deviations: Tensor, z: float) -> float:
    """The share of errors (C) that are no larger than z deviations (C)."""
    return float((errors.abs() <= z * deviations).double().mean())


def coverage(errors: Tensor, deviations: Tensor) -> Tensor:
    """For each share of EXPECTED the share of errors (C) that are as small as normal ones would be."""
    bounds = math.sqrt(2) * torch.erfinv(EXPECTED)
    return (errors.abs() <= bounds[:, None] * deviations).double().mean(1)


def summary(errors: Tensor, deviations: Tensor) -> dict[str, float]:
    """What metrics.json says of errors (C) and deviations (C) fp64, of at least one crystal.

    within_1, within_2: the shares of errors within one and two deviations, of normal ones 0.683 and 0.954.
    miscalibration: the mean difference of `coverage` from EXPECTED.
    rank_correlation: Spearman's, of the errors' sizes and the deviations; 1 if the deviations rank the errors rightly.
    """
    found = {
        "within_1": within(errors, deviations, 1),
        "within_2": within(errors, deviations, 2),
        "miscalibration": float((coverage(errors, deviations) - EXPECTED).abs().mean()),
    }
    if len(errors.abs().unique()) > 1 and len(deviations.unique()) > 1:  # else there is no rank
        found["rank_correlation"] = float(spearman_corrcoef(deviations, errors.abs()))
    return found
