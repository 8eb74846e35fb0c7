"""Loading models end to end: layouts and dtypes against Transformers, and what must be refused."""

import json
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from gguf import GGMLQuantizationType as Kind

import functional_llm as flm
from configs import CONFIGS
from fake_hub import REPO, Server
from functional_llm.backbones.families import FAMILIES
from functional_llm.backbones.llama import Config
from functional_llm.blocks.rope import Rope, rotation
from functional_llm.blocks.rope_scaling import FrequencyFactors
from functional_llm.formats.gguf_model import GGUFModel
from reference import make_reference, reference_logits, save_reference
from test_download import python
from tiny import save_tiny
from tiny_gguf import save_gguf

IDS = np.array([[1, 5, 9, 100, 3, 7], [0, 2, 127, 64, 64, 11]])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_many_shards_in_half_precision(stored: str, tmp_path: Path) -> None:
    model = make_reference(CONFIGS["llama_grouped"]).to(getattr(torch, stored))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    # Read again: casting the model has rounded its rotary frequencies too.
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = reference_logits(model.eval(), IDS)
    for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 0.3), ("float16", 0.05)):
        backbone = flm.Backbone.from_preset(tmp_path, dtype=dtype)
        assert {variable.dtype for variable in backbone.variables} == {dtype}
        np.testing.assert_allclose(
            np.asarray(backbone(IDS), "float32"), expected, atol=tolerance, rtol=0
        )


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q5_1, Kind.Q4_0])
def test_quantised_gguf(kind: Kind, tiny: Path, tmp_path: Path) -> None:
    tokenizer = flm.Tokenizer.from_preset(tiny)
    config = {**CONFIGS["llama_grouped"], "hidden_size": 64, "intermediate_size": 96}
    model = make_reference({**config, "vocab_size": tokenizer.vocabulary_size})
    path = tmp_path / "tiny.gguf"
    save_gguf(model, tiny / "tokenizer.json", path, kind)
    backbone = flm.Backbone.from_preset(path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    )
    np.testing.assert_allclose(
        np.asarray(backbone(IDS)), reference_logits(theirs.eval(), IDS), atol=1e-4, rtol=0
    )
    text = "The quick Viktor jagt 日本語 🙂"
    inside = flm.Tokenizer.from_preset(path)
    assert inside.encode(text) == tokenizer.encode(text)
    assert inside.decode(inside.encode(text)) == text


USE_HUB = """
    import functional_llm as flm
    handle = "hf://{repo}"
    tokenizer = flm.Tokenizer.from_preset(handle)
    generator = flm.TextGenerator(flm.Backbone.from_preset(handle), tokenizer)
    print(generator.generate_ids([tokenizer.encode("quick")], max_new_tokens=8))
"""


@pytest.fixture
def hub(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    server.repo = {path.name: path.read_bytes() for path in tiny.iterdir()}
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    yield server
    server.close()


def test_hub_end_to_end(hub: Server, tiny: Path) -> None:
    code = USE_HUB.format(repo=REPO)
    output, errors = python(code).communicate(timeout=180)
    tokenizer = flm.Tokenizer.from_preset(tiny)
    generator = flm.TextGenerator(flm.Backbone.from_preset(tiny), tokenizer)
    expected = generator.generate_ids([tokenizer.encode("quick")], max_new_tokens=8)
    assert output.strip() == str(expected), errors
    hub.repo.clear()
    output, _ = python(code, HF_HUB_OFFLINE="1").communicate(timeout=180)
    assert output.strip() == str(expected)


# What must be refused -----------------------------------------------------------------------


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: x for key, x in config.items() if x != "absent"}))


