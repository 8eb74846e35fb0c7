"""Draws the pictures of the documents again: `python docs/pictures.py`.

Needs Graphviz, pydot and a Chromium.
"""

import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

import functional_llm as flm  # noqa: E402
from browser import Browser, find_chromium  # noqa: E402

PICTURES = REPOSITORY / "docs" / "pictures"


def main() -> None:
    """Draws them."""
    backbone = flm.Backbone.from_preset("smollm2_135m", load_weights=False)
    flm.plot(backbone, PICTURES / "smollm2.svg")
    gemma = flm.Backbone.from_preset("gemma3_270m", load_weights=False)
    flm.plot(gemma, PICTURES / "gemma3.svg", depth=0)
    lora_backbone = flm.peft.lora(backbone, rank=8)
    attention, original = (
        model.get_layer("decoder_0").get_layer("attention") for model in (lora_backbone, backbone)
    )
    flm.plot(attention, REPOSITORY / "docs" / "lora_attention.svg", original=original)
    chromium = find_chromium()
    if chromium is None:
        raise RuntimeError("Expected a Chromium on the PATH, or in FLM_CHROMIUM.")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "model.html"
        flm.explore(lora_backbone, page, original=backbone)
        with Browser(chromium, page, size=(1180, 900)) as browser:
            browser.press("n")
            browser.run("document.querySelector('#graph').scrollTop = 150")
            browser.screenshot(PICTURES / "explore.png")


if __name__ == "__main__":
    main()
