"""Runs of a small recipe on a disk that becomes full at different moments, then given room and started again.
Needs root, to mount it.

    python scripts/reliability/full_disk.py --sizes 12

Each run gets a disk (tmpfs) of another size, from a few kilobytes to just less than a whole run takes. It
must end with exit code 1 and one line that names a file of the run; with more room the same command must end
as a run does that never met the end of its disk.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from forked import differences, ended, ranks, run_small


def tmpfs(place: Path, kilobytes: int, *options: str) -> None:
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={kilobytes}k"]), "tmpfs", place], check=True
    )


def wrong_line(said: str, out: Path) -> str | None:
    """What is wrong with what a run said at its end: one line of its own, about a file in its folder."""
    lines = [line for line in said.splitlines() if line.startswith("sparc3: ")]
    if "Traceback" in said or len(lines) != 1 or f"cannot write {out}/" not in lines[0]:
        return f"it said {said[-1500:]}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", type=int, default=12, help="how many sizes of the disk (default: %(default)s)"
    )
    sizes = parser.parse_args().sizes
    failed, met = 0, []
    with tempfile.TemporaryDirectory() as place:
        whole, disk, said = Path(place, "whole"), Path(place, "disk"), Path(place, "said")
        if any(ended(ranks(1, lambda: run_small(whole), said))):
            sys.exit(said.read_text())
        taken = sum(-(-path.stat().st_size // 4096) * 4 for path in whole.rglob("*") if path.is_file())
        disk.mkdir()
        out = disk / "run"
        for number in range(sizes):
            size = 16 + (taken - 32) * number // max(1, sizes - 1)
            tmpfs(disk, size)
            try:
                said.write_text("")
                first = ended(ranks(1, lambda: run_small(out), said))
                text = said.read_text()
                wrong = (
                    [f"exit code {first[0]}"]
                    if first != [1]
                    else [line]
                    if (line := wrong_line(text, out))
                    else []
                )
                if not wrong:
                    met.append(text.partition(f"cannot write {out}/")[2].partition(":")[0])
                tmpfs(disk, 8 * taken, "remount")
                if any(ended(ranks(1, lambda: run_small(out), said))):
                    wrong.append(f"started again: {said.read_text()[-1500:]}")
                else:
                    shutil.copytree(out, Path(place, "again"))
                    wrong += differences(whole, Path(place, "again"), 0.0)
                    shutil.rmtree(Path(place, "again"))
            finally:
                subprocess.run(["umount", disk], check=True)
            if wrong:
                failed += 1
                print(f"{size} kB: {'; '.join(wrong)}", flush=True)
    print(
        f"{sizes} disks from 16 to {taken - 16} kB, full at {', '.join(sorted(set(met)))}; {failed} runs "
        "ended otherwise"
    )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
