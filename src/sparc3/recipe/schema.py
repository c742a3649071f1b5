"""Recipes: YAML files that describe a whole run. Reading one loads no model and no data."""

import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import yaml
from pydantic import Field, field_validator, model_validator

from ..attribution.activations import EXPERTISE_METHODS
from ..attribution.methods import settings_for
from ..attribution.options import AttributionOptions
from ..attribution.sums import Settings
from ..circuits.select import parse_scope
from ..errors import UserError, unknown
from ..evaluation.metrics import MetricSettings, SparsitySettings, parse_metrics
from ..safe_text import expand_home, shareable
from ..samples.batches import OF_WORDS
from ..settings import Strict, parse, short
from ..storage import fingerprint, read_text
from .sections import (
    SEQUENTIAL,
    Cards,
    Compare,
    Compress,
    Discover,
    Margins,
    ModelSection,
    Reference,
    Selection,
    Tune,
)

LARGEST = 1_000_000
"""Maximum size of a recipe, in bytes."""
KEYS = (
    *("name", "job", "model", "references", "attribution", "selection", "discover", "compress"),
    *("evaluation", "compare", "cards", "margins"),
)
"""Every key of any job's recipe, in the order in which recipes are written."""
OWN = {"correct": "selection", "discover": "discover", "compress": "compress"}
"""Job → the section that only this job has."""


class BaseRecipe(Strict):
    """Base class of all jobs' recipes. `job`: "correct" removes the units of a behaviour (`selection`),
    "discover" keeps only those of a task, "compress" prunes weights.

    Attributes:
        sets, required_sets: the reference sets that the job knows, and those that it requires.
        needed: the metric that the job requires, if any.
    """

    sets: ClassVar[tuple[str, ...]] = ()
    required_sets: ClassVar[tuple[str, ...]] = ()
    needed: ClassVar[str | None] = None

    name: str = Field(pattern=r"^\w[\w.-]*$", max_length=100)
    job: str
    model: ModelSection
    references: dict[str, Reference]
    attribution: AttributionOptions = AttributionOptions()
    evaluation: dict[str, Any] = Field(default_factory=dict)
    cards: Cards = Cards()
    margins: Margins | None = None

    @model_validator(mode="before")
    @classmethod
    def _require_keys(cls, content: Any) -> Any:
        """Refuse keys that this job does not read, before any section is checked, and say which job reads
        them."""
        if not isinstance(content, Mapping):
            return content
        for key in content:
            if key not in KEYS:
                raise unknown("key in the recipe:", key, KEYS)
        job, references = content.get("job", "correct"), content.get("references")
        for name in references if isinstance(references, Mapping) else ():
            if name not in cls.sets:
                raise unknown("reference set", name, cls.sets)
        if content.get(OWN[job]) is None:
            raise UserError(f"{OWN[job]} is missing; add it")
        for other, section in OWN.items():
            if other != job and content.get(section) is not None:
                raise ValueError(f"job {job} does not read {section}; leave it out, or say job: {other}")
        if job != "correct" and "compare" in content:
            raise ValueError(f"job {job} does not read compare; its methods are {job}.methods")
        return {key: value for key, value in content.items() if value is not None or key not in OWN.values()}

    @field_validator("name")
    @classmethod
    def _require_folder_name(cls, value: str) -> str:
        """Require a name that is valid for folders everywhere: Windows reserves device names, and drops a
        final dot."""
        if re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", value, re.IGNORECASE) or value.endswith("."):
            raise ValueError("some systems do not allow this name for a folder; choose another")
        return value

    @model_validator(mode="after")
    def _require_sets(self) -> "BaseRecipe":
        missing = [name for name in self.required_sets if name not in self.references]
        if missing:
            raise ValueError(f"references needs {' and '.join(missing)}")
        if self.needed and self.needed not in self.metrics():
            raise ValueError(f"job {self.job} needs evaluation.{self.needed}")
        of_words = OF_WORDS & {
            self.attribution.target,
            *(spec.target for spec in self.references.values()),
            *(self.tune.targets if self.tune else ()),
        }
        if of_words and not self.attribution.words:
            raise ValueError(
                f"target {min(of_words)} needs attribution.words; give the words, or a file of them"
            )
        if self.attribution.words and not of_words:
            raise ValueError("attribution.words has no effect without target words or logwords; leave it out")
        return self

    def _require_scorable(self, methods: Sequence[str]) -> None:
        """Raise UserError if one of the methods cannot score the units."""
        for method in methods:
            if method != SEQUENTIAL:
                options = self.attribution.copy_with(method=method)
                settings_for(Settings.from_options(options), options.sites)

    @property
    def tune(self) -> Tune | None:
        """The search, if the recipe has one."""
        return None

    def metrics(self) -> dict[str, MetricSettings]:
        """Settings by metric."""
        return parse_metrics(self.evaluation)

    def resolve(self) -> dict[str, Any]:
        """The recipe as plain data with all defaults written out."""
        content = self.model_dump(
            mode="json", exclude_none=True, exclude={"job"} if self.job == "correct" else None
        )
        content["evaluation"] = {
            name: m.model_dump(mode="json", exclude_none=True) for name, m in self.metrics().items()
        }
        return {key: content[key] for key in KEYS if key in content}

    def to_yaml(self) -> str:
        return yaml.safe_dump(shareable(self.resolve()), sort_keys=False, allow_unicode=True, width=120)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.resolve())


