"""A model on a mesh of devices computes what it computes on one."""

import json
import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import functional_llm as flm
from configs import CONFIGS
from functional_llm.commands.main import main
from functional_llm.graph.placing import own_rows
from reference import save_reference
from tiny import save_tiny

DAY = "data=2,fsdp=2,model=2"
NIGHT = ["data=8", "model=2,data=4", "fsdp=8", "model=8"]


def mesh_of(**sizes: int) -> keras.distribution.DeviceMesh:
    """A mesh of devices that need not be there: layouts ask for their names alone."""
    devices = [f"cpu:{i}" for i in range(int(np.prod([*sizes.values()])))]
    return keras.distribution.DeviceMesh([*sizes.values()], [*sizes], devices)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sharded")
    # 199 tokens divide over nothing, 2 key heads not over 8.
    save_reference({**CONFIGS["llama_grouped"], "vocab_size": 199}, path)
    return path


def measured(folder: Path, works: str, *meshes: str) -> list[dict[str, Any]]:
    """Returns what each mesh gives, in the words of sharded.py."""
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    command = [sys.executable, str(here / "sharded.py"), str(folder), works, *meshes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("works", "meshes"),
    [
        pytest.param("text,lora,peak", [DAY, "fsdp=8"], id=DAY),
        pytest.param("all", [DAY, *NIGHT], id="all", marks=pytest.mark.nightly),
    ],
)
def test_a_mesh_computes_what_one_device_does(folder: Path, works: str, meshes: list[str]) -> None:
    one, *others = measured(folder, works, "-", *meshes)
    close = {"logits": 3e-5, "lora": 1e-5, "all weights": 1e-5, "lora on int8": 1e-5}
    for mesh, own in zip(meshes, others, strict=True):
        for name in own.keys() & close.keys():
            np.testing.assert_allclose(
                own[name], one[name], atol=close[name], rtol=0, err_msg=f"{name} on {mesh}"
            )
        for name in own.keys() & {"text", "one row"}:
            assert own[name] == one[name], mesh
        if "flops" in own and "model" not in mesh:
            assert own["flops"] < 1.1 / 8 * one["flops"], mesh
        if "peak" in own:
            most, share, largest = own["peak"]
            assert share <= most <= share + largest, mesh
            assert share < 0.6 * one["peak"][1] or mesh == "data=8"
        if "bytes" in own and mesh == "fsdp=8":
            assert own["bytes"] < 1.1 / 8 * one["bytes"]


@pytest.mark.nightly
def test_experts_on_an_axis_compute_what_one_device_does(tmp_path: Path) -> None:
    save_reference({**CONFIGS["qwen3_moe_some_dense"], "vocab_size": 199}, tmp_path)
    one, *others = measured(tmp_path, "logits,text,lora,all weights", "-", "data=4,experts=2")
    for own in others:
        assert own["text"] == one["text"]
        for name, close in (("logits", 3e-5), ("lora", 1e-5), ("all weights", 1e-5)):
            np.testing.assert_allclose(own[name], one[name], atol=close, rtol=0, err_msg=name)


@pytest.mark.nightly
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_compute_what_one_device_does(folder: Path, count: int) -> None:
    """Each reads the rows that its devices need, and all have the same text and losses."""
    names = "logits,text,one row,lora,all weights,read"
    (one,) = measured(folder, names, "-")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    for own in processes_of(folder, names, DAY, count, address):
        assert own["text"] == one["text"] and own["one row"] == one["one row"]
        for name, close in (("logits", 3e-5), ("lora", 1e-5), ("all weights", 1e-5)):
            np.testing.assert_allclose(own[name], one[name], atol=close, rtol=0, err_msg=name)
        assert own["read"] < one["read"]


