"""The sections of a recipe; schema.py says which of them each job has."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from ..attribution.activations import EXPERTISE_METHODS
from ..attribution.methods import methods, require_method
from ..circuits.select import parse_scope
from ..errors import unknown
from ..samples.batches import parse_target
from ..samples.sources import Column, SourceName
from ..settings import Strict, validate_with

Share = Annotated[float, Field(gt=0, lt=1)]
Scope = Literal["global", "site", "row"]
Target = Annotated[str, validate_with(parse_target)]
AnyScope = Annotated[str, validate_with(parse_scope)]
SEQUENTIAL = "wanda-sequential"
"""Wanda as in its published code, where each layer sees the already pruned layers before it. It is not a
method of `attribute`."""


def _method_or(*others: str) -> AfterValidator:
    """A validator for a method of `attribute`, or one of these others."""

    def require(method: str) -> None:
        if method.partition(":")[0] not in (*methods(), *others):
            raise unknown("method", method, [*methods(), *others])
        if method not in others:
            require_method(method)

    return validate_with(require)


DEFAULT_SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)


class Discover(Strict):
    """Keep the top units of a task, remove the rest.

    Attributes:
        methods: methods whose circuits are compared, including attribution.method, which the report is about.
        sparsities: shares of all units to remove.
        ranks: "abs" keeps units by the size of their score, "signed" by the score itself (the paper's Eq.
            1 and 2); both can be given, and the report is about the first. A method without negative
            scores is ranked once. "abs" is the default because "signed" is no better than random on
            SmolLM2-135M (docs/reproducing.md).
        enough: the accuracy that a circuit must keep to count as the task's.
        scopes: METHOD: SCOPE. "global", the default, ranks all units together; "site" and, for weights, "row"
            remove the same share of each. The paper's Figures 2 and 12 use rows for Wanda and a global
            ranking for LRP: {wanda: row}.
        ablation: "zero" (the default) sets removed units to zero. "mean" replaces the outputs of heads, or of
            neurons of mlp.up, by their means over all reference samples, as the literature does: only for the
            figures of evaluation.ioi, since such a circuit cannot be exported.
    """

    methods: tuple[Annotated[str, _method_or()], ...] = Field(
        default=("lrp", "gradient", "wanda", "activation", "random"), min_length=1
    )
    sparsities: tuple[Share, ...] = Field(default=DEFAULT_SPARSITIES, min_length=1)
    ranks: tuple[Literal["signed", "abs"], ...] = Field(default=("abs",), min_length=1)
    enough: float = Field(default=0.9, gt=0, le=1)
    scopes: dict[str, Scope] | None = None
    ablation: Literal["zero", "mean"] | None = None

    @field_validator("ablation")
    @classmethod
    def _omit_default(cls, value: str | None) -> str | None:
        """Keep the fingerprints of recipes from before there was a choice."""
        return value if value == "mean" else None

    @model_validator(mode="after")
    def _require_listed(self) -> "Discover":
        for method in self.scopes or ():
            if method not in self.methods:
                raise unknown("method in discover.scopes", method, self.methods)
        return self


class Compress(Strict):
    """Remove the lowest-scored weights of every row.

    Attributes:
        methods: magnitude, wanda, lrp, any other that scores weights, or wanda-sequential.
        reduces: for methods with a relevance: "mean_abs", mean |R| over samples, "abs_mean", |mean R|, "rms",
            the root mean square over tokens, or several.
        scope: "row", "site", "global", or n:m, which has no fractions.
        fractions: shares of the weights to remove.
        samples: numbers of reference samples to compare, taken from each seed's set; methods without samples
            ignore it.
        seeds: "apart" scores, prunes and measures with each seed's reference set alone, and reports the mean,
            its standard error and the circuits' overlap, as in the paper's Table 1; without it, the seeds'
            samples form one set.
    """

    methods: tuple[Annotated[str, _method_or(SEQUENTIAL)], ...] = Field(
        default=("magnitude", "wanda", "lrp"), min_length=1
    )
    reduces: tuple[Literal["mean_abs", "abs_mean", "rms"], ...] = Field(default=("mean_abs",), min_length=1)
    scope: AnyScope = "row"
    fractions: tuple[Share, ...] = ()
    samples: tuple[Annotated[int, Field(ge=1)], ...] = ()
    seeds: Literal["apart"] | None = None

    @model_validator(mode="after")
    def _require_size(self) -> "Compress":
        if parse_scope(self.scope):
            if self.fractions:
                raise ValueError(f"scope {self.scope} already sets the number of weights; omit fractions")
        elif not self.fractions:
            raise ValueError("fractions is empty; give some, such as [0.5]")
        if self.samples and (len(self.fractions) > 1 or SEQUENTIAL in self.methods):
            raise ValueError(
                "samples compares numbers of reference samples at one fraction; give one, and leave "
                f"{SEQUENTIAL} out"
            )
        if self.samples and self.seeds:
            raise ValueError("samples keeps the seeds apart already; leave seeds out")
        if self.scope == "global" and SEQUENTIAL in self.methods:
            raise ValueError(
                f"{SEQUENTIAL} prunes one layer at a time, so it has no scope global; use row or site"
            )
        return self


class ModelSection(Strict):
    id: str
    dtype: str = "auto"
    device: str = "auto"


class Reference(Strict):
    """One reference set.

    Attributes:
        target: overrides attribution.target for this set.
        column: the column of a table with the texts, if it is not called text or prompt.
        chat: each prompt is a user's turn in the model's chat template, and its completion is the answer.
        answer: the answer of a preference set that is the completion.
    """

    source: SourceName
    count: int = Field(ge=1)
    seq_len: int | None = Field(default=None, ge=2)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    split: str = "reference"
    choose_by: Literal["prompt", "continuation", "completion", "repetition"] | None = None
    min_toxicity: float | None = Field(default=None, ge=0, le=1)
    max_toxicity: float | None = Field(default=None, ge=0, le=1)
    max_rur: float = Field(default=0.5, gt=0, le=1)
    scorer: str = "detoxify"
    max_new_tokens: int = Field(default=50, ge=1)
    target: Target | None = None
    column: Column = None
    chat: bool = False
    answer: Literal["chosen", "rejected"] = "chosen"


class Tune(Strict):
    """A search on validation prompts: every combination of the lists is tried, and the best within the budget
    becomes the circuit.

    Attributes:
        max_perplexity_increase: the budget: the largest relative increase of validation perplexity; 0.01 is 1
            %.
        max_kl: the largest divergence from the original, in nats per token; needs evaluation.kl.
        max_fluency_increase: the largest relative increase of the fluency (the original's perplexity) of what
            a candidate writes after validation prompts; by default the verdict's margin (margins.fluency, or
            0.5). Applies if evaluation has fluency, which it needs if given.
        counts: numbers of units.
        targets: replace attribution.target; for a target `completion`, sets without completions use `next`.
        neurons: "abs", "signed", or both.
        contrasts: "plain", "matched", or both; by default all that the reference sets allow.
        penalties: penalties of the matched contrast.
        normalize: null, "l1", or both.
        rounds: numbers of rounds, as in selection.rounds; a candidate attributes again in each round.
        strengths: the share of each unit to remove, as in selection.strength: 1 sets it to zero, 0.5
            halves it.
        damages: fit a strength for each neuron instead, at each of these damages to general text, in nats per
            token (docs/method.md, 8).
        repairs: with damages, how much of the step that lowers the loss of general text the strengths also
            take, from 0 to 1.
        prompts: number of validation prompts; by default as many as test prompts.
        texts: number of validation texts for perplexity; by default as many as in the test.
        text_source: their source, if the perplexity source has no validation split.
    """

    max_perplexity_increase: float = Field(default=0.01, ge=0)
    max_kl: float | None = Field(default=None, ge=0)
    max_fluency_increase: float | None = Field(default=None, ge=0)
    counts: tuple[Annotated[int, Field(ge=1)], ...] = ()
    targets: tuple[Target, ...] = ()
    neurons: tuple[Literal["abs", "signed"], ...] = ()
    contrasts: tuple[Literal["plain", "matched"], ...] = ()
    penalties: tuple[Annotated[float, Field(ge=0)], ...] = Field(default=(1.0,), min_length=1)
    normalize: tuple[Literal["l1"] | None, ...] = Field(default=(None,), min_length=1)
    rounds: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1,), min_length=1)
    strengths: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(default=(1.0,), min_length=1)
    damages: tuple[Annotated[float, Field(gt=0)], ...] = ()
    repairs: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(default=(0.0,), min_length=1)
    prompts: int | None = Field(default=None, ge=1)
    texts: int | None = Field(default=None, ge=1)
    text_source: SourceName | None = None

    @model_serializer(mode="wrap")
    def _without_later_settings(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As before there were damages and repairs, where there are none: runs of that time go on."""
        values: dict[str, Any] = plain(self)
        if not values.get("damages", True):
            del values["damages"]
        if list(values.get("repairs", ())) == [0.0]:  # a tuple, or in JSON a list
            del values["repairs"]
        return values


