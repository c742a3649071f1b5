"""Indirect object identification, or any task of a text, a target token and a contrast token."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from .. import distributed
from ..models.families import ROLES
from ..models.load import context_length, vocabulary_size
from ..models.memory import in_batches, logits_at
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
"""Texts of one batch at the start."""


def ioi(
    model: Model, tokenizer: Tokenizer, samples: ReferenceSet, settings: IOISettings, progress: bool = False
) -> Reading:
    """Logit of the target less that of the contrast at the last position, and how often it is above zero; one
    unit a text."""
    encoded = encode(
        samples, tokenizer, "contrast", context=context_length(model), vocabulary=vocabulary_size(model)
    )
    found = distributed.in_parallel(
        encoded,
        lambda share: in_batches(share, ROWS, lambda part: logit_differences(model, part), of=(model, "ioi")),
    )
    differences = tuple(map(finite, found))
    right = tuple(None if d is None else float(d > 0) for d in differences)
    split, ones, failures = settings.split, (1.0,) * len(differences), differences.count(None)
    return Reading(
        (
            Observations("ioi.accuracy", split, "share of texts", "higher", right, ones, failures),
            Observations("ioi.logit_difference", split, "logits", "higher", differences, ones, failures),
        )
    )


@torch.inference_mode()
def logit_differences(model: Model, part: Sequence[Encoded]) -> list[float]:
    """One of each text."""
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
    """RUR = unique tokens / tokens of the greedy response, and the share of its 4-grams that occurred before;
    one unit a prompt."""
    prompts, prompt_texts = read_prompts(samples, tokenizer)
    made = complete(model, tokenizer, prompts, max_new_tokens=settings.max_new_tokens, progress=progress)
    written = [texts[0] for texts in made]
    tokens = [
        list(read_sample(replace(sample, completion=text), tokenizer).completion)
        for sample, text in zip(samples, written, strict=True)
    ]
    unique, again = tuple(map(uniqueness, tokens)), tuple(map(repeated, tokens))
    split, ones, failures = settings.split, (1.0,) * len(unique), unique.count(None)
    return Reading(
        (
            Observations("rur.mean", split, "unique tokens / tokens", "higher", unique, ones, failures),
            Observations("repetition.4grams", split, "share of 4-grams", "lower", again, ones, failures),
        ),
        [
            {"prompt": p, "continuations": [{"text": t, "score": u}]}
            for p, t, u in zip(prompt_texts, written, unique, strict=True)
        ],
    )


def response_scores(model: Model, tokenizer: Tokenizer, max_new_tokens: int, progress: bool = False) -> Score:
    """Prompts → this model's own greedy responses with their RUR, for choose_by: repetition."""

    def rate(prompts: list[str], written: list[str]) -> list[float | None]:
        made = [Sample(text=p, completion=text) for p, text in zip(prompts, written, strict=True)]
        return [uniqueness(list(read_sample(sample, tokenizer).completion)) for sample in made]

    return own_continuations(model, tokenizer, max_new_tokens, rate, progress)


def uniqueness(ids: list[int]) -> float | None:
    """Unique tokens / tokens; None of an empty response."""
    return len(set(ids)) / len(ids) if ids else None


def repeated(ids: list[int]) -> float | None:
    """Share of 4-grams that are a repetition of an earlier one; None of an empty response, 0 of one too short
    to have any."""
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return None if not ids else 1 - len(set(grams)) / len(grams) if grams else 0.0


GIVES = ("rur.mean", "repetition.4grams")
register(Metric("repetition", RepetitionSettings, repetition, prompts=True, gives=GIVES))

# Sparsity: which share of the weights is exactly zero, counted in the matrices themselves, row by row.


@torch.no_grad()
def sparsity(
    model: Model,
    tokenizer: Tokenizer,
    samples: ReferenceSet,
    settings: SparsitySettings,
    progress: bool = False,
) -> Reading:
    """Share of exact zeros, one unit a site, and the least and the most of any output row: equal where every
    row is pruned alike."""
    roles = settings.sites or [role for role in ROLES if role in family_of(model).roles]
    rows = {site: (site.weight == 0).sum(1).cpu() for site in sites_of(model, roles)}
    zeros = tuple(float(counts.sum()) for counts in rows.values())
    weights = tuple(float(site.out * site.inp) for site in rows)
    least = min(float(counts.min()) / site.inp for site, counts in rows.items())
    most = max(float(counts.max()) / site.inp for site, counts in rows.items())
    return Reading(
        (
            Observations("sparsity", "all", "share of weights", "higher", zeros, weights),
            Observations("sparsity.row_min", "all", "share of the row", "higher", (least,), (1.0,)),
            Observations("sparsity.row_max", "all", "share of the row", "higher", (most,), (1.0,)),
        )
    )


SHARES = ("sparsity", "sparsity.row_min", "sparsity.row_max")
register(Metric("sparsity", SparsitySettings, sparsity, prompts=False, gives=SHARES))
