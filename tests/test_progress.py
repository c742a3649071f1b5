"""A log without a terminal: a line a minute of every long stage."""

from pathlib import Path

import pytest
from test_tune import SMALL

from sparc3 import progress, run
from sparc3.progress import Progress, write_duration


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_a_line_a_minute_with_done_total_and_time_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = _Clock()
    monkeypatch.setattr(progress, "time", clock)
    with caplog.at_level("INFO", logger="sparc3"), Progress(1000, "lrp", "sample") as shown:
        for _ in range(100):  # ten samples every ten seconds
            clock.now += 10
            shown.update(10)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 16  # 1,000 s; the last sample is no news
    assert lines[0] == "lrp: 60 of 1,000 samples, 16 min left"
    assert lines[-1] == "lrp: 960 of 1,000 samples, 40 s left"


def test_silence_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with caplog.at_level("INFO", logger="sparc3"), Progress(3, "lrp", "sample", show=False) as shown:
        assert list(shown.each("abc")) == ["a", "b", "c"]
    assert not caplog.records


def test_a_program_that_sets_no_log_level_reads_the_lines_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setattr(progress.log, "level", 30)
    progress.log.manager._clear_cache()  # type: ignore[attr-defined]
    with Progress(3, "lrp", "sample") as shown:
        shown.update()
    assert capsys.readouterr().err.startswith("lrp: 1 of 3 samples, ")


def test_every_long_stage_of_a_run_tells_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, tuple[int, int]] = {}

    def update(self: Progress, count: int = 1) -> None:
        self.done += count
        if self.shown:
            told[self.label] = (self.done, self.total)

    monkeypatch.setattr(Progress, "update", update)
    recipe = {
        **SMALL,
        "selection": {"tune": {**SMALL["selection"]["tune"], "counts": [4], "targets": ["predicted"]}},
        "compare": {},
    }
    run(recipe, tmp_path / "run", progress=True)
    assert told.pop("protection")[0] > 0
    # kl is last measured on windows, lrp on the matched set; a search tries plain, and matched with two penalties
    assert told.pop("search") == (3, 3)
    assert {name: done for name, (done, total) in told.items() if done == total} == {
        "lrp": 8,
        "generate": 6,
        "perplexity": told["perplexity"][1],
        "kl": told["kl"][1],
    }


@pytest.mark.parametrize(
    ("seconds", "said"), [(40, "40 s"), (95, "2 min"), (5340, "89 min"), (11100, "3 h 05 min")]
)
def test_durations(seconds: float, said: str) -> None:
    assert write_duration(seconds) == said
