"""How many prompts a model completes until enough of them fit: a wide range without the model, a narrower one
after a few prompts."""

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
from .lengths import by_model, is_model_here

PROMPTS_IN = {"realtoxicityprompts": 99_442}
"""Source → its prompts in all, of which the other split's, 30 or 70 %, are passed over."""


@dataclass(frozen=True)
class Tried:
    """So many prompts were completed, and so many of them are as the set asks for."""

    prompts: int
    fitting: int

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the share of all prompts that fit."""
        return share_interval(self.fitting, self.prompts)

    @property
    def said(self) -> str:
        low, high = self.interval
        share = f"{self.fitting / self.prompts:.1%}, 95 % interval {low:.1%} to {high:.1%}"
        return f"{self.fitting} of {self.prompts} tried here fit ({share})"


def sets_by_model(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """What is chosen by the model's own texts: reference sets, prompts of metrics, those of a search."""
    asked: list[tuple[str, Any]] = [*reference_sets(recipe), *recipe.metrics().items()]
    if recipe.job == "correct" and recipe.tune:
        name, settings = search_aim(recipe)
        asked.append((f"validation {name}", settings))
    return ((name, spec) for name, spec in asked if by_model(spec))


def require_tryable(recipe: Recipe, count: int) -> None:
    """Raise UserError where the model is not here, it chooses no set, or `count` is less than 1."""
    if count < 1:
        raise UserError(f"--try-prompts is {count}; give at least 1")
    if not list(sets_by_model(recipe)):
        raise UserError(f"{recipe.name} has no set that the model chooses; leave --try-prompts out")
    if not is_model_here(recipe.model.id):
        raise UserError(
            f"--try-prompts runs the model, and {recipe.model.id} is not here; download it and give its "
            "folder with --set model.id=FOLDER, or leave --try-prompts out"
        )


def try_prompts(recipe: Recipe, count: int) -> dict[str, Tried]:
    """Complete the first `count` prompts of each set that the model chooses, on this machine."""
    model, tokenizer = load_model(recipe.model.id, dtype=recipe.model.dtype, device=recipe.model.device)
    found = {}
    for name, spec in sets_by_model(recipe):
        request = request_for(spec, count=spec.count or 100)
        prompts = prompts_to_complete(request, tokenizer, count)
        scored = score_by_model(spec, model, tokenizer)(prompts)
        found[name] = Tried(len(prompts), sum(bool(text) and fits(request, value) for text, value in scored))
    return found


def prompts_read(spec: Any, tried: Tried | None = None) -> tuple[int, int]:
    """The fewest and the most prompts that the model completes until enough of them are chosen; where some
    were tried, by the ends of the share's interval."""
    count, shares = spec.count or 100, tried.interval if tried else (0.0, 1.0)
    if spec.choose_by == "repetition":
        low, high = (next((many for many in WIDER if many * share >= 1), WIDER[-1]) for share in shares[::-1])
        return count * low, count * high
    whole = len(Rows(spec.source, spec.column)) if is_path(spec.source) else PROMPTS_IN.get(spec.source, 0)
    most = round(whole * (0.3 if spec.split == "test" else 0.7))
    least, needed = (
        math.ceil(count / share / AT_ONCE) * AT_ONCE if share else most for share in shares[::-1]
    )
    return (min(least, most), min(needed, most)) if most else (least, max(least, needed))