def processes_of(
    folder: Path, works: str, mesh: str, count: int, address: str
) -> list[dict[str, Any]]:
    """Returns what each of several processes gives for a mesh over the devices of all."""
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here.parent), str(here)])
    started = [
        subprocess.Popen(
            [sys.executable, str(here / "sharded.py"), str(folder), works, mesh],
            env={**os.environ, "PYTHONPATH": paths, "FLM_PLACE": f"{i}/{count}@{address}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for i in range(count)
    ]
    with ThreadPoolExecutor(count) as pool:  # each waits for the others to end
        outputs = list(pool.map(lambda process: process.communicate(timeout=300)[0], started))
    assert [x.returncode for x in started] == [0] * count
    # JAX writes lines of its own between.
    return [json.loads(re.findall(r"\{.*\}", output)[-1]) for output in outputs]


@pytest.mark.nightly
def test_a_run_goes_on_with_another_mesh(folder: Path) -> None:
    mesh, other = "data=4,model=2", "fsdp=8"
    (found,) = measured(folder, "resume", mesh, other)
    assert found[mesh] == found["whole"]  # to the last bit
    np.testing.assert_allclose(found[other]["losses"], found["whole"]["losses"], atol=1e-5, rtol=0)


def test_each_weight_is_split_by_what_its_layer_is_for(folder: Path) -> None:
    layout = flm.sharding.layout(folder, mesh_of(fsdp=2, model=2))
    axes = {weight.path: weight.placement.axes for weight in layout.weights}
    assert axes["decoder_1/attention/query/kernel"] == ("fsdp", "model")
    assert axes["decoder_1/attention/output/kernel"] == ("model", "fsdp")
    assert axes["decoder_1/mlp/down/kernel"] == ("model", "fsdp")
    assert axes["token_embedding/embeddings"] == (None, "fsdp")  # 199 rows
    assert axes["final_norm/scale"] == (None,)
    assert "199 does not divide over 2 (model)" in layout.explain()


def test_heads_stay_whole(folder: Path) -> None:
    layout = flm.sharding.layout(folder, mesh_of(model=4), most_replicated=0.2)
    found = {weight.path: weight.placement for weight in layout.weights}
    assert found["decoder_0/attention/query/kernel"].axes == (None, "model")
    key = found["decoder_0/attention/key/kernel"]  # 24 outputs, but 2 heads
    assert key.axes == (None, None)
    assert "2 heads do not divide over 4 (model)" in key.reason


def test_what_is_added_follows_its_layer(folder: Path) -> None:
    """Adapters, scales and packed integers lie along the dimensions of the kernel."""
    backbone = flm.Backbone.from_preset(folder, load_weights=False)
    layout = flm.sharding.layout(backbone, mesh_of(fsdp=2, model=2))
    edited = flm.peft.dora(flm.quantize(backbone, "int8"), rank=4)  # which divides everything
    axes = {v.path: layout.placement(v.path, tuple(v.shape)).axes for v in edited.variables}
    query = "decoder_0/attention/query"
    assert axes[f"{query}/lora_a"] == ("fsdp", None)
    assert axes[f"{query}/lora_b"] == (None, "model")
    gate = "decoder_0/mlp/gate"
    adapted = flm.peft.lora(backbone, rank=4, targets="gate")
    shapes = {v.path: tuple(v.shape) for v in adapted.variables}
    lora = [
        layout.placement(f"{gate}/{x}", shapes[f"{gate}/{x}"]).axes for x in ("lora_a", "lora_b")
    ]
    assert lora == [("fsdp", None), (None, "model")]
    assert axes[f"{query}/kernel_scale"] == ("model",)
    assert axes[f"{query}/magnitude"] == ("model",)
    packed = layout.placement("decoder_0/mlp/down/kernel", (40, 48)).axes  # two in a byte
    assert packed == ("model", "fsdp")
    assert axes["token_embedding/embeddings_scale"] == (None,)


def test_a_rewired_graph_has_a_layout(folder: Path) -> None:
    backbone = flm.Backbone.from_preset(folder, load_weights=False)

    def change(layer: Any, path: str) -> Any:
        if not path.endswith("mlp/gate"):
            return layer
        return flm.CompositeLayer(
            [keras.layers.Dense(48, use_bias=False, name="other"), layer], name="before_gate"
        )

    backbone = flm.rewire(backbone, change)
    layout = flm.sharding.layout(backbone, mesh_of(fsdp=2, model=2), most_replicated=0.9)
    reasons = {weight.path: weight.placement for weight in layout.weights}
    other = next(path for path in reasons if path.endswith("other/kernel"))
    assert reasons[other].axes == ("fsdp", None)
    assert reasons[other].reason == "no role; fsdp on the largest dimension that divides"


def test_experts_have_an_axis(checkpoint: Any) -> None:
    folder = checkpoint("qwen3_moe_some_dense")
    layout = flm.sharding.layout(folder, mesh_of(experts=2, model=2), most_replicated=0.5)
    axes = {weight.path: weight.placement.axes for weight in layout.weights}
    gate = next(path for path in axes if path.endswith("experts_gate/kernel"))
    assert axes[gate] == ("experts", None, "model")
    assert axes[gate.replace("gate", "down")] == ("experts", "model", None)


def test_rows_are_split_over_data_and_fsdp(folder: Path) -> None:
    layout = flm.sharding.layout(folder, mesh_of(data=2, fsdp=4))
    assert layout.num_model_replicas == 8
    assert layout.get_data_layout((16, 5)).axes == (("data", "fsdp"), None)
    with pytest.raises(ValueError, match=r"divide over 8 devices \(data=2 and fsdp=4\).* 12 rows"):
        layout.get_data_layout((12, 5))


def test_a_batch_that_does_not_divide(folder: Path) -> None:
    layout = flm.sharding.layout(folder, mesh_of(data=2, fsdp=4))
    with layout.scope(), pytest.raises(ValueError, match="over 8 devices, received 12 rows. Take"):
        own_rows(np.zeros((12, 5)), 12)


def test_axes_may_have_other_names(folder: Path) -> None:
    usual = flm.sharding.layout(folder, mesh_of(data=2, fsdp=2, model=2))
    layout = flm.sharding.layout(folder, mesh_of(rows=2, b=2, c=2), "c", "b")
    other = {"fsdp": "b", "model": "c", None: None}
    for own, same in zip(layout.weights, usual.weights, strict=True):
        assert own.placement.axes == tuple(other[x] for x in same.placement.axes)
    assert layout.get_data_layout((4, 3)).axes == (("rows", "b"), None)
    batch = flm.sharding.layout(folder, mesh_of(batch=4, model=2), fsdp="batch")
    assert batch.num_model_replicas == 4
    with pytest.raises(ValueError, match=r"out of \['batch'\]. Received: \{'model': 'tensor'\}"):
        flm.sharding.layout(folder, mesh_of(batch=2), model="tensor")
    with pytest.raises(ValueError, match="an axis of the mesh for each purpose"):
        flm.sharding.layout(folder, mesh_of(batch=2), model="batch", fsdp="batch")


def test_bad_meshes(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"'tensor'\] are unknown"):
        flm.sharding.layout(folder, mesh_of(data=2, tensor=2))
    with pytest.raises(ValueError, match=r"number of devices, 1\. Received: 'data=3'"):
        flm.sharding.mesh("data=3")
    for text in ("data", "data=0", "data=1,data=1", ""):
        with pytest.raises(ValueError, match="Expected axes with a number of devices each"):
            flm.sharding.mesh(text)
    with pytest.raises(
        ValueError, match=r"at most 5% of the bytes.*'decoder_0/attention/query/kernel'"
    ):
        flm.sharding.layout(folder, mesh_of(model=16))


def test_a_command_takes_a_mesh(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = save_tiny(tmp_path / "tiny")
    options = ["generate", "--preset", str(tiny), "--prompt", "The", "--max-new-tokens", "2"]
    try:
        assert main([*options, "--mesh", "data=1"]) == 0
        assert keras.distribution.distribution() is not None
    finally:
        keras.distribution.set_distribution(None)
    assert main([*options, "--mesh", "data=3"]) == 2
    assert "the number of devices, 1" in capsys.readouterr().err
