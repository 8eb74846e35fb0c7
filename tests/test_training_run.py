"""Training runs: checkpoints, going on after a kill, logs, the script."""

import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file

from functional_llm import peft
from functional_llm.generation.text_generator import TextGenerator
from functional_llm.presets import Backbone, Tokenizer
from functional_llm.training import (
    Example,
    History,
    Rows,
    Settings,
    pack,
    plot_losses,
    train,
)
from functional_llm.training.checkpoints import (
    check_arguments,
    load_checkpoint,
    read_facts,
    save_checkpoint,
)
from functional_llm.training.loop import compile_model
from quick import ENVIRONMENT
from tiny import save_tiny

REPOSITORY = Path(__file__).resolve().parents[1]
PNG = b"\x89PNG\r\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def rows() -> Rows:
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 99, n).astype("int32") for n in rng.integers(5, 20, 8)]
    return pack([Example(x, np.arange(len(x)) > 3) for x in ids], 32)


def _run(*command: Any) -> subprocess.CompletedProcess[str]:
    """Runs a program of this checkout."""
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)}
    environment.pop("KERAS_BACKEND", None)  # as in a new user's shell
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def test_killed_and_resumed_ends_the_same_bit_for_bit(tiny: Path, tmp_path: Path) -> None:
    def run(output: str, kill_after: int, **options: Any) -> subprocess.CompletedProcess[str]:
        program = REPOSITORY / "tests" / "training_run.py"
        return _run(program, tiny, tmp_path / output, kill_after, json.dumps(options))

    done = run("whole", 0)
    assert done.returncode == 0, done.stderr
    # In the middle of a step, between two checkpoints, once before the first of them.
    for batches in (3, 11, 9):
        assert run("killed", batches).returncode == -signal.SIGKILL
    other = run("killed", 0, learning_rate=0.5, batch_size=3)
    assert "learning_rate: 0.001 in the checkpoint, 0.5 now" in other.stderr
    assert "batch_size: 2 in the checkpoint, 3 now" in other.stderr
    assert run("killed", 0).returncode == 0
    first, second = (tmp_path / name / "checkpoint.safetensors" for name in ("whole", "killed"))
    expected, received = load_file(first), load_file(second)
    assert expected.keys() == received.keys()
    assert {name.partition("/")[0] for name in expected} == {"weights", "random", "optimizer"}
    for name, tensor in expected.items():
        assert tensor.tobytes() == received[name].tobytes(), name
    facts, others = read_facts(first), read_facts(second)
    assert facts["step"] == 12 and len(facts["losses"]) == 12
    assert facts["losses"] == others["losses"]
    assert [step for step, _ in facts["held_out"]] == [0, 5, 10, 12]


@pytest.fixture
def model(tiny: Path) -> Any:
    return compile_model(Backbone.from_preset(tiny), Settings(steps=2))


