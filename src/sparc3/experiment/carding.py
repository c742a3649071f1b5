"""The cards stage: cards.json for the report."""

import logging
from typing import Any

from .. import distributed
from ..cards import FORMAT, cards_of
from ..circuit import Circuit
from ..errors import UserError
from ..evaluation.statistics import measurement
from ..files import fingerprint, read_json, write_json
from ..version import __version__
from .measuring import evaluation
from .scoring import Found
from .steps import has_cards
from .work import Work

log = logging.getLogger("sparc3")
SHOWN = ("toxicity.mean", "rur.mean", "ioi.accuracy", "perplexity", "kl")


def write_cards(work: Work, found: Found) -> None:
    """Write cards.json, unless the one there was made from the same circuit, samples and settings; nothing for units without cards."""
    settings = work.recipe.cards
    if not has_cards(work.recipe):
        return
    samples = work.references["undesired"]
    made_from = fingerprint(
        {"circuit": found.circuit.fingerprint, "contrast": found.contrast.fingerprint, "samples": samples.fingerprint,
         "settings": settings.model_dump(), "version": __version__}
    )  # fmt: skip
    where = work.folder / "cards.json"
    if distributed.first(where.is_file() and _made_from(work) == made_from):
        log.info("cards.json is there")
        return

    def alone(circuit: Circuit) -> dict[str, float]:
        (module, indices), = circuit.members.items()
        made = evaluation(work, f"alone/{module}.{indices[0]}", circuit)
        figures = {o.metric: measurement(o, "alone").value for o in made.observations if o.metric in SHOWN}
        return {name: value for name, value in figures.items() if value is not None}

    cards: list[dict[str, Any]] = cards_of(
        work.model, work.tokenizer, found.circuit, contrast=found.contrast, parts=found.parts, samples=samples, most=settings.most,
        alone=settings.alone, measure=alone,
    )
    if distributed.is_main():
        write_json(where, {"format": FORMAT, "made_from": made_from, "cards": cards})
    distributed.wait()
    log.info("cards: %d, %d with the effect of the unit alone", len(cards), sum("alone" in card for card in cards))


def _made_from(work: Work) -> object:
    try:
        return read_json(work.folder / "cards.json", FORMAT).get("made_from")
    except UserError as error:
        log.warning("%s; making it again", error)
        return None
