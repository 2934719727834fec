"""Crystals in: structures of other libraries, packed into batches of tensors."""

from .batch import NUM_ELEMENTS, CrystalBatch

__all__ = ["NUM_ELEMENTS", "CrystalBatch"]
