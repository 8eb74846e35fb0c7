"""What a training run shows: the size that was chosen, and how far it is."""

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from functional_llm.training import display, plan_run


@pytest.mark.parametrize(
    ("rows", "given", "expected"),
    [
        (4, {}, (1, 60)),  # small data
        (16, {}, (2, 60)),
        (100, {}, (4, 75)),
        (1000, {}, (4, 750)),
        (4, {"epochs": 3}, (1, 12)),
        (4, {"steps": 7, "epochs": 3}, (1, 7)),
        (4, {"batch_size": 4}, (4, 60)),
        (100, {"accumulate": 5}, (2, 60)),
    ],
)
def test_plans(rows: int, given: dict[str, Any], expected: tuple[int, int]) -> None:
    plan = plan_run(rows, **given)
    assert (plan.batch_size, plan.steps) == expected
    assert plan.passes is not None
    is_small, is_few = plan.passes > 3, plan.steps < 60
    assert ("are small" in plan.advice, "are few" in plan.advice) == (is_small, is_few)


def test_a_plan_for_a_stream_needs_its_steps() -> None:
    plan = plan_run(None, steps=100)
    assert plan.describe() == "100 steps, batches of 4 rows: a stream" and plan.advice == ""
    with pytest.raises(ValueError, match="Expected `steps` for a stream, whose length is not"):
        plan_run(None, epochs=3)


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_in_a_log_is_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    log, now = io.StringIO(), [0.0]
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    shown = display.make_display(100, 0)
    for step in range(1, 101):
        now[0] += 1
        shown.show(step, {"loss": f"{step}.5"})
    shown.close()
    assert log.getvalue().splitlines() == [
        "step 0 of 100: compiling",
        "step 1 of 100: loss 1.5",
        "step 31 of 100: loss 31.5, left 0:01:09",
        "step 61 of 100: loss 61.5, left 0:00:39",
        "step 91 of 100: loss 91.5, left 0:00:09",
        "step 100 of 100: loss 100.5, left 0:00:00",
    ]


def test_what_is_printed_goes_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", screen)
    shown = display.make_display(10, 2)
    shown.show(3, {"loss": "2.5"})
    print("a line", "and more")
    print("half a line, ", end="")
    print("its other half")
    shown.show(4, {"loss": "2.4"})
    shown.close()
    assert sys.stdout is screen
    lines = screen.getvalue().replace("\r", "\n").splitlines()
    assert "a line and more" in lines and "half a line, its other half" in lines
    assert "2/10 [" in screen.getvalue() and "4/10 [" in screen.getvalue()


def test_a_notebook_without_widgets_has_a_bar_and_no_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setitem(sys.modules, "ipykernel.zmqshell", SimpleNamespace())
    shell = SimpleNamespace(get_ipython=lambda: None)
    monkeypatch.setitem(sys.modules, "IPython", shell)
    for name in ("tqdm.auto", "tqdm.autonotebook"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    shown = display.make_display(10, 0)
    shown.show(10, {"loss": "1"})
    shown.close()
    assert "10/10" in log.getvalue()
