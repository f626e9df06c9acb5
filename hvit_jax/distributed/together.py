"""Several processes as one run: how they meet, what they tell each other, how they end together."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from hvit_jax.distributed.peers import LOST, NoPeers, Peers
from hvit_jax.distributed.processes import Processes
from hvit_jax.distributed.runtime_log import shorten_runtime_messages
from hvit_jax.errors import InputError, first_line
from hvit_jax.system.run import run


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


def check_agreement(text: str, **more: Any) -> None:
    """Check that all processes are about to do the same.

    Args:
        text: what this one does, for people.
        **more: what else has to be the same, such as the content of files that each of them reads.

    Raises:
        InputError: if another process does something else.
    """
    mine = json.loads(json.dumps(more))
    for process, (said, other) in enumerate(gather([text, mine])):
        if said != text:
            raise InputError(f"process {process} was started otherwise: {said}; here: {text}")
        differing = [name for name in mine if other.get(name) != mine[name]]
        if differing:
            raise InputError(f"process {process} has another {', '.join(differing)} than this one")
