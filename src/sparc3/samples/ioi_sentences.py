"""Sentences for indirect object identification (Wang et al. 2022): two people are named, one of them
gives; who receives?

The source `ioi` works for any model: it uses the names, places and things that are single tokens for its
tokenizer. A hash of its words assigns each sentence to exactly one split.
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
"""Minimum numbers of words; with fewer, sentences would repeat too often."""

Row = tuple[str, str, str]
"""(prompt, indirect object, subject); the latter two are strings that are a single token after the prompt."""


def sentences(
    tokenizer: MaybeTokenizer, split: str, seed: int, taken: frozenset[str] = frozenset()
) -> Iterator[Row]:
    """ABBA and BABA sentences in random order, without repetition, until a thousand draws in a row give no
    new one.

    Raises:
        UserError: too few of the words are single tokens for the tokenizer; the message counts and names
            them.
    """
    if tokenizer is None:
        raise UserError(
            "source 'ioi' needs the model's tokenizer, because its names must be single tokens; use it in a "
            "recipe"
        )
    names, places, things = (
        _single_token_words(tokenizer, kind, words)
        for kind, words in (("names", NAMES), ("places", PLACES), ("things", THINGS))
    )
    generator = random.Random(f"sparc3-ioi/{split}/{seed}")
    seen, idle = set(taken), 0
    while idle < 1000:
        first, second = generator.sample(sorted(names), 2)
        giver, receiver = generator.sample((first, second), 2)
        opening = generator.choice(OPENINGS).format(
            one=first, other=second, place=generator.choice(sorted(places))
        )
        prompt = f"{opening} {giver} gave a {generator.choice(sorted(things))} to"
        idle += 1
        if prompt not in seen and choose_split(prompt) == split:
            seen.add(prompt)
            idle = 0
            yield prompt, names[receiver], names[giver]


def _single_token_words(tokenizer: Tokenizer, kind: str, words: tuple[str, ...]) -> dict[str, str]:
    """Word → the string that adds it to a sentence as a single token; without words that need several."""
    known = {word: text for word in words if (text := find_single_token(tokenizer, word))}
    if len(known) < LEAST[kind]:
        list_of_known = f" ({', '.join(known)})" if known else ""
        raise UserError(
            f"source 'ioi' needs {LEAST[kind]} {kind} that are single tokens, and this tokenizer has "
            f"{len(known)} of {len(words)}{list_of_known}; "
            "write a JSONL of text, target and contrast for this model instead"
        )
    return known


def find_single_token(tokenizer: Tokenizer, word: str) -> str | None:
    before, joined = (plain_ids(text, tokenizer) for text in ("gave it to", f"gave it to {word}"))
    return f" {word}" if joined[:-1] == before else None


def choose_split(prompt: str) -> str:
    """The split of a prompt: reference 60 %, validation 10 %, test 30 %."""
    share = random.Random(f"sparc3-ioi/split/{prompt}").random()
    return "reference" if share < 0.6 else "validation" if share < 0.7 else "test"
