"""Triton kernels, one file per op, named as in `crystalformer`. Installed as `crystalformer.kernels`."""