LINEAR = {"rope_type": "linear", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "plamo2"}, "model_type is 'plamo2'. Known families: apertus, bloom"),
        ({"model_type": "absent"}, "model_type is None"),
        ({"model_type": ["llama"]}, "model_type is ['llama']"),
        ({"sliding_window": 7}, "does not handle: sliding_window=7"),
        ({"quantization_config": {"bits": 4}}, "does not handle: quantization_config="),
        ({"num_hidden_layers": "absent"}, "lacks the keys ['num_hidden_layers']"),
        ({"hidden_size": None}, "lacks the keys ['hidden_size']"),
        ({"hidden_size": "48"}, "expected a positive integer for hidden_size, received '48'"),
        ({"num_attention_heads": 0}, "expected a positive integer for num_attention_heads"),
        ({"vocab_size": True}, "expected a positive integer for vocab_size, received True"),
        ({"rms_norm_eps": "1e-5"}, "expected a finite number above 0 for rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "expected a finite number above 0 for rms_norm_eps"),
        ({"tie_word_embeddings": 1}, "expected true or false for tie_word_embeddings, received 1"),
        ({"hidden_act": ["silu"]}, "expected a word for hidden_act, received ['silu']"),
        ({"rope_parameters": 7}, "expected a dict of RoPE parameters"),
        ({"rope_parameters": {"rope_type": "foo"}}, "unknown rope_type='foo'"),
        ({"rope_parameters": {**LINEAR, "factor": 0}}, "above 0 for factor, received 0"),
        ({"rope_parameters": LINEAR}, "of the type 'linear' lack factor"),
        ({"rope_parameters": {**LINEAR, "factor": 2.0, "x": 1}}, "unknown RoPE parameters ['x']"),
        ({"rope_parameters": {**LINEAR, "type": "yarn", "factor": 2.0}}, "one type of RoPE"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "above 0 for rope_theta, received '1e4'"),
    ],
)  # fmt: skip
def test_configs(folder: Path, changes: dict[str, Any], message: str) -> None:
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        flm.Backbone.from_preset(folder)


def test_scaling_without_finite_frequencies() -> None:
    factors = FrequencyFactors(factors=(1.0, 0.0))  # a GGUF file may hold any
    with pytest.raises(ValueError, match="finite frequencies. Received: .*1.0, 0.0"):
        rotation(IDS, Rope(4, 10000.0, factors))


def change_weights(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), f"missing tensor '{NORM}' of shape (48,) (for final_norm/scale)"),
        (lambda t: t.update(extra=t[NORM]), "unknown tensor 'extra' of shape (48,)"),
        (
            lambda t: t.update({NORM: t[NORM][:-1].copy()}),
            f"tensor '{NORM}': expected shape (48,), received (47,)",
        ),
    ],
)
def test_tensors(folder: Path, change: Any, message: str) -> None:
    change_weights(folder, change)
    with pytest.raises(ValueError, match=re.escape(message)):
        flm.Backbone.from_preset(folder)


def test_a_copy_of_a_tied_head_must_be_one(tmp_path: Path) -> None:
    model = save_reference(CONFIGS["llama_multi_head_tied"], tmp_path)
    embedding = model.model.embed_tokens.weight.detach().numpy()
    change_weights(tmp_path, lambda t: t.update({"lm_head.weight": embedding.copy()}))
    logits = np.asarray(flm.Backbone.from_preset(tmp_path)(IDS))
    np.testing.assert_allclose(logits, reference_logits(model, IDS), atol=1e-4, rtol=0)
    change_weights(tmp_path, lambda t: t.update({"lm_head.weight": 2 * embedding}))
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(ValueError, match="ties 'lm_head.weight' to 'model.embed_tokens.wei"):
            flm.Backbone.from_preset(tmp_path, dtype=dtype)


