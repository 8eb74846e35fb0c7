"""Several processes that run one program: they agree, watch one another and end together.

JAX's own service has a place where each can write what all can read; that is all this needs. A
process that waits for another in the middle of a step cannot be told anything: a thread beside
watches, and ends it.
"""

import atexit
import json
import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata

import jax

from functional_llm.files.processes import place_among_processes
from functional_llm.graph.types import JSON
from functional_llm.xla.jax_private import blackboard

_WIDTH = 6  # digits of a process's number, in keys
_BEATS, _STEPS, _ENDS = "flm/beat/", "flm/step/", "flm/end/"
# Other versions of these compute other numbers.
_COMPUTE: tuple[str, ...] = ("jax", "jaxlib", "keras", "numpy")
ENDED = 2  # exit code of a process whose run another has ended
LOST_SECONDS, STALLED_SECONDS = 60.0, 900.0


def join_processes(
    coordinator: str | None = None,
    number: int | None = None,
    count: int | None = None,
    *,
    lost_seconds: float = LOST_SECONDS,
    stalled_seconds: float = STALLED_SECONDS,
) -> None:
    """Makes this process one of several that run the same program on the devices of all.

    Call it before anything computes. With no arguments, JAX finds out where it is: on Slurm,
    Kubernetes, TPU pods and under Open MPI.

    ```python
    flm.sharding.join_processes("10.0.0.1:1234", number=0, count=2)
    keras.distribution.set_distribution(flm.sharding.layout(handle, flm.sharding.mesh("data=8")))
    ```

    From then on a thread watches the other processes. If one is killed, hangs or fails, this one
    ends too, with a line that says which and why, and code 2.

    Args:
        coordinator: Address of process 0 and a free port there.
        number: Of this process.
        count: How many there are.
        lost_seconds: After so many without a sign of life, a process counts as dead.
        stalled_seconds: After so many in which others have begun a step and it has not, it counts
            as stalled. A checkpoint must be written in less.

    Raises:
        RuntimeError: If the others are not found, or JAX has computed something already.
        ValueError: If their versions of Python or of packages that compute are others.
    """
    jax.distributed.initialize(coordinator, count, number)
    own, others = place_among_processes()
    if others == 1:
        return
    agree("versions", {name: metadata.version(name) for name in _COMPUTE} | {"python": _python()})
    watch = _Watch(own, others, lost_seconds, stalled_seconds)
    thread = threading.Thread(target=watch.run, name="flm-processes", daemon=True)
    thread.start()
    atexit.register(_leave, watch, thread)


def agree(what: str, facts: JSON, timeout: float = 120.0) -> None:
    """Checks that all processes have the same facts; nothing if there is one process.

    Args:
        what: They are, a word, another at each call.
        facts: Plain data.
        timeout: Seconds to wait for the others.

    Raises:
        ValueError: If they differ: the same error in each, which names every difference.
        RuntimeError: If a process does not come.
    """
    own, count = place_among_processes()
    if count == 1:
        return
    board, folder = blackboard(), f"flm/facts/{what}/"
    board.key_value_set(f"{folder}{own:0{_WIDTH}}", json.dumps(facts, default=str), True)
    try:
        board.wait_at_barrier(f"flm/{what}", int(timeout * 1000))
    except jax.errors.JaxRuntimeError as error:
        raise RuntimeError(
            f"Expected {count} processes to compare their {what}, received none of some within "
            f"{timeout:.0f} s. See what they say. ({str(error).partition(chr(10))[0]})"
        ) from None
    found = [json.loads(text) for _, text in sorted(board.key_value_dir_get(folder))]
    names = sorted({name for given in found for name in given})
    lines = [_difference(name, [given.get(name) for given in found]) for name in names]
    if any(lines):
        raise ValueError(
            f"Expected {count} processes with the same {what}, received:\n  "
            + "\n  ".join(line for line in lines if line)
            + "\nStart all of them with the same command, files and packages."
        )


def _difference(name: str, values: list[object]) -> str:
    """Returns which processes have which value, nothing if all have the same."""
    groups: dict[str, list[int]] = {}
    for number, value in enumerate(values):
        groups.setdefault(repr(value), []).append(number)
    if len(groups) == 1:
        return ""
    parts = [f"{value} in {', '.join(map(str, numbers))}" for value, numbers in groups.items()]
    return f"{name}: {'; '.join(parts)}"


def begin_step(number: int) -> None:
    """Says that this process begins a step; one that does not come so far is noticed.

    Args:
        number: Of the step, higher than any before.
    """
    own, count = place_among_processes()
    if count > 1:
        blackboard().key_value_set(f"{_STEPS}{own:0{_WIDTH}}", str(number), True)


