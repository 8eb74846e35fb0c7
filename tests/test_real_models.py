"""Real models against Transformers and published text."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import functional_llm as flm
from reference import reference_greedy, reference_logits

PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "Water boils at",
    "The three laws of motion",
    "In 1969, the first",
    "Die Hauptstadt von Deutschland",
    "To make bread you need flour,",
    "Q: What is 12 + 30?\nA:",
    "She opened the door and",
]


@pytest.fixture(scope="module")
def reference(smollm2_gguf: Path) -> Any:
    """Transformers' model, with the weights that Transformers dequantises itself."""
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Any:
    path = str(smollm2_gguf)
    return flm.TextGenerator(flm.Backbone.from_preset(path), flm.Tokenizer.from_preset(path))


@pytest.mark.real
def test_smollm2_logits(reference: Any, smollm2: Any) -> None:
    ids = np.random.default_rng(0).integers(0, 49152, (2, 100))
    rows = [smollm2.tokenizer.encode(text)[:4] for text in PROMPTS]
    for token_ids in (ids, np.array([row for row in rows if len(row) == 4])):
        expected = reference_logits(reference, token_ids)
        logits = np.asarray(smollm2.backbone(token_ids))
        np.testing.assert_allclose(logits, expected, atol=2e-3, rtol=0)


@pytest.mark.real
@pytest.mark.nightly  # by day, it answers, and tiny models' greedy text is that of Transformers
def test_smollm2_greedy_text(reference: Any, smollm2: Any) -> None:
    rows = [smollm2.tokenizer.encode(text) for text in PROMPTS]
    expected = [reference_greedy(reference, row, 12, use_cache=True) for row in rows]
    assert smollm2.generate_ids(rows, max_new_tokens=12) == expected


@pytest.mark.real
def test_smollm2_answers(smollm2: Any) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = smollm2.tokenizer.apply_chat_template(messages)
    for prompt in (messages, text, smollm2.tokenizer.encode(text, parse_special=True)):
        assert smollm2.generate(prompt) == "The capital of France is Paris."
        assert smollm2.stats.prefill_tokens == 37


@pytest.mark.real
def test_preset_config_is_that_of_the_file(smollm2_gguf: Path) -> None:
    preset = flm.Backbone.from_preset("smollm2_135m_instruct", load_weights=False)
    expected = flm.Backbone.from_preset(str(smollm2_gguf), load_weights=False).config
    assert preset.config.layer_norm_epsilon == pytest.approx(expected.layer_norm_epsilon)
    for name in vars(expected):
        if name != "layer_norm_epsilon":  # a float32 in the file
            assert getattr(preset.config, name) == getattr(expected, name), name


MEASURE_LOAD = """
import resource, sys, threading, time
from pathlib import Path
import functional_llm as flm
import jax.numpy as jnp
jnp.zeros(1).block_until_ready()
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
before = peak = resident()
done = threading.Event()
def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, resident())
thread = threading.Thread(target=watch)
thread.start()
backbone = flm.Backbone.from_preset(sys.argv[1], dtype=sys.argv[2])
done.set()
thread.join()
weights = sum(v.value.nbytes for v in backbone.variables)
print((peak - before) / 1e6, weights / 1e6)
"""


@pytest.mark.real
@pytest.mark.parametrize(
    ("dtype", "megabytes"),
    [pytest.param("float32", 538, marks=pytest.mark.nightly), ("bfloat16", 269)],
)
def test_peak_memory_of_a_load(smollm2_gguf: Path, dtype: str, megabytes: int) -> None:
    command = [sys.executable, "-c", MEASURE_LOAD, str(smollm2_gguf), dtype]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    growth, weights = map(float, output.split())
    assert weights == pytest.approx(megabytes, abs=1)
    assert growth < 1.3 * weights + 100  # stricter than the promise: 500 MB beside the weights


@pytest.mark.parametrize("layout", ["", "stories260K-f32.gguf"])
def test_stories260k_writes_its_published_text(material: Path, layout: str) -> None:
    folder = material / "stories260K"
    golden = json.loads((folder / "golden_greedy.json").read_text())
    handle = str(folder / layout) if layout else str(folder)
    tokenizer = flm.Tokenizer.from_preset(handle)
    generator = flm.TextGenerator(flm.Backbone.from_preset(handle), tokenizer)
    count = len(golden["ids"]) - 1
    ids = generator.generate_ids([golden["ids"][:1]], max_new_tokens=count)[0]
    assert golden["ids"][:1] + ids == golden["ids"]
    assert tokenizer.decode(golden["ids"]) == golden["text"]
    begin = "Once upon a time"
    written = generator.generate(begin, max_new_tokens=count + 1 - len(tokenizer.encode(begin)) - 1)
    assert begin + written == golden["text"]


@pytest.mark.real
def test_scripts_write_text(smollm2_gguf: Path, repository: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    environment.pop("KERAS_BACKEND", None)  # as in a new user's shell
    command = [sys.executable, str(repository / "scripts" / "generate.py"), "--stats"]
    options = ["--preset", str(smollm2_gguf), "--max-new-tokens", "8"]
    result = subprocess.run(
        command + options, check=True, capture_output=True, text=True, env=environment
    )
    assert result.stdout.startswith(" Paris.")
    for word in ("load", "compile", "prefill", "decode", "first token"):
        assert word in result.stderr
    command = [sys.executable, str(repository / "scripts" / "chat.py"), "--stats", *options]
    result = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        env=environment,
        input="What is the capital of France?\nAnd of Italy?\n",
    )
    assert result.stdout.startswith("The capital of France is Paris.")
    assert "the cache held the others" in result.stderr


MEMORY = """
import gc
import sys

import functional_llm as flm


def resident():
    gc.collect()
    with open("/proc/self/status") as status:
        return int(status.read().split("VmRSS:")[1].split()[0]) / 1e3


"""


def _measure(code: str, *arguments: Any) -> float:
    """Returns the megabytes that a new process prints."""
    command = [sys.executable, "-c", MEMORY + code, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return float(run.stdout.splitlines()[-1])


@pytest.mark.real
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_attaching_lora_takes_less_than_30_megabytes(smollm2_gguf: Path) -> None:
    code = """
backbone = flm.Backbone.from_preset(sys.argv[1])
before = resident()
model = flm.peft.lora(backbone, rank=8)
print(resident() - before)
"""
    assert _measure(code, smollm2_gguf) < 30


@pytest.mark.real
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.nightly  # by day, what the GGUF file takes
def test_a_float32_file_loads_as_bfloat16_without_a_float32_copy(
    smollm2_gguf: Path, tmp_path: Path
) -> None:
    code = """
import ctypes

before = resident()
backbone = flm.Backbone.from_preset(sys.argv[1], dtype=sys.argv[2])
ctypes.CDLL(None).malloc_trim(0)  # what was freed counts until then
print(resident() - before)
"""
    path = tmp_path / "model.keras"
    flm.Backbone.from_preset(smollm2_gguf).save(path)
    half, full = (_measure(code, path, dtype) for dtype in ("bfloat16", "float32"))
    assert half < full - 150  # the weights take 269 and 538 megabytes
