"""Where the progress of a run is shown: a bar, or lines where no bar can be drawn."""

import sys
import time
import warnings
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Protocol, TextIO

from tqdm.std import tqdm

_SECONDS_PER_LINE = 30.0


class Display(Protocol):
    """Shows how far a run is."""

    def show(self, step: int, facts: Mapping[str, str]) -> None:
        """Shows the steps done, and facts about the last one."""

    def close(self) -> None:
        """Ends it."""


def make_display(steps: int, done: int, what: str = "Training", unit: str = "step") -> Display:
    """Returns a bar on a terminal and in a notebook, lines elsewhere: in a log, under nohup.

    Args:
        steps: Steps of the whole run.
        done: Steps done before.
        what: What is done.
        unit: What a step is.
    """
    is_terminal = sys.stderr.isatty()
    if is_terminal or "ipykernel.zmqshell" in sys.modules:
        return _Bar(steps, done, is_terminal, what, unit)
    return _Lines(steps, done, unit)


class _Bar:
    """A bar of tqdm's. On a terminal, what is printed meanwhile goes above it."""

    def __init__(self, steps: int, done: int, is_terminal: bool, what: str, unit: str) -> None:
        make = tqdm if is_terminal else _notebook_bar()
        options = {"desc": what, "unit": unit, "mininterval": 0.5}
        self._bar = make(total=steps, initial=done, **options)
        self._bar.set_postfix_str("compiling")
        self._printed: _AboveBar | None = None
        if is_terminal and sys.stdout.isatty():
            self._printed = sys.stdout = _AboveBar(sys.stdout, self._bar)

    def show(self, step: int, facts: Mapping[str, str]) -> None:
        self._bar.set_postfix(facts, refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        self._bar.close()
        if self._printed is not None:
            self._printed.release()


def _notebook_bar() -> Any:
    """Returns tqdm's widget, or its bar of characters where a notebook has no widgets."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it would say to install ipywidgets
        from tqdm.auto import tqdm as notebook_bar
    return notebook_bar


class _AboveBar:
    """Stands in the place of `sys.stdout`: writes whole lines where the bar is, and it below."""

    def __init__(self, file: TextIO, bar: Any) -> None:
        self._file, self._bar, self._line = file, bar, ""

    def write(self, text: str) -> int:
        whole, newline, rest = (self._line + text).rpartition("\n")
        self._line = rest
        if newline:
            self._bar.clear()
            self._file.write(whole + newline)
            self._file.flush()
            self._bar.refresh()
        return len(text)

    def release(self) -> None:
        """Gives `sys.stdout` back."""
        self._file.write(self._line)
        self._line = ""
        if sys.stdout is self:
            sys.stdout = self._file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _Lines:
    """Prints a line every half a minute, and for the first and the last step."""

    def __init__(self, steps: int, done: int, unit: str) -> None:
        self._steps, self._first, self._unit = steps, done, unit
        self._began = self._next = time.monotonic()
        _print(f"{unit} {done} of {steps}: compiling")

    def show(self, step: int, facts: Mapping[str, str]) -> None:
        now = time.monotonic()
        if self._next <= now or step == self._steps:
            if step == self._first + 1:  # from here on nothing compiles
                self._began = now
            else:
                seconds = (now - self._began) / (step - self._first - 1) * (self._steps - step)
                facts = {**facts, "left": str(timedelta(seconds=round(seconds)))}
            _print(
                f"{self._unit} {step} of {self._steps}: {', '.join(map(' '.join, facts.items()))}"
            )
            self._next = now + _SECONDS_PER_LINE

    def close(self) -> None:
        pass


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