class Selection(Strict):
    """How many units to remove (unless the scope n:m says so), and by which contrast.

    `rounds`: select a share, ablate it, attribute again, and so on. `tune`: search for these settings
        instead.
    `strength`: the share of each unit to remove: 1 sets it to zero, 0.5 halves it.
    `protect`: leave out single neurons whose removal breaks the model, and list them.
    `seeds`: "apart" finds and measures a circuit with each seed's reference sets alone (a set with one seed
        is shared), and reports the mean of the figures, its standard error and the circuits' overlap; without
        it, the seeds' samples form one set.
    """

    count: int | None = Field(default=None, ge=0)
    fraction: float | None = Field(default=None, ge=0, lt=1)
    scope: AnyScope = "global"
    normalize: Literal["l1"] | None = None
    penalty: float = Field(default=1.0, ge=0)
    rounds: int = Field(default=1, ge=1)
    strength: float = Field(default=1.0, gt=0, le=1)
    protect: bool = True
    tune: Tune | None = None
    seeds: Literal["apart"] | None = None

    @model_validator(mode="after")
    def _require_size(self) -> "Selection":
        if self.tune is not None:
            self._require_search(self.tune)
        elif parse_scope(self.scope):
            if self.count is not None or self.fraction is not None:
                raise ValueError(
                    f"scope {self.scope} already sets the number of weights; omit count and fraction"
                )
        elif (self.count is None) == (self.fraction is None):
            raise ValueError(
                "selection needs either count or fraction; give one of them, or tune to search for a count"
            )
        if self.rounds > 1 and (self.count is None or self.scope != "global"):
            raise ValueError("rounds needs a count and scope global")
        return self

    def _require_search(self, tune: Tune) -> None:
        if self.fraction is not None or self.rounds > 1:
            raise ValueError("tune tries counts and tune.rounds; leave fraction and rounds out")
        if self.seeds:
            raise ValueError("tune chooses one circuit by all samples; leave seeds out")
        if max(tune.rounds) > 1 and self.scope != "global":
            raise ValueError("tune.rounds above 1 needs scope global")
        if parse_scope(self.scope):
            raise ValueError(
                f"tune tries counts, but scope {self.scope} already sets the number of weights; use scope "
                "global or site"
            )
        if self.penalty != 1.0 or self.normalize is not None or self.strength != 1.0:
            raise ValueError(
                "with tune, penalty, normalize and strength must be written as tune.penalties, "
                "tune.normalize and tune.strengths"
            )
        plain = Tune(counts=(1,))
        odd = ("neurons", "contrasts", "penalties", "normalize", "rounds", "strengths")
        if tune.damages and (key := next((k for k in odd if getattr(tune, k) != getattr(plain, k)), None)):
            raise ValueError(
                f"tune.damages fits a strength for each neuron, which tune.{key} does not; omit it"
            )
        if tune.damages and self.scope != "global":
            raise ValueError("tune.damages needs scope global")
        if any(tune.repairs) and not tune.damages:
            raise ValueError("tune.repairs is for fitted strengths; give tune.damages too, or omit it")
        if bool(tune.counts) == (self.count is not None):
            raise ValueError("tune needs the numbers of units to try: tune.counts, or one count")


