"""The options of an attribution, which `attribute`, a recipe's section `attribution`, the command line and a
plan share."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, ValidationInfo, field_validator, model_serializer

from ..errors import unknown
from ..models.families import ROLES
from ..samples.batches import parse_target
from ..settings import Strict
from .methods import require_method

CHOICES: Mapping[str, tuple[Any, ...]] = {
    "unit": ("neuron", "head", "weight"),
    "neuron": ("abs", "signed"),
    "reduce": ("mean", "mean_abs", "abs_mean", "rms"),
    "non_finite": ("error", "skip"),
    "sums_dtype": ("float32", "float64", "bfloat16"),
    "gradient_checkpointing": (True, False, "auto", "offload"),
}
"""Option → what it may be."""
DEVICES = ("cpu", "cuda", "mps", "xpu")


class AttributionOptions(Strict):
    """What is scored, and how; `attribute` says what each means."""

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

    @model_serializer(mode="wrap")
    def _without_default(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What the options' fingerprints are made of: the same as before there was an ε, where it is 0."""
        values: dict[str, Any] = plain(self)
        if values.get("epsilon") == 0:
            del values["epsilon"]
        return values

    @field_validator(*CHOICES)
    @classmethod
    def _require_choice(cls, value: Any, info: ValidationInfo) -> Any:
        known = CHOICES[info.field_name or ""]
        if value not in known:
            raise unknown(str(info.field_name), value, map(str, known))
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

    def but(self, **changed: Any) -> "AttributionOptions":
        """The same with other values, which are not checked again."""
        return self.model_copy(update=changed)
