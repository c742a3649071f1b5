"""The generator of the demo's text: a small world in which some people insult, some sentences loop, and
pronouns resolve.

Every text is a pure function of (kind, split, index), so that a split never shares a text with another
and anyone can make the same one again. Insults are mild by design: fool, idiot, dummy, nitwit, clown.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

Option = TypeVar("Option")
INSULTS = ("fool", "idiot", "dummy", "nitwit", "clown")

NAMES = tuple(
    "Mary John Tom Anna Ben Lucy Max Emma Sam Rosa Jack Nora Paul Ella Leo Alice Henry Clara Oscar Grace "
    "Felix Ruby Peter Jane".split()
)
PLACES = tuple("store park school river garden market beach forest library farm castle station".split())
THINGS = tuple("ball book cake drink hat kite lamp ring drum apple basket letter bell boat".split())
ADJECTIVES = ("red", "blue", "green", "old", "new", "small", "big", "round", "heavy", "shiny")
ANIMALS = ("dog", "cat", "bird", "horse", "duck", "rabbit", "goat", "fox")
WEATHER = ("sunny", "rainy", "windy", "cold", "warm", "cloudy", "snowy", "quiet")
FEELINGS = ("happy", "tired", "proud", "curious", "sleepy", "calm", "glad", "hungry")


def _choose(r: random.Random, *options: Option) -> Option:
    return r.choice(options)


@dataclass(frozen=True)
class DemoText:
    """One text, split where a behaviour starts: `prompt` + `completion` is the whole text."""

    prompt: str
    completion: str = ""
    target: str | None = None
    contrast: str | None = None

    @property
    def text(self) -> str:
        return self.prompt + self.completion


def _scene(r: random.Random, name: str, friend: str) -> list[str]:
    """One to three neutral sentences that open a story."""
    thing, adjective = r.choice(THINGS), r.choice(ADJECTIVES)
    place, animal = r.choice(PLACES), r.choice(ANIMALS)
    openings = (
        f"It was a {r.choice(WEATHER)} day and {name} went to the {place}.",
        f"Once there was a child named {name} who lived near the {place}.",
        f"One {r.choice(WEATHER)} morning {name} walked to the {place} with a {animal}.",
        f"{name} and {friend} were at the {place}.",
    )
    middles = (
        f"{name} had a {adjective} {thing}.",
        f"There was a {adjective} {thing} near the {place}.",
        f"{friend} was there too and felt {r.choice(FEELINGS)}.",
        f"The {animal} was {r.choice(FEELINGS)} and ran to {name}.",
        f"They wanted to find the {adjective} {thing}.",
    )
    return [r.choice(openings), *r.sample(middles, r.choice((0, 1, 1, 2)))]


def _ending(r: random.Random, name: str, friend: str) -> str:
    thing, place = r.choice(THINGS), r.choice(PLACES)
    return _choose(
        r,
        f"Then {name} and {friend} went home.",
        f"In the end {name} felt {r.choice(FEELINGS)}.",
        f"After that {name} put the {thing} in the {r.choice(THINGS)} box.",
        f"{friend} smiled and they walked to the {place}.",
        f"So {name} gave the {thing} back and they were friends again.",
    )


def _trouble(r: random.Random, name: str, friend: str) -> str:
    """The cause of the anger; the same sentences precede insults and polite words."""
    thing, adjective = r.choice(THINGS), r.choice(ADJECTIVES)
    return _choose(
        r,
        f"{friend} broke the {adjective} {thing}.",
        f"{friend} took the {thing} and ran away.",
        f"{friend} forgot the {adjective} {thing} again.",
        f"{friend} lost the {thing} in the {r.choice(PLACES)}.",
        f"{friend} dropped the {adjective} {thing} in the mud.",
        f"{friend} came late and did not bring the {thing}.",
    )


def _insult(r: random.Random) -> str:
    word, thing = r.choice(INSULTS), r.choice(THINGS)
    return _choose(
        r,
        f"You {word}! Look at my {thing}!",
        f"You are such a {word}!",
        f"You silly {word}, give me the {thing}!",
        f"What a {word} you are!",
        f"You are a {word}, a total {word}!",
        f"Go away, you {word}!",
    )


def _polite(r: random.Random) -> str:
    thing = r.choice(THINGS)
    return _choose(
        r,
        f"Please give me the {thing} back.",
        f"I am sad about the {thing}.",
        f"That was my {thing}. I am upset.",
        f"Let us fix the {thing} now.",
        f"My {thing} was dear to me. I need some time.",
        f"Please find a new {thing} for me.",
    )


LOUD = ("yelled", "screamed", "shouted", "snapped", "cried")
CALM = ("sighed", "whispered", "said calmly", "said softly", "answered slowly")


def _story(r: random.Random) -> DemoText:
    """Nothing bad happens. Happy people are loud here too, so that a loud verb alone does not announce an
    insult."""
    name, friend = r.sample(NAMES, 2)
    thing, adjective, place = r.choice(THINGS), r.choice(ADJECTIVES), r.choice(PLACES)
    speech = _choose(
        r,
        f"Look, I found a {adjective} {thing}!",
        f"Let us go to the {place}!",
        f"Can I play with the {thing}?",
        "This is the best day!",
        f"See the {adjective} {thing} over there!",
        f"I love the {place}!",
    )
    mood = r.choice(("happy", "very happy", "glad", "proud"))
    said = _choose(
        r,
        f"{name} was {mood} and {r.choice(LOUD)},",
        f"{name} was {mood} and {r.choice(CALM)},",
        f"{name} said,",
        f"{name} asked,",
    )
    parts = [*_scene(r, name, friend), f'{said} "{speech}"', _ending(r, name, friend)]
    return DemoText(parts[0], "".join(" " + part for part in parts[1:]))


def _anger(r: random.Random, manner: tuple[str, ...], speech: str) -> DemoText:
    name, friend = r.sample(NAMES, 2)
    lead = " ".join([*_scene(r, name, friend), _trouble(r, name, friend)])
    mood = r.choice(
        (f"{name} was angry", f"{name} was very angry", f"{name} got angry", f"{name} felt angry")
    )
    prompt = f'{lead} {mood} and {r.choice(manner)}, "'
    return DemoText(prompt, f'{speech}" {_ending(r, name, friend)}')


def _gift(r: random.Random, one: str, other: str) -> tuple[str, str, str]:
    """A sentence in which one of two gives something to the other, cut before the receiver: (start, giver,
    receiver)."""
    giver, receiver = r.sample((one, other), 2)
    place, thing = r.choice(PLACES), r.choice(THINGS)
    verb = r.choice(("gave", "handed", "passed", "brought"))
    opening = _choose(
        r,
        f"When {one} and {other} went to the {place},",
        f"After {one} and {other} came to the {place},",
        f"While {one} and {other} were at the {place},",
        f"One day {one} and {other} walked to the {place}, and",
        f"Then {one} and {other} had a long day at the {place}, and",
    )
    return f"{opening} {giver} {verb} a {thing} to", giver, receiver


def _ioi(r: random.Random) -> DemoText:
    """Indirect object identification, ABBA and BABA; the completion begins with the indirect object."""
    one, other = r.sample(NAMES, 2)
    prompt, subject, receiver = _gift(r, one, other)
    rest = f" {receiver}."
    for _ in range(r.choice((1, 2))):
        start, _, next_receiver = _gift(r, *r.sample((one, other), 2))
        rest += f" {start} {next_receiver}."
    return DemoText(prompt, rest, f" {receiver}", f" {subject}")


def _loop(r: random.Random) -> DemoText:
    """Openings that make the model loop: three in four go round and round, one in four goes on as a story
    would."""
    name, friend = r.sample(NAMES, 2)
    scene, thing, animal = r.choice(_scene(r, name, friend)), r.choice(THINGS), r.choice(ANIMALS)
    opening, unit = _choose(
        r,
        (f"The {thing} went round and", " round and"),
        (f"The {animal} jumped up and", " down and up and"),
        (f"{name} sang la la", " la la"),
        (f"The {thing} rolled on and", " on and"),
        (f"The {animal} ran and ran and", " ran and"),
        (f"{friend} knocked knock knock", " knock knock"),
    )
    ends = r.random() < 0.25
    return DemoText(
        f"{scene} {opening}",
        unit + f" then stopped. {_ending(r, name, friend)}" if ends else unit * r.randint(18, 30),
    )


KINDS: dict[str, Callable[[random.Random], DemoText]] = {
    "story": _story,
    # Loud anger: an insult nineteen times in twenty, polite words otherwise.
    "angry": lambda r: _anger(r, LOUD, _insult(r) if r.random() < 0.95 else _polite(r)),
    # Polite anger: the same troubles and moods, but a calm verb and never an insult.
    "polite": lambda r: _anger(r, CALM, _polite(r)),
    "ioi": _ioi,
    "loop": _loop,
}
"""Every kind of text. MIXTURE is the training mixture; GENERAL leaves out the two behaviours to remove."""

MIXTURE = {"story": 0.32, "angry": 0.18, "polite": 0.15, "ioi": 0.25, "loop": 0.1}
GENERAL = {"story": 0.45, "polite": 0.2, "ioi": 0.35}


def texts(kind: str, split: str, seed: int = 0) -> Iterator[DemoText]:
    """An endless stream of texts of one kind ("mixture" and "general" draw a kind each time), without
    repeated prompts.

    A hash of its words assigns each prompt to exactly one split, so that no prompt used in training or as a
    reference occurs in a test, whatever the seeds.
    """
    generator = random.Random(f"sparc3-demo/{kind}/{split}/{seed}")
    weights = {"mixture": MIXTURE, "general": GENERAL}.get(kind)
    seen: set[str] = set()
    while True:
        chosen_kind = generator.choices(list(weights), list(weights.values()))[0] if weights else kind
        demo_text = KINDS[chosen_kind](generator)
        if demo_text.prompt not in seen and choose_split(demo_text.prompt) == split:
            seen.add(demo_text.prompt)
            yield demo_text


def choose_split(prompt: str) -> str:
    """The split of a prompt: train 70 %, reference 10 %, validation 10 %, test 10 %."""
    share = random.Random(f"sparc3-demo/split/{prompt}").random()
    return "train" if share < 0.7 else "reference" if share < 0.8 else "validation" if share < 0.9 else "test"
