"""Half of every row's weights out of a small model of stories: perplexity on text it knows and on text it has never seen the like of.

    OMP_NUM_THREADS=1 python benchmarks/compression.py MODEL STORIES TEXT [--fractions 0.5] [--out DIR]

MODEL is a folder or hub id, STORIES a text file with <|endoftext|> between stories, TEXT any text file. The recipe is demo-compress with
another model: calibrated on the first 128 stories, measured on the other stories and on the first 100,000 characters of TEXT. Every
row is counted; a run whose rows are not at their sparsity fails. Then, how much the norms of inputs differ within a row, in this model and in the
embedded one: only as far as they do can Wanda rank otherwise than magnitude.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from sparc3 import ReferenceSet, Results, attribute, load_model, load_recipe, run
from sparc3.models.families import ROLES
from sparc3.models.sites import sites_of
from sparc3.samples.sources import Request, gather

CALIBRATION = 128
CHARACTERS = 100_000
END = "<|endoftext|>"


def recipe(model: str, calibration: Path, text: Path, fractions: list[float]) -> dict[str, Any]:
    content = load_recipe("demo-compress").resolve()
    content["name"] = f"compress-on-{text.stem}"
    content["model"]["id"] = model
    content["references"]["general"] |= {"source": str(calibration), "count": CALIBRATION}
    content["attribution"]["truncate"] = True
    content["compress"]["fractions"] = fractions
    content["evaluation"] = {
        "perplexity": {"source": str(text), "protocol": "blocks", "seq_len": 2048},
        "sparsity": {},
    }
    return content


def perplexities(results: Results) -> dict[str, tuple[float, tuple[float, float] | None]]:
    return {m.variant: (m.value or 0.0, m.ci95) for m in results if m.metric == "perplexity"}


def spreads(name: str, samples: ReferenceSet) -> dict[str, float]:
    """Role → the standard deviation of ‖a_j‖₂ over the inputs j of a row, over their mean; mean of the layers."""
    model, tokenizer = load_model(name, dtype="float32", device="cpu")
    scores, found = (
        attribute(
            model, samples, tokenizer=tokenizer, method="wanda", unit="weight", sites=ROLES, truncate=True
        ),
        {},
    )
    for role in ROLES:
        norms = [
            scores[site.name].sum(0) / site.weight.detach().abs().sum(0) for site in sites_of(model, [role])
        ]
        found[role] = sum(float(one.std() / one.mean()) for one in norms) / len(norms)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("stories", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.5])
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="folder for the files and the run; a temporary one where none is given",
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        stories = [
            story.strip() for story in args.stories.read_text(encoding="utf-8").split(END) if story.strip()
        ]
        texts = {
            "stories": f"\n{END}\n".join(stories[CALIBRATION:]),
            "text": args.text.read_text(encoding="utf-8")[:CHARACTERS],
        }
        (out / "calibration.txt").write_text(f"\n{END}\n".join(stories[:CALIBRATION]), encoding="utf-8")
        for name, text in texts.items():
            (out / f"{name}.txt").write_text(text, encoding="utf-8")
        found = {
            name: run(
                recipe(args.model, out / "calibration.txt", out / f"{name}.txt", args.fractions), out / name
            )
            for name in texts
        }
    for check in (check for results in found.values() for check in results.provenance["checks"]):
        assert check["ok"], check
    rows = {name: perplexities(results) for name, results in found.items()}
    print(f"\nperplexity{'':20} {'stories':>24} {'text':>26}   (every row counted)")
    for variant in rows["stories"]:
        told = (
            f"{value:9.2f} [{ci[0]:.2f}, {ci[1]:.2f}]" if ci else f"{value:9.2f}"
            for value, ci in (rows[name][variant] for name in texts)
        )
        print(f"{variant:30} " + " ".join(f"{one:>26}" for one in told))
    print(f"\nnorms of inputs, deviation over mean{'':20} " + " ".join(f"{role:>9}" for role in ROLES))
    for name, samples in (
        (args.model, ReferenceSet.of(stories[:CALIBRATION])),
        ("demo", gather(Request("demo-general", CALIBRATION))),
    ):
        print(f"{name[-55:]:55} " + " ".join(f"{value:9.2f}" for value in spreads(name, samples).values()))


if __name__ == "__main__":
    main()
