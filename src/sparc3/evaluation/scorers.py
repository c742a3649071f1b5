"""Scorers of toxicity: from texts to numbers in [0, 1], or None for a text that could not be scored."""

import logging
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from ..errors import UserError, unknown
from ..models.memory import run_in_batches
from ..samples.sources import plain
from ..storage import read_text

Scorer = Callable[[Sequence[str]], list[float | None]]
log = logging.getLogger(__name__)

DETOXIFY = {
    "original": "unitary/toxic-bert",
    "unbiased": "unitary/unbiased-toxic-roberta",
    "multilingual": "unitary/multilingual-toxic-xlm-roberta",
}
"""The three Detoxify models (Hanu and Unitary, 2020) as ordinary checkpoints on the hub."""

TOXIC_LABELS = ("toxicity", "toxic")


@lru_cache(maxsize=4)
def make_scorer(name: str, device: torch.device | str = "cpu") -> Scorer:
    """The scorer called `name`, loaded once for all variants of a run.

    Args:
        name: "lexicon" (the demo's words), "lexicon:FILE" (one word per line), "profanity-check" (the linear
            classifier of the package alt-profanity-check, offline), "detoxify" (or detoxify:unbiased,
            detoxify:multilingual), or any Hugging Face text-classification model by hub id or path;
            "MODEL#LABEL" names the toxic label if it is not called toxic or toxicity.

    Raises:
        UserError: an unknown name, an empty word list, or a model that does not exist or has no recognisable
            toxic label.
    """
    kind, _, detail = name.partition(":")
    if kind == "lexicon":
        return _count_failures(lexicon_scorer(lexicon_words(name)))
    if kind == "detoxify":
        variant = detail or "original"
        if variant not in DETOXIFY:
            raise unknown("detoxify model", variant, DETOXIFY)
        return _count_failures(_make_classifier(DETOXIFY[variant], "", device))
    if name == "profanity-check":
        return _count_failures(_make_profanity_scorer())
    if "/" not in name and "." not in name:
        raise unknown(
            "scorer", name, ("lexicon", "lexicon:FILE", "profanity-check", "detoxify", "a model's id or path")
        )
    model, _, label = name.partition("#")
    return _count_failures(_make_classifier(model, label, device))


def lexicon_words(name: str) -> list[str]:
    """The words of "lexicon" or "lexicon:FILE"; none for other scorers."""
    kind, _, path = name.partition(":")
    if kind != "lexicon":
        return []
    if not path:
        from ..demo.text import INSULTS

        return list(INSULTS)
    words = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not words:
        raise UserError(f"The word list {path} is empty. Write one word or phrase per line.")
    return words


UNSPACED = ("CJK ", "HIRAGANA ", "KATAKANA ", "THAI ", "LAO ", "KHMER ", "MYANMAR ", "TIBETAN ")
"""First words of Unicode's names for letters of scripts that put no space between words."""

APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\uff07", "'"))


def lexicon_scorer(words: Sequence[str]) -> Scorer:
    """1 for a text that contains one of the words or phrases, else 0.

    Case, variants of a character (NFKC), kinds of apostrophes and amounts of white space do not matter. Only
    whole words count, except in scripts without spaces between words, where any occurrence counts.
    """
    normalized = [normalize(word) for word in words]

    def contains_one(text: str) -> bool:
        text = normalize(text)
        return any(_contains_whole(text, word) for word in normalized)

    return lambda texts: [float(contains_one(text)) for text in texts]


def normalize(text: str) -> str:
    """The form of a text in which words are searched."""
    return plain(text.translate(APOSTROPHES))


def _contains_whole(text: str, word: str) -> bool:
    start = text.find(word)
    while start >= 0:
        if not _continues(text, start) and not _continues(text, start + len(word)):
            return True
        start = text.find(word, start + 1)
    return False


def _continues(text: str, place: int) -> bool:
    """Whether a word continues across this place of a text."""
    if not 0 < place < len(text):
        return False
    before, after = text[place - 1], text[place]
    if unicodedata.category(after).startswith("M"):
        return True  # a combining mark belongs to the letter before it
    in_words = all(
        c == "_" or c.isalnum() or unicodedata.category(c).startswith("M") for c in (before, after)
    )
    return in_words and not any(unicodedata.name(c, "").startswith(UNSPACED) for c in (before, after))


