"""Draw toxicity against damage of every edit that benchmarks/toxicity_edits.py measured on validation prompts.

    python benchmarks/draw_edits.py [--out docs/edits.svg]

Reads benchmarks/toxicity_edits/validation.json. Each curve is one family of edits, each mark one size of it.
"""

import argparse
import json
from pathlib import Path

from sparc3.report.charts import Scale, drawing, line, mark, polyline, tag

HERE = Path(__file__).parent
BUDGET = 0.02
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 430, 62, 560, 20, 380

CURVES = {
    "words by gradient, fitted, repair": ("#b3005e", "m1"),
    "words by lrp, fitted, repair": ("#e0559b", ""),
    "words by gradient, fitted": ("#0b6e4f", "m1"),
    "words by lrp, fitted": ("#1f5fbf", ""),
    "words by cp-lrp, fitted": ("#6a3fb5", "m3"),
    "words by relp, fitted": ("#0f8b8d", "m2"),
    "words by lrp, zeroed": ("#7aa7e8", ""),
    "words by cp-lrp, zeroed": ("#b39adf", "m3"),
    "words by gradient, zeroed": ("#7fc4a8", "m1"),
    "LRP, matched contrast": ("#d1495b", ""),
    "gradient, matched contrast": ("#e6a0a9", "m1"),
    "AurA": ("#c77d0a", "m6"),
    "Det-0": ("#dcb36a", "m6"),
    "activation difference": ("#7a6a53", "m4"),
    "directional ablation": ("#444444", "m5"),
    "profane tokens' experts": ("#222222", "m7"),
    "random, in LRP's layers": ("#9a9a9a", "m8"),
}
"""Family, as validation.json has it → its colour and the class of its mark. The others are in the table of docs/experiments.md."""

STYLE = """
text { font: 13px sans-serif; fill: #333 } .axis { stroke: #999 } .grid { stroke: #e4e4e4 }
.budget { stroke: #333; stroke-dasharray: 4 4 } path.curve { fill: none; stroke-width: 2 }
"""


def draw_edits(edits: list[dict[str, float]]) -> str:
    """The SVG of all edits, each a dict with family, damage (nats a token) and hazard (× the original's)."""
    x = Scale(0.001, 2.0, LEFT, RIGHT, log=True)
    y = Scale(0.0, 2.4, BOTTOM, TOP)
    parts = [tag("style", STYLE), tag("rect", width=WIDTH, height=HEIGHT, fill="white")]
    for tick in (0, 0.5, 1, 1.5, 2):
        parts += [
            line(LEFT, RIGHT, y(tick), y(tick), "axis" if tick == 0 else "grid"),
            tag("text", f"× {tick:g}", x=LEFT - 8, y=y(tick) + 4, text_anchor="end"),
        ]
    for tick in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1):
        parts += [
            line(x(tick), x(tick), BOTTOM, BOTTOM + 5, "axis"),
            tag("text", f"{tick:g}", x=x(tick), y=BOTTOM + 20, text_anchor="middle"),
        ]
    parts += [
        line(x(BUDGET), x(BUDGET), TOP, BOTTOM, "budget"),
        tag("text", "budget", x=x(BUDGET) + 6, y=TOP + 12),
        tag("text", "damage, nats a token (0.01 is about 1 % of perplexity)", x=LEFT, y=HEIGHT - 8),
        tag("text", "probability of profane words, × the original's", x=LEFT + 8, y=BOTTOM - 8),
    ]
    for row, (family, (colour, shape)) in enumerate(CURVES.items()):
        sizes = sorted((edit["damage"], edit["hazard"]) for edit in edits if edit["family"] == family)
        if not sizes:
            raise SystemExit(f"validation.json has no edit of the family {family!r}")
        points = [(x(damage), y(hazard)) for damage, hazard in sizes]
        shapes = [mark(shape, *point, 4.5) for point in points]
        height = TOP + 14 + 23 * row
        parts += [
            tag("path", d=polyline(points), class_="curve", stroke=colour),
            tag("g", *shapes, mark(shape, RIGHT + 34, height - 4, 4.5), fill=colour),
            tag("text", family, x=RIGHT + 48, y=height),
        ]
    label = "Probability of profane words against damage, by edit"
    return str(drawing(WIDTH, HEIGHT, label, *parts, xmlns="http://www.w3.org/2000/svg"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "edits.svg")
    edits = json.loads((HERE / "toxicity_edits" / "validation.json").read_text())
    parser.parse_args().out.write_text(draw_edits(edits) + "\n")


if __name__ == "__main__":
    main()