WRITER = """
import os, signal, sys
from pathlib import Path
from functional_llm.files.replacing import replaced_file
with replaced_file(Path(sys.argv[1])) as path:
    path.write_bytes(b"half of the n")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_while_writing_leaves_the_checkpoint_before(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, model, {"step": 1})
    before = path.read_bytes()
    assert _run("-c", WRITER, path).returncode == -signal.SIGKILL
    assert path.read_bytes() == before
    assert load_checkpoint(path, model) == {"step": 1}
    assert len(os.listdir(tmp_path)) == 2
    save_checkpoint(path, model, {"step": 2})
    assert read_facts(path) == {"step": 2}
    assert os.listdir(tmp_path) == [path.name]  # what the kill left is gone


def test_a_full_disk_leaves_the_checkpoint_before(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, model, {"step": 1})
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # as if the disk ended there
    try:
        with pytest.raises(OSError, match="could not be written.*The one before is as it was"):
            save_checkpoint(path, model, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]
    assert load_checkpoint(path, model) == {"step": 1}


def test_a_full_disk_gets_no_half_of_a_model(tiny: Path, tmp_path: Path, capfd: Any) -> None:
    """One line and nothing left: HDF5 would print a traceback for each variable."""
    backbone = Backbone.from_preset(tiny)
    adapted = peft.lora(backbone, rank=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    capfd.readouterr()
    for save, where, room in (  # for the tokenizer's files, which come first
        (backbone.save, tmp_path / "model.keras", 100_000),
        (backbone.save_preset, tmp_path / "directory", 100_000),
        (lambda path: peft.save_adapter(adapted, path), tmp_path, 1_000),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            with pytest.raises(OSError, match="could not be written|with room for 0.* MB") as error:
                save(where)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert len(str(error.value).splitlines()) == 1
        assert os.listdir(tmp_path) == [] and capfd.readouterr().err == ""


def test_checkpoints_are_strict(model: Any, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, model, {})
    adapted = peft.lora(Backbone.from_preset(tiny), rank=2)
    with pytest.raises(ValueError, match="does not fit this model") as error:
        load_checkpoint(path, compile_model(adapted, Settings(steps=2)))
    assert "weights/token_embedding/embeddings is not in the model" in str(error.value)
    assert "lora" in str(error.value) and "is not in the file" in str(error.value)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="is damaged or no checkpoint"):
        load_checkpoint(path, model)


def test_other_arguments_are_named() -> None:
    kept = {"rank": 8, "seed": 0, "old": 1, "ids": [1, 2]}
    given = {"rank": 16, "seed": 0, "new": 2, "ids": (1, 2)}
    with pytest.raises(ValueError) as error:
        check_arguments(Path("c"), kept, given)
    lines = str(error.value).splitlines()[1:-1]
    assert [line.strip() for line in lines] == [
        "new: None in the checkpoint, 2 now",
        "old: 1 in the checkpoint, None now",
        "rank: 8 in the checkpoint, 16 now",
    ]


def test_a_run_does_not_fall_over_an_earlier_one(tiny: Path, rows: Rows, tmp_path: Path) -> None:
    settings = Settings(steps=2, batch_size=2)
    said: list[str] = []
    history = train(Backbone.from_preset(tiny), rows, rows, settings, tmp_path, say=said.append)
    assert "Memory of a step" in said[0] and len(said) == 3 and "perplexity" in said[2]
    assert history.held_out[1][1] < history.held_out[0][1]
    with pytest.raises(ValueError, match="is the checkpoint of an earlier run. Ask to resume it"):
        train(Backbone.from_preset(tiny), rows, rows, settings, tmp_path)
    backbone = Backbone.from_preset(tiny)
    again = train(backbone, rows, rows, settings, tmp_path, resume=True, say=said.append)
    assert not any("no checkpoint" in line for line in said)
    assert (again.step, again.losses) == (2, history.losses)
    kept = load_file(tmp_path / "checkpoint.safetensors")
    for variable in backbone.trainable_variables:
        np.testing.assert_array_equal(variable, kept[f"weights/{variable.path}"])
    with pytest.raises(ValueError, match="data: '.*' in the checkpoint, '.*' now"):
        other = Rows(rows.token_ids + 1, rows.positions, rows.segment_ids, rows.labels)
        train(Backbone.from_preset(tiny), other, rows, settings, tmp_path, resume=True)


def test_a_resume_without_a_checkpoint_is_said(tiny: Path, rows: Rows, tmp_path: Path) -> None:
    said: list[str] = []
    settings = Settings(steps=1, checkpoint_every=0)
    train(Backbone.from_preset(tiny), rows, None, settings, tmp_path, resume=True, say=said.append)
    assert said[0] == f"There is no checkpoint in {tmp_path}: this run begins at step 0."


def test_an_evaluation_that_was_cut_off_is_made_up_for(
    tiny: Path, rows: Rows, tmp_path: Path
) -> None:
    class Stop(keras.callbacks.Callback):
        def on_test_begin(self, logs: Any = None) -> None:
            raise KeyboardInterrupt

    settings = Settings(steps=2, batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        train(Backbone.from_preset(tiny), rows, rows, settings, tmp_path, callbacks=[Stop()])
    assert read_facts(tmp_path / "checkpoint.safetensors")["step"] == 2
    saved: list[bool] = []
    resumed = train(
        Backbone.from_preset(tiny),
        rows,
        rows,
        settings,
        tmp_path,
        resume=True,
        save=lambda: saved.append(True),
    )
    assert [step for step, _ in resumed.held_out] == [0, 2] and saved == [True]


def test_accumulated_batches_are_one_step(tiny: Path, rows: Rows, tmp_path: Path) -> None:
    """Two batches of two rows move the weights as one of four, where they hold as many labels."""
    same = Rows(*(np.tile(x[:1], (4, 1)) for x in vars(rows).values()))
    weights = []
    for batch_size, accumulate in ((4, 1), (2, 2)):
        backbone = Backbone.from_preset(tiny)
        settings = Settings(
            steps=3, batch_size=batch_size, accumulate=accumulate, checkpoint_every=0
        )
        history = train(backbone, same, None, settings, tmp_path, say=lambda _: None)
        assert history.step == len(history.losses) == 3
        weights.append([np.asarray(v) for v in backbone.trainable_variables])
    for one, other in zip(*weights, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    assert os.listdir(tmp_path) == []


def test_a_loss_that_is_no_number_stops_the_run(tiny: Path, rows: Rows, tmp_path: Path) -> None:
    settings = Settings(steps=9, learning_rate=1e30, clip_norm=0, checkpoint_every=1)
    with pytest.raises(RuntimeError, match="The loss is nan at step .* lower the learning rate"):
        train(Backbone.from_preset(tiny), rows, None, settings, tmp_path)


def test_a_folder_that_cannot_be_made_is_known_before_training(
    tiny: Path, rows: Rows, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    backbone = Backbone.from_preset(tiny)
    before = np.asarray(backbone.trainable_variables[0])
    with pytest.raises(OSError, match="file"):
        train(backbone, rows, rows, Settings(steps=1), tmp_path / "file" / "training")
    np.testing.assert_array_equal(backbone.trainable_variables[0], before)


def test_bad_settings(tiny: Path, rows: Rows, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected `steps` of at least 1, received 0"):
        Settings(steps=0)
    with pytest.raises(ValueError, match="Expected `learning_rate` of at least 0, received nan"):
        Settings(steps=1, learning_rate=math.nan)
    with pytest.raises(ValueError, match="fewer steps of warm-up than steps, received 3 and 3"):
        Settings(steps=3, warmup_steps=3)
    frozen = Backbone.from_preset(tiny)
    frozen.trainable = False
    with pytest.raises(ValueError, match="Expected trainable weights"):
        train(frozen, rows, None, Settings(steps=1), tmp_path)


@pytest.mark.parametrize(
    ("every", "done", "expected"),
    [
        (0, 0, [(0, 12)]),
        (5, 0, [(0, 5), (5, 10), (10, 12)]),
        (5, 7, [(7, 10), (10, 12)]),
        (5, 10, [(10, 12)]),
        (5, 12, []),
        (99, 3, [(3, 12)]),
    ],
)
def test_rounds(every: int, done: int, expected: list[tuple[int, int]]) -> None:
    assert Settings(steps=12, evaluate_every=every).rounds(done) == expected


def test_tensorboard_that_cannot_write_is_left_out(
    tiny: Path, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    tensorboard = pytest.importorskip("tensorboardX")

    def fail(self: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(tensorboard.SummaryWriter, "flush", fail)
    settings = Settings(steps=3, batch_size=2, checkpoint_every=0)
    train(Backbone.from_preset(tiny), rows, None, settings, tmp_path, tensorboard=True)
    assert capsys.readouterr().err.count("No more logs for TensorBoard: No space left") == 1


def test_tensorboard_logs(tiny: Path, rows: Rows, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto import event_pb2

    settings = Settings(steps=3, batch_size=2)
    history = train(
        Backbone.from_preset(tiny),
        rows,
        rows,
        settings,
        tmp_path,
        tensorboard=True,
        say=lambda _: None,
    )
    (file,) = (tmp_path / "tensorboard").iterdir()
    raw, scalars = file.read_bytes(), []
    while raw:  # length, its checksum, the event, its checksum
        size = int.from_bytes(raw[:8], "little")
        event = event_pb2.Event.FromString(raw[12 : 12 + size])
        scalars += [(x.tag, event.step, x.simple_value) for x in event.summary.value]
        raw = raw[16 + size :]
    expected: list[tuple[str, float, float]]
    expected = [("loss/train", i, loss) for i, loss in enumerate(history.losses, 1)]
    step, loss = history.held_out[-1]
    expected += [("loss/held_out", step, loss), ("perplexity/held_out", step, math.exp(loss))]
    assert [x[:2] for x in scalars] == [x[:2] for x in expected]
    np.testing.assert_allclose([x[2] for x in scalars], [x[2] for x in expected], rtol=1e-6)


def test_a_loss_curve(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_losses(tmp_path / "a" / "loss.png", [3.0, 2.0], [[0, 3.5], [2, 2.5]])
    assert (tmp_path / "a" / "loss.png").read_bytes().startswith(PNG)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    lines = [{"instruction": f"question {i}", "output": "the lazy dog"} for i in range(12)]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tuned(tiny: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An adapter that the script has made."""
    pytest.importorskip("matplotlib")
    output = tmp_path_factory.mktemp("output") / "adapter"
    arguments = ["--preset", tiny, "--dataset", dataset, "--output", output, "--length", 64]
    numbers = ["--learning-rate", 0.02, "--steps", 30, "--rank", 4, "--targets", "all"]
    done = _run(REPOSITORY / "scripts" / "finetune.py", *arguments, *numbers)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(output=output, said=done.stdout, arguments=arguments)


