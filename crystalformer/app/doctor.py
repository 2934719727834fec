"""crystalformer doctor: works with Python alone, to say what else is missing."""

import argparse
import platform
from importlib import metadata
from typing import NamedTuple

from ..common.loading import available_backends
from ..common.process import PROG
from ..common.version import version
from ..common.words import count
from .user_errors import Stop


class Extra(NamedTuple):
    """Packages that are installed together.

    Attributes:
        purpose: what they are for.
        packages: what each costs where it is missing.
        install: what installs them all; "" for `pip install` with their names.
    """

    purpose: str
    packages: dict[str, str]
    install: str = ""


TRITON = {"triton": "GPUs take the backend 'reference', many times slower"}
REQUIRED = Extra(
    "Required",
    {
        "torch": "nothing works but --help, --version and doctor",
        "numpy": "nothing works but --help, --version and doctor",
        **(TRITON if (platform.system(), platform.machine()) == ("Linux", "x86_64") else {}),
    },
)
EXTRAS = {
    "data": Extra(
        "Extra [data]: reading structures",
        {
            "pymatgen": "no structures of pymatgen, CIF, POSCAR and most tables",
            "ase": "no structures of ase, extxyz and ase databases; no cf.ase.Calculator",
            "spglib": "every atom has its row: give symmetry_tol=0, trainings are slower",
        },
        "'crystalformer[data]'",
    ),
    "train": Extra(
        "Extra [train]: training, saved models, this command line",
        {
            "lightning": "no training",
            "jsonargparse": "no command but doctor",
            "pyyaml": "no command but doctor",
            "tqdm": "no training, no predictions on the command line",
            "safetensors": "no saved models",
            "matplotlib": "no training on the command line, which draws plots",
            "torchmetrics": "no training",
        },
        "'crystalformer[train]'",
    ),
    "tensorboard": Extra(
        "Extra [tensorboard]", {"tensorboard": "no train --tensorboard"}, "'crystalformer[tensorboard]'"
    ),
}


def doctor(arguments: list[str]) -> int:
    """Shows backends and versions, what is missing, what that costs and how to get it."""
    parser = argparse.ArgumentParser(prog=f"{PROG} doctor", description=doctor.__doc__)
    _, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise Stop(f"unrecognized arguments: {' '.join(unknown)}: see {parser.prog} --help")
    print(f"crystalformer {version}, Python {platform.python_version()}, {platform.platform()}")
    try:
        _show_backends()
    except ModuleNotFoundError as error:
        print(f"no backend computes: {error}")
    for extra in (REQUIRED, *EXTRAS.values()):
        _show_packages(extra)
    return 0


def _show_backends() -> None:
    import numpy  # noqa: F401  # without it torch computes, but the library does not
    import torch

    from ..common.backends import describe_backend

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"torch {torch.__version__}, {count(torch.get_num_threads(), 'thread')}, GPU: {', '.join(gpus) or 'none'}")
    for device in ("cpu", "cuda") if gpus else ("cpu",):
        print(describe_backend(torch.device(device)))
    print()
    print("Backends of the attention")
    for name, state in available_backends().items():
        print(f"  {name:12}{'ready' if state is True else state}")


def _show_packages(extra: Extra) -> None:
    print(f"\n{extra.purpose}")
    missing = []
    for package, cost in extra.packages.items():
        try:
            print(f"  {package:14}{metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"  {package:14}missing: {cost}")
            missing.append(package)
    if missing:
        print(f"  pip install {f'{extra.install} or pip install ' if extra.install else ''}{' '.join(missing)}")
