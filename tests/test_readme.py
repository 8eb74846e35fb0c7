"""The README's Python runs as it stands."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.M | re.S)
(WHOLE,) = [block for block in BLOCKS if "import functional_llm" in block]


@pytest.mark.real
def test_the_python_block_runs(
    smollm2_gguf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(WHOLE, str(README), "exec"), names)
    assert capsys.readouterr().out.startswith(" Paris.")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "directory", "model.keras"}
    assert names["model"](names["token_ids"]).shape == names["logits"].shape  # type: ignore[operator, attr-defined]
