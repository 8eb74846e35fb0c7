"""The commands and scripts: what is wrong gets a clear line and exit code 2, no traceback."""

import importlib.util
import io
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import functional_llm as flm
from functional_llm.commands.loading import announce, introduce
from functional_llm.commands.main import COMMANDS
from functional_llm.edits.quantization import quantized_modes
from tiny import save_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def run(repository: Path, monkeypatch: pytest.MonkeyPatch, name: str, *options: Any) -> Any:
    """Runs a script's `main` in this process; returns its exit code."""
    path = repository / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"script_{name}", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr("sys.argv", [path.name, *map(str, options)])
    try:
        return script.main()
    except SystemExit as stop:  # of argparse
        return stop.code


@pytest.mark.parametrize("name", ["generate", "chat"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-new-tokens", "0"], "expected a whole number above 0, received '0'"),
        (["--max-new-tokens", "1.5"], "expected a whole number above 0, received '1.5'"),
        (["--temperature", "hot"], "invalid float value: 'hot'"),
        (["--temperature", "nan"], "finite number above 0. Received: nan"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        ([], "Unknown preset 'no_such_preset'. Near names: "),
    ],
)
def test_bad_options(
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    options: list[str],
    message: str,
) -> None:
    # The preset's name is wrong too: what the command line alone shows is found first.
    code = run(repository, monkeypatch, name, "--preset", "no_such_preset", *options)
    written = capsys.readouterr()
    assert (code, written.out) == (2, "")
    assert message in written.err and len(written.err.splitlines()) <= 2


@pytest.mark.parametrize("kind", ["missing", "folder", "no text", "empty"])
def test_bad_prompt_files(
    repository: Path,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    path = tmp_path / "prompt.txt"
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(b"\xff\xfe" if kind == "no text" else b"")
    code = run(repository, monkeypatch, "generate", "--preset", tiny, "--prompt-file", path)
    error = capsys.readouterr().err
    expected = "at least one character" if kind == "empty" else "expected a text file in UTF-8"
    assert code == 2 and expected in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("generate", ["--prompt", ""], "--prompt: expected at least one character"),
        ("generate", ["--prompt", "x" * 600], "tokens.*context holds 512"),
        ("generate", ["--max-new-tokens", "512"], "context holds 512"),
        ("generate", ["--stop", ""], "--stop: expected at least one character"),
        ("generate", ["--dtype", "float8"], "invalid choice: 'float8'"),
        ("generate", ["--dtype", "float16", "--quantize", "int8"], "use --dtype bfloat16"),
        ("generate", ["--adapter", "/dev/null"], "/dev/null has no adapter_config.json"),
        ("chat", ["--system", "x" * 600], "tokens.*context holds 512"),
        ("chat", ["--max-new-tokens", "512"], "context holds 512"),
    ],
)
def test_what_cannot_be_run_is_refused_before_the_model_is_loaded(
    repository: Path,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.delattr(flm.Backbone, "from_preset")
    assert run(repository, monkeypatch, name, "--preset", tiny, *options) == 2
    written = capsys.readouterr()
    assert written.out == "" and re.search(message, written.err)
    assert len(written.err.splitlines()) <= 2


def test_a_base_model_is_refused_before_it_is_loaded(
    repository: Path,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delattr(flm.Backbone, "from_preset")
    load = flm.Tokenizer.from_preset

    def load_without_template(handle: str) -> flm.Tokenizer:
        return replace(load(handle), chat_template=None)

    monkeypatch.setattr(flm.Tokenizer, "from_preset", load_without_template)
    for name, options in (("chat", []), ("generate", ["--chat"])):
        assert run(repository, monkeypatch, name, "--preset", tiny, *options) == 2
        assert "no chat template" in capsys.readouterr().err


def test_a_terminal_is_told_what_the_default_model_is(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(repository, monkeypatch, "generate", "--help")
    assert "4-bit file" in capsys.readouterr().out
    introduce("smollm2_135m_instruct")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    introduce("smollm2_135m_instruct")
    introduce("some/folder")
    (line,) = capsys.readouterr().err.splitlines()
    assert "4-bit weights" in line and "hf://HuggingFaceTB/SmolLM2-135M-Instruct" in line
    with announce("prefill"):
        assert "[compiling prefill" in capsys.readouterr().err


def test_advice_to_install_something_works(repository: Path) -> None:
    """What pip is told to install is on an index under that name, and is what an extra has."""
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    known = {re.split("[<>=; ]", x)[0] for group in extras.values() for x in group}
    files = [
        repository / "README.md",
        *(repository / "docs").glob("*.md"),
        *(repository / "scripts").glob("*.py"),
        *(repository / "functional_llm").rglob("*.py"),
    ]
    advice = []
    for path in files:
        text = " ".join(path.read_text(encoding="utf-8").replace('"', " ").split())
        assert not re.search(r"functional[-_]llm\[", text), f"{path}: not on an index"
        for found in re.finditer(r"pip(?: install|:) ((?:-\S+ )*)([^\s`)]+)", text):
            advice.append(found[2].rstrip(".,"))
            if advice[-1].startswith("'.["):
                assert set(advice[-1][3:].rstrip("]'").split(",")) <= set(extras), path
            else:
                assert advice[-1] in known, f"{path}: pip install {advice[-1]}"
    assert len(advice) >= 5


def test_prompt_from_a_file_and_from_standard_input(
    repository: Path,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("The quick")
    options = ["--preset", tiny, "--max-new-tokens", "4"]
    texts = []
    for prompt in (["--prompt", "The quick"], ["--prompt-file", path], ["--prompt-file", "-"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("The quick"))
        assert run(repository, monkeypatch, "generate", *options, *prompt) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].strip() and texts == [texts[0]] * 3


@pytest.mark.parametrize("name", ["generate", "chat"])
def test_matrices_of_bytes(
    repository: Path,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    backbones = []

    class Recorded(flm.TextGenerator):
        def __init__(self, backbone: Any, *args: Any) -> None:
            super().__init__(backbone, *args)
            backbones.append(backbone)

    monkeypatch.setattr("functional_llm.presets.text_generator.TextGenerator", Recorded)
    monkeypatch.setattr("sys.stdin", io.StringIO("The quick"))
    options = ["--preset", tiny, "--max-new-tokens", "4", "--dtype", "bfloat16"]
    assert run(repository, monkeypatch, name, *options, "--quantize", "int8") == 0
    assert capsys.readouterr().out.strip()
    (backbone,) = backbones
    assert quantized_modes(backbone)


@pytest.mark.parametrize(("name", "code"), [("generate", 130), ("chat", 0)])
def test_interrupt_is_no_traceback(
    repository: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("functional_llm.TextGenerator.stream", interrupt)
    monkeypatch.setattr("sys.stdin", io.StringIO("The quick"))
    assert run(repository, monkeypatch, name, "--preset", tiny) == code


SLOW = """
import atexit, sys
atexit.register(lambda: print(sorted({"keras", "jax", "numpy"} & set(sys.modules))))
"""


@pytest.mark.parametrize("option", ["--help", "--bogus"])
@pytest.mark.parametrize("name", [*COMMANDS, ""])
def test_options_are_parsed_before_anything_slow_is_imported(
    repository: Path, tmp_path: Path, name: str, option: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    starts = [["-m", "functional_llm", *([name] if name else [])]]
    if (script := repository / "scripts" / f"{name}.py").is_file():
        starts.append([str(script)])
    for start in starts:
        done = subprocess.run(
            [sys.executable, *start, option],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{repository}"},
            check=False,
        )
        assert done.returncode == (0 if option == "--help" else 2), done.stderr
        assert done.stdout.splitlines()[-1] == "[]"
        program = "python -m functional_llm" if start[0] == "-m" else Path(start[0]).name
        assert f"usage: {program} {name}".strip() in done.stdout + done.stderr or name in program


def test_a_library_is_imported_whole_and_a_command_by_names(tmp_path: Path) -> None:
    """Keras finds the layers of files as soon as the library is imported; not in a command."""
    program = tmp_path / "functional-llm"  # what pip installs
    program.write_text(
        "import sys\nimport functional_llm as flm\n"
        "print('keras' in sys.modules)\n"
        "print(flm.Backbone.__name__, flm.peft.lora.__name__, len(flm.__all__))\n"
        "from functional_llm import *\nprint(TextGenerator.__name__)\n"
    )
    (tmp_path / "own.py").write_text(program.read_text())
    for path, whole in ((program, False), (tmp_path / "own.py", True)):
        done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=True)
        expected = [str(whole), f"Backbone lora {len(flm.__all__)}", "TextGenerator"]
        assert done.stdout.splitlines() == expected
