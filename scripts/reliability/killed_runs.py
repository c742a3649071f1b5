"""Runs of a small recipe, killed with SIGKILL at random moments and started again, compared with one that was
not.

    python scripts/reliability/killed_runs.py --runs 50
    python scripts/reliability/killed_runs.py --runs 20 --ranks 2     one of two ranks is killed

Each run is killed one to three times, at moments spread over the time that it takes; then it is started a
last time and must end well, with scores and figures to the last bit (several ranks: 1e-6), and nothing left
over. Ends with 1 where it does not.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from forked import differences, ended, ranks, removed, run_small

MARKS = (
    ("recipe.yaml", "before its recipe was written"),
    ("scores", "in the samples"),
    ("circuit.json", "in the scores"),
    ("results.json", "in the evaluation"),
    ("report.html", "in the report"),
)


def stage(folder: Path) -> str:
    """Where a run was when it was killed: at the first thing that is not there."""
    return next((name for mark, name in MARKS if not (folder / mark).exists()), "at its end")


def campaign(runs: int, processes: int, seed: int) -> int:
    chance, where, failed = random.Random(seed), Counter[str](), 0
    with tempfile.TemporaryDirectory() as place:
        whole, again, said = Path(place, "whole"), Path(place, "again"), Path(place, "said")
        began = time.monotonic()
        if any(ended(ranks(1, lambda: run_small(whole), said))):
            sys.exit(said.read_text())
        took = time.monotonic() - began
        print(f"uninterrupted: {took:.1f} s", flush=True)
        for number in range(runs):
            for _ in range(chance.choice((1, 1, 2, 3))):
                children = ranks(processes, lambda: run_small(again), said)
                time.sleep(chance.uniform(0, took))
                os.kill(chance.choice(children), signal.SIGKILL)
                if any(ended(children)):
                    where[stage(again)] += 1
            codes = ended(ranks(processes, lambda: run_small(again), said))
            wrong = (
                differences(whole, again, 0.0 if processes == 1 else 1e-6)
                if not any(codes)
                else [f"exit codes {codes}"]
            )
            if "Traceback" in said.read_text():
                wrong.append("a traceback")
            if wrong:
                failed += 1
                print(f"run {number}: {'; '.join(wrong)}\n{said.read_text()[-3000:]}", flush=True)
            removed(again)
            said.unlink()
    print(
        f"{runs} runs of {processes} process{'es' if processes > 1 else ''}, killed {where.total()} times: "
        f"{', '.join(f'{count} {name}' for name, count in where.most_common())}; {failed} ended otherwise "
        "than the uninterrupted one"
    )
    return int(failed > 0)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=50, help="how many (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=1, help="processes of one run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    asked = parser.parse_args()
    return campaign(asked.runs, asked.ranks, asked.seed)


if __name__ == "__main__":
    sys.exit(main())
