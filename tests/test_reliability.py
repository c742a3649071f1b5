"""An allocation that fails halves the batch; what cannot fit is refused with the numbers."""

import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch

from sparc3 import Sparc3Error, attribute, evaluate, load_model
from sparc3.models.memory import _Growth, available, limit_fragmentation

Call = Callable[..., Any]
PROMPTS = [
    f"Mary had a {word} ball." for word in ("red", "blue", "green", "old", "new", "small", "big", "round")
]


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparc3.models.memory._ROOM", WeakKeyDictionary())


@pytest.fixture
def fails_above(demo: tuple[Any, Any]) -> Iterator[Callable[[int, type[Exception]], list[int]]]:
    """Makes every forward pass of more than some rows fail as the allocator does; gives the list of rows of those that went through."""
    hooks = []

    def set_up(rows: int, kind: type[Exception]) -> list[int]:
        seen: list[int] = []

        def look(module: Any, arguments: Any, named: dict[str, Any]) -> None:
            ids = named["input_ids"] if "input_ids" in named else arguments[0]
            if ids.shape[0] > rows:
                raise kind("DefaultCPUAllocator: can't allocate memory: you tried to allocate 123 bytes")
            seen.append(ids.shape[0])

        hooks.append(demo[0].get_submodule("model").register_forward_pre_hook(look, with_kwargs=True))
        return seen

    yield set_up
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError, torch.OutOfMemoryError])
def test_a_batch_that_does_not_fit_is_halved(
    demo: tuple[Any, Any], fails_above: Call, tmp_path: Path, kind: type[Exception]
) -> None:
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    asked = {
        "toxicity": {
            "source": str(tmp_path / "p.txt"),
            "count": 8,
            "scorer": "lexicon",
            "generations": 2,
            "max_new_tokens": 4,
        },
        "perplexity": {"source": str(tmp_path / "p.txt"), "protocol": "blocks", "seq_len": 8},
    }
    model, tokenizer = demo
    scores, results = (
        attribute(model, PROMPTS, tokenizer=tokenizer, batch_tokens=10**6),
        evaluate(model, tokenizer, asked),
    )
    seen = fails_above(3, kind)
    again = attribute(model, PROMPTS, tokenizer=tokenizer, batch_tokens=10**6)
    assert max(seen) > 1
    assert all(torch.allclose(again[name], scores[name], rtol=1e-5, atol=1e-8) for name in scores)
    for one, other in zip(results, evaluate(model, tokenizer, asked), strict=True):
        assert (one.metric, one.n) == (other.metric, other.n)
        assert one.value == pytest.approx(other.value, rel=1e-5)


def test_one_sample_that_does_not_fit_is_an_error_of_one_line(
    demo: tuple[Any, Any], fails_above: Call, tmp_path: Path
) -> None:
    fails_above(0, RuntimeError)
    with pytest.raises(Sparc3Error, match=r"sample \d, \d+ tokens\b.*memory"):
        attribute(demo[0], PROMPTS, tokenizer=demo[1])
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    with pytest.raises(Sparc3Error, match=r"sample .*memory"):
        evaluate(*demo, {"perplexity": {"source": str(tmp_path / "p.txt")}})


def test_an_allocation_that_really_fails(demo: tuple[Any, Any]) -> None:
    """The address space is limited to what the process has and a little more, which one batch of everything does not fit into."""
    model, _ = demo
    samples = [list(range(3, 259)) for _ in range(64)]
    small = attribute(model, samples, batch_tokens=256)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    earlier = resource.getrlimit(resource.RLIMIT_AS)
    rows: list[int] = []
    counting = model.register_forward_pre_hook(
        lambda module, arguments, named: rows.append(len(named["input_ids"])), with_kwargs=True
    )
    resource.setrlimit(resource.RLIMIT_AS, (held + 2**28, earlier[1]))
    try:
        again = attribute(model, samples, batch_tokens=10**6)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, earlier)
        counting.remove()
    assert rows[0] == 64 > rows[-1], "nothing was halved"
    assert all(torch.allclose(again[name], small[name], rtol=1e-4, atol=1e-7) for name in small)


def test_a_model_that_cannot_fit_is_refused_with_the_numbers(
    mistake: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert available(torch.device("cpu")) or not Path("/proc/meminfo").exists()
    monkeypatch.setattr("sparc3.models.load.available", lambda device: 2**20)
    told = mistake(
        "attribute", "demo", "--samples", "demo-angry", "--dtype", "float32", "--out", tmp_path / "s"
    )
    assert re.search(r"GiB in float32.*\bcpu .*0\.000977 GiB.*bfloat16", told)
    monkeypatch.setattr(
        "transformers.PreTrainedModel.from_pretrained", lambda *_, **__: pytest.fail("weights were read")
    )
    with pytest.raises(Sparc3Error, match=r"GiB in bfloat16.*\bcpu .*0\.000977 GiB"):
        load_model("demo", dtype="bfloat16", device="cpu")


def test_holes_are_handed_back_while_a_process_grows_and_no_more_when_it_has_grown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held, handed_back = [10 * 2**30], []
    monkeypatch.setattr("sparc3.models.memory.resident", lambda: held[0])
    monkeypatch.setattr("sparc3.models.memory.return_memory", lambda: handed_back.append(held[0]))
    for name in ("began", "limit"):
        monkeypatch.setattr(_Growth, name, 0)
    layer = torch.nn.Identity()
    grown = []
    for _ in range(3):
        with limit_fragmentation([layer]):
            for megabytes in range(0, 2000, 10):
                held[0] = 10 * 2**30 + megabytes * 2**20
                layer(torch.zeros(1))
        grown.append(len(handed_back))
    assert grown[0] == len(
        [limit for n in range(20) if (limit := 64 * 1.5**n) < 1990]
    )  # 64, 96, 144, ... MiB
    assert grown == [grown[0]] * 3
    layer(torch.zeros(1))
    assert len(handed_back) == grown[0]  # outside nobody looks