class Compare(Strict):
    """Other methods and other counts to compare with, and the null: `random_draws` draws of as many random
    units in each layer.

    `det0` removes the neurons that best tell undesired from benign samples; `aura` damps them, and in one
    more variant all neurons that do so at all.

    Every method, including det0 and aura, uses selection.scope, and `counts` are counted in the same way as
    selection.count: units in total, per site, or per row. Variants are named by their total number of
    units. If the selection has a fraction or a scope n:m, the other methods take as many units as the
    circuit; with n:m there is no other size, so `counts` is not allowed. The null has as many units in
    each site as its circuit.

    `scopes`: METHOD: SCOPE gives a method another scope: with "site" or "row" it takes the same share of
    each, rounded down; with "global", as many units in total as the others.
    """

    methods: tuple[Annotated[str, _method_or(*EXPERTISE_METHODS)], ...] = ()
    counts: tuple[int, ...] = ()
    random_draws: int = Field(default=3, ge=0)
    scopes: dict[str, Scope] | None = None

    @model_validator(mode="after")
    def _require_listed(self) -> "Compare":
        for method in self.scopes or ():
            if method not in self.methods or method == "random":
                raise unknown("method in compare.scopes", method, [m for m in self.methods if m != "random"])
        return self


class Cards(Strict):
    """Cards of the removed neurons: their maximum number, and the number of those with the effect of
    removing that neuron alone (which needs an evaluation each)."""

    most: int = Field(default=50, ge=0)
    alone: int = Field(default=0, ge=0)


class Margins(Strict):
    """The relative increases over the original up to which a figure counts as flat in the verdict: 0.02 is
    2 %.

    Attributes:
        perplexity: of other text; by default 0.02 or a search's budget for the job correct, and no
            judgement for the job compress.
        fluency: perplexity of the changed model's texts; by default 0.5.
    """

    perplexity: float | None = Field(default=None, ge=0)
    fluency: float | None = Field(default=None, ge=0)
