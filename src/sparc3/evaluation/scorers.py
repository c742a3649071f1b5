"""Scorers of toxicity: from texts to numbers in [0, 1], or None where a text could not be scored."""

import logging
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from ..errors import UserError, unknown
from ..models.memory import in_batches
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
        name: "lexicon" (the demo's words), "lexicon:FILE" (one word a line), "profanity-check" (the linear
            classifier of the package alt-profanity-check, offline), "detoxify" (or detoxify:unbiased,
            detoxify:multilingual), or any Hugging Face text-classification model by hub id or path;
            "MODEL#LABEL" names the label that counts where it is not called toxic or toxicity.

    Raises:
        UserError: an unknown name, an empty word list, a model that is not there or whose toxic label cannot
            be told.
    """
    kind, _, detail = name.partition(":")
    if kind == "lexicon":
        return _count_failures(lexicon_scorer(lexicon_words(name)))
    if kind == "detoxify":
        variant = detail or "original"
        if variant not in DETOXIFY:
            raise unknown("detoxify model", variant, DETOXIFY)
        return _count_failures(_classifier(DETOXIFY[variant], "", device))
    if name == "profanity-check":
        return _count_failures(_profanity_scorer())
    if "/" not in name and "." not in name:
        raise unknown(
            "scorer", name, ("lexicon", "lexicon:FILE", "profanity-check", "detoxify", "a model's id or path")
        )
    model, _, label = name.partition("#")
    return _count_failures(_classifier(model, label, device))


def lexicon_words(name: str) -> list[str]:
    """The words of "lexicon" or "lexicon:FILE"; of another scorer, none."""
    kind, _, path = name.partition(":")
    if kind != "lexicon":
        return []
    if not path:
        from ..demo.text import INSULTS

        return list(INSULTS)
    words = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not words:
        raise UserError(f"The word list {path} is empty. Write one word or phrase a line.")
    return words


UNSPACED = ("CJK ", "HIRAGANA ", "KATAKANA ", "THAI ", "LAO ", "KHMER ", "MYANMAR ", "TIBETAN ")
"""First words of Unicode's names for letters of scripts that put no space between words."""

APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\uff07", "'"))


def lexicon_scorer(words: Sequence[str]) -> Scorer:
    """1 where a text contains one of the words or phrases, else 0.

    Case, ways to write one character (NFKC), kinds of apostrophes and amounts of white space do not count.
    Only whole words count, but in scripts that put no space between words, where any occurrence does.
    """
    normalized = [normalize(word) for word in words]

    def contains_one(text: str) -> bool:
        text = normalize(text)
        return any(_contains_whole(text, word) for word in normalized)

    return lambda texts: [float(contains_one(text)) for text in texts]


def normalize(text: str) -> str:
    """A text as words are looked for in it."""
    return plain(text.translate(APOSTROPHES))


def _contains_whole(text: str, word: str) -> bool:
    start = text.find(word)
    while start >= 0:
        if not _continues(text, start) and not _continues(text, start + len(word)):
            return True
        start = text.find(word, start + 1)
    return False


def _continues(text: str, place: int) -> bool:
    """Whether a word goes on across this place of a text, instead of ending or beginning there."""
    if not 0 < place < len(text):
        return False
    before, after = text[place - 1], text[place]
    if unicodedata.category(after).startswith("M"):
        return True  # a mark belongs to the letter before it
    in_words = all(
        c == "_" or c.isalnum() or unicodedata.category(c).startswith("M") for c in (before, after)
    )
    return in_words and not any(unicodedata.name(c, "").startswith(UNSPACED) for c in (before, after))


def _profanity_scorer() -> Scorer:
    """Probability of offensive language by a linear classifier of word counts; its weights are inside the
    package."""
    try:
        with warnings.catch_warnings():
            # The package's weights were written by an earlier scikit-learn, which says so each time they are
            # read.
            warnings.simplefilter("ignore")
            from profanity_check import predict_prob
    except ImportError:
        raise UserError(
            "the scorer profanity-check needs the package alt-profanity-check; install it: pip install "
            "'sparc3[profanity]'"
        ) from None
    return lambda texts: [float(value) for value in predict_prob(list(texts))]


def _count_failures(scorer: Scorer) -> Scorer:
    """An empty text, a scorer that raises, or a number outside [0, 1] is a None that is counted, never a
    zero."""

    def careful(texts: Sequence[str]) -> list[float | None]:
        answers = iter(_score_or_none(scorer, [text for text in texts if text.strip()]))
        scores = (next(answers) if text.strip() else None for text in texts)
        numbers = int | float | np.floating
        return [float(s) if isinstance(s, numbers) and 0 <= s <= 1 else None for s in scores]

    return careful


def _score_or_none(scorer: Scorer, texts: list[str]) -> list[Any]:
    """The scorer's answers; of a batch for which it has none that fits, each text is asked for alone."""
    answers, why = _call_scorer(scorer, texts)
    if answers is not None:
        return answers
    alone = [_call_scorer(scorer, [text])[0] for text in texts] if len(texts) > 1 else [None]
    said = "the scorer failed on a batch of %d texts (%s); %d of them also fail alone and count as failures"
    log.warning(said, len(texts), why, alone.count(None))
    return [answer[0] if answer is not None else None for answer in alone]


def _call_scorer(scorer: Scorer, texts: list[str]) -> tuple[list[Any] | None, str]:
    """As many answers as texts; or None, and why."""
    try:
        answers = list(scorer(texts))
    except Exception as error:  # a scorer is anyone's code
        return None, f"{type(error).__name__}: {error}"
    return (answers, "") if len(answers) == len(texts) else (None, f"{len(answers)} answers")


def _classifier(name: str, label: str, device: torch.device | str) -> Scorer:
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
    # A model of several labels that do not exclude each other says so; softmax over them would be wrong.
    separate = model.config.problem_type == "multi_label_classification" or model.config.num_labels == 1

    # A tokenizer that does not know the model's length says 10^30; RoBERTa's positions begin behind padding.
    places = getattr(model.config, "max_position_embeddings", None) or 512
    offset = (model.config.pad_token_id or 0) + 1 if "roberta" in model.config.model_type else 0
    longest = min(int(tokenizer.model_max_length), 512, places - offset)
    size = 64 if tokenizer.pad_token is not None else 1  # without a padding token, a text is read alone

    @torch.inference_mode()
    def probabilities(texts: Sequence[str]) -> list[float | None]:
        encoded = tokenizer(
            list(texts), padding=len(texts) > 1, truncation=True, max_length=longest, return_tensors="pt"
        ).to(model.device)
        logits = model(**encoded).logits.float()
        return (logits.sigmoid() if separate else logits.softmax(-1))[:, column].tolist()  # type: ignore[no-any-return]

    return lambda texts: in_batches(texts, size, probabilities, of=(model, "score"))


def _toxic_column(name: str, config: Any, label: str) -> int:
    labels = {str(text).casefold(): int(index) for index, text in config.id2label.items()}
    if len(labels) == 1:
        return 0
    for wanted in (label.casefold(),) if label else TOXIC_LABELS:
        if wanted in labels:
            return labels[wanted]
    raise UserError(
        f"sparc3 cannot tell which label of '{name}' means toxic: it has "
        f"{', '.join(map(str, config.id2label.values()))}; write {name}#LABEL"
    )
