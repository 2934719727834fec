"""The providers: this library, and what else computes the same, each as well as its users could write it."""

from ..cases import Provider
from . import dense, edges, grid, library, neighbours, orbits, paper

PROVIDERS: list[Provider] = [
    provider for module in (library, orbits, dense, edges, grid, paper, neighbours) for provider in module.PROVIDERS
]