class CorrectRecipe(BaseRecipe):
    """Removes the units of a behaviour."""

    sets = ("general", "undesired", "matched")
    required_sets = ("general", "undesired")

    job: Literal["correct"] = "correct"
    selection: Selection
    compare: Compare = Compare()

    @property
    def tune(self) -> Tune | None:
        return self.selection.tune

    @model_validator(mode="after")
    def _require_consistent(self) -> "CorrectRecipe":
        if "matched" not in self.references and self.selection.penalty != 1.0:
            raise ValueError(
                "selection.penalty has no effect without references.matched; give that set, or leave the "
                "penalty out"
            )
        expertise_methods = [method for method in self.compare.methods if method in EXPERTISE_METHODS]
        if expertise_methods and (self.attribution.unit, self.attribution.sites) != ("neuron", ("mlp.up",)):
            raise ValueError(
                f"compare.methods {expertise_methods[0]} acts on neurons of mlp.up; leave it out, or "
                "attribute unit neuron at sites [mlp.up]"
            )
        self._require_scopes()
        self._require_seeds()
        self.metrics()
        if self.selection.tune:
            self._require_searchable(self.selection.tune)
        return self

    def _require_scopes(self) -> None:
        """Raise if a scope does not fit the units, the contrast or the counts."""
        own_scope, groups = self.selection.scope, parse_scope(self.selection.scope)
        if self.attribution.method in (self.compare.scopes or {}):
            raise ValueError(
                f"compare.scopes {self.attribution.method} is the run's own method; its scope is "
                "selection.scope"
            )
        for key, scope in {"selection.scope": own_scope, **(self.compare.scopes or {})}.items():
            if scope in ("global", "site"):
                continue
            key = key if "." in key else f"compare.scopes.{key}"
            if self.attribution.unit != "weight":
                raise ValueError(
                    f"{key} {scope} is for weights, and attribution.unit is {self.attribution.unit}; use "
                    "global or site"
                )
            if "matched" in self.references and (
                self.selection.tune is None or self.selection.tune.contrasts != ("plain",)
            ):
                raise ValueError(
                    f"{key} {scope} takes the same number from every row, and a matched contrast has "
                    "candidates below zero alone; use global or site, or leave references.matched out"
                )
        if groups and self.compare.counts:
            raise ValueError(f"scope {own_scope} already sets the number of weights; omit compare.counts")

    def _require_seeds(self) -> None:
        """Raise where seeds are to be kept apart, and the sets do not say which belong together."""
        many = {len(spec.seeds) for spec in self.references.values()} - {1}
        if self.selection.seeds and len(many) != 1:
            raise ValueError(
                "selection.seeds apart needs a reference set with several seeds, and as many in each that "
                "has more than one; give such as references.general.seeds [0, 1, 2]"
            )

    def _require_searchable(self, tune: Tune) -> None:
        metrics = self.metrics()
        if "perplexity" not in metrics or not {"toxicity", "repetition"} & metrics.keys():
            raise ValueError(
                "selection.tune needs evaluation.perplexity for its budget, and evaluation.toxicity or "
                "repetition to lower"
            )
        if tune.max_kl is not None and "kl" not in metrics:
            raise ValueError("selection.tune.max_kl needs evaluation.kl")
        if tune.max_fluency_increase is not None and "fluency" not in metrics:
            raise ValueError("selection.tune.max_fluency_increase needs evaluation.fluency")
        asked_of = self.attribution
        if tune.damages:
            if (asked_of.unit, asked_of.sites, asked_of.neuron) != ("neuron", ("mlp.up",), "signed"):
                raise ValueError(
                    "selection.tune.damages fits strengths to signed scores of neurons of mlp.up; write "
                    "attribution.unit neuron, sites [mlp.up], neuron signed"
                )
            if "matched" in self.references or self.compare.counts:
                raise ValueError(
                    "selection.tune.damages does not read references.matched or compare.counts; omit them"
                )
        if "matched" in tune.contrasts and "matched" not in self.references:
            raise ValueError("selection.tune.contrasts: matched needs references.matched")


