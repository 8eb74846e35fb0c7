"""Looking at a graph: as a tree of text, as a picture, as a page to click through.

`calls.py` joins loose operations to boxes, `folding.py` finds layers that repeat, `changes.py` what a
rewiring changed; `outline.py` makes of them the one description that the picture and the page draw.
"""