def end_run(error: str = "") -> None:
    """Says that this process ends, so that none waits for it; with an error, all end.

    Args:
        error: What has gone wrong, if something has.
    """
    own, count = place_among_processes()
    if count == 1:
        return
    with suppress(jax.errors.JaxRuntimeError):  # the first process is gone already
        blackboard().key_value_set(f"{_ENDS}{own:0{_WIDTH}}", error, True)
        if error and own == 0:  # whose end takes away what the others read that from
            time.sleep(3 * _Watch.every)


def _leave(watch: "_Watch", thread: threading.Thread) -> None:
    """Says how this process ends, if nothing has, and lets the watching end before Python does.

    A thread that is in JAX's C++ while Python shuts down would abort the process.
    """
    fault = getattr(sys, "last_value", None)  # what nobody has caught
    if isinstance(fault, jax.errors.JaxRuntimeError):  # as of a collective without a partner
        return  # and who that was is what the watching finds, while JAX waits for it
    with suppress(jax.errors.JaxRuntimeError):
        ended = {key for key, _ in blackboard().key_value_dir_get(_ENDS)}
        if f"{_ENDS}{watch.own:0{_WIDTH}}" not in ended:
            end_run(f"{type(fault).__name__}: {fault}".partition("\n")[0] if fault else "")
    watch.over.set()
    thread.join(timeout=3 * watch.every)


def _python() -> str:
    return ".".join(map(str, sys.version_info[:3]))


@dataclass
class _Watch:
    """Watches the other processes.

    Args:
        own: Number of this process.
        count: How many there are.
        lost_seconds: As for `join_processes`; the others too.
    """

    own: int
    count: int
    lost_seconds: float
    stalled_seconds: float
    every = 1.0  # seconds
    over: threading.Event = field(default_factory=threading.Event)
    _seen: dict[str, tuple[str, float]] = field(default_factory=dict)  # key: value, since when

    def run(self) -> None:
        """Looks until it is over, or a reason to end is found; ends the process then."""
        beat, failures = 0, 0.0
        while not self.over.is_set():
            beat += 1
            try:
                blackboard().key_value_set(f"{_BEATS}{self.own:0{_WIDTH}}", str(beat), True)
                reason, failures = self.reason(time.monotonic()), 0.0
            except (jax.errors.JaxRuntimeError, AttributeError):  # AttributeError: at the end
                failures += self.every
                reason = "process 0 does not answer" if failures > self.lost_seconds else ""
            if reason:
                self._end(reason)
            self.over.wait(self.every)

    def reason(self, now: float) -> str:
        """Returns why this process is to end, or nothing.

        Args:
            now: Seconds of a clock.
        """
        board = blackboard()
        ends = self._read(board.key_value_dir_get(_ENDS), now)
        for number, (error, _) in ends.items():
            if error and number != self.own:
                return f"process {number} failed: {error}"
        beats = self._read(board.key_value_dir_get(_BEATS), now)
        for number in range(self.count):
            _, since = beats.get(number) or self._seen.setdefault(f"no beat of {number}", ("", now))
            if number not in ends and now - since > self.lost_seconds:
                return f"process {number} gave no sign of life for {now - since:.0f} s"
        steps = self._read(board.key_value_dir_get(_STEPS), now)
        furthest = max((int(step) for step, _ in steps.values()), default=0)
        arrived = max((since for step, since in steps.values() if int(step) == furthest), default=0)
        for number, (step, since) in steps.items():
            behind = now - max(since, arrived)
            if number not in ends and int(step) < furthest and behind > self.stalled_seconds:
                return (
                    f"process {number} stands at step {step}, {behind:.0f} s after others began "
                    f"step {furthest}"
                )
        return ""

    def _read(self, pairs: list[tuple[str, str]], now: float) -> dict[int, tuple[str, float]]:
        """Returns number of a process -> what it has written, and since when."""
        for key, value in pairs:
            if key not in self._seen or self._seen[key][0] != value:
                self._seen[key] = value, now
        return {int(key.rpartition("/")[2]): self._seen[key] for key, _ in pairs}

    def _end(self, reason: str) -> None:
        print(
            f"process {self.own}: the run ends, because {reason}. What is saved is whole: "
            "--resume goes on from the last checkpoint.",
            file=sys.__stderr__,
            flush=True,
        )
        with suppress(Exception):
            if not any(error for _, error in blackboard().key_value_dir_get(_ENDS)):
                blackboard().key_value_set(f"{_ENDS}{self.own:0{_WIDTH}}", reason, True)
            if self.own == 0:  # whose end takes away what the others read the reason from
                time.sleep(3 * self.every)
        os._exit(ENDED)
