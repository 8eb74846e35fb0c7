"""Several processes on one machine train and write what one does, and end together."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import CONFIGS
from functional_llm.commands.main import main
from functional_llm.training.checkpoints import read_facts
from quick import ENVIRONMENT
from reference import save_reference
from test_training_streams import ROWS, write
from tiny import save_tiny

HERE = Path(__file__).parent
NIGHT = pytest.mark.nightly


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("several")
    save_reference({**CONFIGS["llama_grouped"], "vocab_size": 200}, path)
    return path


def environment(**others: str) -> dict[str, str]:
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": paths, **others}


def coordinator() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def start(count: int, *options: object) -> list["subprocess.Popen[str]"]:
    """Starts processes of several.py."""
    address, pipe = coordinator(), subprocess.PIPE
    return [
        subprocess.Popen(
            [sys.executable, HERE / "several.py", str(i), str(count), address, *map(str, options)],
            env=environment(),
            stdout=pipe,
            stderr=pipe,
            text=True,
        )
        for i in range(count)
    ]


def results(started: list["subprocess.Popen[str]"]) -> list[tuple[int, str, str]]:
    """Returns exit code, output and errors of each."""
    try:
        ended = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(x.returncode, *pair) for x, pair in zip(started, ended, strict=True)]


@pytest.mark.parametrize(
    ("work", "message"),
    [
        ("arguments", r"same arguments, received:\n  rate: 0\.1 in 0; 0\.2 in 1\nStart all"),
        pytest.param("versions", r"same versions, .*safetensors: None in 0; '", marks=NIGHT),
    ],
)
def test_processes_that_disagree_say_so_each(work: str, message: str, folder: Path) -> None:
    for code, output, errors in results(start(2, folder, work)):
        assert code == 2, errors
        assert "MainThread" in output and "flm-processes" not in output
        assert re.search(message, errors, re.DOTALL), errors


def losses(output: str) -> Any:
    return json.loads(re.findall(r"\[\d.*\]", output)[-1])  # other lines are of JAX


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=NIGHT)])
def test_after_a_kill_the_others_end(count: int, folder: Path, tmp_path: Path) -> None:
    last = count - 1
    started = start(count, folder, f"kill {last}", tmp_path / "killed")
    started[last].wait(120)
    began = time.monotonic()
    ended = results(started)
    assert time.monotonic() - began < 30  # 4 seconds without a sign of life, and others' work
    assert ended[last][0] == -signal.SIGKILL
    for code, _, errors in ended[:last]:
        assert code == 2, errors
        assert f"process {last} gave no sign of life" in errors
        assert "--resume goes on from the last checkpoint" in errors
    assert [x.name for x in (tmp_path / "killed").iterdir()] == ["checkpoint.safetensors"]


@NIGHT
def test_a_run_that_goes_on_is_the_same_to_the_last_bit(folder: Path, tmp_path: Path) -> None:
    results(start(2, folder, "kill 0", tmp_path / "killed"))
    for name in ("killed", "whole"):
        ended = results(start(2, folder, "train", tmp_path / name))
        assert [code for code, *_ in ended] == [0, 0], ended[0][2]
    paths = [tmp_path / name / "checkpoint.safetensors" for name in ("killed", "whole")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    (alone,) = results(start(1, folder, "train", tmp_path / "one"))
    np.testing.assert_allclose(losses(ended[0][1]), losses(alone[1]), atol=1e-5, rtol=0)


@NIGHT
@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_stands_still_ends_the_run(
    number: int, folder: Path, tmp_path: Path
) -> None:
    ended = results(start(2, folder, f"stall {number}", tmp_path))
    for code, _, errors in ended:
        assert code == 2, errors
        assert re.search(rf"process {number} stands at step 4, \d+ s after others began", errors)
    assert read_facts(tmp_path / "checkpoint.safetensors")["step"] == 3


@pytest.mark.parametrize(
    ("count", "mesh", "method"),
    [
        (2, "fsdp=2", "lora"),
        pytest.param(4, "fsdp=2,model=2", "full", marks=NIGHT),
        pytest.param(2, "data=2", "full", marks=NIGHT),
        pytest.param(4, "data=2,model=2", "lora", marks=NIGHT),
    ],
)
def test_a_command_in_several_processes(count: int, mesh: str, method: str, tmp_path: Path) -> None:
    """On a stream: each process has its rows of the batches that one process would have."""
    preset, data = save_tiny(tmp_path / "tiny"), write(tmp_path / "data.jsonl", ROWS)
    options = ["finetune", "--preset", preset, "--dataset", data, "--streaming", "--steps", "20"]
    options += ["--batch-size", "4", "--length", "32", "--held-out", "0", "--method", method]
    command = [sys.executable, "-m", "functional_llm", *map(str, options)]
    for name, others in (("one", []), ("all", ["--mesh", mesh, "--processes", str(count)])):
        done = subprocess.run(
            [*command, "--output", tmp_path / name, *others],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("Saved in") == 1  # the first process prints
    facts = [
        read_facts(tmp_path / x / "training" / "checkpoint.safetensors") for x in ("one", "all")
    ]
    assert len(facts[0]["losses"]) == 20
    np.testing.assert_allclose(facts[1]["losses"], facts[0]["losses"], atol=1e-5, rtol=0)
    file = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    one, several = (load_file(tmp_path / name / file) for name in ("one", "all"))
    assert one.keys() == several.keys()
    for name, tensor in one.items():
        np.testing.assert_allclose(several[name], tensor, atol=2e-4, rtol=0, err_msg=name)
    assert {x.name for x in (tmp_path / "one").iterdir()} == {
        x.name for x in (tmp_path / "all").iterdir()
    }


def test_options_of_processes(capsys: pytest.CaptureFixture[str]) -> None:
    several = ["--save", "keras", "--mesh", "data=2", "--processes", "2"]
    with pytest.raises(SystemExit):
        main(["finetune", "--dataset", "a", "--output", "b", *several])
    assert "--save keras: Keras writes files in one process" in capsys.readouterr().err
    for options, message in (
        (["--processes", "2"], "--processes: say what lies where: --mesh"),
        (["--processes", "0", "--mesh", "data=2"], "expected how many to start here"),
        (["--processes", "2/2@host:1", "--mesh", "data=2"], "expected how many to start here"),
        (["--processes", "0/2", "--mesh", "data=2"], "expected how many to start here"),
    ):
        with pytest.raises(SystemExit):
            main(["generate", "--prompt", "a", *options])
        assert message in capsys.readouterr().err