def test_the_script_makes_an_adapter_that_answers(tiny: Path, tuned: Any) -> None:
    assert (tuned.output / "loss.png").read_bytes().startswith(PNG)
    assert "11 examples in" in tuned.said and "1 held out" in tuned.said
    assert "30 steps, batches of 1 row" in tuned.said and "30 steps are few" in tuned.said
    losses = [float(x) for x in re.findall(r"held-out loss ([0-9.]+)", tuned.said)]
    assert losses[1] < 0.5 * losses[0]
    tokenizer = Tokenizer.from_preset(tiny)
    adapted = peft.load_adapter(Backbone.from_preset(tiny), tuned.output)
    question = [{"role": "user", "content": "question 3"}]
    ids = tokenizer.apply_chat_template(question, tokenize=True)
    texts = []
    for model in (adapted, peft.merge(adapted)):
        generator = TextGenerator(model, tokenizer)
        texts.append("".join(generator.stream(ids, max_new_tokens=40)))
    assert texts == ["the lazy dog"] * 2


AFTER_LOADING = {"bitfit"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--length", 9999], "Expected a length from 1 to 512 tokens, the model's context"),
        (["--rank", 0], "rank"),
        (["--dataset", "none.jsonl"], "Expected a dataset at none.jsonl: there is no such file"),
        (["--held-out", 0.99], "leaves something to train on"),
        (["--targets", "quary"], "no layer of .* matches 'quary'. Expected names \\(.*query, "),
        (["--output", "/dev/null/adapter"], "that can be written to. Received: /dev/null/adapter"),
        (["--warmup-steps", 60, "--output", "new"], "fewer steps of warm-up than steps"),
        (["--epochs", "nan"], "--epochs: expected a number above 0, received 'nan'"),
        (["--dtype", "float8"], "--dtype: invalid choice: 'float8'"),
        ([], "is the checkpoint of an earlier run"),
        (["--resume", "--rank", 2, "--steps", 30, "--targets", "all"], "rank: 4 in the checkpoint"),
        (["--resume", "--length", 32, "--no-packing"], "length: 64 in the checkpoint, 32 now"),
        (["--resume", "--no-packing"], "packing: True in the checkpoint, False now"),
        (
            ["--method", "bitfit", "--save", "merged", "--output", "new"],
            "does not fit its config, 14 differences",
        ),
    ],
)
def test_the_script_says_what_is_wrong(
    tuned: Any, changes: list[Any], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import runpy

    given = [str(x) for x in [*tuned.arguments, *changes]]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *given])
    monkeypatch.syspath_prepend(
        str(REPOSITORY / "scripts")
    )  # as Python does with a script's folder
    monkeypatch.setattr(keras.utils, "set_random_seed", lambda seed: None)  # other tests' affair
    if not AFTER_LOADING & set(changes):
        monkeypatch.delattr(Backbone, "from_preset")  # it is known before the model is loaded
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(REPOSITORY / "scripts" / "finetune.py"), run_name="__main__")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and "Traceback" not in error


