"""Whether this process is one of several: what the command line and launchers say."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass

from hvit_jax.errors import InputError
from hvit_jax.fields import Options, option

_processes = functools.partial(
    option, group="several processes (SLURM, Open MPI 4 and Kubernetes set the first three)"
)
HOW_TO_MEET = "give each of them --coordinator HOST:PORT, --processes and --process-id"
# Where launchers count their processes, and what else they set where JAX finds the others itself.
_JOINED = {
    "SLURM_STEP_NUM_TASKS": "SLURM_STEP_NODELIST",
    "OMPI_COMM_WORLD_SIZE": "OMPI_MCA_orte_hnp_uri",
}
# Where others count: Open MPI 5, MPICH and Intel MPI, MVAPICH, IBM's jsrun, Flux.
_COUNTS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_SIZE")
_COUNTS += ("JSM_NAMESPACE_SIZE", "FLUX_JOB_SIZE")


@dataclass(frozen=True)
class Processes(Options):
    """The processes of a run; without any of these options a launcher tells, or there is one."""

    coordinator: str | None = _processes(
        None, "address of process 0 and a free port on it", metavar="HOST:PORT"
    )
    processes: int | None = _processes(None, "processes in all, each started by you", least=1)
    process_id: int | None = _processes(None, "which of them this is, from 0", metavar="I", least=0)
    process_timeout: float = _processes(
        300.0,
        "how long to wait for other processes to start, and to answer later",
        metavar="SECONDS",
        least=1,
        most=86400,
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
        """Tell whether this process is one of several: by the options, else by what launchers say.

        Raises:
            InputError: if a launcher started several that cannot find each other.
        """
        if self.processes is not None:
            return self.processes > 1
        joined = _joined(environment)
        for name, count in _counted(environment).items():
            if count > joined:
                raise InputError(
                    f"{name}={environment[name]} says that this is one of several processes, which "
                    f"do not find each other by themselves; {HOW_TO_MEET}"
                )
        return joined > 1


def refuse_several(program: str, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse a launcher's several processes for a command that runs in one."""
    if max(_joined(environment), *_counted(environment).values()) > 1:
        raise InputError(
            f"{program} runs in one process, with all devices that it sees; start it once, without "
            "srun or mpirun"
        )


def _joined(environment: Mapping[str, str]) -> int:
    """Count the processes that find each other through JAX; 1 where there is no such launcher."""
    for count, sign in _JOINED.items():
        if sign in environment and _number(environment, count) > 1:
            return _number(environment, count)
    # An indexed job; JAX asks Kubernetes itself how many pods it has: two, or more.
    indexed = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys()
    return 2 if indexed and importlib.util.find_spec("kubernetes") is not None else 1


def _counted(environment: Mapping[str, str]) -> dict[str, int]:
    """List the processes that launchers count, by the variable that says so."""
    counted = {name: _number(environment, name) for name in _COUNTS}
    # PMIx tells ranks, but not how many there are.
    counted["PMIX_RANK"] = 1 + _number(environment, "PMIX_RANK")
    if "RANK" in environment:
        counted["WORLD_SIZE"] = _number(environment, "WORLD_SIZE")
    return counted


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    return int(text) if text.isdecimal() else 0
