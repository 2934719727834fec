"""The compiled CPU kernels, `crystalformer._C`: importing it implements the operators `crystalformer::cpu_...`."""


def _load() -> bool | str:
    try:
        from . import _C  # type: ignore[attr-defined]  # noqa: F401
    except ImportError as error:
        return (
            f"the compiled CPU kernels, crystalformer._C, cannot be loaded ({error}): install crystalformer with "
            "`pip install --no-build-isolation .`, with torch and a C++20 compiler there, or use 'reference'"
        )
    return True


# True, or why there are none and what to do about it.
LOADED = _load()
