"""Work that is killed, split and put together again ends with the scores of work that was not."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Words, tiny
from unchanged import fingerprint, require_same

from sparc3 import Scores, UserError, attribute
from sparc3.attribution.attribute import merge
from sparc3.attribution.partial_sums import PartialSums, load_sums

Call = Callable[..., Any]
SAMPLES = [[3 + (7 * i + j) % 30 for j in range(3 + i % 6)] for i in range(17)]
KINDS: list[dict[str, Any]] = [
    {},
    {"neuron": "signed"},
    {"unit": "weight", "reduce": "mean_abs", "sites": ("attn.q", "mlp.up")},
    {"method": "wanda"},
    {"target": "next"},
]


class Killed(Exception):
    pass


@pytest.fixture
def model() -> Any:
    return tiny("llama")


def equal(one: Scores, other: Scores) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def close(one: Scores, other: Scores) -> bool:
    """Within 1e-6 of each site's largest score, which is as far as float32 in batches of other shapes agrees with itself."""
    return list(one) == list(other) and all(
        (one[name] - other[name]).abs().max() <= 1e-6 * other[name].abs().max() for name in one
    )


@pytest.fixture
def killed_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Ends an attribution after some batches, in the way that it can notice least."""
    record = PartialSums.record

    def set_up(batches: int) -> None:
        seen = iter(range(1, batches))

        def counted(self: PartialSums, *arguments: Any) -> None:
            record(self, *arguments)
            if next(seen, None) is None:
                raise Killed

        monkeypatch.setattr(PartialSums, "record", counted)

    yield set_up
    monkeypatch.setattr(PartialSums, "record", record)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("batches", [1, 3])
def test_a_killed_attribution_goes_on_to_the_same_bits(
    model: Any,
    tmp_path: Path,
    killed_after: Call,
    monkeypatch: pytest.MonkeyPatch,
    kind: dict[str, Any],
    batches: int,
) -> None:
    whole = attribute(model, SAMPLES, batch_tokens=16, **kind)
    partial = tmp_path / "sums"
    killed_after(batches)
    with pytest.raises(Killed):
        attribute(model, SAMPLES, batch_tokens=16, partial=partial, save_every=0, **kind)
    monkeypatch.undo()
    done = load_sums(partial)[2]
    assert 0 < len(done) < len(SAMPLES)
    seen: list[int] = []
    record = PartialSums.record
    monkeypatch.setattr(
        PartialSums,
        "record",
        lambda self, batch, sums: (seen.extend(s.index for s in batch.samples), record(self, batch, sums))[1],
    )
    again = attribute(model, SAMPLES, batch_tokens=16, partial=partial, **kind)
    assert sorted(seen) == sorted(set(range(len(SAMPLES))) - done)
    assert equal(whole, again)
    assert whole.provenance == again.provenance
    assert not list(tmp_path.iterdir())


def test_sums_of_something_else_are_not_gone_on_from(
    model: Any, tmp_path: Path, killed_after: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = tmp_path / "sums"
    killed_after(2)
    with pytest.raises(Killed):
        attribute(model, SAMPLES, batch_tokens=16, partial=partial, save_every=0)
    monkeypatch.undo()
    for changed in ({"neuron": "signed"}, {"skip_positions": 1}, {"target": "next"}):
        assert equal(
            attribute(model, SAMPLES, batch_tokens=16, partial=partial, **changed),
            attribute(model, SAMPLES, batch_tokens=16, **changed),
        )
    partial.write_bytes(b"cut off")
    assert equal(attribute(model, SAMPLES, partial=partial), attribute(model, SAMPLES))


def test_samples_left_out_stay_left_out(
    model: Any, tmp_path: Path, killed_after: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight[39] = float("nan")
    samples = [[3, 4, 39, 5, 6, 7, 8, 9, 10, 11], *SAMPLES]
    killed_after(2)
    with pytest.raises(Killed):
        attribute(model, samples, batch_tokens=16, partial=tmp_path / "sums", save_every=0, non_finite="skip")
    monkeypatch.undo()
    assert attribute(
        model, samples, batch_tokens=16, partial=tmp_path / "sums", non_finite="skip"
    ).provenance["skipped"] == [0]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shards", [1, 2, 3])
def test_shards_add_up(model: Any, tmp_path: Path, kind: dict[str, Any], shards: int) -> None:
    files = [tmp_path / f"{number}.safetensors" for number in range(1, shards + 1)]
    for number, file in enumerate(files, 1):
        attribute(model, SAMPLES, partial=file, shard=(number, shards), **kind)
    whole, merged = attribute(model, SAMPLES, **kind), merge(list(reversed(files)), model=model)
    assert close(merged, whole)
    assert merged.provenance == whole.provenance


def test_a_shard_that_is_done_is_not_done_again(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attribute(model, SAMPLES, partial=tmp_path / "1", shard=(1, 2))
    monkeypatch.setattr(PartialSums, "record", lambda *_: pytest.fail("a batch was run"))
    attribute(model, SAMPLES, partial=tmp_path / "1", shard=(1, 2))


def test_what_does_not_belong_together_is_refused_by_name(
    model: Any, tmp_path: Path, killed_after: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shard(
        name: str, number: int, *, samples: Sequence[Any] = SAMPLES, of: int = 3, on: Any = model, **kind: Any
    ) -> Path:
        attribute(on, samples, partial=tmp_path / name, shard=(number, of), **kind)
        return tmp_path / name

    one, two, three = (shard(f"s{number}", number) for number in (1, 2, 3))
    with pytest.raises(UserError):
        merge([])
    with pytest.raises(UserError, match="shard 2/3 "):
        merge([one, three])
    with pytest.raises(UserError, match="shards 1/3, 3/3 "):
        merge([two])
    with pytest.raises(UserError, match=r"sample 0 .*\bs1 .*\bs1 .*\b6\b"):
        merge([one, two, three, one])
    with pytest.raises(UserError, match=r"\bneuron \((signed|abs) and (signed|abs)\)"):
        merge([one, two, shard("other", 3, neuron="signed")])
    with pytest.raises(UserError, match="samples fingerprint"):
        merge([one, two, shard("less", 3, samples=SAMPLES[:16])])
    with pytest.raises(UserError, match="in fingerprint"):
        merge([one, two, shard("weights", 3, on=tiny("llama", seed=1))])
    with pytest.raises(UserError, match=r"half\b.*\b2 shards.*\bs1\b"):
        merge([one, shard("half", 2, of=2)])
    with pytest.raises(UserError, match=r"wanda .*model"):
        merge([shard(f"w{number}", number, method="wanda") for number in (1, 2, 3)])
    killed_after(1)
    with pytest.raises(Killed):
        shard("cut", 3, batch_tokens=8, save_every=0)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"cut .*\b\d of its 5 samples"):
        merge([one, two, tmp_path / "cut"])
    with pytest.raises(UserError, match=r"2 samples.*\b3/3\b"):
        shard("none", 3, samples=SAMPLES[:2])


def test_shards_on_the_command_line(sparc3: Call, mistake: Call, tmp_path: Path) -> None:
    ask = ("attribute", "demo", "--samples", "demo-angry", "--count", "9")
    assert sparc3(*ask, "--out", tmp_path / "whole.safetensors")[0] == 0
    for number in (1, 2):
        assert sparc3(*ask, "--shard", f"{number}/2", "--out", tmp_path / f"s{number}")[0] == 0
    assert "shard 1/2" in mistake("merge", tmp_path / "s2", "--out", tmp_path / "m.safetensors")
    assert "'0/2'" in mistake(*ask, "--shard", "0/2", "--out", tmp_path / "x")
    assert "--shard" in mistake(
        "attribute", "demo", "--method", "random", "--shard", "1/2", "--out", tmp_path / "x"
    )
    assert re.search(
        r"whole\.safetensors .*sparc3\.shard/1",
        mistake("merge", tmp_path / "whole.safetensors", "--out", tmp_path / "x"),
    )
    assert sparc3("merge", tmp_path / "s1", tmp_path / "s2", "--out", tmp_path / "m.safetensors")[0] == 0
    assert close(Scores.load(tmp_path / "m.safetensors"), Scores.load(tmp_path / "whole.safetensors"))


SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
from tiny import tiny
from sparc3 import attribute, distributed
torch.set_num_threads(1)
distributed.start()
samples = [[3 + (7 * i + j) % 30 for j in range(3 + i % 6)] for i in range({count})]
scores = attribute(tiny("llama"), samples, batch_tokens=16, partial=sys.argv[1] + "/sums", save_every=0)
if distributed.is_main():
    scores.save(sys.argv[1] + "/scores.safetensors")
distributed.end()
"""