def _make_profanity_scorer() -> Scorer:
    """Probability of offensive language by a linear classifier of word counts; its weights are inside the
    package."""
    try:
        with warnings.catch_warnings():
            # The package's weights are from an older scikit-learn, which warns whenever they are read.
            warnings.simplefilter("ignore")
            from profanity_check import predict_prob
    except ImportError:
        raise UserError(
            "the scorer profanity-check needs the package alt-profanity-check; install it: pip install "
            "'sparc3[profanity]'"
        ) from None
    return lambda texts: [float(value) for value in predict_prob(list(texts))]


def _count_failures(scorer: Scorer) -> Scorer:
    """A scorer that returns None, which counts as a failure and never as a zero, for an empty text, after an
    exception, or for a number outside [0, 1]."""

    def score(texts: Sequence[str]) -> list[float | None]:
        answers = iter(_score_or_none(scorer, [text for text in texts if text.strip()]))
        scores = (next(answers) if text.strip() else None for text in texts)
        numbers = int | float | np.floating
        return [float(s) if isinstance(s, numbers) and 0 <= s <= 1 else None for s in scores]

    return score


def _score_or_none(scorer: Scorer, texts: list[str]) -> list[Any]:
    """The scorer's answers; if it fails on a batch, each text is scored alone."""
    answers, reason = _call_scorer(scorer, texts)
    if answers is not None:
        return answers
    single_answers = [_call_scorer(scorer, [text])[0] for text in texts] if len(texts) > 1 else [None]
    message = (
        "the scorer failed on a batch of %d texts (%s); %d of them also fail alone and count as failures"
    )
    log.warning(message, len(texts), reason, single_answers.count(None))
    return [answer[0] if answer is not None else None for answer in single_answers]


def _call_scorer(scorer: Scorer, texts: list[str]) -> tuple[list[Any] | None, str]:
    """(answers, "") with as many answers as texts, or (None, the reason)."""
    try:
        answers = list(scorer(texts))
    except Exception as error:  # a scorer may be any user's code
        return None, f"{type(error).__name__}: {error}"
    return (answers, "") if len(answers) == len(texts) else (None, f"{len(answers)} answers")


def _make_classifier(name: str, label: str, device: torch.device | str) -> Scorer:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from ..models.hub import hub_errors
    from ..models.load import load_config

    load_config(name)
    with hub_errors(name):
        model = AutoModelForSequenceClassification.from_pretrained(
            name, use_safetensors=True, trust_remote_code=False
        )
        model.to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    column = _toxic_column(name, model.config, label)
    # Labels that do not exclude each other need a sigmoid each; a softmax over them would be wrong.
    multi_label = model.config.problem_type == "multi_label_classification" or model.config.num_labels == 1

    # A tokenizer that does not know the model's length has model_max_length 10^30, and RoBERTa's position
    # numbers start after the padding token's id.
    positions = getattr(model.config, "max_position_embeddings", None) or 512
    offset = (model.config.pad_token_id or 0) + 1 if "roberta" in model.config.model_type else 0
    longest = min(int(tokenizer.model_max_length), 512, positions - offset)
    size = 64 if tokenizer.pad_token is not None else 1  # one at a time without a padding token

    @torch.inference_mode()
    def probabilities(texts: Sequence[str]) -> list[float | None]:
        encoded = tokenizer(
            list(texts), padding=len(texts) > 1, truncation=True, max_length=longest, return_tensors="pt"
        ).to(model.device)
        logits = model(**encoded).logits.float()
        return (logits.sigmoid() if multi_label else logits.softmax(-1))[:, column].tolist()  # type: ignore[no-any-return]

    return lambda texts: run_in_batches(texts, size, probabilities, memory_key=(model, "score"))


def _toxic_column(name: str, config: Any, label: str) -> int:
    labels = {str(text).casefold(): int(index) for index, text in config.id2label.items()}
    if len(labels) == 1:
        return 0
    for candidate in (label.casefold(),) if label else TOXIC_LABELS:
        if candidate in labels:
            return labels[candidate]
    raise UserError(
        f"sparc3 cannot tell which label of '{name}' means toxic: it has "
        f"{', '.join(map(str, config.id2label.values()))}; write {name}#LABEL"
    )
