"""Memory between training steps: what the process has had once, it keeps."""

import pytest


def test_the_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    from functional_llm.training import keep_memory

    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    assert not keep_memory()
