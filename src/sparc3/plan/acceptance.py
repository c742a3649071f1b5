"""How many prompts the model has to complete until enough of them fit: a wide range without the model, and a
narrower one after it has completed a few."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from ..evaluation.statistics import share_interval
from ..experiment.gather import score_by_model, search_aim
from ..experiment.seeds import reference_sets
from ..models.load import load_model
from ..recipe.schema import Recipe
from ..samples.reference_set import Rows
from ..samples.sources import AT_ONCE, WIDER, fits, is_path, prompts_to_complete, request_for
from .lengths import is_chosen_by_model, is_model_here

PROMPTS_IN = {"realtoxicityprompts": 99_442}
"""Source → its total number of prompts, of which the other split's 30 or 70 % are skipped."""


@dataclass(frozen=True)
class TriedPrompts:
    """The numbers of prompts that were completed, and of those that fit the set's conditions."""

    prompts: int
    fitting: int

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the share of all prompts that fit."""
        return share_interval(self.fitting, self.prompts)

    @property
    def description(self) -> str:
        low, high = self.interval
        share = f"{self.fitting / self.prompts:.1%}, 95 % interval {low:.1%} to {high:.1%}"
        return f"{self.fitting} of {self.prompts} tried here fit ({share})"


def sets_by_model(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """(name, settings) of every set chosen by the model's own texts: reference sets, metrics' prompts, and a
    search's prompts."""
    specs: list[tuple[str, Any]] = [*reference_sets(recipe), *recipe.metrics().items()]
    if recipe.job == "correct" and recipe.tune:
        name, settings = search_aim(recipe)
        specs.append((f"validation {name}", settings))
    return ((name, spec) for name, spec in specs if is_chosen_by_model(spec))


def require_tryable(recipe: Recipe, count: int) -> None:
    """Raise UserError if the model is not on this machine, it chooses no set, or `count` is less than 1."""
    if count < 1:
        raise UserError(f"--try-prompts is {count}; give at least 1")
    if not list(sets_by_model(recipe)):
        raise UserError(f"{recipe.name} has no set that the model chooses; leave --try-prompts out")
    if not is_model_here(recipe.model.id):
        raise UserError(
            f"--try-prompts runs the model, and {recipe.model.id} is not here; download it and give its "
            "folder with --set model.id=FOLDER, or leave --try-prompts out"
        )


def try_prompts(recipe: Recipe, count: int) -> dict[str, TriedPrompts]:
    """Complete the first `count` prompts of each set that the model chooses, on this machine."""
    model, tokenizer = load_model(recipe.model.id, dtype=recipe.model.dtype, device=recipe.model.device)
    tried = {}
    for name, spec in sets_by_model(recipe):
        request = request_for(spec, count=spec.count or 100)
        prompts = prompts_to_complete(request, tokenizer, count)
        completions = score_by_model(spec, model, tokenizer)(prompts)
        fitting = sum(bool(text) and fits(request, value) for text, value in completions)
        tried[name] = TriedPrompts(len(prompts), fitting)
    return tried


def prompts_read(spec: Any, tried: TriedPrompts | None = None) -> tuple[int, int]:
    """The smallest and the largest number of prompts that the model may have to complete until enough of them
    are chosen. If some were tried, they follow from the ends of the interval of the share that fits."""
    count, shares = spec.count or 100, tried.interval if tried else (0.0, 1.0)
    if spec.choose_by == "repetition":
        # The source is read in widening rounds until enough prompts fit.
        low, high = (
            next((factor for factor in WIDER if factor * share >= 1), WIDER[-1]) for share in shares[::-1]
        )
        return count * low, count * high
    total = len(Rows(spec.source, spec.column)) if is_path(spec.source) else PROMPTS_IN.get(spec.source, 0)
    limit = round(total * (0.3 if spec.split == "test" else 0.7))  # as `prompt_split` divides them
    smallest, largest = (
        math.ceil(count / share / AT_ONCE) * AT_ONCE if share else limit for share in shares[::-1]
    )
    return (min(smallest, limit), min(largest, limit)) if limit else (smallest, max(smallest, largest))
