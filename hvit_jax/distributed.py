"""Several processes as one run: who takes part, how they meet, and how they end together."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from hvit_jax.command_line import run
from hvit_jax.errors import InputError, first_line
from hvit_jax.peers import LOST, NoPeers, Peers
from hvit_jax.runtime_log import shorten_runtime_messages

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


def _launched(environment: Mapping[str, str]) -> bool:
    for sign, count in _LAUNCHERS:
        number = environment.get(count, "")
        if sign in environment and number.isdecimal() and int(number) > 1:
            return True
    # An indexed job; JAX asks Kubernetes itself how many pods it has.
    indexed = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys()
    return indexed and importlib.util.find_spec("kubernetes") is not None


def run_together(
    command: Callable[[Peers | NoPeers], int | None], processes: Processes | None, program: str
) -> int | None:
    """Run a command as one of several processes; where one stops early, all of them do.

    Args:
        command: is given the other processes.
        processes: from `find_processes`; None runs the command alone.
        program: the name that messages start with.

    Returns:
        The command's status. A process of several that fails ends here.

    Raises:
        InputError: if the processes do not find each other.
    """
    if processes is None:
        return command(NoPeers())
    peers = _meet(processes, program)
    status = _status(command, peers, program)
    if status:
        sys.stdout.flush()
        os._exit(status)  # Leaving in order would wait for the others.
    peers.done()
    jax.distributed.shutdown()
    peers.close()
    return status


def _meet(processes: Processes, program: str) -> Peers:
    shorten_runtime_messages(program)
    # It would swallow SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        # Peers notices a loss before JAX does, whose own way to end a process saves nothing.
        jax.distributed.initialize(
            processes.coordinator,
            processes.count,
            processes.index,
            heartbeat_timeout_seconds=int(4 * processes.seconds) + 1,
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the processes did not find each other: {first_line(error)}") from error
    # The client has no public name; Orbax takes it from here as well.
    from jax._src import distributed

    store = distributed.global_state.client
    index, count = jax.process_index(), jax.process_count()
    return Peers(store, index, count, seconds=processes.seconds, program=program)


def _status(command: Callable[[Peers], int | None], peers: Peers, program: str) -> int:
    def told() -> int | None:
        try:
            status = command(peers)
        except (InputError, KeyboardInterrupt, OSError) as error:
            peers.tell(str(error) or "interrupted")
            raise
        if status:
            peers.tell("interrupted")
        return status

    try:
        return run(told, program)
    except Exception:
        # What another process's death looks like depends on the collective that it left.
        peers.wait_for_verdict()
        traceback.print_exc()
        peers.tell("it failed; see its own messages")
        return LOST


def gather(value: Any) -> list[Any]:
    """Give every process what each of them has.

    Args:
        value: anything that JSON can express; all processes call this at the same point.

    Returns:
        The values in the order of the processes.
    """
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([text.size])).ravel()
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: text.size] = text
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def check_agreement(text: str, *more: Any) -> None:
    """Check that all processes are about to do the same.

    Args:
        text: what this one does, for people.
        *more: what else has to be the same.

    Raises:
        InputError: if another process does something else.
    """
    mine = [text, *more]
    for process, other in enumerate(gather(mine)):
        if other != mine:
            raise InputError(f"process {process} was started otherwise: {other[0]}; here: {text}")
