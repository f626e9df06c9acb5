"""Whether this process is one of several: what the command line and launchers say."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass

from hvit_jax.errors import InputError
from hvit_jax.fields import Options, option

GROUP = "several processes (SLURM, Open MPI and Kubernetes set the first three)"
# What tells a launcher, and where it counts its processes; JAX reads the rest itself.
_LAUNCHERS = (
    ("SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS"),
    ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE"),
)


@dataclass(frozen=True)
class Processes(Options):
    """The processes of a run; without any of these options a launcher tells, or there is one."""

    coordinator: str | None = option(
        None, "address of process 0, and a free port there", metavar="HOST:PORT", group=GROUP
    )
    processes: int | None = option(
        None, "processes in all, each started by you", least=1, group=GROUP
    )
    process_id: int | None = option(
        None, "which of them this is, from 0", metavar="I", least=0, group=GROUP
    )
    process_timeout: float = option(
        30.0,
        "without a sign of life after which a process counts as dead",
        metavar="SECONDS",
        least=1,
        most=86400,
        group=GROUP,
    )

    def __post_init__(self):
        super().__post_init__()
        address, count, index = self.coordinator, self.processes, self.process_id
        if address is None and count is None and index is None:
            return
        if address is None or count is None or index is None:
            raise InputError("--coordinator, --processes and --process-id go together")
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise InputError(f"--coordinator takes HOST:PORT, such as node1:1234, got {address!r}")
        if index >= count:
            raise InputError(
                f"--process-id must be 0 to {count - 1} (--processes {count}), got {index}"
            )

    def several(self, environment: Mapping[str, str] = os.environ) -> bool:
        """Tell whether this process is one of several."""
        return _launched(environment) if self.processes is None else self.processes > 1


def refuse_several(program: str, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse a launcher's several processes for a command that runs in one."""
    if _launched(environment):
        raise InputError(
            f"{program} runs in one process, with all devices that it sees; start it once, without "
            "srun or mpirun"
        )


def _launched(environment: Mapping[str, str]) -> bool:
    for sign, count in _LAUNCHERS:
        number = environment.get(count, "")
        if sign in environment and number.isdecimal() and int(number) > 1:
            return True
    # An indexed job; JAX asks Kubernetes itself how many pods it has.
    indexed = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys()
    return indexed and importlib.util.find_spec("kubernetes") is not None
