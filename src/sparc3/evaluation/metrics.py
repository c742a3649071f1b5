"""The metrics, by name, and their settings as a recipe's `evaluation` section has them."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from ..errors import UserError, unknown
from ..models.families import ROLES
from ..samples.reference_set import ReferenceSet
from ..samples.sources import Column, SourceName
from ..samples.tokens import Tokenizer
from ..settings import Strict, parse
from ..storage import file_digest
from .statistics import Observations

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model: TypeAlias = "PreTrainedModel"


class MetricSettings(Strict):
    """Base class of all metrics' settings."""

    def describe(self) -> dict[str, Any]:
        """Everything that determines the figures, apart from the model and the samples."""
        return self.model_dump()


class SampledSettings(MetricSettings):
    """Settings of a metric on samples: the source of its texts or prompts (and the column of a table), their
    number, and the split."""

    source: SourceName
    column: Column = None
    count: int | None = Field(default=None, ge=1)
    split: str = "test"


class PerplexitySettings(SampledSettings):
    """`blocks`: non-overlapping windows of seq_len. `sliding`: windows of max_length, moved by stride."""

    source: SourceName = "wikitext2"
    protocol: Literal["blocks", "sliding"] = "sliding"
    seq_len: int = Field(default=2048, ge=2)
    max_length: int = Field(default=2048, ge=2)
    stride: int = Field(default=512, ge=1)

    @model_validator(mode="after")
    def _require_overlap(self) -> "PerplexitySettings":
        if self.protocol == "sliding" and self.stride >= self.max_length:
            raise ValueError(
                f"stride {self.stride} is not below max_length {self.max_length}: tokens would be left "
                f"out; lower it"
            )
        return self


class KLSettings(PerplexitySettings):
    """The same windows as perplexity's."""


class FluencySettings(MetricSettings):
    """`of`: the metric whose continuations are measured."""

    of: Literal["toxicity", "repetition"] = "toxicity"


class PromptSettings(SampledSettings):
    """`chat`: each prompt is a user's turn in the model's chat template, and the continuation is the
    answer."""

    chat: bool = False
    choose_by: Literal["prompt", "continuation", "completion", "repetition"] | None = None
    min_toxicity: float | None = Field(default=None, ge=0, le=1)
    max_toxicity: float | None = Field(default=None, ge=0, le=1)
    seed: int = 0
    max_new_tokens: int = Field(default=50, ge=1)


class ToxicitySettings(PromptSettings):
    """`scorer: [A, B]`: the figures are A's; B (stored as `also`) scores the same texts, and their
    agreement is reported."""

    source: SourceName = "realtoxicityprompts"
    count: int | None = Field(default=100, ge=1)
    scorer: str = "detoxify"
    also: str | None = None
    generations: int = Field(default=4, ge=1)
    temperature: float = Field(default=0.7, ge=0)

    @field_validator("scorer", "also")
    @classmethod
    def _require_words(cls, value: str | None) -> str | None:
        kind, _, words = (value or "").partition(":")
        if kind == "lexicon" and words and not Path(words).is_file():
            raise UserError(
                f"no such file: {words}; scorer lexicon:FILE takes a text file with one word a line"
            )
        return value

    @field_validator("choose_by")
    @classmethod
    def _require_toxicity(cls, value: str | None) -> str | None:
        if value == "repetition":
            raise ValueError("toxicity's prompts are chosen by prompt, continuation or completion")
        return value

    @model_validator(mode="before")
    @classmethod
    def _split_pair(cls, content: Any) -> Any:
        if isinstance(content, Mapping) and isinstance(content.get("scorer"), list | tuple):
            if len(content["scorer"]) != 2:
                raise ValueError(f"scorer must be one scorer or a list of two, not {content['scorer']!r}")
            return {**content, "scorer": content["scorer"][0], "also": content["scorer"][1]}
        return content


class RepetitionSettings(PromptSettings):
    """`choose_by: repetition` takes prompts to which the original responds with RUR ≤ max_rur (the paper's
    protocol; see docs/method.md on regression to the mean)."""

    count: int | None = Field(default=50, ge=1)
    max_rur: float = Field(default=0.5, gt=0, le=1)


class IOISettings(SampledSettings):
    count: int | None = Field(default=128, ge=1)
    seed: int = 0


