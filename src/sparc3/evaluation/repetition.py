"""Repetition of greedy responses: the response uniqueness ratio RUR (Eq. 11)."""

from typing import TYPE_CHECKING

from ..samples import ReferenceSet
from ..sources import Score
from .generation import complete
from .metrics import Measured, Metric, RepetitionSettings, register
from .observations import Observations

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def repetition(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", samples: ReferenceSet, settings: RepetitionSettings, progress: bool = False
) -> Measured:
    """RUR = unique tokens / tokens of the greedy response, and the share of its 4-grams that occurred before; one unit a prompt."""
    prompts = [sample.text or "" for sample in samples]
    written = [texts[0] for texts in complete(model, tokenizer, prompts, max_new_tokens=settings.max_new_tokens, progress=progress)]
    tokens = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else [] for text in written]
    unique = [uniqueness(ids) for ids in tokens]
    failures = unique.count(None)
    ones = (1.0,) * len(unique)
    return Measured(
        (
            Observations("rur.mean", settings.split, "unique tokens / tokens", "higher", tuple(unique), ones, failures),
            Observations("repetition.4grams", settings.split, "share of 4-grams", "lower", tuple(map(repeated, tokens)), ones, failures),
        ),
        [{"prompt": p, "continuations": [{"text": t, "score": u}]} for p, t, u in zip(prompts, written, unique, strict=True)],
    )


def response_scores(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", max_new_tokens: int) -> Score:
    """Prompts → this model's own greedy responses with their RUR, for choose_by: repetition."""

    def score(prompts: list[str]) -> list[tuple[str, float | None]]:
        written = [texts[0] for texts in complete(model, tokenizer, prompts, max_new_tokens=max_new_tokens)]
        return [(text, uniqueness(list(tokenizer(text, add_special_tokens=False)["input_ids"])) if text else None) for text in written]

    return score


def uniqueness(ids: list[int]) -> float | None:
    """Unique tokens / tokens; None of an empty response."""
    return len(set(ids)) / len(ids) if ids else None


def repeated(ids: list[int]) -> float | None:
    """Share of 4-grams that are a repetition of an earlier one; None of an empty response, 0 of one too short to have any."""
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return None if not ids else 1 - len(set(grams)) / len(grams) if grams else 0.0


register(Metric("repetition", RepetitionSettings, repetition, prompts=True, gives=("rur.mean", "repetition.4grams")))
