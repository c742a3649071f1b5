"""What attribution costs, against the plain forward of the same samples one by one; writes benchmarks/RESULTS.md.

    OMP_NUM_THREADS=2 python benchmarks/attribution.py [--repeats 7] [--peers FOLDER] [--layers 8]
    python benchmarks/attribution.py --device cuda --shape llama3-8b [--repeats 5]
    OMP_NUM_THREADS=2 python benchmarks/attribution.py --model smollm2 [--repeats 7]

The first is the table for a CPU: a random Llama of 1024 wide, 2816 in the MLP, 8 layers, vocabulary 4096, float32. --peers names the
folder in which peers.sh made its environments. The second makes random weights of a real model's shape on the device, in bfloat16.
All is measured in turns within one run, so that a slow minute is slow for all; a ratio is a median over the rounds, with the smallest
and the largest beside it.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from weights import Peak, build

HERE = Path(__file__).parent
SHAPES: dict[str, dict[str, Any]] = {
    "llama3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
    "small": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 4096,
        "max_position_embeddings": 2048,
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "max_position_embeddings": 2048,
    },
}
Samples = list[list[int]]


@dataclass(frozen=True)
class Row:
    """One line of a table: a figure with its spread, and what it should be."""

    what: str
    value: float
    low: float
    high: float
    goal: str
    reached: bool | None
    note: str = ""

    def line(self) -> str:
        verdict = {True: "yes", False: "**no**", None: ""}[self.reached]
        return f"| {self.what} | {self.value:.2f} ({self.low:.2f}–{self.high:.2f}) | {self.goal} | {verdict} | {self.note} |"


def row(
    what: str, ours: Sequence[float], against: Sequence[float], goal: float, *, least: bool = False
) -> Row:
    """The ratio of two series of seconds measured in turns."""
    ratios = [one / other for one, other in zip(ours, against, strict=True)]
    value = statistics.median(ratios)
    reached = value >= goal if least else value <= goal
    note = f"{statistics.median(ours):.3f} s against {statistics.median(against):.3f} s"
    return Row(what, value, min(ratios), max(ratios), f"{'≥' if least else '≤'} {goal:g}", reached, note)


def in_turns(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, after one round that does not count."""
    import torch

    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - began)
        print(f"round {turn} of {repeats}", end="\r", file=sys.stderr, flush=True)
    return seconds


def samples(lengths: Sequence[int], vocabulary: int = 4096) -> Samples:
    chance = random.Random(0)
    return [[chance.randrange(3, vocabulary) for _ in range(length)] for length in lengths]


LONG = samples([512] * 4)
SHORT = samples([random.Random(i).randint(8, 32) for i in range(24)])


def forward(model: Any, ids: Samples) -> None:
    """The plain forward, one sample at a time."""
    import torch

    with torch.inference_mode():
        for one in ids:
            model(input_ids=torch.tensor([one], device=model.device), use_cache=False)


def full_backward(model: Any, ids: Samples) -> None:
    """Forward and backward, one sample at a time, with a gradient for every weight."""
    import torch

    for one in ids:
        model.zero_grad(set_to_none=True)
        model(input_ids=torch.tensor([one], device=model.device), use_cache=False).logits[
            0, -1
        ].max().backward()
    model.zero_grad(set_to_none=True)


def attribution(model: Any, ids: Samples, **options: Any) -> None:
    from sparc3 import attribute

    attribute(model, ids, **options)


def batches_alone(
    model: Any,
    ids: Samples,
    *,
    method: str = "lrp",
    unit: str = "neuron",
    neuron: str = "abs",
    reduce: str = "mean",
    sites: Sequence[str] = ("mlp.up",),
) -> None:
    """What attribute does for each batch, without what it does once a run: the model's fingerprint, the division, the checks."""
    from sparc3.attribution.methods import require_method
    from sparc3.attribution.sums import Settings, Sums
    from sparc3.models.sites import sites_of
    from sparc3.samples.batches import encode, make_batches, token_budget
    from sparc3.samples.reference_set import ReferenceSet

    settings = Settings(method, unit, "predicted", neuron, reduce)
    encoded = encode(ReferenceSet.of(ids), None, "predicted", context=2**20, vocabulary=2**31)
    batches = make_batches(encoded, token_budget("auto", model.device.type), model.device)
    run = require_method(method).run
    assert run
    for _ in run(model, batches, sites_of(model, sites), settings, Sums(settings)):
        pass


