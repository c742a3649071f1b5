"""Sums on disk: what an interrupted attribution goes on from, and what the shards of a job array leave for `merge`."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import DamagedFile, UserError
from ..files import fingerprint
from ..models import Site
from ..scores import is_model
from ..tensors import load_tensors, read_header, save_tensors
from .sums import Settings, Sums

FORMAT = "sparc3.shard/1"


@dataclass(frozen=True)
class Task:
    """What a set of sums is about; sums add up only where all of it agrees.

    Attributes:
        settings: of the method.
        model: id, architecture, fingerprint; and the dtype it was run in.
        samples_fingerprint: of the whole reference set, of which a shard has seen a part.
        tokens_fingerprint: of its tokens and targets, which also depend on the tokenizer and on truncation.
        count: how many samples the reference set has.
        sites: (name, role, layer, out, in, heads) of every site.
        shard: (2, 3) for the second of three, None for all samples.
    """

    settings: Settings
    model: dict[str, str]
    samples_fingerprint: str
    tokens_fingerprint: str
    count: int
    sites: tuple[tuple[str, str, int, int, int, int], ...]
    shard: tuple[int, int] | None = None

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.asked())

    def asked(self) -> dict[str, Any]:
        """As plain data, without where and how it is computed: sums from a GPU and from a CPU add up."""
        settings = {key: value for key, value in asdict(self.settings).items() if key not in ("sums_device", "gradient_checkpointing")}
        return {**asdict(self), "settings": settings}

    def stand_ins(self) -> list[Site]:
        """The sites without their modules: enough for all that does not need the weights' values."""
        return [Site(name, role, layer, nn.Identity(), out, inp, heads) for name, role, layer, out, inp, heads in self.sites]

    def share(self) -> range:
        """The places, in the reference set, of the samples of this shard."""
        number, shards = self.shard or (1, 1)
        return range(number - 1, self.count, shards)


def parse_shard(shard: str) -> tuple[int, int]:
    """(2, 3) of "2/3". Raises UserError for anything else."""
    number, slash, shards = shard.partition("/")
    if not (slash and number.isdigit() and shards.isdigit() and 1 <= int(number) <= int(shards)):
        raise UserError(f"shard '{shard}' is not one; write the first of three as 1/3, the last as 3/3")
    return int(number), int(shards)


def save_sums(path: str | os.PathLike[str], task: Task, sums: Sums, positions: Iterable[int]) -> None:
    """Write sums, with their task and the places of the samples they are over; all of it or nothing."""
    counts = {"samples": sums.samples, "tokens": sums.tokens, "targets": sums.targets, "skipped": sums.skipped}
    header = {**task.asked(), **counts, "positions": sorted(positions), "task": task.fingerprint}
    save_tensors(path, FORMAT, {name: total.cpu() for name, total in sums.totals.items()}, header)


def load_sums(path: str | os.PathLike[str]) -> tuple[Task, Sums, frozenset[int]]:
    """What `save_sums` wrote. Raises UserError for another kind of file, DamagedFile where the content does not fit."""
    tensors, header = load_tensors(path, FORMAT)
    try:
        shard = header["shard"]
        task = Task(
            Settings(**header["settings"]), header["model"], header["samples_fingerprint"], header["tokens_fingerprint"], header["count"],
            tuple(tuple(site) for site in header["sites"]), tuple(shard) if shard else None,
        )  # fmt: skip
        sums = Sums(task.settings, tensors, header["samples"], header["tokens"], header["targets"], list(header["skipped"]))
        positions = frozenset(header["positions"])
        good = header["task"] == task.fingerprint and is_model(task.model) and _fit(task, sums, positions)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFile(f"{path} lacks what a shard file has ({error}); make it again") from None
    if not good:
        raise DamagedFile(f"{path}: its task, sums and counts are not as {FORMAT} has them; make it again")
    return task, sums, positions


def _fit(task: Task, sums: Sums, positions: frozenset[int]) -> bool:
    """Whether the parts of a shard file fit each other."""
    names = {name for name, _, _, _, _, _ in task.sites}
    counts = (task.count, sums.samples, sums.tokens, sums.targets, *sums.skipped, *positions)
    return (
        all(type(count) is int and count >= 0 for count in counts) and sums.samples + len(sums.skipped) == len(positions)
        and positions <= set(task.share()) and all(name in names and total.is_floating_point() for name, total in sums.totals.items())
    )  # fmt: skip


def read_positions(path: Path) -> tuple[str, frozenset[int]]:
    """The fingerprint of the task and the places of the samples of a shard file, without its tensors."""
    header = read_header(path)
    try:
        return str(header["task"]), frozenset(header["positions"])
    except (KeyError, TypeError) as error:
        raise DamagedFile(f"{path} lacks what a shard file has ({error}); make it again") from None


def combined(paths: Sequence[str | os.PathLike[str]]) -> tuple[Task, Sums]:
    """The sums of all shards of one reference set, as if they had been made in one go.

    Raises:
        UserError: shards that are not of one task, that overlap, or that leave a sample out; the message names the file and what differs.
    """
    parts = sorted(((*load_sums(path), str(path)) for path in paths), key=lambda part: (part[0].shard or (0, 0), part[3]))
    task = parts[0][0]
    whole = Sums(task.settings)
    held: dict[int, str] = {}
    for other, sums, positions, path in parts:
        _require_same(task, other, parts[0][3], path)
        if both := sorted(positions & held.keys()):
            raise UserError(f"sample {both[0]} is in {held[both[0]]} and in {path} ({len(both)} are in both); give each shard once")
        held.update(dict.fromkeys(positions, path))
        whole.absorb(sums)
    _require_whole([(part[0], part[2], part[3]) for part in parts])
    return task, whole


def _require_same(one: Task, other: Task, first: str, path: str) -> None:
    here, there = one.asked(), other.asked()
    for kind in ("model", "samples_fingerprint", "tokens_fingerprint", "settings", "sites"):
        if here[kind] != there[kind]:
            mine, theirs = here[kind], there[kind]
            if isinstance(mine, dict):
                kind = next(key for key in mine if mine[key] != theirs.get(key))
                mine, theirs = mine[kind], theirs.get(kind)
            values = "" if kind == "sites" else f" ({theirs} and {mine})"
            raise UserError(f"{path} and {first} differ in {kind.replace('_', ' ')}{values}; merge shards of one attribution only")
    if one.shard and other.shard and one.shard[1] != other.shard[1]:
        raise UserError(f"{path} is one of {other.shard[1]} shards and {first} one of {one.shard[1]}; merge shards of one attribution only")


def _require_whole(parts: list[tuple[Task, frozenset[int], str]]) -> None:
    for task, positions, path in parts:
        if left := set(task.share()) - positions:
            raise UserError(f"{path} is not finished: {len(left)} of its {len(task.share())} samples are missing; run that shard again")
    shards = parts[0][0].shard
    there = {task.shard[0] for task, _, _ in parts if task.shard}
    missing = sorted(set(range(1, shards[1] + 1)) - there) if shards else []
    if missing and shards:
        names = ", ".join(f"{number}/{shards[1]}" for number in missing)
        raise UserError(f"shard{'s' if len(missing) > 1 else ''} {names} missing; give the files of all {shards[1]} shards")