def test_what_is_optional_fails_in_a_line(
    tuned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The adapter is saved before the evaluation and the plot, and both fail."""
    import runpy

    from functional_llm import training

    def fail(*arguments: Any, **options: Any) -> None:
        assert (tmp_path / "adapter_config.json").is_file()
        raise RuntimeError("out of\npaper")

    given = [*tuned.arguments, "--output", tmp_path, "--steps", 2, "--checkpoint-every", 0]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, given)])
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    monkeypatch.setattr(keras.utils, "set_random_seed", lambda seed: None)
    monkeypatch.setattr(training, "plot_losses", fail)
    add = History.add_held_out

    def fail_at_the_end(self: History, loss: float) -> None:
        add(self, loss) if self.step == 0 else fail()

    monkeypatch.setattr(History, "add_held_out", fail_at_the_end)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(REPOSITORY / "scripts" / "finetune.py"), run_name="__main__")
    assert stop.value.code == 0
    saved, *said = capsys.readouterr().out.splitlines()[-3:]
    assert f"Saved in {tmp_path}. Try it: " in saved and f"--adapter {tmp_path}" in saved
    assert said == [
        "What was trained is saved; the last evaluation failed: RuntimeError: out of",
        "No loss curve was drawn: RuntimeError: out of",
    ]