def script(tmp_path: Path, count: int) -> Path:
    path = tmp_path / "job.py"
    path.write_text(SCRIPT.format(tests=str(Path(__file__).parent), count=count))
    return path


def kill_and_finish(tmp_path: Path, kills: int, how: signal.Signals) -> None:
    job = script(tmp_path, 150)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    began = time.perf_counter()
    subprocess.run([sys.executable, job, tmp_path / "a"], check=True)
    took = time.perf_counter() - began
    chance = random.Random(kills)
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, job, tmp_path / "b"])
        time.sleep(took * chance.uniform(0.3, 0.9))
        process.send_signal(how)
        process.wait()
    subprocess.run([sys.executable, job, tmp_path / "b"], check=True)
    whole, again = (Scores.load(tmp_path / folder / "scores.safetensors") for folder in ("a", "b"))
    assert equal(whole, again)
    assert whole.provenance == again.provenance
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["scores.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "how"), [(3, signal.SIGKILL), (2, signal.SIGTERM)])
def test_kills_at_random_moments(tmp_path: Path, kills: int, how: signal.Signals) -> None:
    kill_and_finish(tmp_path, kills, how)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ask", "least"), [("--runs 20", 20), ("--runs 4 --ranks 2", 1), ("--runs 3 --ranks 3", 1)]
)
def test_whole_runs_killed_at_random_moments(ask: str, least: int) -> None:
    """Runs are killed at twenty moments and more; of several ranks one is. What they end with is compared with an uninterrupted run of one process."""
    campaign = Path(__file__).parent.parent / "scripts/reliability/killed_runs.py"
    done = subprocess.run([sys.executable, campaign, *ask.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.findall(r"killed (\d+) times", done.stdout)[0]) >= least


def test_the_model_is_as_it_was_when_saving_raises(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rules come off at once, though the exception that is still held keeps the method's generator alive."""

    def fails(*_: Any) -> None:
        raise OSError("No space left on device")

    before = fingerprint(model)
    monkeypatch.setattr(PartialSums, "record", fails)
    with pytest.raises(OSError, match="No space") as held:
        attribute(model, SAMPLES, batch_tokens=16, partial=tmp_path / "sums")
    assert held.tb
    require_same(before, fingerprint(model))


def test_a_request_to_end_saves_first(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM lets the batch under way end, saves the sums though no minute is over, and then ends the process."""
    sent: list[int] = []
    monkeypatch.setattr(
        "sparc3.attribution.partial_sums.os.kill",
        lambda _, number: (sent.append(number), (_ for _ in ()).throw(Killed()))[1].send(None),
    )
    record = PartialSums.record

    def interrupted(self: PartialSums, *arguments: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        record(self, *arguments)

    monkeypatch.setattr(PartialSums, "record", interrupted)
    with pytest.raises(Killed):
        attribute(model, SAMPLES, batch_tokens=16, partial=tmp_path / "sums")
    assert sent == [signal.SIGTERM]
    assert len(load_sums(tmp_path / "sums")[2]) > 0
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_ctrl_c_saves_first_and_the_second_ends_at_once(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler_before = signal.getsignal(signal.SIGINT)
    record, times = PartialSums.record, 1

    def interrupted(self: PartialSums, *arguments: Any) -> None:
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        record(self, *arguments)

    monkeypatch.setattr(PartialSums, "record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        attribute(model, SAMPLES, batch_tokens=16, partial=tmp_path / "once")
    assert 0 < len(load_sums(tmp_path / "once")[2]) < len(SAMPLES)
    times = 2
    with pytest.raises(KeyboardInterrupt):
        attribute(model, SAMPLES, batch_tokens=16, partial=tmp_path / "twice")
    assert not (tmp_path / "twice").exists()
    assert signal.getsignal(signal.SIGINT) == handler_before
    monkeypatch.setattr(PartialSums, "record", record)
    again, whole = (
        attribute(model, SAMPLES, batch_tokens=16, partial=tmp_path / name) for name in ("once", "anew")
    )
    assert equal(whole, again)


def torchrun(ranks: int, *command: str | Path) -> None:
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        *command,
    ]
    done = subprocess.run(
        [str(part) for part in launch],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_give_the_same_scores_and_take_over_each_others_sums(
    model: Any, tmp_path: Path, killed_after: Call, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    whole = attribute(model, SAMPLES)
    killed_after(2)
    with pytest.raises(Killed):
        attribute(model, SAMPLES, batch_tokens=16, partial=tmp_path / "sums", save_every=0)
    monkeypatch.undo()
    torchrun(ranks, script(tmp_path, len(SAMPLES)), tmp_path)
    assert close(Scores.load(tmp_path / "scores.safetensors"), whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.py", "scores.safetensors"]


@pytest.mark.slow
def test_the_command_line_under_torchrun(tmp_path: Path) -> None:
    ask = ["-m", "sparc3", "attribute", "demo", "--samples", "demo-angry", "--count", "9", "--out"]
    subprocess.run([sys.executable, *ask, tmp_path / "one.safetensors"], check=True)
    torchrun(2, *ask, tmp_path / "two.safetensors")
    assert close(Scores.load(tmp_path / "one.safetensors"), Scores.load(tmp_path / "two.safetensors"))
    torchrun(2, *ask, tmp_path / "s1", "--shard", "1/2")
    subprocess.run([sys.executable, *ask, tmp_path / "s2", "--shard", "2/2"], check=True)
    assert close(merge([tmp_path / "s1", tmp_path / "s2"]), Scores.load(tmp_path / "one.safetensors"))
    assert not list(tmp_path.glob("*rank*"))


def test_texts_that_another_tokenizer_reads_are_another_task(model: Any, tmp_path: Path) -> None:
    class Shifted(Words):
        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [token + 1 for token in super().__call__(text)["input_ids"]]}

    for number, tokenizer in ((1, Words()), (2, Shifted())):
        attribute(
            model,
            ["w3 w4 w5", "w6 w7"],
            tokenizer=tokenizer,
            partial=tmp_path / str(number),
            shard=(number, 2),
        )
    with pytest.raises(UserError, match="in tokenizer"):
        merge([tmp_path / "1", tmp_path / "2"])


def test_a_damaged_shard_is_named(model: Any, tmp_path: Path, mistake: Call) -> None:
    attribute(model, SAMPLES, partial=tmp_path / "s1", shard=(1, 2))
    raw = bytearray((tmp_path / "s1").read_bytes())
    raw[-3] ^= 1
    (tmp_path / "s1").write_bytes(raw)
    assert re.search("s1 .*checksum", mistake("merge", tmp_path / "s1", "--out", tmp_path / "x"))
    assert json.dumps(sorted(path.name for path in tmp_path.iterdir())) == '["s1"]'
