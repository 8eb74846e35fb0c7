"""The documentation's site is built without a network, and no link in it is broken."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import functional_llm as flm


@pytest.fixture(scope="module")
def site(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command,
        cwd=repository,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_fetches_nothing(site: Path) -> None:
    """Scripts, styles, fonts and pictures are in it."""
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(
            r"""<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="http""", text
        )


def test_pages_lead_to_the_sources_that_they_name(site: Path) -> None:
    text = (site / "models" / "index.html").read_text(encoding="utf-8")
    assert 'href="../source/functional_llm/backbones/llama.py/"' in text
    page = (site / "source/functional_llm/backbones/llama.py/index.html").read_text("utf-8")
    assert "build_decoder" in page


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("functional_llm", flm.__all__),
        ("functional_llm.peft", flm.peft.__all__),
        ("functional_llm.sharding", flm.sharding.__all__),
        ("functional_llm.training", flm.training.__all__),
    ],
)
def test_every_public_name_is_in_the_reference(site: Path, module: str, names: list[str]) -> None:
    """Constants apart, and names of 0.1."""
    pages = "".join(p.read_text("utf-8") for p in (site / "reference").rglob("*.html"))
    old, rooms = {"twin", "Past"}, {"peft", "sharding", "training"}
    wanted = {name for name in names if not name.isupper() or name in ("IA3", "SVF")} - old - rooms
    missing = {name for name in wanted if f'id="{module}.{name}"' not in pages}
    assert missing == set()