class DiscoverRecipe(BaseRecipe):
    """Keeps only the units of a task."""

    sets = ("task",)
    required_sets = ("task",)
    needed = "ioi"

    job: Literal["discover"]
    discover: Discover

    @model_validator(mode="after")
    def _require_consistent(self) -> "DiscoverRecipe":
        options = self.attribution
        if options.method not in self.discover.methods:
            raise ValueError(
                f"discover.methods lacks attribution.method {options.method}, which the report is about"
            )
        for method, scope in (self.discover.scopes or {}).items():
            if scope == "row" and options.unit != "weight":
                raise ValueError(
                    f"discover.scopes.{method} row is for weights, and attribution.unit is {options.unit}; "
                    "use global or site"
                )
        if self.discover.ablation == "mean":
            self._require_means()
        self._require_scorable(self.discover.methods)
        return self

    def _require_means(self) -> None:
        """Raise if the units have no output whose mean could be taken, or if a metric does not read whole
        texts only."""
        options, others = self.attribution, [name for name in self.metrics() if name != "ioi"]
        if (options.unit, options.sites) not in (("head", ("attn.o",)), ("neuron", ("mlp.up",))):
            raise ValueError(
                "discover.ablation mean is for heads of attn.o and neurons of mlp.up, not for "
                f"{options.unit}s of {', '.join(options.sites)}; use zero"
            )
        if others:
            raise ValueError(
                f"discover.ablation mean is measured by evaluation.ioi alone; leave {others[0]} out, or use "
                "zero"
            )


class CompressRecipe(BaseRecipe):
    """Prunes weights."""

    sets = ("general",)
    required_sets = ("general",)
    needed = "sparsity"

    job: Literal["compress"]
    compress: Compress

    @model_validator(mode="after")
    def _require_consistent(self) -> "CompressRecipe":
        options = self.attribution
        if options.unit != "weight":
            raise ValueError(
                f"job compress prunes weights; write attribution.unit weight for '{options.unit}'"
            )
        if max(self.compress.samples, default=0) > self.references["general"].count:
            raise ValueError(
                f"compress.samples asks for {max(self.compress.samples)} samples, and "
                "references.general.count is less; raise it"
            )
        self._require_scorable(self.compress.methods)
        return self

    def metrics(self) -> dict[str, MetricSettings]:
        """Settings by metric; zeros are counted at the pruned sites, unless the recipe names others."""
        metrics = parse_metrics(self.evaluation)
        sparsity = metrics.get("sparsity")
        if isinstance(sparsity, SparsitySettings) and not sparsity.sites:
            metrics["sparsity"] = sparsity.model_copy(update={"sites": self.attribution.sites})
        return metrics


JOBS: dict[str, type[BaseRecipe]] = {
    "correct": CorrectRecipe,
    "discover": DiscoverRecipe,
    "compress": CompressRecipe,
}
"""Job → the class of its recipes; without a job, a recipe is "correct"."""
Recipe = CorrectRecipe | DiscoverRecipe | CompressRecipe


