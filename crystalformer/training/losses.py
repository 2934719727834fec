"""The losses by their names, and what is measured over an epoch beside them."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.utilities import dim_zero_cat

# Of outputs and targets (C,T), each with its own; "huber" is quadratic up to an error of 1.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "l1": F.l1_loss,
    "mse": F.mse_loss,
    "huber": F.huber_loss,
    "bce": F.binary_cross_entropy_with_logits,
}
MEANS = torch.float64  # over an epoch


class Mean(Metric):
    """Mean over all processes of the values that are counted. torchmetrics' own mean looks for NaN in every batch."""

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "count"):
            self.add_state(name, torch.zeros((), dtype=MEANS), dist_reduce_fx="sum")

    def update(self, values: Tensor, counted: Tensor) -> None:
        """Takes values where counted, of the same shape, is true."""
        self.total += (values.to(MEANS) * counted).sum()
        self.count += counted.sum()

    def compute(self) -> Tensor:
        return self.total / self.count


class Auc(Metric):
    """`auc` over all processes. torchmetrics' own is 0 where there is one class only, which reads as the worst."""

    probabilities: list[Tensor]
    classes: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("probabilities", "classes"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, probabilities: Tensor, classes: Tensor) -> None:
        """Takes probabilities (C) of class 1 and the classes (C), 0 or 1, NaN where they do not count."""
        self.probabilities.append(probabilities)
        self.classes.append(classes)

    def compute(self) -> Tensor:
        probabilities, classes = dim_zero_cat(self.probabilities), dim_zero_cat(self.classes)
        counted = ~classes.isnan()
        return auc(probabilities[counted], classes[counted])


def auc(probabilities: Tensor, classes: Tensor) -> Tensor:
    """The area under the ROC curve of probabilities (C) of class 1; NaN where not both classes are there."""
    if not 0 < classes.sum() < len(classes):
        return classes.new_full((), torch.nan)
    return binary_auroc(probabilities, classes.int())
