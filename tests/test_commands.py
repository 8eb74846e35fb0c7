"""The commands with adapters: which base, how much each counts, what is written."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import functional_llm as flm
from functional_llm.commands.main import main
from reference import reference_logits
from tiny import save_tiny

IDS = np.array([[1, 7, 30, 12, 5]])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def adapters(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two adapters, `a` and `b`, of the tiny model."""
    folder = tmp_path_factory.mktemp("adapters")
    rng = np.random.default_rng(0)
    for name, rank, targets in (("a", 2, ["query", "down"]), ("b", 3, ["query", "up"])):
        model = flm.peft.lora(flm.Backbone.from_preset(tiny), rank, targets=targets, seed=0)
        for variable in model.trainable_variables:
            variable.assign(rng.normal(size=variable.shape).astype("float32") * 0.3)
        flm.peft.save_adapter(model, folder / name)
    return folder


def run(*options: Any) -> int:
    """Returns the exit code of a command line."""
    try:
        return main([str(x) for x in options])
    except SystemExit as stop:  # of argparse
        assert isinstance(stop.code, int)
        return stop.code


def _logits(folder: Path) -> np.ndarray:
    return np.asarray(flm.Backbone.from_preset(folder)(IDS))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_weighted_adapters_are_what_peft_concatenates(
    tiny: Path, adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PEFT: `add_weighted_adapter(..., combination_type="cat")` is the sum of weighted changes."""
    theirs = pytest.importorskip("peft")
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype="float32")
    model = theirs.PeftModel.from_pretrained(base, str(adapters / "a"), adapter_name="a")
    model.load_adapter(str(adapters / "b"), adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.7, 0.4], "both", combination_type="cat")
    model.set_adapter("both")
    expected = reference_logits(model.eval(), IDS)
    names = ["--adapter", f"{adapters / 'a'}=0.7", "--adapter", f"{adapters / 'b'}=0.4"]
    output = tmp_path / "merged"
    assert run("merge", *names, "--output", output) == 0
    assert f"functional-llm chat --preset {output}" in capsys.readouterr().out
    np.testing.assert_allclose(_logits(output), expected, atol=1e-4)
    opened = transformers.AutoModelForCausalLM.from_pretrained(output, dtype="float32").eval()
    np.testing.assert_allclose(reference_logits(opened, IDS), expected, atol=1e-4)
    assert "0.7 of a and 0.4 of b" in (output / "README.md").read_text()
    assert (output / "tokenizer.json").is_file()
    weights = {adapters / "a": 0.7, adapters / "b": 0.4}
    ours: Any = flm.TextGenerator.from_preset(adapter=weights).backbone
    np.testing.assert_allclose(np.asarray(ours(IDS)), expected, atol=1e-4)
    ours.save(tmp_path / "both.keras")  # keeps the weights
    stock = keras.saving.load_model(tmp_path / "both.keras")
    np.testing.assert_allclose(np.asarray(stock(IDS)), expected, atol=1e-4)
    again: Any = flm.Backbone.from_preset(tmp_path / "both.keras")
    np.testing.assert_allclose(np.asarray(again(IDS)), expected, atol=1e-4)
    flm.peft.activate(again, {"b": 0.4})
    assert np.abs(np.asarray(again(IDS)) - expected).max() > 1e-2
    assert run("merge", *names, "--output", tmp_path / "merged.keras") == 0
    stock = keras.saving.load_model(tmp_path / "merged.keras")
    np.testing.assert_allclose(np.asarray(stock(IDS)), expected, atol=1e-4)


def test_weights_of_what_trains_beside_an_adapter(tiny: Path) -> None:
    """Norms and tokens that were retrained count by the weight, too, also once merged."""
    backbone = flm.Backbone.from_preset(tiny)
    model: Any = flm.peft.retrain(flm.peft.lora(backbone, 2), ["final_norm", "decoder_0/mlp/up"])
    model = flm.peft.train_tokens(model, [7, 30])
    rng = np.random.default_rng(1)
    for variable in model.trainable_variables:
        variable.assign_add(rng.normal(size=variable.shape).astype("float32") * 0.1)
    seen = {}
    for weight in (0.0, 0.5, 1.0, -0.5):
        flm.peft.activate(model, {"default": weight})
        seen[weight] = np.asarray(model(IDS))
        merged = flm.peft.merge(model)
        np.testing.assert_allclose(np.asarray(merged(IDS)), seen[weight], atol=1e-4)
    np.testing.assert_allclose(seen[0.0], np.asarray(backbone(IDS)), atol=1e-5)
    flm.peft.activate(model, "default")
    np.testing.assert_array_equal(np.asarray(model(IDS)), seen[1.0])
    wrong: Any
    for wrong in (float("nan"), None, "half"):
        with pytest.raises(ValueError, match="finite numbers, received {'default'"):
            flm.peft.activate(model, {"default": wrong})


@pytest.mark.parametrize("name", ["generate", "chat"])
def test_an_adapter_alone_brings_its_base(
    tiny: Path,
    adapters: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import io

    texts = []
    for options in (
        ["--adapter", adapters / "a"],
        ["--preset", adapters / "a"],
        ["--preset", tiny, "--adapter", adapters / "a"],
        ["--preset", tiny],
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO("The quick"))
        assert run(name, *options, "--max-new-tokens", 6) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2] != texts[3]


def test_an_adapter_is_trained_further(
    tiny: Path, adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    lines = [json.dumps({"instruction": f"question {i}", "output": "dog"}) for i in range(6)]
    data.write_text("\n".join(lines))
    options = ["--dataset", data, "--steps", 2, "--length", 32, "--checkpoint-every", 0]
    options += ["--output", tmp_path / "more", "--adapter", adapters / "a"]
    assert run("finetune", *options, "--method", "lora") == 2
    assert run("finetune", *options, "--adapter", adapters / "b") == 2
    assert run("finetune", *options) == 0
    first, more = (flm.Backbone.from_preset(x) for x in (adapters / "a", tmp_path / "more"))
    for old, new in zip(first.trainable_variables, more.trainable_variables, strict=True):
        assert old.path == new.path and old.shape == new.shape
        assert 0 < np.abs(np.asarray(old) - np.asarray(new)).max() < 0.1
    card = (tmp_path / "more" / "README.md").read_text()
    assert "data.jsonl" in card and str(tmp_path) not in card
    assert re.search(r"\| training \| [0-9.]+ \|\n\| held out \| [0-9.]+ \|", card)
    assert f"--adapter {tmp_path / 'more'}" in capsys.readouterr().out


def test_what_an_adapter_may_call_its_base(
    tiny: Path, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from functional_llm.presets.sources import base_handle, check_base

    path = tmp_path / "adapter_config.json"
    monkeypatch.chdir(tiny.parent)
    for base, revision, expected in (
        (str(tiny), None, str(tiny)),
        ("tiny", None, "tiny"),
        ("llama3.2_1b", None, "llama3.2_1b"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", None, "smollm2_135m_instruct"),
        ("Qwen/Qwen3-0.6B", None, "qwen3_0.6b"),
        ("Qwen/Qwen3-0.6B", "v9", "hf://Qwen/Qwen3-0.6B@v9"),
        ("someone/else", None, "hf://someone/else"),
        ("hf://someone/else", None, "hf://someone/else"),
    ):
        path.write_text(json.dumps({"base_model_name_or_path": base, "revision": revision}))
        assert base_handle(tmp_path) == expected
    for nothing in (None, "", 3, "/gone/model", "no_such_preset"):
        path.write_text(json.dumps({"base_model_name_or_path": nothing}))
        with pytest.raises(ValueError, match=r"adapter_config.json: expected .*base_model_name_or"):
            base_handle(tmp_path)
    facts = {"base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct"}
    path.write_text(json.dumps(facts))
    check_base(tmp_path, "smollm2_135m_instruct")
    check_base(tmp_path, "hf://HuggingFaceTB/SmolLM2-135M-Instruct@main")
    for handle in ("smollm2_135m", "hf://someone/else", tiny):
        with pytest.raises(ValueError, match="Received: one for HuggingFaceTB/SmolLM2-135M-Instr"):
            check_base(tmp_path, handle)
    path.write_text(json.dumps({"base_model_name_or_path": "someone/else"}))
    check_base(tmp_path, tiny)  # nobody knows
    file = flm.Backbone.from_preset(tiny)
    file.save(tmp_path / "model.keras")
    model = flm.peft.lora(flm.Backbone.from_preset(tmp_path / "model.keras"), 2)
    flm.peft.save_adapter(model, tmp_path / "of_a_file")
    assert base_handle(tmp_path / "of_a_file") == str(tmp_path / "model.keras")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of another size, which is not the one that adapters name."""
    return save_tiny(tmp_path_factory.mktemp("other") / "larger", vocabulary_size=320)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter", "A", "--adapter", "A"], "--adapter: .*/a is given twice"),
        (["--adapter", "A", "--adapter", "B/../a=0.5"], "/a is given twice"),
        (["--adapter", "A=much"], "expected a number as the weight of .*, received 'much'"),
        (["--adapter", "A=nan"], "received 'nan'"),
        (["--adapter", "TINY"], "tiny has no adapter_config.json"),
        (["--preset", "OTHER", "--adapter", "A"], "for another base. .*/larger. Received: .*/tiny"),
        (["--preset", "smollm2_360m", "--adapter", "A"], "for another base. .*smollm2_360m.*/tiny"),
        (["--preset", "A", "--adapter", "A"], "/a is given twice"),
        ([], "the following arguments are required: --adapter"),
        (["--adapter", "A", "--preset", "nope"], "Unknown preset 'nope'"),
    ],
)
def test_adapters_that_cannot_be_merged(
    tiny: Path,
    adapters: Path,
    other: Path,
    tmp_path: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(flm.Backbone, "from_preset")  # it is known before a model is loaded
    places = {"OTHER": other, "TINY": tiny, "A": adapters / "a", "B": adapters / "b"}
    for name, path in places.items():
        options = [re.sub(rf"^{name}\b", str(path), x) for x in options]
    assert run("merge", *options, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert re.search(message, error, re.S), error
    assert len(error.splitlines()) <= 2 and not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("default:The adapter in:UserWarning")
def test_a_base_that_does_not_fit_and_one_in_int8(
    tiny: Path, adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "adapter"
    shutil.copytree(adapters / "a", broken)
    facts = json.loads((broken / "adapter_config.json").read_text())
    facts["base_model_name_or_path"] = "someone/else"
    facts["r"] = 5
    (broken / "adapter_config.json").write_text(json.dumps(facts))
    assert run("generate", "--preset", tiny, "--adapter", broken) == 2
    assert "it was made for someone/else" in capsys.readouterr().err
    flm.quantize(flm.Backbone.from_preset(tiny)).save(tmp_path / "int8.keras")
    with pytest.warns(
        UserWarning, match=r"made for .*/tiny, and is used with .*/int8.keras, which"
    ):
        flm.TextGenerator.from_preset(tmp_path / "int8.keras", adapters / "a")
    output = tmp_path / "out"
    options = ["--preset", tmp_path / "int8.keras", "--adapter", adapters / "a"]
    assert run("merge", *options, "--output", output) == 2
    warned, error = capsys.readouterr().err.splitlines()
    assert warned.startswith("functional-llm merge: The adapter in")
    assert re.search("base of floats .* .*int8.keras, [0-9]+ layers of which hold int8", error)
    assert not output.exists()


@pytest.mark.filterwarnings("ignore:No class of KerasHub's is a Llama3 tokenizer:UserWarning")
def test_conversions(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], material: Path
) -> None:
    expected = _logits(tiny)
    chain = ["tiny.keras", "directory", "hub"]
    source: Path = tiny
    for name in chain:
        options = ["--to", "keras_hub"] if name == "hub" else []
        assert run("convert", source, tmp_path / name, *options) == 0
        source = tmp_path / name
        np.testing.assert_allclose(_logits(source), expected, atol=1e-5)
    gguf = material / "stories260K" / "stories260K-f32.gguf"
    assert run("convert", gguf, tmp_path / "stories") == 0
    np.testing.assert_allclose(_logits(tmp_path / "stories"), _logits(gguf), atol=1e-5)
    capsys.readouterr()
    foreign = {row["family"] for row in flm.list_families() if "KerasHub" not in row["writes"]}
    lacking = next(row["name"] for row in flm.list_presets() if row["family"] in foreign)
    wrong: list[tuple[list[Any], str]] = [
        ([tiny, tmp_path / "x.keras", "--to", "directory"], "--to directory: expected an output"),
        ([tiny, tmp_path / "x", "--to", "keras"], "--to keras: expected an output for it"),
        ([tmp_path / "none", tmp_path / "x"], "none: nothing is there"),
        ([tiny, "/dev/null/x"], "can be written to. Received: /dev/null/x"),
        ([lacking, tmp_path / "x", "--to", "keras_hub"], "of a family that KerasHub has"),
    ]
    for given, message in wrong:
        assert run("convert", *given) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_what_is_said_of_a_model(
    tiny: Path, adapters: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("info", "smollm2_135m_instruct") == 0
    said = capsys.readouterr().out
    for words in (
        "apache-2.0",
        "llama (Llama 2",
        "GGUF (`llama`)",
        "30 layers",
        "8,192 tokens",
        "134,515,008",
        "float32 538 MB, bfloat16 269 MB, int8 (with bfloat16) 135 MB",
        "int4 (with bfloat16) 94.8 MB",
        "46.1 kB a token",  # 30 layers x 2 x 3 heads x 64 x 4 bytes, and a position
        "decoder_0/attention/dot_product and 29 more",
    ):
        assert words in said, words
    assert run("info", adapters / "b") == 0
    said = capsys.readouterr().out
    assert "LORA, rank 3, alpha" in said and f"base  {tiny}" in said and "(unknown" not in said
    backbone: Any = flm.Backbone.from_preset(tiny)
    assert f"{backbone.count_params():,}" in said


def test_generate_imports_what_it_needs(tiny: Path) -> None:
    options = ["generate", "--preset", str(tiny), "--max-new-tokens", "1"]
    code = (
        "import sys; sys.argv[0] = 'functional-llm'; from functional_llm.commands.main import main;"
        f"main({options!r}); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert {"jax", "keras", "functional_llm"} <= imported
    others = {"tensorflow", "torch", "transformers", "keras_hub", "datasets", "matplotlib"}
    assert not imported & (others | {"pandas", "peft", "trl", "lm_eval", "IPython", "requests"})


def test_a_list_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in ("generate", "chat", "merge", "convert", "info"))
    assert run("generat") == 2
    assert "invalid choice: 'generat'" in capsys.readouterr().err
    assert run() == 2
    assert run("--version") == 0
