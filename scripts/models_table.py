"""Write the table of supported models in docs/models.md from the family table in the code, with figures
measured now.

    python scripts/models_table.py

Each figure is the worst over tiny random models of that architecture (tests/tiny.py), computed in float64.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from tiny import CONFIGS, samples, tiny  # noqa: E402

from sparc3.doctor import checks  # noqa: E402
from sparc3.doctor.checks import relevance_ledger  # noqa: E402
from sparc3.doctor.second_opinion import all_sites, exact_copy, record_flows  # noqa: E402
from sparc3.models.families import FAMILIES, Family  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- models: written by scripts/models_table.py -->", "<!-- end of models -->"


def main() -> None:
    before, rest = PAGE.read_text().split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")


def table() -> str:
    head = "| model_type | models | neurons | heads | ledger's gap | AttnLRP against its rules |"
    return "\n".join(
        [head, "|---|---|---|---|---|---|", *(row(kind, family) for kind, family in sorted(FAMILIES.items()))]
    )


def row(kind: str, family: Family) -> str:
    figures = [measured(name) for name, (own, _) in CONFIGS.items() if own == kind]
    gap, difference = (max(column) for column in zip(*figures, strict=True))
    up, out = (f"`{family.describe_role(role)}`" for role in ("mlp.up", "attn.o"))
    return f"| `{kind}` | {family.models} | {up} | {out} | {gap:.0e} | {difference:.0e} |"


def measured(name: str) -> tuple[float, float]:
    """(largest gap of the ledger, relative to its largest part; difference of AttnLRP from the second
    opinion) of a tiny model."""
    model = exact_copy(tiny(name))
    seen = record_flows(model, samples()[0], all_sites(model))
    difference, _, _ = checks.attnlrp_agrees(model, samples(), seen)
    return max(relevance_ledger(model, ids).gap for ids in samples()), difference


if __name__ == "__main__":
    main()
