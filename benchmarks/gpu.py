"""All that waits for a GPU, in one run of at most 8 minutes; writes benchmarks/gpu-SHAPE.json.

    python benchmarks/gpu.py [--shape llama3-8b] [--device cuda] [--minutes 8] [--out FILE]

Each part is a process of its own, of random weights, so that one that fails or runs out of time takes nothing of
the others with it: what was not measured is listed with the reason. First whether the scores of a small model in
float32 are those of a CPU, then what `attribution.py --device cuda --shape ...` measures, then Wanda and weights of
one matrix a layer, then one long sample. Nothing is loaded from anywhere.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from attribution import (
    SHAPES,
    attribution,
    batches_alone,
    device_rows,
    forward,
    hardware,
    in_turns,
    on_device,
    row,
    samples,
)

HERE = Path(__file__).parent
Found = dict[str, Any]


def agreement(shape: str, device: str) -> Found:
    """The largest gap between the scores of a device and of a CPU, as a share of the largest score of each site."""
    from sparc3 import attribute

    model = on_device("small", "cpu", "float32")
    ids = samples([64, 200, 17], 4096)
    options: dict[str, dict[str, Any]] = {
        "neuron abs": {},
        "neuron signed": {"neuron": "signed"},
        "weight": {"unit": "weight"},
        "wanda": {"method": "wanda", "unit": "weight"},
    }
    here = {name: attribute(model, ids, **asked) for name, asked in options.items()}
    model.to(device)
    there = {name: attribute(model, ids, **asked) for name, asked in options.items()}
    return {
        name: max(
            float((there[name][site] - ours).abs().max() / ours.abs().max())
            for site, ours in here[name].items()
        )
        for name in options
    }


def speed(shape: str, device: str) -> Found:
    rows, peak = device_rows(shape, device, "bfloat16", repeats=3)
    return {"rows": [asdict(one) for one in rows], "peak_gib_neuron_abs": peak}


def other_methods(shape: str, device: str) -> Found:
    model = on_device(shape, device, "bfloat16")
    ids = samples([2048] * 2, SHAPES[shape]["vocab_size"])
    every = ("mlp.up", "mlp.down")
    seconds = in_turns(
        {
            "forward": partial(forward, model, ids),
            "wanda": partial(batches_alone, model, ids, method="wanda", sites=every),
            "gradient": partial(batches_alone, model, ids, method="gradient"),
            "weight": partial(batches_alone, model, ids[:1], unit="weight", sites=("attn.q",)),
        },
        2,
    )
    plain = seconds["forward"]
    return {
        "rows": [
            asdict(
                row(
                    "Wanda of mlp.up and mlp.down against the forward one by one",
                    seconds["wanda"],
                    plain,
                    1.1,
                )
            ),
            asdict(row("gradient of neurons, same", seconds["gradient"], plain, 2.2)),
        ],
        "seconds_weight_attn_q_one_sample": seconds["weight"],
    }


def long_sample(shape: str, device: str) -> Found:
    """One sample as long as the model's context, which `auto` may have to compute layer by layer."""
    model = on_device(shape, device, "bfloat16")
    length = SHAPES[shape]["max_position_embeddings"]
    ids = samples([length], SHAPES[shape]["vocab_size"])
    return {"tokens": length, "seconds": in_turns({"abs": partial(attribution, model, ids)}, 1)["abs"]}


PARTS: dict[str, Callable[[str, str], Found]] = {
    "agreement": agreement,
    "speed": speed,
    "other_methods": other_methods,
    "long_sample": long_sample,
}


def measure_parts(shape: str, device: str, minutes: float) -> Found:
    """What each part found, and in `not_measured` why the others found nothing."""
    found: Found = {}
    missing: dict[str, str] = {}
    deadline = time.monotonic() + 60 * minutes
    for part in PARTS:
        command = [sys.executable, __file__, "--only", part, "--shape", shape, "--device", device]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=max(1.0, deadline - time.monotonic())
            )
        except subprocess.TimeoutExpired:
            missing[part] = f"not done within {minutes:g} minutes of the start"
            continue
        if done.returncode:
            missing[part] = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        else:
            found[part] = json.loads(done.stdout.splitlines()[-1])
        print(part, "measured" if part in found else missing[part], flush=True)
    return {**found, "not_measured": missing}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama3-8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(PARTS[args.only](args.shape, args.device)))
        return
    import torch
    import transformers

    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no GPU here; give --device cpu --shape tiny to try the script")
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(args.device),
        "shape": args.shape,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": f"python benchmarks/gpu.py {' '.join(sys.argv[1:])}".strip(),
    }
    out = args.out or HERE / f"gpu-{args.shape}.json"
    found = measure_parts(args.shape, args.device, args.minutes)
    out.write_text(json.dumps(about | found, indent=1) + "\n")
    if found["not_measured"]:
        raise SystemExit(f"not measured: {', '.join(found['not_measured'])}; {out} says why")


if __name__ == "__main__":
    main()
