"""Weight-level LRP against a plain forward and full backward of the same sample, and global selection over many scores, on a CPU.

    OMP_NUM_THREADS=2 python benchmarks/weights.py [--layers 8] [--repeats 7] [--scores 100000000]

Each memory figure is the peak resident set of a process of its own, less what it held before the model was built.
Prints ratios of medians; the goals are 1.25 in time, 1 in memory, 30 s and twice the scores' memory in selection.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ASKED: dict[str, dict[str, Any]] = {
    **{"global 1 %": {"fraction": 0.01}, "global 50 %": {"fraction": 0.5}},
    **{"row 50 %": {"fraction": 0.5, "scope": "row"}, "2:4": {"scope": "2:4"}},
}
PAGE = resource.getpagesize()


def build(layers: int) -> Any:
    """A random Llama in float32: hidden 1024, intermediate 2816, vocabulary 4096."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=4096,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def sample() -> list[int]:
    import torch

    return torch.randint(3, 4096, (512,), generator=torch.Generator().manual_seed(0)).tolist()  # type: ignore[no-any-return]


def plain(model: Any) -> None:
    """Forward and full backward of the largest logit at the last position, with a gradient for every weight."""
    import torch

    model.zero_grad(set_to_none=True)
    model(input_ids=torch.tensor([sample()]), use_cache=False).logits[0, -1].max().backward()


def lrp(model: Any) -> None:
    from sparc3 import attribute
    from sparc3.models.families import ROLES

    attribute(model, [sample()], unit="weight", sites=ROLES, reduce="mean_abs")


def lrp_pass(model: Any) -> Callable[[], None]:
    """What attribute does per sample, without what it does once a run: fingerprint, division by the count, checks."""
    import torch

    from sparc3.attribution.relevance import lrp as method
    from sparc3.attribution.sums import Settings, Sums
    from sparc3.models.families import ROLES
    from sparc3.models.sites import sites_of
    from sparc3.samples.batches import encode, make_batches
    from sparc3.samples.reference_set import ReferenceSet

    settings = Settings("lrp", "weight", "predicted", "abs", "mean_abs")
    batches = make_batches(
        encode(ReferenceSet.of([sample()]), None, "predicted", context=512, vocabulary=4096),
        1024,
        torch.device("cpu"),
    )
    sums = Sums(settings)
    return lambda: list(method(model, batches, sites_of(model, ROLES), settings, sums)) and None  # type: ignore[func-returns-value]


def timed(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each, taken in turns so that a slow minute is slow for all."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


class Peak:
    """The largest resident set while the block runs, above what it was at the start, in MB; looked at every millisecond."""

    def __enter__(self) -> "Peak":
        self.start = self.top = resident()
        self.over = threading.Event()
        self.watch = threading.Thread(target=self.look, daemon=True)
        self.watch.start()
        return self

    def look(self) -> None:
        while not self.over.wait(0.001):
            self.top = max(self.top, resident())

    def __exit__(self, *_: object) -> None:
        self.top = max(self.top, resident())
        self.over.set()
        self.watch.join()

    @property
    def megabytes(self) -> float:
        return (self.top - self.start) / 1e6


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def memory(what: str, layers: int) -> float:
    """Peak MB of one pass, model included, in this process."""
    import torch  # noqa: F401  loaded before the measuring begins
    import transformers  # noqa: F401

    import sparc3.attribution.attribute  # noqa: F401

    with Peak() as peak:
        model = build(layers)
        (plain if what == "plain" else lrp)(model)
    return peak.megabytes


def selection(count: int) -> dict[str, float]:
    """Seconds and peak memory, as a share of the scores', of taking 1 % and 50 % of them globally, and 50 % of every row."""
    import torch

    from sparc3 import Scores, select

    columns = 4096
    rows = count // columns // 8
    scores = Scores(
        {
            f"site{i}": torch.randn(rows, columns, generator=torch.Generator().manual_seed(i))
            for i in range(8)
        },
        {"unit": "weight"},
    )
    size = scores.units * 4 / 1e6
    found = {}
    for name, asked in ASKED.items():
        with Peak() as peak:
            began = time.perf_counter()
            select(scores, **asked)
            seconds = time.perf_counter() - began
        found[name] = seconds
        found[f"{name}, memory above the scores / scores"] = peak.megabytes / size
    return found


def apart(*arguments: str) -> Any:
    """What a process of its own prints last."""
    return json.loads(
        subprocess.run(
            [sys.executable, __file__, *arguments], capture_output=True, text=True, check=True
        ).stdout.splitlines()[-1]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--scores", type=int, default=100_000_000)
    parser.add_argument("--only", choices=["plain", "lrp", "selection"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(
            json.dumps(selection(args.scores) if args.only == "selection" else memory(args.only, args.layers))
        )
        return
    import torch

    model = build(args.layers)
    print(
        f"{model.num_parameters():,} parameters, one sample of 512 tokens, {torch.get_num_threads()} threads, medians of {args.repeats}"
    )
    seconds = timed(
        {"plain": lambda: plain(model), "pass": lrp_pass(model), "lrp": lambda: lrp(model)}, args.repeats
    )
    print(f"plain forward and full backward  {seconds['plain']:.3f} s")
    print(
        f"weight LRP, a sample             {seconds['pass']:.3f} s  ratio {seconds['pass'] / seconds['plain']:.3f} (goal 1.25)"
    )
    print(
        f"attribute(), all that it does    {seconds['lrp']:.3f} s  ratio {seconds['lrp'] / seconds['plain']:.3f}"
    )
    peaks = {what: apart("--only", what, "--layers", str(args.layers)) for what in ("plain", "lrp")}
    print(
        f"peak memory: plain {peaks['plain']:.0f} MB, attribute() {peaks['lrp']:.0f} MB, ratio {peaks['lrp'] / peaks['plain']:.3f} (goal 1)"
    )
    for name, value in apart("--only", "selection", "--scores", str(args.scores)).items():
        print(f"selection over {args.scores:.0e}, {name}: {value:.2f}{'' if 'memory' in name else ' s'}")


if __name__ == "__main__":
    main()
