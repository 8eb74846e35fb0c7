"""What save_preset writes beside the weights, and that it writes all or nothing."""

import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from gguf import GGMLQuantizationType as Kind

import functional_llm as flm
from configs import CONFIGS
from functional_llm.files.replacing import replaced_folder
from functional_llm.formats.safetensors_reader import open_safetensors
from functional_llm.formats.safetensors_writer import WEIGHT_FILES, write_safetensors
from reference import make_reference
from tiny import TEXTS, save_tiny
from tiny_gguf import save_gguf


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def gguf_file(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    size = json.loads((tiny / "config.json").read_text())["vocab_size"]
    config = {**CONFIGS["llama_grouped"], "vocab_size": size}
    save_gguf(make_reference(config), tiny / "tokenizer.json", path, Kind.F32)
    return path


def test_a_directory_keeps_its_tokenizer(tiny: Path, tmp_path: Path) -> None:
    flm.Backbone.from_preset(tiny).save_preset(tmp_path / "saved")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (tiny / name).read_bytes()
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["eos_token_id"] == 2


def test_a_tokenizer_out_of_a_gguf_file(gguf_file: Path, tmp_path: Path) -> None:
    flm.Backbone.from_preset(gguf_file).save_preset(tmp_path / "saved")
    ours = flm.Tokenizer.from_preset(gguf_file)
    again = flm.Tokenizer.from_preset(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for name in ("bos_token_id", "eos_token_id", "add_bos", "stop_token_ids", "chat_template"):
        assert getattr(again, name) == getattr(ours, name), name
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_token_id, ours.eos_token_id)
    for text in [*TEXTS, "", " leading", "two  spaces\n\n"]:
        assert again.encode(text) == ours.encode(text)
        assert theirs.encode(text) == ours.encode(text, add_bos=ours.add_bos)


def test_a_sentencepiece_tokenizer_out_of_a_gguf_file(material: Path, tmp_path: Path) -> None:
    path = material / "stories260K" / "stories260K-f32.gguf"
    flm.Backbone.from_preset(path).save_preset(tmp_path / "saved")
    ours, again = (flm.Tokenizer.from_preset(p) for p in (path, tmp_path / "saved"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in ("Once upon a time", "Zwölf 日本語 🙂", "two  spaces\n\n"):
        assert again.encode(text) == ours.encode(text)
        assert theirs.encode(text) == ours.encode(text, add_bos=ours.add_bos)


def test_others_may_read_what_is_written(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "any").write_text("")
    mode = (tmp_path / "any").stat().st_mode
    backbone = flm.Backbone.from_preset(tiny)
    backbone.save_preset(tmp_path / "saved")
    flm.peft.save_adapter(flm.peft.lora(backbone, rank=1), tmp_path / "adapter")
    backbone.save(tmp_path / "model.keras")
    files = [*tmp_path.glob("*/*"), tmp_path / "model.keras"]
    assert {path.stat().st_mode for path in files} == {mode}


def test_saving_over_a_directory_replaces_its_weights(tiny: Path, tmp_path: Path) -> None:
    backbone, folder = flm.Backbone.from_preset(tiny), tmp_path / "saved"
    backbone.save_preset(folder, max_shard_bytes=20_000)
    (folder / "README.md").write_text("mine")
    backbone.save_preset(folder)
    assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]
    assert (folder / "README.md").read_text() == "mine"
    flm.Backbone.from_preset(folder)


def test_what_fails_leaves_all_as_it_was(tmp_path: Path) -> None:
    def arrays(count: int) -> Any:
        for i in range(4):
            if i == count:
                raise RuntimeError("stop")
            yield str(i), np.full(10, i, "float32")

    folder = tmp_path / "saved"
    for _ in range(2):
        with (
            pytest.raises(RuntimeError, match="stop"),
            replaced_folder(folder, WEIGHT_FILES) as beside,
        ):
            write_safetensors(beside, arrays(2), 40)
        assert list(tmp_path.iterdir()) == []
    with replaced_folder(folder, WEIGHT_FILES) as beside:
        write_safetensors(beside, arrays(9), 40)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(RuntimeError, match="stop"), replaced_folder(folder, WEIGHT_FILES) as beside:
        write_safetensors(beside, arrays(2), 80)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]
    assert set(open_safetensors(folder).shapes) == set("0123")


def test_bad_places(tiny: Path, tmp_path: Path) -> None:
    backbone = flm.Backbone.from_preset(tiny)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="which is a file"):
        backbone.save_preset(tmp_path / "file")
    with pytest.raises(OSError, match="can be written to"):
        backbone.save_preset(tmp_path / "file" / "below")


def test_what_a_directory_cannot_hold_is_refused(tiny: Path, tmp_path: Path) -> None:
    backbone = flm.Backbone.from_preset(tiny)
    biases = flm.peft.bitfit(backbone, "decoder_0/mlp/up")
    merged = flm.peft.merge(biases)
    with pytest.raises(
        ValueError, match=r"(?s)1 differences:\n  'decoder_0/mlp/up/bias': .*save_adapt"
    ):
        merged.save_preset(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"'decoder_0/mlp/up/bias': expected no such weight"):
        biases.save_preset(tmp_path / "saved")

    def without(layer: Any, path: str, inputs: Any) -> Any:
        return inputs

    shorter = flm.rewire(backbone, call=without, where="decoder_0/mlp")
    with pytest.raises(ValueError, match=r"'decoder_0/mlp/up/kernel': expected .*received none"):
        shorter.save_preset(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("kind", ["preset", "adapter"])
def test_a_full_disk_is_an_oserror(tiny: Path, tmp_path: Path, kind: str) -> None:
    backbone = flm.Backbone.from_preset(tiny)
    adapted = flm.peft.lora(backbone, 8, targets="all")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # as if the disk ended there
    try:
        with pytest.raises(OSError, match="could not be written.*File too large"):
            if kind == "preset":
                backbone.save_preset(tmp_path / "saved")
            else:
                flm.peft.save_adapter(adapted, tmp_path / "saved")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("*.part"))
