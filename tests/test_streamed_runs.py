"""Runs on a stream: killed, with a fault in the data, by the document and by the script."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from functional_llm.presets import Backbone, Tokenizer
from functional_llm.training import Settings, StreamedRows, stream_records, train
from functional_llm.training.checkpoints import read_facts
from test_scripts import run
from test_training_run import REPOSITORY, _run
from test_training_streams import ROWS, write
from tiny import save_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def test_killed_and_resumed_on_a_stream_ends_the_same(tiny: Path, tmp_path: Path) -> None:
    names = [str(write(tmp_path / f"{x}.jsonl", ROWS[i::2])) for i, x in enumerate("ab")]

    def go(output: str, kill_after: int) -> Any:
        program, options = REPOSITORY / "tests" / "training_run.py", {"stream": names}
        return _run(program, tiny, tmp_path / output, kill_after, json.dumps(options))

    done = go("whole", 0)
    assert done.returncode == 0, done.stderr
    assert go("killed", 19).returncode == -signal.SIGKILL  # within step 10, after checkpoint 8
    checkpoint = tmp_path / "killed" / "checkpoint.safetensors"
    assert read_facts(checkpoint)["stream"]["facts"]["passes"] >= 1
    done = go("killed", 0)
    assert done.returncode == 0, done.stderr
    assert "examples were read" in done.stdout and "passes over all data so far" in done.stdout
    assert "tokens " in done.stderr
    paths = [tmp_path / name / "checkpoint.safetensors" for name in ("whole", "killed")]
    expected, received = map(load_file, paths)
    assert {name.partition("/")[0] for name in expected} == {
        "weights",
        "random",
        "optimizer",
        "data",
    }
    assert expected.keys() == received.keys()
    for name, tensor in expected.items():
        assert tensor.tobytes() == received[name].tobytes(), name
    first, second = map(read_facts, paths)
    assert first == second and len(first["losses"]) == 12


def test_a_fault_far_into_the_data_names_its_place_and_the_checkpoint(
    tiny: Path, tmp_path: Path
) -> None:
    rows = [{"text": "the lazy dog " * 4} for _ in range(6)]
    path = write(tmp_path / "a.jsonl", [*rows, {"txt": "the lazy dog"}])
    tokenizer = Tokenizer.from_preset(tiny)
    data = StreamedRows(stream_records(path), tokenizer, 8, shuffle_buffer=0)
    settings = Settings(steps=9, checkpoint_every=2, batch_size=1)
    with pytest.raises(ValueError, match="line 13 lacks columns") as error:
        train(Backbone.from_preset(tiny), data, None, settings, tmp_path, say=lambda _: None)
    assert error.value.__notes__ == [
        f"{tmp_path / 'checkpoint.safetensors'} has step 6: resume from there."
    ]


def test_the_example_of_the_document_runs(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (REPOSITORY / "docs" / "streaming.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code").mkdir()
    write(tmp_path / "chats.jsonl", ROWS * 10)
    write(tmp_path / "code" / "a.parquet", ROWS * 3)
    for wanted, here in ((r'"smollm2_\w+"', repr(str(tiny))), ("2000", "2"), ("512", "64")):
        block = re.sub(wanted, here, block)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["history"].step == 2 and len(names["history"].held_out) == 2
    state = read_facts(tmp_path / "run" / "checkpoint.safetensors")["stream"]
    assert state["facts"]["read"] > 60 and state["facts"]["tokens"] > 200


def test_the_script_streams(
    repository: Path,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = [write(tmp_path / f"{x}.jsonl", ROWS[i::2]) for i, x in enumerate("ab")]
    monkeypatch.setattr("keras.utils.set_random_seed", lambda seed: None)  # other tests' affair
    given = ["--preset", tiny, "--output", tmp_path / "out", "--length", 64, "--dataset", *names]
    wrong = [
        ([], "--streaming: how long a stream is shows when it ends: say --steps"),
        (["--steps", 2, "--weights", 1, 0], "above 0, received 0.0"),
        (["--steps", 2, "--weights", 1], "one weight for each of 2 datasets, received 1"),
        (["--steps", 2, "--stopping-strategy", "all_exhausted"], "without --weights"),
        (["--steps", 2, "--held-out", 0.001], "--held-out: expected a share that leaves"),
        (["--steps", 2, "--evaluate-on", "no.jsonl"], "no.jsonl: there is no such file"),
    ]
    for options, message in wrong:
        assert run(repository, monkeypatch, "finetune", *given, "--streaming", *options) == 2
        assert message in capsys.readouterr().err
    assert run(repository, monkeypatch, "finetune", *given, "--weights", 1, 2) == 2
    assert "add --streaming" in capsys.readouterr().err
    options = ["--steps", 3, "--weights", 1, 2, "--shuffle-buffer", 4, "--evaluate-examples", 2]
    options += ["--batch-size", 2, "--held-out", 0.3]
    assert run(repository, monkeypatch, "finetune", *given, "--streaming", *options) == 0
    said = capsys.readouterr().out
    assert "A stream of rows of 64 tokens, 2 held out" in said
    assert "3 steps, batches of 2 rows: a stream" in said and "examples were read" in said
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    options[options.index("--weights") + 1] = 3
    code = run(repository, monkeypatch, "finetune", *given, "--streaming", "--resume", *options)
    assert code == 2
    assert "weights: [1.0, 2.0] in the checkpoint, [3.0, 2.0] now" in capsys.readouterr().err
