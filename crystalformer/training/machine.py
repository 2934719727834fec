"""What a training may ask for: no more processes than there are devices, and only other machines that can be found."""

import os

import torch
from lightning.fabric.plugins import environments

from ..common import checks
from ..common.process import cores

CLUSTERS = (environments.SLURMEnvironment, environments.LSFEnvironment, environments.MPIEnvironment)


def check_machine(accelerator: str, devices: int, nodes: int) -> torch.device:
    """The device that lightning's Trainer trains on.

    Refuses more processes than there are devices, and other machines that it would wait for without end.

    Raises:
        ValueError: for accelerators, devices or nodes that are not there.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    apple = torch.backends.mps.is_available()
    if accelerator not in ("auto", "cpu", "gpu", "mps"):
        raise ValueError(f"accelerator must be auto, cpu, gpu or mps, not {accelerator!r}")
    if accelerator == "gpu" and not gpus:
        raise ValueError("accelerator must be cpu or auto, not gpu: torch finds no GPU")
    if accelerator == "mps" and not apple:
        raise ValueError("accelerator must be cpu or auto, not mps: torch finds no GPU of Apple")
    on_gpus = gpus > 0 and accelerator in ("auto", "gpu")
    device = torch.device("cuda" if on_gpus else "mps" if apple and accelerator != "cpu" else "cpu")
    checks.check_integer("devices", devices, 1)
    checks.check_integer("nodes", nodes, 1)
    if environments.TorchElasticEnvironment.detect():
        return device  # the processes are there already, whatever the options say
    there, what = {"cuda": (gpus, "GPUs"), "mps": (1, "GPUs"), "cpu": (cores(), "cores")}[device.type]
    if devices > there:
        raise ValueError(f"devices must be at most {there}, the {what} of this machine, not {devices}")
    clustered = "MASTER_ADDR" in os.environ or any(x.detect() for x in CLUSTERS)
    if nodes > 1 and not clustered:
        raise ValueError(
            f"nodes must be 1, not {nodes}, where nothing says how to find the others: start the training with "
            "torchrun or SLURM, or set MASTER_ADDR, MASTER_PORT and NODE_RANK"
        )
    return device