def cpu_rows(layers: int, repeats: int) -> list[Row]:
    """The rows on a CPU that are ratios of times."""
    from sparc3.evaluation.generate import complete
    from sparc3.evaluation.perplexity import negative_log_likelihoods
    from sparc3.models.families import ROLES

    model = build(layers)
    texts: Any = [" ".join(map(str, prompt)) for prompt in samples([32] * 16)]
    windows = [(tuple(one), len(one) - 1) for one in LONG]
    one_by_one = {"forward": partial(forward, model, LONG), "short forward": partial(forward, model, SHORT)}
    calls = {
        **one_by_one,
        "signed": partial(batches_alone, model, LONG, neuron="signed"),
        "abs": partial(batches_alone, model, LONG),
        "short": partial(batches_alone, model, SHORT),
        "wanda": partial(batches_alone, model, LONG, method="wanda"),
        "all": partial(attribution, model, LONG),
        "backward": partial(full_backward, model, LONG),
        "weight": partial(attribution, model, LONG, unit="weight", reduce="mean_abs", sites=ROLES),
        "twice": partial(attribution, model, LONG, gradient_checkpointing=True),
        "perplexity": partial(negative_log_likelihoods, model, windows, False),
        "bare": partial(decode_bare, model, samples([32] * 16), 16),
        "generation": partial(complete, model, Numbers(), texts, max_new_tokens=16, batch=16),  # type: ignore[arg-type]
    }
    seconds = in_turns(calls, repeats)
    plain = seconds["forward"]
    rows = [
        row("neuron `signed`, 4 × 512 tokens, against the plain forward", seconds["signed"], plain, 2.0),
        row("neuron `abs`, same", seconds["abs"], plain, 2.2),
        row("neuron `abs`, 24 prompts of 8–32 tokens, same", seconds["short"], seconds["short forward"], 1.0),
        row(
            "weight, mean_abs, all sites, 4 × 512, `attribute()`, against forward + full backward",
            seconds["weight"],
            seconds["backward"],
            1.25,
        ),
        row("Wanda, 4 × 512, against the plain forward", seconds["wanda"], plain, 1.15),
    ]
    whole = row(
        "`attribute()` as a whole (fingerprint of the model included), neuron `abs`, 4 × 512",
        seconds["all"],
        plain,
        0,
    )
    twice = row(
        "`gradient_checkpointing`, neuron `abs`, 4 × 512, against none", seconds["twice"], seconds["all"], 0
    )
    return [
        *rows,
        *(replace(r, goal="", reached=None) for r in (whole, twice)),
        row(
            "perplexity, 4 windows of 512: forward throughput that is reached",
            plain,
            seconds["perplexity"],
            0.7,
            least=True,
        ),
        row(
            "generation, 16 × 16 tokens: bare decoding throughput that is reached",
            seconds["bare"],
            seconds["generation"],
            0.7,
            least=True,
        ),
    ]


MEMORY: dict[str, tuple[dict[str, Any], float]] = {
    "neuron `abs`": ({"neuron": "abs"}, 0.5),
    "neuron `signed`": ({"neuron": "signed"}, 0.5),
    "neuron `abs`, eight samples one by one": ({"neuron": "abs", "batch_tokens": 512}, 0.0),
    "neuron `signed`, eight samples one by one": ({"neuron": "signed", "batch_tokens": 512}, 0.0),
    "neuron `abs`, `gradient_checkpointing`": ({"neuron": "abs", "gradient_checkpointing": True}, 0.5),
    "weight, all sites": ({"unit": "weight", "reduce": "mean_abs", "gradient_checkpointing": False}, 1.0),
    "weight, all sites, `gradient_checkpointing`": (
        {"unit": "weight", "reduce": "mean_abs", "gradient_checkpointing": True},
        1.0,
    ),
}


