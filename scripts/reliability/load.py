"""Many samples through attribution and evaluation of the demo model, with the memory of the process watched.

    python scripts/reliability/load.py                  20,000 short prompts, 2,000 texts of 2,048 tokens:
    about an hour on one thread python scripts/reliability/load.py --prompts 2000 --texts 200 --only attribute

Memory is flat where its peak after the first tenth of a stage's time is less than 5 % above the peak within
it. Ends with 1 where it is not. The demo model was made for 512 tokens; for the long texts it is told 2,048,
which changes what it says and not what it allocates.
"""

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from sparc3 import attribute, evaluate, load_model
from sparc3.demo.text import texts

LONG = 2048
LIMIT = 0.05


class Watched:
    """Resident memory of this process, ten times a second, while a block runs."""

    def __enter__(self) -> "Watched":
        self.seen: list[tuple[float, int]] = []
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.ended.wait(0.1):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.seen.append((time.perf_counter(), pages * 4096))

    def peaks(self) -> tuple[float, float, float]:
        """Seconds; peaks in MB within the first tenth of them, and after it."""
        first, last = self.seen[0][0], self.seen[-1][0]
        border = first + (last - first) / 10
        return (
            last - first,
            max(m for t, m in self.seen if t <= border) / 1e6,
            max(m for t, m in self.seen if t > border) / 1e6,
        )


def stages(prompts: int, long: int, folder: Path) -> dict[str, Callable[[], object]]:
    model, tokenizer = load_model("demo", dtype="float32", device="cpu")
    short = [text.prompt for text in islice(texts("angry", "reference"), prompts)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in short))
    chance, words = random.Random(0), sorted({word for text in short for word in text.split()})
    ids = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words]
    tokens = [[chance.choice(ids) for _ in range(LONG)] for _ in range(long)]
    (folder / "texts.jsonl").write_text(
        "".join(json.dumps({"text": tokenizer.decode(row)}) + "\n" for row in tokens)
    )
    model.config.max_position_embeddings = LONG
    toxicity = {
        "source": str(folder / "prompts.jsonl"),
        "count": prompts,
        "scorer": "lexicon",
        "generations": 1,
        "max_new_tokens": 8,
    }
    perplexity = {"source": str(folder / "texts.jsonl"), "protocol": "blocks", "seq_len": LONG}
    return {
        f"attribute, {prompts:,} prompts": lambda: attribute(
            model, short, tokenizer=tokenizer, partial=folder / "short"
        ),
        f"toxicity, {prompts:,} prompts": lambda: evaluate(model, tokenizer, {"toxicity": toxicity}),
        f"attribute, {long:,} × {LONG:,} tokens": lambda: attribute(
            model, tokens, target="next", partial=folder / "long"
        ),
        f"perplexity, {long:,} × {LONG:,} tokens": lambda: evaluate(
            model, tokenizer, {"perplexity": perplexity}
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=20_000, help="how many (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=2_000, help="how many (default: %(default)s)")
    parser.add_argument(
        "--only", default="", help="stages whose name begins so: attribute, toxicity, perplexity"
    )
    asked = parser.parse_args()
    grown = False
    print(
        "| stage | minutes | peak in the first tenth, MB | peak after it, MB | growth "
        "|\n|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, stage in stages(asked.prompts, asked.texts, Path(folder)).items():
            if not name.startswith(asked.only):
                continue
            with Watched() as watched:
                stage()
            took, before, after = watched.peaks()
            grown |= after / before - 1 >= LIMIT
            print(
                f"| {name} | {took / 60:.1f} | {before:.0f} | {after:.0f} | {after / before - 1:+.1%} |",
                flush=True,
            )
    return int(grown)


if __name__ == "__main__":
    sys.exit(main())
