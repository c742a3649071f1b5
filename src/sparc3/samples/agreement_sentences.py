"""Sentences for subject-verb agreement across a noun of the other number (Linzen et al. 2016).

Source `agreement`, for a tokenizer that has pairs of verbs as single tokens: "The keys near the cabinet" is
followed by " are" (target) and not by " is" (contrast). A sentence belongs to exactly one split, by a hash of
its words.
"""

import random
from collections.abc import Iterator

from ..errors import UserError
from .ioi_sentences import Row, choose_split, find_single_token
from .tokens import MaybeTokenizer

VERBS = (("is", "are"), ("was", "were"), ("has", "have"), ("does", "do"))
SUBJECTS = tuple(
    "key door book letter picture report teacher doctor farmer manager author student pilot singer window "
    "table garden machine cousin neighbor sister lawyer senator guard".split()
)
ATTRACTORS = tuple(
    "cabinet house car river school office painting road chair lamp hospital hotel officer dancer guest "
    "customer worker driver actor nurse friend uncle rival boss".split()
)
LINKS = (
    "near the",
    "behind the",
    "next to the",
    "in front of the",
    "that belongs to the",
    "that belong to the",
)
OPENINGS = ("The", "Yesterday the", "We all know that the", "After lunch the", "According to the news, the")


def sentences(
    tokenizer: MaybeTokenizer, split: str, seed: int, taken: frozenset[str] = frozenset()
) -> Iterator[Row]:
    """(prompt, verb of the subject's number, verb of the other number), singular and plural subjects in
    turn, no prompt twice, until a thousand draws in a row gave none that is new.

    Raises:
        UserError: no tokenizer, or one without a pair of verbs that are single tokens.
    """
    if tokenizer is None:
        raise UserError("source 'agreement' needs the model's tokenizer; use it in a recipe")
    pairs = [
        (singular_token, plural_token)
        for singular, plural in VERBS
        if (singular_token := find_single_token(tokenizer, singular))
        and (plural_token := find_single_token(tokenizer, plural))
    ]
    if not pairs:
        raise UserError(
            "source 'agreement' needs a pair of verbs that are single tokens, such as ' is' and ' are', and "
            "this tokenizer has none; write a JSONL of text, target and contrast for this model instead"
        )
    generator = random.Random(f"sparc3-agreement/{split}/{seed}")
    seen, idle, plural = set(taken), 0, False
    while idle < 1000:
        idle += 1
        link = generator.choice(
            [link for link in LINKS if link != f"that belong{'' if not plural else 's'} to the"]
        )
        subject, attractor = generator.choice(SUBJECTS), generator.choice(ATTRACTORS)
        prompt = f"{generator.choice(OPENINGS)} {subject}{'s' * plural} {link} {_other(attractor, plural)}"
        target, contrast = generator.choice(pairs)[:: -1 if plural else 1]
        if prompt not in seen and choose_split(prompt) == split:
            seen.add(prompt)
            idle, plural = 0, not plural
            yield prompt, target, contrast


def _other(noun: str, plural: bool) -> str:
    """The noun in the opposite number of the subject's."""
    if plural:
        return noun
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"