def memory_of(what: str, layers: int) -> float:
    """Peak MB above the loaded model of one 512-token sample, or of eight, in this process."""
    from sparc3.models.families import ROLES

    model = build(layers)
    forward(model, samples([8]))  # what the first call of any kind sets up is not the method's
    ids = LONG * 2 if "eight samples" in what else LONG[:1]
    with Peak() as peak:
        if what.startswith("backward"):
            full_backward(model, ids)
        else:
            attribution(
                model, ids, **({"sites": ROLES} if what.startswith("weight") else {}), **MEMORY[what][0]
            )
    return peak.megabytes


def memory_rows(layers: int, repeats: int) -> list[Row]:
    """Each figure from a process of its own."""
    rows: list[Row] = []
    found: dict[str, list[float]] = {what: [] for what in ("backward", "backward, eight samples", *MEMORY)}
    for _ in range(repeats):
        for what, values in found.items():
            command = [sys.executable, __file__, "--only", what, "--layers", str(layers)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            values.append(float(done.stdout.split()[-1]))
    for what, (_, goal) in MEMORY.items():
        one = "" if "eight samples" in what else "one 512-token sample, "
        title = f"peak memory above the loaded model, {one}{what}, against forward + full backward{' of them' * (not one)}"
        made = row(title, found[what], found["backward" if one else "backward, eight samples"], goal)
        rows.append(made if goal else replace(made, goal="", reached=None))
    return [replace(r, note=r.note.replace(" s", " MB")) for r in rows]


def peer_rows(folder: Path | None, layers: int, repeats: int) -> tuple[list[Row], list[str]]:
    """lxt and llm-compressor's Wanda, where peers.sh made them an environment, and what is not there."""
    rows, missing = [], []
    for name, wanted in (("lxt", "lxt 2.1"), ("wanda", "llm-compressor's Wanda modifier")):
        python = folder / name / "bin/python" if folder else None
        if python is None or not python.exists():
            missing.append(f"{wanted}: not measured, it is not installed (benchmarks/peers.sh)")
            continue
        for ids, label in (
            ((LONG, "4 × 512 tokens"), (SHORT, "24 prompts of 8–32 tokens"))
            if name == "lxt"
            else ((LONG, "4 × 512 tokens"),)
        ):
            try:
                rows.append(_peer_row(name, wanted, python, ids, label, layers, repeats))
            except (subprocess.CalledProcessError, ValueError) as error:
                last = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
                missing.append(f"{wanted}, {label}: failed ({last[-1] if last else error})")
    return rows, missing


def _peer_row(
    name: str, wanted: str, python: Path, ids: Samples, label: str, layers: int, repeats: int
) -> Row:
    """Theirs over ours, each in units of a plain forward timed beside it, since the two live in processes of their own."""
    import torch

    with tempfile.NamedTemporaryFile("w", suffix=".json") as asked:
        json.dump({"threads": torch.get_num_threads(), "layers": layers, "samples": ids}, asked)
        asked.flush()
        done = subprocess.run(
            [python, HERE / "peers.py", name, asked.name, str(repeats)],
            capture_output=True,
            text=True,
            check=True,
        )
    theirs = json.loads(done.stdout.strip().splitlines()[-1])
    spent = [
        work - built if name == "wanda" else work
        for work, built in zip(theirs["work"], theirs["build"], strict=True)
    ]
    model = build(layers)
    ours = in_turns(
        {
            "forward": partial(forward, model, ids),
            "work": partial(batches_alone if name == "lxt" else prune, model, ids),
        },
        repeats,
    )
    units = [
        [work / plain for work, plain in zip(*pair, strict=True)]
        for pair in ((spent, theirs["forward"]), (ours["work"], ours["forward"]))
    ]
    ratios = [one / other for one, other in zip(*units, strict=True)]
    value = statistics.median(ratios)
    what = f"{wanted}, {'neuron `abs`' if name == 'lxt' else 'half of every row, all linear maps'}, {label}: theirs over ours"
    note = f"{statistics.median(units[0]):.2f} and {statistics.median(units[1]):.2f} forwards"
    return Row(what, value, min(ratios), max(ratios), "> 1", value > 1, note)


def prune(model: Any, ids: Samples) -> None:
    """Wanda's scores of all weights, the lower half of every row, and the model without them, for a while."""
    from sparc3 import ablated, attribute, select
    from sparc3.models.families import ROLES

    scores = attribute(model, ids, method="wanda", unit="weight", sites=ROLES)
    with ablated(model, select(scores, fraction=0.5, scope="row")):
        pass


def model_rows(name: str, repeats: int) -> list[Row]:
    """A pretrained model on a CPU, one sample of 512 tokens; all but the last two without the model's fingerprint."""
    from sparc3 import load_model
    from sparc3.models.families import ROLES

    model, _ = load_model(name, dtype="float32", device="cpu")
    ids = samples([512], model.config.vocab_size)
    every: dict[str, Any] = {"unit": "weight", "sites": ROLES}
    asked: dict[str, tuple[float, Callable[[], Any]]] = {
        "neuron `signed`": (2.05, partial(batches_alone, model, ids, neuron="signed")),
        "neuron `abs`": (2.05, partial(batches_alone, model, ids)),
        "Wanda of `mlp.up`": (1.1, partial(batches_alone, model, ids, method="wanda")),
        "Wanda of all weights": (1.1, partial(batches_alone, model, ids, method="wanda", **every)),
        "weight, mean_abs, all sites": (0, partial(batches_alone, model, ids, reduce="mean_abs", **every)),
        "`attribute()`, neuron `signed`": (0, partial(attribution, model, ids, neuron="signed")),
        "`attribute()`, Wanda of `mlp.up`": (0, partial(attribution, model, ids, method="wanda")),
    }
    calls = {"forward": partial(forward, model, ids), **{what: call for what, (_, call) in asked.items()}}
    seconds = in_turns(calls, repeats)
    made = {what: row(what, seconds[what], seconds["forward"], goal) for what, (goal, _) in asked.items()}
    return [one if asked[what][0] else replace(one, goal="", reached=None) for what, one in made.items()]


# A device, with random weights of a real model's shape ------------------------------------------------------------------


class Numbers:
    """A tokenizer for texts such as "17 4 9": what generation needs of one, for a model without words."""

    pad_token_id = eos_token_id = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {
            "input_ids": [int(word) for word in text.split() if word.isdigit()]
        }  # asked of other texts too

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(str(int(one)) for one in ids)


def on_device(shape: str, device: str, dtype: str) -> Any:
    """Random weights made on the device itself; nothing is loaded."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama", **SHAPES[shape], bos_token_id=1, eos_token_id=None, pad_token_id=None
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None
    return model


def decode_bare(model: Any, prompts: Samples, new: int) -> None:
    """Greedy decoding with a cache and nothing else: what the device's forward gives a batch."""
    import torch

    ids = torch.tensor(prompts, device=model.device)
    with torch.inference_mode():
        made = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        for _ in range(new - 1):
            made = model(
                input_ids=made.logits[:, -1:].argmax(-1), past_key_values=made.past_key_values, use_cache=True
            )


def device_rows(
    shape: str, device: str, dtype: str, repeats: int, tokens: int = 2048, batch: int = 32, new: int = 64
) -> tuple[list[Row], float]:
    """The rows of a device, and the peak GiB of neuron scores (0 where the device keeps no count)."""
    import torch

    from sparc3.evaluation.generate import complete
    from sparc3.evaluation.perplexity import negative_log_likelihoods

    model = on_device(shape, device, dtype)
    vocabulary = SHAPES[shape]["vocab_size"]
    ids = samples([tokens] * 4, vocabulary)
    prompts = samples([32] * batch, vocabulary)
    texts: Any = [" ".join(map(str, prompt)) for prompt in prompts]
    windows = [(tuple(one), tokens - 1) for one in ids]
    peak = 0.0
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        batches_alone(model, ids)
        peak = torch.cuda.max_memory_allocated() / 2**30
    seconds = in_turns(
        {
            "forward": partial(forward, model, ids),
            "abs": partial(batches_alone, model, ids),
            "signed": partial(batches_alone, model, ids, neuron="signed"),
            "perplexity": partial(negative_log_likelihoods, model, windows, False),
            "bare": partial(decode_bare, model, prompts, new),
            "generation": partial(complete, model, Numbers(), texts, max_new_tokens=new, batch=batch),  # type: ignore[arg-type]
        },
        repeats,
    )
    per_sample = [s / len(ids) for s in seconds["abs"]]
    return [
        Row(
            f"s per {tokens}-token sample, neuron `abs`",
            statistics.median(per_sample),
            min(per_sample),
            max(per_sample),
            "≤ 0.25",
            statistics.median(per_sample) <= 0.25 if shape == "llama3-8b" else None,
        ),
        row("neuron `abs` against the forward one by one", seconds["abs"], seconds["forward"], 2.2),
        row("neuron `signed` against the forward one by one", seconds["signed"], seconds["forward"], 2.0),
        row(
            "perplexity: forward throughput that is reached",
            seconds["forward"],
            seconds["perplexity"],
            0.7,
            least=True,
        ),
        row(
            f"generation, {batch} × {new} tokens: bare decoding throughput that is reached",
            seconds["bare"],
            seconds["generation"],
            0.7,
            least=True,
        ),
    ], peak


# The page ---------------------------------------------------------------------------------------------------------------

HEADER = "| what | ratio: median (least–most) | goal | reached | |\n|---|---|---|---|---|"


def table(rows: list[Row]) -> str:
    return "\n".join([HEADER, *(r.line() for r in rows)])


def hardware(device: str) -> str:
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def page(path: Path, section: str, body: str) -> None:
    """Put a section into the page, in place of the earlier one of that name; the others stay."""
    title = "# What attribution costs\n\nWritten by `benchmarks/attribution.py`, which says how each figure is taken. Ratios within one run.\n"
    text = (
        path.read_text()
        if path.exists()
        else title
        + "\n## cuda\n\nNot measured: no GPU was at hand. `python benchmarks/gpu.py` is ready and takes at most 8 minutes.\n"
    )
    head, *parts = text.split("\n## ")
    sections = {part.partition("\n")[0]: part.partition("\n")[2].strip("\n") for part in parts}
    sections[section] = body.strip("\n")
    path.write_text(
        head.rstrip("\n") + "\n" + "".join(f"\n## {name}\n\n{sections[name]}\n" for name in sorted(sections))
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peers", type=Path, help="the folder that peers.sh was given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=sorted(SHAPES))
    parser.add_argument("--dtype", default="bfloat16", help="with --shape")
    parser.add_argument("--model", help="a pretrained model, on a CPU")
    parser.add_argument(
        "--out", type=Path, default=HERE / "RESULTS.md", help="the page to write (default: %(default)s)"
    )
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(memory_of(args.only, args.layers))
        return
    import torch
    import transformers

    busy = ", ".join(f"{load:.0f}" for load in os.getloadavg()[:2])
    told = f"{time.strftime('%Y-%m-%d')}, `python benchmarks/attribution.py {' '.join(sys.argv[1:])}`; load average at the start {busy}"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    if args.shape:
        rows, peak = device_rows(args.shape, args.device, args.dtype, args.repeats)
        reach = f"Peak memory of neuron scores of `mlp.up`: {peak:.1f} GiB (goal: ≤ 24).\n" if peak else ""
        body = f"{hardware(args.device)}; {args.shape}, {args.dtype}, random weights; {versions}; {told}; {args.repeats} rounds.\n\n"
        page(
            args.out,
            args.device.partition(":")[0] if args.device != "cpu" else f"cpu, {args.shape}",
            body + table(rows) + f"\n\n{reach}",
        )
    elif args.model:
        rows = model_rows(args.model, args.repeats)
        body = f"{hardware('cpu')}; float32, one sample of 512 tokens; {versions}; {told}; {args.repeats} rounds.\n\n"
        page(args.out, f"cpu, {args.model}", body + table(rows))
    else:
        rows = cpu_rows(args.layers, args.repeats)
        rows += memory_rows(args.layers, min(3, args.repeats))
        peers, missing = peer_rows(args.peers, args.layers, args.repeats)
        rows += peers
        shape = f"random Llama, 1024 wide, 2816 in the MLP, {args.layers} layers, vocabulary 4096, float32"
        about = f"{hardware('cpu')}; {shape}; {versions}; {told}; {args.repeats} rounds.\n\n"
        page(args.out, "cpu", about + table(rows) + "".join(f"\n\n{line}." for line in missing))
    for r in rows:
        print(r.line())


if __name__ == "__main__":
    main()
