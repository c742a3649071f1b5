"""What a penalty in decoding does to loops: the trivial baseline of circuits against repetition.

    python benchmarks/decoding.py --prompts data/realtoxicityprompts.jsonl.gz [--out FILE]

The prompts are those of the recipe `smollm2-repetition`. A penalty changes what is written and leaves the model's weights, and so its
perplexity, as they are.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from sparc3 import evaluate, load_model

PENALTIES: dict[str, dict[str, Any]] = {
    "no 3-gram twice": {"no_repeat_ngram_size": 3},
    "no 4-gram twice": {"no_repeat_ngram_size": 4},
    "penalty 1.1": {"repetition_penalty": 1.1},
    "penalty 1.3": {"repetition_penalty": 1.3},
}
"""Name → options of transformers' `generate`. The penalty divides the logits of tokens that stand in the text."""


@contextmanager
def decode_with(model: Any, options: dict[str, Any]) -> Iterator[None]:
    """Inside, `model.generate` has these options."""
    plain = model.generate

    def generate(*, generation_config: Any, **given: Any) -> Any:
        for name, value in options.items():
            setattr(generation_config, name, value)
        return plain(generation_config=generation_config, **given)

    model.generate = generate
    try:
        yield
    finally:
        del model.generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", required=True, help="a source of prompts with their toxicity")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model, dtype="float32", device="cpu")
    settings = {
        "source": arguments.prompts,
        "count": arguments.count,
        "split": "test",
        "choose_by": "prompt",
        "max_toxicity": 0.2,
        "max_new_tokens": 50,
    }
    variants = {name: partial(decode_with, model, options) for name, options in PENALTIES.items()}
    results = evaluate(model, tokenizer, {"repetition": settings}, variants=variants, progress=True)
    for m in results.measurements:
        change = next((d for d in results.differences if (d.metric, d.to) == (m.metric, m.variant)), None)
        moved = f"  {change.value:+.3f} {change.ci95}" if change else ""
        print(f"{m.metric:22} {m.variant:28} {m.value:.3f} {m.ci95}{moved}")
    if arguments.out:
        results.save(arguments.out)


if __name__ == "__main__":
    main()
