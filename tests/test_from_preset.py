"""One call from a handle to a generator; what users of Transformers and Keras write by habit."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import functional_llm as flm
from functional_llm.edits.quantization import quantized_modes
from tiny import TEXTS, save_tiny

MESSAGES = [{"role": "user", "content": "The quick"}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def generator(tiny: Path) -> flm.TextGenerator:
    return flm.TextGenerator.from_preset(tiny)


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = flm.peft.lora(flm.Backbone.from_preset(tiny), 2, targets="all", seed=0)
    for variable in model.trainable_variables:
        variable.assign_add(np.full(variable.shape, 0.1, "float32"))
    folder = tmp_path_factory.mktemp("adapters") / "one"
    flm.peft.save_adapter(model, folder)
    return folder


def test_adapters_however_they_are_given(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    other = tmp_path / "one"  # of the same name
    flm.peft.save_adapter(flm.Backbone.from_preset(adapter), other)
    ids = np.array([[1, 7, 30, 12, 5]])

    def logits(handle: Any = None, given: Any = None, **options: Any) -> np.ndarray:
        loaded = flm.TextGenerator.from_preset(handle, given, **options)
        assert loaded.tokenizer is not None
        return np.asarray(loaded.backbone(ids), "float32")

    expected = logits(adapter)
    base = logits(tiny)
    assert np.abs(expected - base).max() > 1e-2
    for arguments in ((None, adapter), (tiny, str(adapter)), (tiny, [adapter]), (str(adapter),)):
        np.testing.assert_array_equal(logits(*arguments), expected)
    np.testing.assert_allclose(logits(tiny, {adapter: 0.0}), base, atol=1e-5)
    halves = logits(tiny, {adapter: 0.5, other: 0.5})
    np.testing.assert_allclose(halves, expected, atol=1e-4)
    assert np.abs(logits(tiny, [adapter, other]) - expected).max() > 1e-2
    assert np.abs(logits(tiny, [adapter], dtype="bfloat16") - expected).max() < 0.3
    small = flm.TextGenerator.from_preset(adapter, quantize="int8")
    assert quantized_modes(small.backbone)
    wrong: list[tuple[Any, str]] = [
        ([adapter, adapter], "one is given twice"),
        ([adapter, f"{adapter.parent}/../{adapter.parent.name}/one"], "given twice"),
        (tiny, "it has no adapter_config.json"),
        ("nope", "received nope: it has no adapter_config.json"),
    ]
    for given, message in wrong:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            flm.TextGenerator.from_preset(tiny, given)
    with pytest.raises(ValueError, match="a handle of a model, or an adapter; received neither"):
        flm.TextGenerator.from_preset()


def test_generate_and_stream_take_the_same_prompts(generator: Any, tiny: Path) -> None:
    tokenizer = generator.tokenizer
    ids = tokenizer.encode("The quick", add_bos=tokenizer.add_bos)
    for prompt in (
        "The quick",
        MESSAGES,
        tuple(MESSAGES),
        ids,
        np.array(ids),
        tokenizer("The quick"),
        tokenizer(["The quick"], return_tensors="np"),
        ["The quick"],
    ):
        whole = generator.generate(prompt, max_new_tokens=6)
        pieces = "".join(generator.stream(prompt, max_new_tokens=6))
        assert pieces and [pieces] == (whole if isinstance(whole, list) else [whole])
    with pytest.raises(ValueError, match="Expected one prompt, received 2"):
        next(generator.stream(["The", "quick"]))
    assert len(generator.generate(["The", MESSAGES, ids], max_new_tokens=2)) == 3


def test_numbers_of_a_sampler_as_keywords(generator: Any) -> None:
    def write(**options: Any) -> str:
        text = generator.generate("The quick", max_new_tokens=8, seed=3, **options)
        assert "".join(generator.stream("The quick", 8, seed=3, **options)) == text
        ids = generator.tokenizer.encode("The quick", add_bos=generator.tokenizer.add_bos)
        ends = generator.tokenizer.stop_token_ids
        (row,) = generator.generate_ids([ids], 8, seed=3, stop_token_ids=ends, **options)
        assert generator.tokenizer.decode(row, continues=True) == text
        chat = generator.chat(max_new_tokens=8, seed=3, **options)
        assert chat.sampler == flm.samplers.choose(options.pop("sampler", None), options)
        return text

    made = flm.samplers.make(temperature=0.7, top_p=0.9)
    assert write(temperature=0.7, top_p=0.9) == write(sampler=made)
    assert write() == write(sampler="greedy") == write(temperature=0) == write(temperature=0.0)
    assert write(top_k=5) == write(sampler=flm.samplers.make(top_k=5))
    named = flm.samplers.get("top_p", temperature=2.0)
    assert write(sampler="top_p", temperature=2.0) == write(sampler=named)
    greedy = flm.samplers.get("greedy", repetition_penalty=1.5)
    assert write(repetition_penalty=1.5) == write(sampler=greedy)
    for call in (generator.generate, lambda *x, **y: next(generator.stream(*x, **y))):
        with pytest.raises(ValueError, match="with no numbers beside it.*'temperature': 0.5"):
            call("The", sampler=made, temperature=0.5)
        with pytest.raises(ValueError, match="'greedy' takes .* repetition_penalty. Received: top"):
            call("The", sampler="greedy", top_k=3)
        with pytest.raises(ValueError, match="greedy.*Received: top_p"):
            call("The", temperature=0, top_p=0.5)
        with pytest.raises(ValueError, match="finite number above 0. Received: -1"):
            call("The", temperature=-1)
        with pytest.raises((ValueError, TypeError), match="temprature"):
            call("The", temprature=0.5)


def test_a_warm_up_compiles_all_that_a_prompt_needs(tiny: Path) -> None:
    generator = flm.TextGenerator.from_preset(tiny)
    generator.warm_up(prompt_tokens=20, max_new_tokens=40)
    generator.warm_up(prompt_tokens=40, max_new_tokens=300, num_rows=2, temperature=0.5)
    count = generator.num_compilations
    assert count > 0
    generator.generate("The quick", max_new_tokens=30)
    list(generator.stream("brown", max_new_tokens=10, stop="x"))
    generator.generate(["The quick", "b" * 36], max_new_tokens=280, temperature=0.9, seed=1)
    assert generator.num_compilations == count
    flm.TextGenerator(generator.backbone).warm_up()
    with pytest.raises(ValueError, match="context holds 512"):
        generator.warm_up(prompt_tokens=600)


def test_a_chat_of_a_generator(generator: Any) -> None:
    chat = generator.chat("Be brief.", max_new_tokens=8, stop="\n", seed=1, top_k=3)
    assert isinstance(chat, flm.Chat) and id(chat.generator) == id(generator)
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    first = flm.Chat(generator, "Be brief.", max_new_tokens=8, stop="\n", seed=1, top_k=3)
    assert "".join(chat.say("The quick")) == "".join(first.say("The quick"))
    with pytest.raises(ValueError, match="with a tokenizer"):
        flm.TextGenerator(generator.backbone).chat()
    with pytest.raises(ValueError, match="no numbers beside it"):
        generator.chat(sampler=flm.samplers.make(), top_k=3)


def test_a_tokenizer_called_as_one_of_transformers(tiny: Path, material: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = tiny.parent / "stories"
    flm.Backbone.from_preset(material / "stories260K" / "stories260K-f32.gguf").save_preset(folder)
    texts = [*TEXTS, "", "<|im_start|>user", "<s>twice"]
    for handle in (tiny, folder):
        ours, theirs = (
            flm.Tokenizer.from_preset(handle),
            transformers.AutoTokenizer.from_pretrained(handle),
        )
        assert len(ours) == len(theirs)
        for special in (True, False):
            for text in texts:
                expected = theirs(text, add_special_tokens=special)
                received = ours(text, add_special_tokens=special)
                assert received["input_ids"] == received.input_ids == expected.input_ids, text
                assert received.attention_mask == expected.attention_mask
            expected = theirs(texts, add_special_tokens=special)
            assert ours(texts, add_special_tokens=special).input_ids == expected.input_ids
        if theirs.pad_token is None:
            theirs.pad_token = theirs.eos_token
        theirs.padding_side = "right"
        expected = theirs(texts, padding=True, return_tensors="np")
        received = ours(texts, padding=True, return_tensors="np")
        for name in ("input_ids", "attention_mask"):
            np.testing.assert_array_equal(received[name], expected[name])
    with pytest.raises(ValueError, match="Pass padding=True"):
        ours(["a", "a b c d"], return_tensors="np")
    with pytest.raises(ValueError, match="return_tensors to be 'np' or None, received 'pt'"):
        ours("a", return_tensors="pt")
    with pytest.raises(AttributeError, match="input_ids, attention_mask, received offsets"):
        _ = ours("a").offsets


def test_a_summary_names_equal_layers_once(tiny: Path) -> None:
    backbone: Any = flm.Backbone.from_preset(tiny)
    lines: list[str] = []
    backbone.summary(print_fn=lines.append)
    (decoders,) = [line for line in lines if line.startswith("decoder_0 to decoder_")]
    number = backbone.config.num_layers
    assert f"decoder_{number - 1} x {number}" in decoders
    (query,) = [line for line in lines if line.strip().startswith("query")]
    kernel = backbone.get_layer("decoder_0").graph.get_layer("attention")
    assert "Dense" in query and kernel is not None
    total = backbone.count_params()
    assert lines[-2] == f"parameters: {total:,}, of which {total:,} train"
    assert lines[-1] == f"memory: {total * 4 / 1e6:,.1f} MB (float32)"
    assert len(lines) < 25
    lines.clear()
    adapted = flm.peft.lora(backbone, 2, targets=["decoder_1/*/query"])
    adapted.summary(print_fn=lines.append)
    trained = sum(x.shape[0] * x.shape[1] for x in adapted.trainable_variables)
    assert lines[-2].endswith(f"of which {trained} train")
    assert any(line.startswith("decoder_1 ") and line.endswith(f" {trained}") for line in lines)
    assert any(line.strip().startswith("query") and "LoRA" in line for line in lines)
    half: list[str] = []
    small: Any = flm.quantize(flm.Backbone.from_preset(tiny, dtype="bfloat16"))
    small.summary(print_fn=half.append)
    assert " int8" in half[-1] and " bfloat16" in half[-1]
    kerass: list[str] = []
    keras.Model.summary(backbone, print_fn=kerass.append)
    assert "Output Shape" in "".join(kerass)
    for options in ({"expand_nested": True}, {"line_length": 120}):
        with_options: list[str] = []
        backbone.summary(**options, print_fn=with_options.append)
        assert "Output Shape" in "".join(with_options)
