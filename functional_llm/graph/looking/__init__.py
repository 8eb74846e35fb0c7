"""Looking at a graph: as a tree of text, as a picture, as a page to click through.

`units.py` joins loose operations, `folding.py` finds layers that repeat, `changes.py` what a
rewiring changed; `outline.py` makes of them boxes and arrows, which the picture and the page draw.
"""
