"""The options of an attribution, which `attribute`, a recipe's section `attribution`, the command line and a
plan share."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, SerializerFunctionWrapHandler, ValidationInfo, field_validator, model_serializer

from ..errors import UserError, unknown
from ..models.families import ROLES
from ..samples.batches import parse_target
from ..settings import Strict
from ..storage import read_text
from .methods import require_method

CHOICES: Mapping[str, tuple[Any, ...]] = {
    "unit": ("neuron", "head", "weight"),
    "neuron": ("abs", "signed"),
    "reduce": ("mean", "mean_abs", "abs_mean", "rms"),
    "non_finite": ("error", "skip"),
    "sums_dtype": ("float32", "float64", "bfloat16"),
    "gradient_checkpointing": (True, False, "auto", "offload"),
}
"""Option → its allowed values."""
DEVICES = ("cpu", "cuda", "mps", "xpu")


class WordsBy(Strict):
    """The words that a scorer of toxicity rates at `min_score` or more: of the tokenizer's tokens those that
    begin a word and are nothing but letters, at least three. A recipe finds them before it attributes."""

    scorer: str
    min_score: float = Field(default=0.75, gt=0, le=1)


class AttributionOptions(Strict):
    """What is scored, and how; the docstring of `attribute` explains each option."""

    method: str = "lrp"
    unit: str = "neuron"
    sites: tuple[str, ...] = Field(default=("mlp.up",), min_length=1)
    target: str = "predicted"
    neuron: str = "abs"
    reduce: str = "mean"
    batch_tokens: int | str = "auto"
    truncate: bool = False
    skip_positions: int = Field(default=0, ge=0)
    non_finite: str = "error"
    sums_dtype: str = "float32"
    sums_device: str = "cpu"
    gradient_checkpointing: bool | str = "auto"
    epsilon: float = Field(default=0.0, ge=0)
    words: tuple[Annotated[str, Field(min_length=1)] | Annotated[int, Field(ge=0)], ...] | WordsBy = ()

    @model_serializer(mode="wrap")
    def _omit_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Keep the fingerprints of options from before there were an ε and words."""
        values: dict[str, Any] = serialize(self)
        for name in ("epsilon", "words"):
            if not values.get(name, True):
                del values[name]
        return values

    @field_validator("words", mode="before")
    @classmethod
    def _read_words(cls, value: Any) -> Any:
        """The words, also out of a text file, one a line."""
        if not isinstance(value, str):
            return value
        if not (words := tuple(line for line in read_text(value).splitlines() if line.strip())):
            raise UserError(f"{value} has no word in it; write one a line, with its leading space")
        return words

    @field_validator(*CHOICES)
    @classmethod
    def _require_choice(cls, value: Any, info: ValidationInfo) -> Any:
        choices = CHOICES[info.field_name or ""]
        if value not in choices:
            raise unknown(str(info.field_name), value, map(str, choices))
        return value

    @field_validator("method")
    @classmethod
    def _require_method(cls, value: str) -> str:
        require_method(value)
        return value

    @field_validator("target")
    @classmethod
    def _require_target(cls, value: str) -> str:
        parse_target(value)
        return value

    @field_validator("sites")
    @classmethod
    def _require_roles(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for role in value:
            if role not in ROLES:
                raise unknown("site", role, ROLES)
        return value

    @field_validator("batch_tokens")
    @classmethod
    def _require_budget(cls, value: int | str) -> int | str:
        if value != "auto" and (isinstance(value, str) or value < 1):
            raise ValueError("give a positive number of tokens, or auto")
        return value

    @field_validator("sums_device")
    @classmethod
    def _require_device(cls, value: str) -> str:
        if not re.fullmatch(r"[a-z]+(:\d+)?", value) or value.partition(":")[0] not in DEVICES:
            raise unknown("sums_device", value, ("cpu", "cuda"))
        return value

    @property
    def word_list(self) -> tuple[str | int, ...]:
        """The words. Raises UserError if a recipe has yet to find them."""
        if isinstance(self.words, WordsBy):
            raise UserError("words of a scorer are for recipes; give the words themselves, or a file of them")
        return self.words

    def copy_with(self, **changes: Any) -> "AttributionOptions":
        """A copy with other values, which are not checked again."""
        return self.model_copy(update=changes)
