"""The benchmark harness: a real worker on a small real model, and the arithmetic of its tables."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from benchmarks import accelerator, accelerator_work, report, tiny_models
from benchmarks.engines import ENGINES
from benchmarks.measures import CHECK, MEASURES, WORKS, make_prompts
from benchmarks.memory import read_bandwidth
from benchmarks.turns import Turns, Worker


def test_worker_measures_and_survives_an_error(material: Path, tmp_path: Path) -> None:
    weights = material / "stories260K"
    worker = Worker("functional_llm", "float32", weights, tmp_path)
    try:
        assert worker.wait()["figures"]["load"] > 0
        assert "KeyError" in worker.ask("no_such_measure", 0)["error"]
        assert worker.ask("prefill_32", 0)["figures"] > 0
        assert worker.ask("peak_memory", 1)["figures"] > 50
    finally:
        worker.close()


@pytest.mark.nightly
@pytest.mark.parametrize("work", ["lora", "train"])
def test_worker_trains(material: Path, tmp_path: Path, work: str) -> None:
    worker = Worker("functional_llm", "float32", material / "stories260K", tmp_path, work)
    try:
        assert "load" in worker.wait()["figures"]
        assert len(worker.ask(CHECK, 0)["figures"]["losses"]) == 2
        assert worker.ask(f"{work}_step", 1)["figures"] > 0
    finally:
        worker.close()


def test_worker_that_cannot_load_says_why(tmp_path: Path) -> None:
    worker = Worker("functional_llm", "float32", tmp_path / "nowhere", tmp_path)
    try:
        assert "FileNotFoundError" in worker.wait()["error"]
        assert "the process ended" in worker.ask("decode_1", 1)["error"]
    finally:
        worker.close()


def test_second_token_is_timed_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import time; print(1, end='', flush=True); time.sleep(0.2); print(2, end='')"
    entry = replace(ENGINES["functional_llm"], script=("-c", program))
    worker = Worker("functional_llm", "float32", tmp_path / "nowhere", tmp_path)
    try:
        monkeypatch.setitem(ENGINES, "functional_llm", entry)
        first, second = (worker.first_tokens(tmp_path, count)["figures"] for count in (1, 2))
        assert 0 < first and 0.2 < second
        monkeypatch.setitem(ENGINES, "functional_llm", replace(entry, script=("-c", "1 / 0")))
        assert "ended with code 1" in worker.first_tokens(tmp_path, 2)["error"]
    finally:
        worker.close()


def test_ratio_compares_each_round_with_itself() -> None:
    figures = {"a": [10.0, 100.0, 30.0], "b": [5.0, 25.0, 10.0]}  # 2, 4 and 3 times
    assert report.ratio("decode_1", figures, "a", "b") == 3.0
    assert report.ratio("first_token_warm", figures, "b", "a") == 3.0


def test_table_and_log(tmp_path: Path) -> None:
    turns = Turns(print, tmp_path)
    turns.figures = {"decode_1": {"functional_llm float32": [40.0], "transformers float32": [20.0]}}
    turns.others = {"decode_1": [0.5, 0.1, 0.3]}
    turns.bandwidths = {"decode_1": [30.0, 20.2, 25.0]}
    turns.errors = {"keras_hub float32": {"decode_1": "no memory"}}
    table = report.make_table(turns, first="functional_llm")
    assert "| transformers float32 | 20 | 20 to 20 | 2.00× |" in table
    assert "| decode_1 | keras_hub float32 | failed: no memory | | |" in table
    log = tmp_path / "LOG.md"
    for note in ("first", "second"):
        report.append_log(log, turns, table, ["greedy ids of b: as a"], note)
    text = log.read_text()
    assert text.count(table) == 2 and "UTC: second" in text and "cores" in text
    assert "(median of the turns): decode_1 30%" in text
    assert "(median of the rounds, range): decode_1 25 (20 to 30)" in text


def test_an_accelerator_is_measured(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.accelerator", "--smoke", "--measures", "text"]
    command += ["--engines", "functional_llm", "--log", str(tmp_path / "LOG.md"), "--note", "a try"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository, check=True)
    heading, *_, row = (tmp_path / "LOG.md").read_text().strip().splitlines()
    assert f"cpu JAX {jax.__version__}, one small layer, bfloat16: a try" in heading
    kind, engine, rate, first, peak = [x.strip() for x in row.strip("|").split("|")]
    assert (kind, engine) == ("text 2x8+4", "functional_llm")
    assert float(rate) > 0 and float(first) > 0 and float(peak) > 0.1
    assert row in done.stdout


def test_tiny_models_are_compared_with_stored_logits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_models.write_references(tmp_path, ["llama_grouped"])
    tiny_models.compare(tmp_path)
    float32, bfloat16 = capsys.readouterr().out.strip().splitlines()[-2:]
    assert "logits of 1 differ" in float32 and "from those of Transformers" in float32
    differences = [float(line.split("at most ")[1].split()[0]) for line in (float32, bfloat16)]
    assert differences[0] < 1e-4 < differences[1] < 1


def test_what_an_accelerator_lacks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = replace(ENGINES["keras_hub"], packages=("no-such-package",))
    monkeypatch.setitem(ENGINES, "keras_hub", entry)
    log = accelerator.Log(tmp_path / "LOG.md")
    assert not accelerator.is_installed("keras_hub", log)
    assert "no-such-package is not installed" in (tmp_path / "LOG.md").read_text()
    failed = accelerator.make_row("full", "4x2048", "keras_hub", {"error": "no memory"})
    assert failed == "| full 4x2048 | keras_hub | failed: no memory | | |"
    figures = {"rate": 12345.6, "first": 9.87, "peak": 17.2e9}
    row = accelerator.make_row("full", "4x2048", "transformers", {"figures": figures})
    assert row == "| full 4x2048 | transformers | 12346 | 9.9 | 17.20 |"
    (late,) = accelerator.measure("full", "keras_hub", ["4x2048"], tmp_path, 0.0)
    assert late == "| full | keras_hub | the time was over | | |"


def test_every_work_has_sizes_and_engines() -> None:
    for table in (accelerator_work.SIZES, accelerator_work.SMOKE_SIZES):
        assert set(table) == set(accelerator_work.WORKS) == set(accelerator_work.ENGINES_OF)
    assert not set(accelerator_work.WORKS) & set(WORKS)  # one worker serves both


def test_memory_is_read() -> None:
    assert 0.1 < read_bandwidth() < 1e4


def test_greedy_ids_that_differ_are_told() -> None:
    ids = {"a": [[1, 2, 3], [4, 5, 6]], "b": [[1, 2, 3], [4, 0, 6]], "c": [[1, 2, 3], [4, 5, 6]]}
    assert report.compare_ids(ids, "a") == [
        "greedy ids of b: 4 of 6 before the first difference, against a",
        "greedy ids of c: as a",
    ]


def test_best_precisions_are_compared_where_they_took_turns(tmp_path: Path) -> None:
    turns = Turns(print, tmp_path)
    figures = {"a float32": [10.0], "a bfloat16": [30.0], "b float32": [20.0], "b int8": [60.0]}
    turns.figures = {"decode_1": figures, "lora_step": figures, "peak_memory": figures}
    assert report.make_best_table(turns, first="a").splitlines()[2:] == [
        "| | a | b |",
        "|---|---|---|",
        "| decode, batch 1 (tokens/s) | bfloat16 30 | int8 60 (0.50×) |",
        "| LoRA step (tokens/s) | bfloat16 30 | int8 60 |",
        "| peak memory, generation (MB) | float32 10 | float32 20 (2.00×) |",
    ]


def test_losses_are_told() -> None:
    assert report.compare_losses("train", {"a float32": [10.0, 9.25]}) == [
        "train: loss of a float32: 10.0000, after one step 9.2500"
    ]


def test_plot_draws_bars_and_curves(tmp_path: Path) -> None:
    turns = Turns(print, tmp_path)
    one = {"functional_llm float32": [2.0, 3.0], "llama_cpp int8": [4.0]}
    turns.figures = {"decode_1": one, "compile_4": one, "compile_30": one}
    report.save_plot(tmp_path / "plot.png", turns)
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_engines_sit_out_what_they_cannot_do() -> None:
    def able(work: str, precision: str) -> list[str]:
        return [name for name, entry in ENGINES.items() if entry.does(work, precision)]

    assert able("generate", "int8") == ["functional_llm", "llama_cpp", "ctranslate2"]
    assert able("train", "float32") == ["functional_llm", "keras_hub", "transformers"]
    assert able("lora", "int8") == []
    assert able("compile", "bfloat16") == ["functional_llm", "keras_hub"]
    assert {measure.work for measure in MEASURES.values()} == set(WORKS)


def test_prompts_differ_from_round_to_round() -> None:
    first, second = make_prompts(8, 32, 0), make_prompts(8, 32, 1)
    assert first != second and first == make_prompts(8, 32, 0)
    assert [len(row) for row in first] == [32] * 8


def test_help_names_every_measure(repository: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=repository, check=True)
    assert all(name in shown.stdout.replace("\n", " ") for name in MEASURES)


@pytest.mark.nightly
def test_a_cpu_rule_is_measured_on_and_off(repository: Path) -> None:
    measures = ["prefill_32", "lora_step"]
    options = ["--rules", "half_rows", "--precisions", "bfloat16", "--measures", *measures]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cpu_rules", *options, "--rounds", "1", "--layers", "1"],
        capture_output=True,
        text=True,
        cwd=repository,
        check=True,
    )
    heading, *_, prefill, step = done.stdout.splitlines()
    assert "cores; " in heading
    for measure, row in zip(measures, (prefill, step), strict=True):
        assert row.startswith(f"| half_rows | bfloat16 | {measure} | ") and row.count("|") == 7
