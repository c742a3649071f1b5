"""Report: a run folder → one HTML file that holds everything, asks the network for nothing, and reads without JavaScript.

    folder ─▶ what the run left behind          wording  ─▶ what it says, in sentences
    numbers, visible, masking, svg ─▶ how a figure, a text, an offensive word, a shape is written
    curves, comparison, unit_map, pairs, cards, tables ─▶ the sections        page ─▶ all of them in page.html
"""

from .page import write_report

__all__ = ["write_report"]
