"""Settings and material that the tests share."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # before anything imports keras

from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests that need downloaded material last: what is quick fails first."""
    items.sort(key=lambda item: item.get_closest_marker("real") is not None)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder of the checkout."""
    return REPOSITORY
