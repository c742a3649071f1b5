"""Sentences for indirect object identification (Wang et al. 2022): two people are named, one gives, who
receives?

Source `ioi`, for any model: names, places and things are those that are one token for its tokenizer. A
sentence belongs to exactly one split, by a hash of its words.
"""

import random
from collections.abc import Iterator

from ..errors import UserError
from .tokens import MaybeTokenizer, Tokenizer, plain_ids

NAMES = tuple(
    "Mary John Tom James Dan Martin Amy Scott Jack Mark Kelly Paul Alan David Anna Sarah Kate Laura "
    "Peter Simon Alice Emma George Frank Jane Rose Henry Lisa Adam Michael Robert Ben".split()
)
PLACES = tuple(
    "store garden restaurant school hospital office house station park market library church".split()
)
THINGS = tuple("ring kiss bone basketball computer necklace drink snack book ball letter box".split())
OPENINGS = (
    "When {one} and {other} went to the {place},",
    "Then, {one} and {other} went to the {place}.",
    "After {one} and {other} went to the {place},",
    "While {one} and {other} were working at the {place},",
    "The {place} was quiet. {one} and {other} had a long talk there, and",
)
LEAST = {"names": 8, "places": 3, "things": 3}
"""Fewer words than these would make the same sentence again and again."""

Row = tuple[str, str, str]
"""(prompt, indirect object, subject); the latter two as the strings whose one token follows the prompt."""


def sentences(
    tokenizer: MaybeTokenizer, split: str, seed: int, taken: frozenset[str] = frozenset()
) -> Iterator[Row]:
    """ABBA and BABA sentences in turn by chance, no prompt twice, until a thousand draws in a row gave none
    that is new.

    Raises:
        UserError: the tokenizer knows too few of the words as single tokens; the message counts and names
            them.
    """
    if tokenizer is None:
        raise UserError(
            "source 'ioi' needs the model's tokenizer, whose single tokens its names must be; use it in a "
            "recipe"
        )
    names, places, things = (
        _single(tokenizer, kind, words)
        for kind, words in (("names", NAMES), ("places", PLACES), ("things", THINGS))
    )
    r = random.Random(f"sparc3-ioi/{split}/{seed}")
    seen, idle = set(taken), 0
    while idle < 1000:
        one, other = r.sample(sorted(names), 2)
        giver, receiver = r.sample((one, other), 2)
        opening = r.choice(OPENINGS).format(one=one, other=other, place=r.choice(sorted(places)))
        prompt = f"{opening} {giver} gave a {r.choice(sorted(things))} to"
        idle += 1
        if prompt not in seen and split_of(prompt) == split:
            seen.add(prompt)
            idle = 0
            yield prompt, names[receiver], names[giver]


def _single(tokenizer: Tokenizer, kind: str, words: tuple[str, ...]) -> dict[str, str]:
    """Word → the string that adds to a sentence the one token that the word has there."""
    found = {word: text for word in words if (text := find_single_token(tokenizer, word))}
    if len(found) < LEAST[kind]:
        there = f" ({', '.join(found)})" if found else ""
        raise UserError(
            f"source 'ioi' needs {LEAST[kind]} {kind} that are single tokens, and this tokenizer has "
            f"{len(found)} of {len(words)}{there}; "
            "write a JSONL of text, target and contrast for this model instead"
        )
    return found


def find_single_token(tokenizer: Tokenizer, word: str) -> str | None:
    before, whole = (plain_ids(text, tokenizer) for text in ("gave it to", f"gave it to {word}"))
    return f" {word}" if whole[:-1] == before else None


def split_of(prompt: str) -> str:
    """The split a prompt belongs to: reference 60 %, validation 10 %, test 30 %."""
    share = random.Random(f"sparc3-ioi/split/{prompt}").random()
    return "reference" if share < 0.6 else "validation" if share < 0.7 else "test"
