"""What a training may ask of the machine: as many processes as it has devices, and other machines that will answer."""

import os

import torch
from lightning.fabric.plugins import environments

from .. import checks

CLUSTERS = (environments.SLURMEnvironment, environments.LSFEnvironment, environments.MPIEnvironment)


def check_machine(accelerator: str, devices: int, nodes: int) -> None:
    """Checks what lightning's Trainer would start processes for, or wait for without end.

    Raises:
        ValueError: for accelerators, devices or nodes that are not there.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if accelerator not in ("auto", "cpu", "gpu", "mps"):
        raise ValueError(f"accelerator must be auto, cpu, gpu or mps, not {accelerator!r}")
    if accelerator == "gpu" and not gpus:
        raise ValueError("accelerator must be cpu or auto, not gpu: torch finds no GPU")
    if accelerator == "mps" and not torch.backends.mps.is_available():
        raise ValueError("accelerator must be cpu or auto, not mps: torch finds no GPU of Apple")
    checks.check_integer("devices", devices, 1)
    checks.check_integer("nodes", nodes, 1)
    if environments.TorchElasticEnvironment.detect():
        return  # the processes are there already, whatever the options say
    on_gpus = gpus > 0 and accelerator in ("auto", "gpu")
    there, what = (gpus, "GPUs") if on_gpus else (1, "GPUs") if accelerator == "mps" else (_cores(), "cores")
    if devices > there:
        raise ValueError(f"devices must be at most {there}, the {what} of this machine, not {devices}")
    clustered = "MASTER_ADDR" in os.environ or any(x.detect() for x in CLUSTERS)
    if nodes > 1 and not clustered:
        raise ValueError(
            f"nodes must be 1, not {nodes}, where nothing says how to find the others: start the training with "
            "torchrun or SLURM, or set MASTER_ADDR, MASTER_PORT and NODE_RANK"
        )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
