"""Model cards, whose snippets run; uploads to a Hub on 127.0.0.1."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard

import functional_llm as flm
from fake_hub import REPO, Server
from functional_llm.formats.model_card import add_losses, is_own
from tiny import save_tiny

ROOT = Path(__file__).parents[1]
FACTS = flm.CardFacts(datasets=["org/chats", "mine.jsonl"], method="By hand.", losses={"x": 1.5})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "tiny")


def _lora(folder: Path) -> Any:
    return flm.peft.lora(flm.Backbone.from_preset(folder), rank=2, targets=["query", "down"])


def test_the_head_says_what_the_hub_reads(tiny: Path, tmp_path: Path) -> None:
    backbone = flm.Backbone.from_preset(tiny)
    backbone.preset = "llama3.2_1b"
    tokenizer = flm.Tokenizer.from_preset(tiny)
    backbone.save_preset(tmp_path / "model", tokenizer, facts=FACTS)
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.base_model == "meta-llama/Llama-3.2-1B"
    assert (card.data.license, card.data.library_name) == ("llama3.2", "transformers")
    assert card.data.datasets == ["org/chats"]
    assert card.data.to_dict()["base_model_relation"] == "finetune"
    assert "Data: org/chats, mine.jsonl." in card.text and "| x | 1.5000 |" in card.text
    model = flm.peft.lora(backbone, rank=2)
    model.preset = "qwen2.5_3b"
    flm.peft.save_adapter(model, tmp_path / "adapter")
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    head = card.data.to_dict()
    assert (head["license"], head["license_name"]) == ("other", "qwen-research")
    assert (head["base_model"], head["library_name"]) == ("Qwen/Qwen2.5-3B", "peft")
    assert set(head["tags"]) >= {"functional_llm", "lora", "base_model:adapter:Qwen/Qwen2.5-3B"}
    assert "LoRA, rank 2, alpha 16, on q_proj, v_proj" in card.text


def test_a_card_beside_a_stock_file(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = flm.Backbone.from_preset(tiny)
    (tmp_path / "saved").mkdir()
    backbone.save(tmp_path / "saved" / "model.keras")
    backbone.write_card(tmp_path / "saved" / "model.keras", FACTS)
    assert ModelCard.load(tmp_path / "saved" / "README.md").data.library_name == "keras"
    names = _run_snippets(tmp_path / "saved", monkeypatch)
    _check(names, np.asarray(backbone(IDS)), IDS)


def test_only_a_card_of_ours_is_written_anew(tiny: Path, tmp_path: Path) -> None:
    model, path = _lora(tiny), tmp_path / "README.md"
    flm.peft.save_adapter(model, tmp_path)
    first = path.read_text()
    assert is_own(first) and str(tiny) not in first
    add_losses(tmp_path, {"held out": 2.25})
    assert is_own(path.read_text()) and "| held out | 2.2500 |" in path.read_text()
    flm.peft.save_adapter(model, tmp_path, facts=FACTS)
    assert "By hand." in path.read_text()
    changed = path.read_text().replace("By hand.", "By my hand.")
    for text in (changed, "---\nlicense: mit\n---\nmine", ""):
        path.write_text(text)
        assert not is_own(text)
        add_losses(tmp_path, {"held out": 2.25})
        flm.peft.save_adapter(model, tmp_path)
        assert path.read_text() == text
    backbone = flm.Backbone.from_preset(tiny)
    backbone.save_preset(tmp_path)
    assert path.read_text() == ""


def _snippets(folder: Path) -> list[str]:
    text = (folder / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)


def _run_snippets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs a card's blocks beside its folder, as they stand; returns the names that they made."""
    monkeypatch.chdir(folder.parent)
    names: dict[str, Any] = {}
    for block in _snippets(folder):
        exec(compile(block, "README.md", "exec"), names)
        if "AutoModel" in block:
            names.setdefault("theirs", []).append(names["model"])
    return names


def _check(names: dict[str, Any], expected: np.ndarray, ids: np.ndarray) -> None:
    import torch

    np.testing.assert_allclose(np.asarray(names["model"](ids)), expected, atol=1e-4)
    assert names["theirs"]
    for model in names["theirs"]:
        with torch.no_grad():
            logits = model.eval()(torch.tensor(ids)).logits.numpy()
        np.testing.assert_allclose(logits, expected, atol=1e-4)


