"""Counts, on the CPU, how often a GPU would be waited for."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """Notes the operations that would wait for a GPU, to learn a size or a value."""

    SIZE_FROM_VALUES = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "bincount",
        "unique",
        "equal",
        "linalg_check_errors",
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.__name__, kwargs or {}
        by_mask = name.startswith("index") and any(
            isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)
            for indices in args[1:2]
            if isinstance(indices, (list, tuple))
            for x in indices
        )
        unknown_length = name.startswith("repeat_interleave") and kwargs.get("output_size") is None
        if by_mask or unknown_length or any(part in name for part in self.SIZE_FROM_VALUES):
            self.found += [name] * (2 if unknown_length else 1)  # for the sum, and for whether any is negative
        return func(*args, **kwargs)
