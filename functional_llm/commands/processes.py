"""Several processes of one command: started on this machine, or found by what starts them.

Importing this file imports nothing of JAX, as that of `options`.
"""

import argparse
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from functional_llm.files.processes import is_first

CLUSTER = "auto"
_GRACE_SECONDS = 30.0  # in which those that are left end by themselves


@dataclass(frozen=True)
class Place:
    """What a process is among those of a command.

    Args:
        number: Of the process.
        count: How many there are.
        coordinator: Address of process 0 and a port there.
    """

    number: int
    count: int
    coordinator: str


def processes(text: str) -> int | str | Place:
    """Returns what `--processes` says: how many to start, `"auto"`, or one's own place."""
    if text == CLUSTER:
        return text
    if re.fullmatch(r"[1-9]\d*", text):
        return int(text)
    match = re.fullmatch(r"(\d+)/(\d+)@(.+:\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(
            f"expected how many to start here, as 4; 'auto' on a cluster; or which this is, as "
            f"0/4@10.0.0.1:1234. Received {text!r}"
        )
    return Place(int(match[1]), int(match[2]), match[3])


def join(arguments: argparse.Namespace) -> None:
    """Makes this process one of several, if it is; the first alone prints.

    Args:
        arguments: With `processes`, if the option was given.
    """
    place = arguments.processes
    if place is None:
        return
    from functional_llm.training.processes import join_processes

    if isinstance(place, Place):
        join_processes(place.coordinator, place.number, place.count)
    else:
        join_processes()
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # to the end


def launch(name: str, options: Sequence[str], count: int) -> int:
    """Starts processes of a command on this machine; returns the exit code when all have ended.

    Each of them takes one of the machine's accelerators. If one is killed, the others are ended.

    Args:
        name: Of the command.
        options: Its command line.
        count: How many processes.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "functional_llm", name, *options]
            + ["--processes", f"{number}/{count}@localhost:{port}"],
            env={**os.environ, "JAX_LOCAL_DEVICE_IDS": str(number)},
            stdin=subprocess.DEVNULL,
        )
        for number in range(count)
    ]
    try:
        return _wait(started)
    except KeyboardInterrupt:  # which they receive, too
        _wait(started)
        raise
    finally:
        for process in started:
            process.kill()


def _wait(started: Sequence["subprocess.Popen[bytes]"]) -> int:
    failed = None
    while any(process.poll() is None for process in started):
        bad = [(i, x.returncode) for i, x in enumerate(started) if x.returncode]
        if bad and failed is None:
            failed = time.monotonic()
            number, code = bad[0]
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            print(f"process {number} {how}: all end.", file=sys.stderr, flush=True)
            if code < 0:  # it could not say so itself, and the others may wait for it
                break
        if failed is not None and time.monotonic() - failed > _GRACE_SECONDS:
            break
        time.sleep(0.1)
    for process in started:
        process.kill()
    codes = [process.wait() for process in started]
    return max((abs(code) if code > 0 else 2 for code in codes if code), default=0)