IDS = np.array([[1, 7, 30, 12, 5]])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ["model", "lora", "svf"])
def test_every_snippet_of_a_card_runs(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, capsys: Any
) -> None:
    pytest.importorskip("peft")
    if kind == "model":
        model: Any = flm.Backbone.from_preset(tiny)
        model.save_preset(tmp_path / "saved")
    else:
        model = _lora(tiny) if kind == "lora" else flm.peft.svf(flm.Backbone.from_preset(tiny))
        for variable in model.trainable_variables:
            variable.assign_add(np.full(variable.shape, 0.1, "float32"))
        flm.peft.save_adapter(model, tmp_path / "saved")
    names = _run_snippets(tmp_path / "saved", monkeypatch)
    assert capsys.readouterr().out
    _check(names, np.asarray(model(IDS)), IDS)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in list(os.environ):
        if name.startswith("HF_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("NO_PROXY", "*")
    server = Server()
    yield server
    server.close()


PUSH = """
import functional_llm as flm, numpy as np, sys
from functional_llm.commands.main import main
backbone = flm.Backbone.from_preset(sys.argv[1])
def push(kind, repository="someone/tiny"):
    if kind == "model":
        return backbone.push_to_hub(repository, private=True)
    if kind == "adapter":
        model = flm.peft.lora(backbone, rank=2, seed=3)
        return flm.peft.push_to_hub(model, repository, message="First")
    if kind == "command":
        return main(["push", sys.argv[3], repository, "--private"])
    if kind == "load":
        alone = flm.Backbone.from_preset(f"hf://{repository}")
        onto = flm.TextGenerator.from_preset(sys.argv[1], adapter=f"hf://{repository}").backbone
        return [model(np.array([[1, 7, 30]])).tolist() for model in (alone, onto)]
    return flm.push_to_hub(sys.argv[3], repository)
for what in sys.argv[2].split(";"):
    try:
        print(push(*what.split(",")))
    except (ValueError, RuntimeError, OSError) as error:
        print(type(error).__name__, error)
"""


def _push(server: Server, *arguments: Any, **environment: str) -> str:
    environment = {"HF_ENDPOINT": server.url, "HF_TOKEN": server.token, **environment}
    done = subprocess.run(
        [sys.executable, "-c", PUSH, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_model_and_an_adapter_go_to_the_hub(hub: Server, tiny: Path, tmp_path: Path) -> None:
    assert _push(hub, tiny, "model") == f"{hub.url}/{REPO}"
    assert hub.created[0]["visibility"] == "private"
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(hub.repo)
    card = hub.repo["README.md"].decode()
    assert 'from_preset("hf://someone/tiny")' in card and 'from_pretrained("someone/tiny")' in card
    folder = tmp_path / "again"
    folder.mkdir()
    for name, data in hub.repo.items():
        (folder / name).write_bytes(data)
    original, again = (flm.Backbone.from_preset(x) for x in (tiny, folder))
    np.testing.assert_array_equal(np.asarray(again(IDS)), np.asarray(original(IDS)))
    hub.repo.clear()
    assert _push(hub, tiny, "adapter") == f"{hub.url}/{REPO}"
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(hub.repo)
    assert "AutoPeftModelForCausalLM" in hub.repo["README.md"].decode()


def test_a_folder_goes_to_the_hub_without_its_checkpoint(
    hub: Server, tiny: Path, tmp_path: Path
) -> None:
    flm.peft.save_adapter(_lora(tiny), tmp_path / "a")
    (tmp_path / "a" / "training").mkdir()
    (tmp_path / "a" / "training" / "checkpoint.safetensors").write_bytes(b"x")
    (tmp_path / "a" / "README.md").write_text("mine")
    _push(hub, tiny, "folder", tmp_path / "a")
    assert hub.repo["README.md"] == b"mine"
    assert not any(name.startswith("training") for name in hub.repo)


def test_an_adapter_goes_to_the_hub_by_command_and_comes_back(
    hub: Server, tiny: Path, tmp_path: Path
) -> None:
    model = _lora(tiny)
    for variable in model.trainable_variables:
        variable.assign(np.random.default_rng(0).normal(size=variable.shape) * 0.3)
    flm.peft.save_adapter(model, tmp_path / "a")
    assert _push(hub, tiny, "command", tmp_path / "a").startswith(f"Uploaded to {hub.url}/{REPO}.")
    assert hub.created[0]["visibility"] == "private" and "adapter_config.json" in hub.repo
    loaded = json.loads(_push(hub, tiny, "load"))
    expected = np.asarray(model(np.array([[1, 7, 30]])))
    for logits in loaded:
        np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_what_cannot_be_pushed_is_said(hub: Server, tiny: Path) -> None:
    messages = {
        "model,other/name": "ValueError .*other/name. Received: a token that may not write",
        "model,tiny": "ValueError Expected organisation/name. Received: 'tiny'",
        "model,a b/c": "ValueError Expected organisation/name. Received: 'a b/c'",
        "folder": "FileNotFoundError Expected a directory .*/nothing: it has no config.json",
    }
    received = _push(hub, tiny, ";".join(messages), tiny.parent / "nothing").splitlines()
    for message, line in zip(messages.values(), received, strict=True):
        assert re.match(message, line), line
    assert hub.repo == {}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"HF_TOKEN": ""}, "ValueError Expected a token.*Received: no token.*HF_TOKEN"),
        ({"HF_TOKEN": "hf_other"}, "ValueError .*Received: a token that is not valid"),
        pytest.param(
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "RuntimeError Could not upload to",
            marks=pytest.mark.nightly,  # by day, offline
        ),
        ({"HF_HUB_OFFLINE": "1"}, "RuntimeError Could not upload to .*HF_HUB_OFFLINE"),
    ],
)
def test_who_cannot_push_is_told_why(
    hub: Server, tiny: Path, environment: dict[str, str], message: str
) -> None:
    received = _push(hub, tiny, "model;adapter", **environment).splitlines()
    assert len(received) == 2 and all(re.match(message, line) for line in received), received
    assert hub.repo == {}
