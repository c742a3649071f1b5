"""What a recipe says of the jobs `discover` and `compress`: the sections of the same names. The job `correct` has `selection`."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from .attribution.methods import methods, require_method
from .errors import unknown
from .schema import Strict
from .selection import parse_scope

Share = Annotated[float, Field(gt=0, lt=1)]
SEQUENTIAL = "wanda-sequential"
"""Wanda as its own code has it, which is no method of `attribute`: each layer sees the already pruned ones before it."""

DEFAULT_SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)


class Discover(Strict):
    """Keep the top units of a task, remove the rest.

    Attributes:
        methods: whose circuits are compared; the report is about attribution.method, which is one of them.
        sparsities: shares of all units that are removed.
        ranks: units are kept by "signed", the score itself (the paper's Eq. 1 and 2), by "abs", its size, or once by each; a method
            without negative scores is ranked once.
        enough: the accuracy that a circuit must keep to count as the task's.
    """

    methods: tuple[str, ...] = Field(default=("lrp", "gradient", "wanda", "activation", "random"), min_length=1)
    sparsities: tuple[Share, ...] = Field(default=DEFAULT_SPARSITIES, min_length=1)
    ranks: tuple[Literal["signed", "abs"], ...] = Field(default=("signed",), min_length=1)
    enough: float = Field(default=0.9, gt=0, le=1)

    @field_validator("methods")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for method in value:
            require_method(method)
        return value


class Compress(Strict):
    """Remove the least weights of every row.

    Attributes:
        methods: magnitude, wanda, lrp, any other that scores weights, or wanda-sequential.
        reduces: of methods with a relevance: "mean_abs", mean |R| over samples, "abs_mean", |mean R|, or both.
        scope: "row", "site", "global", or n:m, which has no fractions.
        fractions: shares of the weights that go.
        samples: numbers of reference samples to compare, each of every seed's set; methods that look at no sample are as without it.
    """

    methods: tuple[str, ...] = Field(default=("magnitude", "wanda", "lrp"), min_length=1)
    reduces: tuple[Literal["mean_abs", "abs_mean"], ...] = Field(default=("mean_abs",), min_length=1)
    scope: str = "row"
    fractions: tuple[Share, ...] = ()
    samples: tuple[Annotated[int, Field(ge=1)], ...] = ()

    @field_validator("methods")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for method in value:
            if method.partition(":")[0] not in (*methods(), SEQUENTIAL):
                raise unknown("method", method, [*methods(), SEQUENTIAL])
        return value

    @model_validator(mode="after")
    def _sized(self) -> "Compress":
        if parse_scope(self.scope):
            if self.fractions:
                raise ValueError(f"scope {self.scope} says how many weights go; leave fractions out")
        elif not self.fractions:
            raise ValueError("there are no fractions; give some, such as [0.5]")
        if self.samples and (len(self.fractions) > 1 or SEQUENTIAL in self.methods):
            raise ValueError(f"samples compares numbers of reference samples at one fraction; give one, and leave {SEQUENTIAL} out")
        if self.scope == "global" and SEQUENTIAL in self.methods:
            raise ValueError(f"{SEQUENTIAL} has no scope global, since later layers are not known yet; use row or site")
        return self
