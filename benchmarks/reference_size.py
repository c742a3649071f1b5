"""How many samples a reference set needs: what share of the strongest neurons two sets without a common sample agree on.

    python benchmarks/reference_size.py MODEL TEXTS [LENGTH]

TEXTS: a JSONL or text file; texts are cut to LENGTH tokens (default 64), shorter ones left out.
"""

import sys

import torch

from sparc3 import ReferenceSet, Scores, attribute, load_model

SIZES = (4, 16, 64, 128)


def main(name: str, path: str, length: str = "64") -> None:
    model, tokenizer = load_model(name)
    tokens = int(length)
    ids = [
        tokenizer(sample.text, verbose=False)["input_ids"][:tokens]
        for sample in ReferenceSet.load(path)
        if sample.text
    ]
    ids = [one for one in ids if len(one) == tokens]
    print(
        f"{len(ids)} texts of {tokens} tokens; share of the strongest 5 % in common, by samples in each set"
    )
    for target in ("predicted", "next"):
        for neuron in ("signed", "abs"):
            shares = [
                f"{size}: {agreement(*pair):.2f}"
                for size in SIZES
                if (pair := two(model, ids, size, target, neuron))
            ]
            print(f"{target:10} {neuron:7} {'  '.join(shares)}", flush=True)


def two(model: object, ids: list[list[int]], size: int, target: str, neuron: str) -> list[Scores]:
    """Scores on the first `size` samples and on the next; none where there are too few."""
    parts = [ids[:size], ids[size : 2 * size]] if len(ids) >= 2 * size else []
    return [attribute(model, part, target=target, neuron=neuron) for part in parts]  # type: ignore[arg-type]


def agreement(one: Scores, other: Scores) -> float:
    values = [torch.cat([value.abs() for value in scores.values()]) for scores in (one, other)]
    count = max(1, round(0.05 * len(values[0])))
    strongest = [set(value.topk(count).indices.tolist()) for value in values]
    return len(strongest[0] & strongest[1]) / count


if __name__ == "__main__":
    main(*sys.argv[1:])