def _parse_recipe(content: Mapping[str, Any]) -> Recipe:
    job = content.get("job", "correct")
    if not isinstance(job, str) or job not in JOBS:
        raise unknown("job", job, JOBS)
    return cast(Recipe, parse(JOBS[job], content, ""))


def bundled_recipes() -> dict[str, str]:
    """The bundled recipes: name → first comment line."""
    folder = resources.files("sparc3.recipe") / "bundled"
    texts = {
        entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    }
    return {name: text.splitlines()[0].lstrip("# ") for name, text in sorted(texts.items())}


def load_recipe(
    recipe: "str | os.PathLike[str] | Mapping[str, Any] | Recipe", sets: Sequence[str] = ()
) -> Recipe:
    """A recipe by bundled name, YAML path or content, with "a.b=c" settings applied to it.

    Raises:
        UserError: an unknown recipe (with the nearest name), invalid YAML, an unknown key, or an invalid
            value.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return _parse_recipe(expand_home(apply_settings(dict(recipe), sets)))
    name = os.fspath(recipe)
    content = expand_home(apply_settings(_read(name), sets))
    try:
        return _parse_recipe(content)
    except UserError as error:
        if not _is_file(name):
            raise
        raise UserError(f"{name}: {error}") from None


def apply_settings(content: dict[str, Any], sets: Sequence[str]) -> dict[str, Any]:
    """`content` with "a.b=c" settings applied to it, whose values are read as YAML. Raises UserError for a
    setting of another form."""
    for setting in sets:
        content = _apply_setting(content, setting)
    return content


def _is_file(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml") or "/" in name


def _read(name: str) -> dict[str, Any]:
    if _is_file(name):
        text = read_text(name, LARGEST)
    elif name in (names := bundled_recipes()):
        text = (resources.files("sparc3.recipe") / "bundled" / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        raise unknown("recipe", name, names)
    return _yaml(text, name)


class _Loader(yaml.SafeLoader):
    """A loader for plain data, without repeated keys and without aliases, which could expand to more than
    fits into memory. 2:4 is text, not 124."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(
                None, None, f"the alias *{event.anchor} is not allowed; write out its value", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            keys = [key.value for key, _ in node.value]
            repeated = next((key for key in keys if keys.count(key) > 1), "of a mapping")
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {short(repeated)} appears twice", node.start_mark
            )
        return mapping

    def construct_number(self, node: yaml.ScalarNode) -> int | float | str:
        """YAML 1.1 reads 2:4 as a sexagesimal number (124); in a recipe it means two of every four."""
        text = self.construct_scalar(node)
        if ":" in text:
            return text
        return self.construct_yaml_int(node) if node.tag.endswith(":int") else self.construct_yaml_float(node)


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)


def _yaml(text: str, source: str) -> dict[str, Any]:
    try:
        content = _Loader(text).get_single_data()
    except (
        Exception
    ) as error:  # a scalar with a tag of its own can make the safe loader raise nearly anything
        mark = getattr(error, "problem_mark", None)
        line_note = f", line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{source}{line_note} is not valid YAML: "
            f"{getattr(error, 'problem', None) or 'it cannot be read'}; correct it"
        ) from None
    if not isinstance(content, dict):
        raise UserError(
            f"{source} contains no recipe; a recipe is a YAML mapping with name, model, references, …"
        )
    if bad_keys := [key for key in content if not isinstance(key, str)]:
        raise UserError(
            f"{source} has the key {short(bad_keys[0])}, which is not a name; a recipe is a YAML mapping "
            "with name, model, references, …"
        )
    return dict(content)


def _apply_setting(content: dict[str, Any], setting: str) -> dict[str, Any]:
    key, equals, value = setting.partition("=")
    if not equals or not key:
        raise UserError(f"--set {setting}: write it as a.b=value")
    path = key.split(".")
    result = dict(content)
    section = result
    for part in path[:-1]:
        child = section.get(part)
        if child is not None and not isinstance(child, dict):
            raise UserError(f"--set {setting}: {part} is not a section")
        section[part] = dict(child or {})
        section = section[part]
    section[path[-1]] = _yaml(f"value: {value}" if value.strip() else "value: null", f"--set {setting}")[
        "value"
    ]
    return result