@pytest.mark.parametrize("damage", ["cut", "absurd header", "page of a web server"])
def test_damaged_weights(folder: Path, damage: str) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(
        {
            "cut": data[: len(data) // 2],
            "absurd header": struct.pack("<Q", 1 << 40) + data[8:],
            "page of a web server": b"<html>404</html>" * 9,
        }[damage]
    )
    with pytest.raises(ValueError, match="Cannot read .*truncated or damaged: download it again"):
        flm.Backbone.from_preset(folder)


def test_gguf_of_another_architecture(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "plamo2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        ValueError, match="general.architecture is 'plamo2'. Known families: .*gemma"
    ):
        flm.Backbone.from_preset(tmp_path / "x.gguf")


def test_gguf_of_an_architecture_without_the_key_that_tells_its_family(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mistral3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    told = GGUFModel(tmp_path / "x.gguf", {"ministral3": FAMILIES["ministral3"]})
    with pytest.raises(
        ValueError, match=r"mistral3\.attention\.temperature_scale.*, received \[\]"
    ):
        _ = told.family
    assert GGUFModel(tmp_path / "x.gguf", FAMILIES).family.model_type == "mistral"


@pytest.mark.parametrize(
    ("handle", "message"),
    [
        ("smolm2_135m", "Near names: smollm2_"),
        ("", "non-empty string"),
        (None, "non-empty string"),
        ("https://x/y", "The hubs are 'hf://org/name'"),
    ],
)
def test_handles(handle: Any, message: str) -> None:
    for load in (flm.Backbone.from_preset, flm.Tokenizer.from_preset):
        with pytest.raises(ValueError, match=re.escape(message)):
            load(handle)


@pytest.mark.parametrize("dtype", ["float8", "int8", "int32", "float64", None])
def test_dtypes(folder: Path, dtype: Any) -> None:
    with pytest.raises(ValueError, match=f"one of float32, bfloat16, .* received {dtype!r}"):
        flm.Backbone.from_preset(folder, dtype=dtype)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (np.full((1, 3), 300), "token ids from 0 to 299, received ids from 300 to 300"),
        (np.array([[4, -100]]), "token ids from 0 to 299, received ids from -100 to 4"),
        ([[1, 2, 3]], "an array of shape (batch, tokens)"),
        (np.ones((1, 3)), "an integer dtype"),
        (np.ones(3, int), "an array of shape (batch, tokens)"),
        ({"positions": np.ones((2, 2), int)}, "positions, integers of the shape of token_ids"),
        ({"positions": np.ones((2, 3))}, "received float32 of shape (2, 3)"),
        ({"segment_ids": np.ones((2, 4), int)}, "received int32 of shape (2, 4)"),
        ({"tokens": np.ones(1)}, "received ['token_ids', 'to"),
        ({"cache": {}}, "of `make_cache` or of an earlier call"),
        ({"cache": 1}, "a cache for 2 rows, as many as token_ids has, received one for 1"),
        ({"attention_mask": np.ones((2, 4), int)}, "attention_mask of the shape of token_ids"),
        ({"attention_mask": np.full((2, 3), 2)}, "1 for a token and 0 for padding"),
        ({"padding_mask": np.ones((2, 3, 3), int)}, "is said by `mask`, booleans of shape"),
        ({"padding_mask": np.ones((2, 3)), "attention_mask": np.ones((2, 3))}, "received both"),
        ({"mask": np.ones((2, 3, 3), int)}, "mask, booleans of shape (2, 3, 3)"),
        ({"mask": np.ones((2, 3), bool)}, "bool of shape (2, 3)"),
        ({"mask": np.ones((2, 3, 4), bool)}, "mask, booleans of shape (2, 3, 3)"),
        ({"mask": np.ones((2, 3, 2), bool), "cache": 2}, "a column for each position, up to 2"),
    ],
)
def test_calls(tiny: Path, inputs: Any, message: str) -> None:
    backbone = flm.Backbone.from_preset(tiny)
    if isinstance(inputs, dict):
        inputs = {"token_ids": np.ones((2, 3), int), **inputs}
        if isinstance(inputs.get("cache"), int):
            inputs["cache"] = flm.make_cache(backbone, inputs["cache"], 8)
    with pytest.raises(ValueError, match=f"(?i){re.escape(message)}"):
        backbone(inputs)


def test_config_fields_have_plain_types() -> None:
    """`read_config` checks values by these."""
    assert Config.__dataclass_fields__["layer_norm_epsilon"].type is float
