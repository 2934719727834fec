"""A provider that is not as exact as its bound says is not timed."""

from .cases import Provider, Results, relative_error


class Wrong(Exception):
    """A provider whose results are off by more than its bound."""


def verify(provider: Provider, results: Results, truth: Results) -> float:
    """The largest error of any output or gradient of a provider, relative to the largest value of that result.

    Raises:
        Wrong: if it is more than the provider's bound, or a result has another shape than the truth.
    """
    largest = 0.0
    for name, found in results.items():
        exact = truth[name]
        if found.shape != exact.shape:
            raise Wrong(f"{name} has the shape {tuple(found.shape)}, not {tuple(exact.shape)}")
        error = relative_error(found, exact.double())
        if not error <= provider.bound:
            raise Wrong(f"{name} has an error of {error:.1e}, more than {provider.bound:.0e}")
        largest = max(largest, error)
    return largest
