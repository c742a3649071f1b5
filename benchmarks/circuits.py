"""Which ranking finds the sparsest circuit of the demo's task, and why: exact removals, choices made on validation prompts, one test.

    OMP_NUM_THREADS=1 python benchmarks/circuits.py [--seeds 6]

Neurons of `mlp.up` in the embedded model, indirect objects, target `contrast`. First every neuron is removed alone and its effect on the mean
logit difference is set beside its score. Then each method may choose its ranking (Σ of a signed score, or of its size; ranked by value or by
size; scored once, or again after each 15 % that went) on validation prompts with reference sets of its own, and its choice is measured once on
test prompts with other reference sets; differences are paired by reference set. A circuit is as sparse as the largest share removed at
which, as at all smaller ones tried, 90 % of the answers are right.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparc3 import Circuit, ReferenceSet, ablated, attribute, load_model
from sparc3.evaluation.metrics import IOISettings, Prepared, require_metric
from sparc3.evaluation.statistics import Observations, difference, measurement
from sparc3.evaluation.toxicity import ranks
from sparc3.results import find_sparsest
from sparc3.samples.sources import Request, gather

SHARES = tuple(round(1 - 0.7 * 0.85**step, 3) for step in range(17))
"""Shares removed: 30 %, then 15 % of what is left at a time."""
ENOUGH = 0.9
METHODS = ("lrp", "gradient")


@dataclass(frozen=True)
class Ranking:
    """One way to rank neurons.

    Attributes:
        reduce: "mean" over samples of the signed score, or "mean_abs" of its size.
        by: kept first is the highest "value", or the largest "size".
        again: whether the neurons are scored again after each removal.
    """

    reduce: str
    by: str
    again: bool

    def __str__(self) -> str:
        return f"{self.reduce} by {self.by}{', scored again' if self.again else ''}"


RANKINGS = tuple(
    Ranking(reduce, by, again)
    for again in (False, True)
    for reduce, by in (("mean", "value"), ("mean", "size"), ("mean_abs", "size"))
)


@dataclass(frozen=True)
class Task:
    """The model, its sites, and the prompts that circuits are measured on."""

    model: Any
    tokenizer: Any
    prompts: ReferenceSet

    @property
    def sites(self) -> list[str]:
        return [name for name, _ in self.model.named_modules() if name.endswith("mlp.up_proj")]

    def scores(self, references: ReferenceSet, method: str, reduce: str) -> Tensor:
        """[all neurons], layer after layer."""
        made = attribute(
            self.model,
            references,
            tokenizer=self.tokenizer,
            method=method,
            neuron="signed",
            target="contrast",
            reduce=reduce,
        )
        return torch.cat([made[name].double() for name in self.sites])

    def without(self, gone: Tensor) -> Any:
        """The context in which the neurons of the mask are removed."""
        masks = zip(self.sites, gone.chunk(len(self.sites)), strict=True)
        return ablated(
            self.model,
            Circuit(
                "neuron", {name: tuple(mask.nonzero()[:, 0].tolist()) for name, mask in masks if mask.any()}
            ),
        )

    def measured(self) -> tuple[float, float]:
        """(accuracy, mean logit difference)."""
        made = Prepared(require_metric("ioi"), IOISettings(source="demo-ioi"), self.prompts).measure(
            self.model, self.tokenizer
        )
        accuracy, logits = (float(np.mean([s for s in o.sums if s is not None])) for o in made.observations)
        return accuracy, logits


def prompts(split: str, seed: int, count: int = 128) -> ReferenceSet:
    return gather(Request("demo-ioi", count, split, seeds=(seed,)))


def exact(task: Task) -> Tensor:
    """How much of the mean logit difference goes with each neuron alone."""
    with torch.no_grad():
        whole = task.measured()[1]
        effects = []
        for name in task.sites:
            for index in range(task.model.get_submodule(name).out_features):
                with ablated(task.model, Circuit("neuron", {name: (index,)})):
                    effects.append(whole - task.measured()[1])
    return torch.tensor(effects, dtype=torch.float64)


def spearman(one: Tensor, other: Tensor) -> float:
    return float(np.corrcoef(ranks(one.numpy()), ranks(other.numpy()))[0, 1])


def kept_first(scores: Tensor, by: str) -> Tensor:
    return scores.abs() if by == "size" else scores


def curve(task: Task, references: ReferenceSet, method: str, ranking: Ranking) -> float:
    """The share removed at which enough answers are still right."""
    scores = kept_first(task.scores(references, method, ranking.reduce), ranking.by)
    gone, accuracies = torch.zeros(len(scores), dtype=torch.bool), []
    for share in SHARES:
        if ranking.again and gone.any():
            with task.without(gone):
                scores = kept_first(task.scores(references, method, ranking.reduce), ranking.by)
        order = torch.argsort(scores.masked_fill(gone, -torch.inf), stable=True)
        gone = torch.zeros_like(gone)
        gone[order[: round(share * len(gone))]] = True
        with task.without(gone):
            accuracies.append(task.measured()[0])
        if accuracies[-1] < ENOUGH:
            break
    return find_sparsest(SHARES[: len(accuracies)], accuracies, ENOUGH)


def by_effect(task: Task, effects: Tensor) -> Iterator[tuple[str, float]]:
    """How sparse the exact effects themselves can be."""
    for by in ("value", "size"):
        accuracies = []
        for share in SHARES:
            gone = torch.zeros(len(effects), dtype=torch.bool)
            gone[torch.argsort(kept_first(effects, by), stable=True)[: round(share * len(effects))]] = True
            with task.without(gone):
                accuracies.append(task.measured()[0])
        yield by, find_sparsest(SHARES, accuracies, ENOUGH)


def observed(values: list[float]) -> Observations:
    return Observations(
        "circuit.sparsest", "test", "share of units removed", "higher", tuple(values), (1.0,) * len(values)
    )


def told(values: list[float]) -> str:
    found = measurement(observed(values), "")
    between = f" [{found.ci95[0]:.1%}, {found.ci95[1]:.1%}]" if found.ci95 else ""
    return f"{found.value:.1%}{between}"


def show_effects(task: Task, references: ReferenceSet) -> None:
    effects = exact(task)
    largest = effects.abs() >= effects.abs().sort(descending=True).values[len(effects) // 7 - 1]
    print(
        f"each of {len(effects)} neurons removed alone; the {int(largest.sum())} largest effects have the score's sign in"
    )
    print(f"{'':10} {'ρ':>6} {'ρ of sizes':>11} {'sign right':>11}")
    for method in ("lrp", "cp-lrp", "gradient"):
        scores = task.scores(references, method, "mean")
        right = float(((scores > 0) == (effects > 0))[largest].double().mean())
        print(
            f"{method:10} {spearman(scores, effects):6.2f} {spearman(scores.abs(), effects.abs()):11.2f} {right:11.0%}",
            flush=True,
        )
    for by, share in by_effect(task, effects):
        print(f"the exact effects by {by}: {share:.1%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=6,
        help="reference sets of 128 sentences for the test; half as many for the choice",
    )
    args = parser.parse_args()
    model, tokenizer = load_model("demo", dtype="float32", device="cpu")
    validation, test = (Task(model, tokenizer, prompts(split, 0)) for split in ("validation", "test"))
    show_effects(Task(model, tokenizer, prompts("validation", 0, 32)), prompts("reference", 100))
    chosen: dict[str, Ranking] = {}
    print("\nlargest share removed, validation prompts")
    for method in METHODS:
        found = {
            r: [
                curve(validation, prompts("reference", 100 + seed), method, r)
                for seed in range((args.seeds + 1) // 2)
            ]
            for r in RANKINGS
        }
        for ranking, values in found.items():
            print(f"{method:10} {ranking!s:32} {told(values)}", flush=True)
        chosen[method] = max(found, key=lambda r: sum(found[r]))
    print(
        "\nthe same on test prompts: both by the paper's ranking (Eq. 1 and 2), both by the other's choice too, each by its own"
    )
    same = {f"{r}": dict.fromkeys(METHODS, r) for r in dict.fromkeys([RANKINGS[0], *chosen.values()])}
    for title, ways in {**same, "each by its choice": chosen}.items():
        tested = {
            m: [curve(test, prompts("reference", seed), m, r) for seed in range(args.seeds)]
            for m, r in ways.items()
        }
        for method, values in tested.items():
            net = difference(observed(tested["gradient"]), observed(values), "gradient", method)
            assert net is not None
            against = (
                ""
                if method == "gradient" or net.ci95 is None
                else (
                    f"   less gradient {100 * net.value:+.1f} [{100 * net.ci95[0]:+.1f}, {100 * net.ci95[1]:+.1f}] points, p = {net.p:.2f}"
                )
            )
            print(
                f"{title:32} {method:10} {told(values)}{against}{f'   ({ways[method]})' if title.startswith('each') else ''}",
                flush=True,
            )


if __name__ == "__main__":
    main()