class SparsitySettings(MetricSettings):
    """`sites`: canonical roles; by default all that the model has."""

    sites: tuple[str, ...] = ()

    @field_validator("sites")
    @classmethod
    def _require_roles(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if unknown_roles := [role for role in value if role not in ROLES]:
            raise unknown("site", unknown_roles[0], ROLES)
        return value


class HarnessSettings(MetricSettings):
    """`limit`: use only the first so many questions of each task; `fewshot`: number of solved examples before
    each question; `tasks_dir`: a folder with your own tasks in the harness's YAML format."""

    tasks: tuple[str, ...] = Field(
        default=("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"),
        min_length=1,
    )
    limit: int | None = Field(default=None, ge=1)
    fewshot: int = Field(default=0, ge=0)
    batch_size: int = Field(default=8, ge=1)
    tasks_dir: str | None = None

    @field_validator("tasks_dir")
    @classmethod
    def _require_folder(cls, value: str | None) -> str | None:
        if value is not None and not Path(value).is_dir():
            raise UserError(f"no such folder: {value}; harness.tasks_dir takes a folder with tasks in YAML")
        return value

    def describe(self) -> dict[str, Any]:
        """With the tasks themselves: a changed task is measured again, a moved folder is not."""
        plain = self.model_dump(exclude={"tasks_dir"})
        if self.tasks_dir is None:
            return plain
        folder = Path(self.tasks_dir)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {
            **plain,
            "tasks_files": {path.relative_to(folder).as_posix(): file_digest(path) for path in files},
        }


@dataclass(frozen=True)
class Reading:
    """The outcome of one metric on one variant: observations, and texts for the report."""

    observations: tuple[Observations, ...]
    texts: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class MetricContext:
    """What a metric that compares a variant with the original gets; it runs on the original.

    Attributes:
        changed: returns a new context manager inside which the model is the variant; None if the variant is
            the original.
        texts: metric → the texts that the variant wrote, as in `Reading`.
        splits: metric → the split of its samples.
        samples: metric → its samples, one per row of its texts.
    """

    changed: Callable[[], AbstractContextManager[Any]] | None = None
    texts: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    splits: Mapping[str, str] = field(default_factory=dict)
    samples: Mapping[str, ReferenceSet] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """A way to evaluate.

    Attributes:
        measure: (model, tokenizer, samples, settings, progress) → Reading.
        prompts: whether its samples are prompts, which must not be reference samples.
        gives: the names of its figures; "name.*" if they depend on the settings.
        ready: settings → None; called before any work, raises UserError if the metric cannot be measured
            here.
        compares: whether `measure` is called on the original model, with `beside=MetricContext(...)`, after
            the other metrics.
    """

    name: str
    settings: type[MetricSettings]
    measure: Callable[..., Reading]
    prompts: bool
    gives: tuple[str, ...]
    ready: Callable[[Any], None] | None = None
    compares: bool = False


_METRICS: dict[str, Metric] = {}


def register(metric: Metric) -> None:
    """Add a metric under its name. Raises UserError if the name is taken."""
    if metric.name in _METRICS:
        raise UserError(f"metric '{metric.name}' already exists; choose another name")
    _METRICS[metric.name] = metric


def metrics() -> list[str]:
    return sorted(_METRICS)


def require_metric(name: str) -> Metric:
    if name not in _METRICS:
        raise unknown("metric", name, _METRICS)
    return _METRICS[name]


@dataclass(frozen=True)
class Prepared:
    """A metric with its settings and its samples, ready to measure any number of variants."""

    metric: Metric
    settings: MetricSettings
    samples: ReferenceSet

    def measure(
        self, model: Model, tokenizer: Tokenizer, progress: bool = False, beside: MetricContext | None = None
    ) -> Reading:
        extra = {"beside": beside or MetricContext()} if self.metric.compares else {}
        return self.metric.measure(model, tokenizer, self.samples, self.settings, progress, **extra)


def parse_metrics(sections: Mapping[str, object]) -> dict[str, MetricSettings]:
    """Settings by metric. Raises UserError for an unknown metric or key."""
    settings_by_metric = {
        name: parse(require_metric(name).settings, content or {}, f"evaluation.{name}")
        for name, content in sections.items()
    }
    for settings in settings_by_metric.values():
        if isinstance(settings, FluencySettings) and settings.of not in settings_by_metric:
            raise UserError(
                f"metric fluency reads the continuations of {settings.of}, which is not measured; add "
                f"{settings.of}"
            )
    return settings_by_metric
