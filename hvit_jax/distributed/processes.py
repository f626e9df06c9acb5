"""Whether this process is one of several: what the command line and launchers say."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hvit_jax.errors import InputError

OPTIONS = ("coordinator", "processes", "process_id", "process_timeout")
# What tells a launcher, and where it counts its processes; JAX reads the rest itself.
_LAUNCHERS = (
    ("SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS"),
    ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE"),
)


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Attributes:
        coordinator: host and port of process 0; None where the launcher tells.
        count: how many there are; None where the launcher tells.
        index: which one this is; None where the launcher tells.
        seconds: without a sign of life after which a process counts as dead.
    """

    coordinator: str | None
    count: int | None
    index: int | None
    seconds: float


def add_process_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `find_processes` reads."""
    group = parser.add_argument_group(
        "several processes", "under SLURM, Open MPI and Kubernetes they find each other"
    )
    add = group.add_argument
    add("--coordinator", metavar="HOST:PORT", help="where process 0 listens, a free port of its")
    add("--processes", type=int, metavar="N", help="processes in all, each started by you")
    add("--process-id", type=int, metavar="I", help="which of them this is, from 0")
    silent = "without a sign of life after which a process counts as dead (default: 30)"
    add("--process-timeout", type=float, default=30.0, metavar="SECONDS", help=silent)


def find_processes(
    options: argparse.Namespace, environment: Mapping[str, str] = os.environ
) -> Processes | None:
    """Find out whether this process is one of several.

    Args:
        options: of `add_process_options`.
        environment: where a launcher describes itself.

    Returns:
        The processes, or None for a run of this process alone.

    Raises:
        InputError: if only some of the options are given, or they contradict each other.
    """
    given = (options.coordinator, options.processes, options.process_id)
    seconds = options.process_timeout
    if not 1 <= seconds <= 86400:
        raise InputError(f"--process-timeout must be 1 to 86400 seconds, got {seconds:g}")
    if given == (None, None, None):
        return Processes(None, None, None, seconds) if _launched(environment) else None
    if None in given:
        raise InputError("--coordinator, --processes and --process-id go together")
    address, count, index = given
    port = address.rpartition(":")[2]
    if not port.isdecimal() or ":" not in address:
        raise InputError(f"--coordinator takes HOST:PORT, such as node1:1234, got {address!r}")
    if not 0 <= index < count:
        raise InputError(
            f"--process-id must be 0 to {count - 1} (--processes {count}), got {index}"
        )
    return Processes(*given, seconds) if count > 1 else None


def refuse_several(
    arguments: Sequence[str], command: str, environment: Mapping[str, str] = os.environ
) -> None:
    """Refuse several processes for a command that runs in one.

    Args:
        arguments: the command line, without the program's name.
        command: what it is called.
        environment: where a launcher describes itself.

    Raises:
        InputError: if a launcher started several, or an option asks for them.
    """
    flags = {"--" + name.replace("_", "-") for name in OPTIONS}
    asked = [word for word in arguments if word.partition("=")[0] in flags]
    if asked or _launched(environment):
        how = f"leave out {asked[0]}" if asked else "start it once, without srun or mpirun"
        raise InputError(f"{command} runs in one process, with all devices that it sees; {how}")


def _launched(environment: Mapping[str, str]) -> bool:
    for sign, count in _LAUNCHERS:
        number = environment.get(count, "")
        if sign in environment and number.isdecimal() and int(number) > 1:
            return True
    # An indexed job; JAX asks Kubernetes itself how many pods it has.
    indexed = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys()
    return indexed and importlib.util.find_spec("kubernetes") is not None
