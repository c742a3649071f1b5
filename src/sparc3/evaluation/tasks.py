"""Metrics on tasks: indirect object identification (or any task with a text, a target token and a contrast
token), repetition, and sparsity."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from .. import distributed
from ..models.families import ROLES
from ..models.load import context_length, vocabulary_size
from ..models.memory import logits_at, run_in_batches
from ..models.offloading import device_of
from ..models.sites import family_of, sites_of
from ..samples.batches import Encoded, encode, make_batch
from ..samples.reference_set import ReferenceSet, Sample
from ..samples.sources import Score
from ..samples.tokens import Tokenizer, read_sample
from .generate import complete, own_continuations, read_prompts
from .metrics import IOISettings, Metric, Model, Reading, RepetitionSettings, SparsitySettings, register
from .statistics import Observations, finite

ROWS = 32
"""Texts in the first batch; halved when they do not fit into memory."""


def ioi(
    model: Model, tokenizer: Tokenizer, samples: ReferenceSet, settings: IOISettings, progress: bool = False
) -> Reading:
    """Logit of the target minus that of the contrast at the last position, and the share of texts in which
    it is above zero; one unit per text."""
    encoded = encode(
        samples, tokenizer, "contrast", context=context_length(model), vocabulary=vocabulary_size(model)
    )
    raw_differences = distributed.run_in_parallel(
        encoded,
        lambda share: run_in_batches(
            share, ROWS, lambda part: logit_differences(model, part), memory_key=(model, "ioi")
        ),
    )
    differences = tuple(map(finite, raw_differences))
    correct = tuple(None if d is None else float(d > 0) for d in differences)
    split, ones, failures = settings.split, (1.0,) * len(differences), differences.count(None)
    return Reading(
        (
            Observations("ioi.accuracy", split, "share of texts", "higher", correct, ones, failures),
            Observations("ioi.logit_difference", split, "logits", "higher", differences, ones, failures),
        )
    )


@torch.inference_mode()
def logit_differences(model: Model, part: Sequence[Encoded]) -> list[float]:
    """Logit of the target minus that of the contrast, for each text."""
    batch = make_batch(part, device_of(model))
    last = [sample.positions[0] for sample in part]
    logits = logits_at(model, batch.ids, list(range(len(part))), last).float()
    return [
        float(row[(sample.tokens or (0,))[0]] - row[(sample.against or (0,))[0]])
        for row, sample in zip(logits, part, strict=True)
    ]


register(Metric("ioi", IOISettings, ioi, prompts=True, gives=("ioi.accuracy", "ioi.logit_difference")))

# Repetition of greedy responses: the response uniqueness ratio RUR (Eq. 11).


def repetition(
    model: Model,
    tokenizer: Tokenizer,
    samples: ReferenceSet,
    settings: RepetitionSettings,
    progress: bool = False,
) -> Reading:
    """RUR = unique tokens / tokens of the greedy response, and the share of its 4-grams that repeat
    earlier ones; one unit per prompt."""
    prompts, prompt_texts = read_prompts(samples, tokenizer)
    generations = complete(
        model, tokenizer, prompts, max_new_tokens=settings.max_new_tokens, progress=progress
    )
    responses = [texts[0] for texts in generations]
    tokens = [
        list(read_sample(replace(sample, completion=text), tokenizer).completion)
        for sample, text in zip(samples, responses, strict=True)
    ]
    unique, repeats = tuple(map(uniqueness, tokens)), tuple(map(repeated_share, tokens))
    split, ones, failures = settings.split, (1.0,) * len(unique), unique.count(None)
    return Reading(
        (
            Observations("rur.mean", split, "unique tokens / tokens", "higher", unique, ones, failures),
            Observations("repetition.4grams", split, "share of 4-grams", "lower", repeats, ones, failures),
        ),
        [
            {"prompt": p, "continuations": [{"text": t, "score": u}]}
            for p, t, u in zip(prompt_texts, responses, unique, strict=True)
        ],
    )


def response_scores(model: Model, tokenizer: Tokenizer, max_new_tokens: int, progress: bool = False) -> Score:
    """A `Score` that returns this model's own greedy responses with their RUR, for choose_by: repetition."""

    def rate(prompts: list[str], responses: list[str]) -> list[float | None]:
        samples = [Sample(text=p, completion=text) for p, text in zip(prompts, responses, strict=True)]
        return [uniqueness(list(read_sample(sample, tokenizer).completion)) for sample in samples]

    return own_continuations(model, tokenizer, max_new_tokens, rate, progress)


def uniqueness(ids: list[int]) -> float | None:
    """Unique tokens / tokens; None for an empty response."""
    return len(set(ids)) / len(ids) if ids else None


def repeated_share(ids: list[int]) -> float | None:
    """Share of 4-grams that repeat an earlier one; None for an empty response, 0 for one that is too short to
    have any."""
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return None if not ids else 1 - len(set(grams)) / len(grams) if grams else 0.0


GIVES = ("rur.mean", "repetition.4grams")
register(Metric("repetition", RepetitionSettings, repetition, prompts=True, gives=GIVES))

# Sparsity: the share of weights that are exactly zero, counted in the matrices themselves, row by row.


@torch.no_grad()
def sparsity(
    model: Model,
    tokenizer: Tokenizer,
    samples: ReferenceSet,
    settings: SparsitySettings,
    progress: bool = False,
) -> Reading:
    """Share of exact zeros, one unit per site, and the smallest and largest share in any output row, which
    are equal if every row is pruned equally."""
    roles = settings.sites or [role for role in ROLES if role in family_of(model).roles]
    rows = {site: (site.weight == 0).sum(1).cpu() for site in sites_of(model, roles)}
    zeros = tuple(float(counts.sum()) for counts in rows.values())
    weights = tuple(float(site.out * site.inp) for site in rows)
    smallest = min(float(counts.min()) / site.inp for site, counts in rows.items())
    largest = max(float(counts.max()) / site.inp for site, counts in rows.items())
    return Reading(
        (
            Observations("sparsity", "all", "share of weights", "higher", zeros, weights),
            Observations("sparsity.row_min", "all", "share of the row", "higher", (smallest,), (1.0,)),
            Observations("sparsity.row_max", "all", "share of the row", "higher", (largest,), (1.0,)),
        )
    )


SHARES = ("sparsity", "sparsity.row_min", "sparsity.row_max")
register(Metric("sparsity", SparsitySettings, sparsity, prompts=False, gives=SHARES))
