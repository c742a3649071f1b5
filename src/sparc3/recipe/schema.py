"""A recipe: a YAML file that describes a whole run. Reading it loads no model and no data."""

import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationInfo, field_validator, model_validator

from ..attribution.activations import METHODS as EXPERTISE
from ..attribution.methods import methods, require_method, settings_for
from ..attribution.sums import Settings
from ..circuits.select import parse_scope
from ..errors import UserError, unknown
from ..evaluation.metrics import MetricSettings, SparsitySettings, parse_metrics
from ..models.families import ROLES
from ..safe_text import at_home, shareable
from ..samples.batches import parse_target
from ..samples.sources import require_source
from ..settings import Strict, parse, short
from ..storage import fingerprint, read_text

REFERENCES = ("general", "undesired", "matched")
LARGEST = 1_000_000
"""Longest recipe that is read, in bytes."""
JOBS = {"correct": REFERENCES, "discover": ("task",), "compress": ("general",)}
"""Job → the reference sets it knows."""


# What a recipe says of the jobs `discover` and `compress`: the sections of the same names. The job `correct`
# has `selection`.


Share = Annotated[float, Field(gt=0, lt=1)]
SEQUENTIAL = "wanda-sequential"
"""Wanda as its own code has it, which is no method of `attribute`: each layer sees the already pruned ones
before it."""

DEFAULT_SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)


class Discover(Strict):
    """Keep the top units of a task, remove the rest.

    Attributes:
        methods: whose circuits are compared; the report is about attribution.method, which is one of them.
        sparsities: shares of all units that are removed.
        ranks: units are kept by "abs", the size of their score, by "signed", the score itself (the paper's
            Eq. 1 and 2), or once by each; the first is the one that the report is about. A method without
            negative scores is ranked once. "abs" is the default because "signed" is no better than random on
            SmolLM2-135M (docs/reproducing.md).
        enough: the accuracy that a circuit must keep to count as the task's.
    """

    methods: tuple[str, ...] = Field(
        default=("lrp", "gradient", "wanda", "activation", "random"), min_length=1
    )
    sparsities: tuple[Share, ...] = Field(default=DEFAULT_SPARSITIES, min_length=1)
    ranks: tuple[Literal["signed", "abs"], ...] = Field(default=("abs",), min_length=1)
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
        reduces: of methods with a relevance: "mean_abs", mean |R| over samples, "abs_mean", |mean R|, or
            both.
        scope: "row", "site", "global", or n:m, which has no fractions.
        fractions: shares of the weights that go.
        samples: numbers of reference samples to compare, each of every seed's set; methods that look at no
            sample are as without it.
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
    def _require_size(self) -> "Compress":
        if parse_scope(self.scope):
            if self.fractions:
                raise ValueError(f"scope {self.scope} says how many weights go; leave fractions out")
        elif not self.fractions:
            raise ValueError("there are no fractions; give some, such as [0.5]")
        if self.samples and (len(self.fractions) > 1 or SEQUENTIAL in self.methods):
            raise ValueError(
                "samples compares numbers of reference samples at one fraction; give one, and leave "
                f"{SEQUENTIAL} out"
            )
        if self.scope == "global" and SEQUENTIAL in self.methods:
            raise ValueError(
                f"{SEQUENTIAL} has no scope global, since later layers are not known yet; use row or site"
            )
        return self


class ModelSection(Strict):
    id: str
    dtype: str = "auto"
    device: str = "auto"


class Reference(Strict):
    """One reference set. `seed` is short for `seeds` of one; `target` overrides attribution.target for this
    set."""

    source: str
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
    target: str | None = None

    @field_validator("source")
    @classmethod
    def _require_source(cls, value: str) -> str:
        require_source(value)
        return value

    @field_validator("target")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None:
            parse_target(value)
        return value


class Attribution(Strict):
    method: str = "lrp"
    unit: Literal["neuron", "head", "weight"] = "neuron"
    sites: tuple[str, ...] = Field(default=("mlp.up",), min_length=1)
    target: str = "predicted"
    neuron: Literal["abs", "signed"] = "abs"
    reduce: Literal["mean", "mean_abs", "abs_mean"] = "mean"
    batch_tokens: int | Literal["auto"] = "auto"
    truncate: bool = False
    skip_positions: int = Field(default=0, ge=0)
    non_finite: Literal["error", "skip"] = "error"
    sums_dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    sums_device: str = "cpu"
    gradient_checkpointing: bool | Literal["auto", "offload"] = "auto"

    @field_validator("method", "target", "sites", "sums_device")
    @classmethod
    def _known(cls, value: Any, info: ValidationInfo) -> Any:
        if info.field_name == "method":
            require_method(value)
        elif info.field_name == "sums_device":
            if not re.fullmatch(r"[a-z]+(:\d+)?", value) or value.partition(":")[0] not in (
                "cpu",
                "cuda",
                "mps",
                "xpu",
            ):
                raise unknown("sums_device", value, ("cpu", "cuda"))
        elif info.field_name == "target":
            parse_target(value)
        else:
            for role in value:
                if role not in ROLES:
                    raise unknown("site", role, ROLES)
        return value


class Tune(Strict):
    """A search on validation prompts: every combination of the lists is tried, and the best within the budget
    is the circuit.

    Attributes:
        max_perplexity_increase: the budget: the largest relative increase of validation perplexity; 0.01 is 1
            %.
        max_kl: and of the divergence from the original, in nats a token; needs evaluation.kl.
        counts: numbers of units.
        targets: in the place of attribution.target; sets without completions take `next` where a candidate
            says `completion`.
        neurons: "abs", "signed", or both.
        contrasts: "plain", "matched", or both; all that the reference sets allow where none is given.
        penalties: of the matched contrast.
        normalize: null, "l1", or both.
        rounds: in how many rounds a circuit is found, as selection.rounds; a candidate attributes again in
            each.
        strengths: the share of each unit that is taken away, as selection.strength: 1 sets it to zero, 0.5
            halves it.
        prompts: number of validation prompts; as many as there are test prompts where it is not given.
        texts: number of validation texts for perplexity; as many as the test has where it is not given.
        text_source: where they come from, if the perplexity source has no validation split of its own.
    """

    max_perplexity_increase: float = Field(default=0.01, ge=0)
    max_kl: float | None = Field(default=None, ge=0)
    counts: tuple[Annotated[int, Field(ge=1)], ...] = ()
    targets: tuple[str, ...] = ()
    neurons: tuple[Literal["abs", "signed"], ...] = ()
    contrasts: tuple[Literal["plain", "matched"], ...] = ()
    penalties: tuple[Annotated[float, Field(ge=0)], ...] = Field(default=(1.0,), min_length=1)
    normalize: tuple[Literal["l1"] | None, ...] = Field(default=(None,), min_length=1)
    rounds: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1,), min_length=1)
    strengths: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(default=(1.0,), min_length=1)
    prompts: int | None = Field(default=None, ge=1)
    texts: int | None = Field(default=None, ge=1)
    text_source: str | None = None

    @field_validator("targets")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for target in value:
            parse_target(target)
        return value

    @field_validator("text_source")
    @classmethod
    def _require_source(cls, value: str | None) -> str | None:
        if value is not None:
            require_source(value)
        return value


class Selection(Strict):
    """How many units (a scope n:m says it itself), and by which contrast.

    `rounds`: select a share, ablate it, attribute again, and go on. `tune`: search for all that.
    `strength`: the share of each unit that is taken away: 1 sets it to zero, 0.5 halves it.
    `protect`: leave out neurons whose removal alone breaks the model, and list them.
    """

    count: int | None = Field(default=None, ge=0)
    fraction: float | None = Field(default=None, ge=0, lt=1)
    scope: str = "global"
    normalize: Literal["l1"] | None = None
    penalty: float = Field(default=1.0, ge=0)
    rounds: int = Field(default=1, ge=1)
    strength: float = Field(default=1.0, gt=0, le=1)
    protect: bool = True
    tune: Tune | None = None

    @field_validator("scope")
    @classmethod
    def _known(cls, value: str) -> str:
        parse_scope(value)
        return value

    @model_validator(mode="after")
    def _one_size(self) -> "Selection":
        if self.tune is not None:
            self._require_search(self.tune)
        elif parse_scope(self.scope):
            if self.count is not None or self.fraction is not None:
                raise ValueError(f"scope {self.scope} says how many weights go; leave count and fraction out")
        elif (self.count is None) == (self.fraction is None):
            raise ValueError(
                "count and fraction are both given, or neither; give one of them, or tune to search for a "
                "count"
            )
        if self.rounds > 1 and (self.count is None or self.scope != "global"):
            raise ValueError("rounds needs a count and scope global")
        return self

    def _require_search(self, tune: Tune) -> None:
        if self.fraction is not None or self.rounds > 1:
            raise ValueError("tune tries counts and tune.rounds; leave fraction and rounds out")
        if max(tune.rounds) > 1 and self.scope != "global":
            raise ValueError("tune.rounds above 1 needs scope global")
        if parse_scope(self.scope):
            raise ValueError(
                f"tune tries counts, and scope {self.scope} says how many weights go; use scope global or "
                "site"
            )
        if self.penalty != 1.0 or self.normalize is not None or self.strength != 1.0:
            raise ValueError(
                "with tune, penalty, normalize and strength must be written as tune.penalties, "
                "tune.normalize and tune.strengths"
            )
        if bool(tune.counts) == (self.count is not None):
            raise ValueError("tune needs the numbers of units to try: tune.counts, or one count")


class Compare(Strict):
    """Other methods at other counts, and the null: `random_draws` draws of as many random units in each
    layer.

    `det0` removes the neurons that tell undesired from benign samples best, `aura` damps them, and all that
    do at all.
    """

    methods: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()
    random_draws: int = Field(default=3, ge=0)

    @field_validator("methods")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for method in value:
            if method not in EXPERTISE:
                if method.partition(":")[0] not in methods():
                    raise unknown("method", method, [*methods(), *EXPERTISE])
                require_method(method)
        return value


class Cards(Strict):
    """Cards of the removed neurons: how many at most, and how many of them with what removing that neuron
    alone does (an evaluation each)."""

    most: int = Field(default=50, ge=0)
    alone: int = Field(default=0, ge=0)


class Recipe(Strict):
    """`job`: "correct" removes the units of a behaviour (`selection`), "discover" keeps those of a task
    alone, "compress" prunes weights."""

    name: str = Field(pattern=r"^\w[\w.-]*$", max_length=100)
    job: Literal["correct", "discover", "compress"] = "correct"
    model: ModelSection
    references: dict[str, Reference]
    attribution: Attribution = Attribution()
    selection: Selection = Selection(count=0)
    discover: Discover | None = None
    compress: Compress | None = None
    evaluation: dict[str, Any] = Field(default_factory=dict)
    compare: Compare = Compare()
    cards: Cards = Cards()

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, value: str) -> str:
        """On every system: Windows has names of devices, and drops a dot at the end."""
        if re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", value, re.IGNORECASE) or value.endswith("."):
            raise ValueError("on some systems this cannot be the name of a folder; give another name")
        return value

    @model_validator(mode="after")
    def _whole(self) -> "Recipe":
        for name in self.references:
            if name not in JOBS[self.job]:
                raise unknown("reference set", name, JOBS[self.job])
        self._sections()
        if self.job != "correct":
            self._require_job()
            return self
        missing = [name for name in ("general", "undesired") if name not in self.references]
        if missing:
            raise ValueError(f"references needs {' and '.join(missing)}")
        if "matched" not in self.references and self.selection.penalty != 1.0:
            raise ValueError(
                "selection.penalty has no effect without references.matched; give that set, or leave the "
                "penalty out"
            )
        theirs = [method for method in self.compare.methods if method in EXPERTISE]
        if theirs and (self.attribution.unit, self.attribution.sites) != ("neuron", ("mlp.up",)):
            raise ValueError(
                f"compare.methods {theirs[0]} acts on neurons of mlp.up; leave it out, or attribute unit "
                "neuron at sites [mlp.up]"
            )
        self.metrics()
        if self.selection.tune:
            self._searchable(self.selection.tune)
        return self

    def _sections(self) -> None:
        """Raise where a section is missing that the job needs, or there that it does not read."""
        given = {
            "correct": self.selection if "selection" in self.model_fields_set else None,
            "discover": self.discover,
            "compress": self.compress,
        }
        names = {"correct": "selection", "discover": "discover", "compress": "compress"}
        if given[self.job] is None:
            raise UserError(f"{names[self.job]} is missing; add it")
        for job, section in given.items():
            if job != self.job and section is not None:
                raise ValueError(
                    f"job {self.job} does not read {names[job]}; leave it out, or say job: {job}"
                )
        if self.job != "correct" and "compare" in self.model_fields_set:
            raise ValueError(f"job {self.job} does not read compare; its methods are {self.job}.methods")

    def _require_job(self) -> None:
        """Raise where a method cannot score the units, or the evaluation lacks what the job is about."""
        needed, section = (
            ("task", "ioi") if self.job == "discover" else ("general", "sparsity"),
            self.discover or self.compress,
        )
        assert section is not None
        if needed[0] not in self.references:
            raise ValueError(f"references needs {needed[0]}")
        if needed[1] not in self.metrics():
            raise ValueError(f"job {self.job} needs evaluation.{needed[1]}")
        asked = self.attribution
        if self.job == "compress" and asked.unit != "weight":
            raise ValueError(f"job compress prunes weights; write attribution.unit weight for '{asked.unit}'")
        if self.job == "discover" and asked.method not in section.methods:
            raise ValueError(
                f"discover.methods lacks attribution.method {asked.method}, which the report is about"
            )
        if self.compress and max(self.compress.samples, default=0) > self.references["general"].count:
            raise ValueError(
                f"compress.samples asks for {max(self.compress.samples)} samples, and "
                "references.general.count is less; raise it"
            )
        for method in section.methods:
            if method != SEQUENTIAL:
                settings_for(
                    Settings(method, asked.unit, asked.target, asked.neuron, asked.reduce), asked.sites
                )

    def _searchable(self, tune: Tune) -> None:
        asked = self.metrics()
        if "perplexity" not in asked or not {"toxicity", "repetition"} & asked.keys():
            raise ValueError(
                "selection.tune needs evaluation.perplexity for its budget, and evaluation.toxicity or "
                "repetition to lower"
            )
        if tune.max_kl is not None and "kl" not in asked:
            raise ValueError("selection.tune.max_kl needs evaluation.kl")
        if "matched" in tune.contrasts and "matched" not in self.references:
            raise ValueError("selection.tune.contrasts: matched needs references.matched")

    def metrics(self) -> dict[str, MetricSettings]:
        """Settings by metric; the job compress counts zeros where it prunes, unless the recipe says where."""
        found = parse_metrics(self.evaluation)
        counted = found.get("sparsity")
        if self.job == "compress" and isinstance(counted, SparsitySettings) and not counted.sites:
            found["sparsity"] = counted.model_copy(update={"sites": self.attribution.sites})
        return found

    def resolved(self) -> dict[str, Any]:
        """The recipe with every default written out, as plain data."""
        content = self.model_dump(
            mode="json",
            exclude_none=True,
            exclude={"job"} if self.job == "correct" else {"selection", "compare"},
        )
        content["evaluation"] = {
            name: m.model_dump(mode="json", exclude_none=True) for name, m in self.metrics().items()
        }
        return content

    def to_yaml(self) -> str:
        return yaml.safe_dump(shareable(self.resolved()), sort_keys=False, allow_unicode=True, width=120)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.resolved())


def bundled_recipes() -> dict[str, str]:
    """The recipes that come with sparc3: name → first comment line."""
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
    """A recipe by bundled name, YAML path or content, with "a.b=c" settings put over it.

    Raises:
        UserError: no such recipe (with the near name), not YAML, an unknown key, a value that does not fit.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return parse(Recipe, at_home(apply_settings(dict(recipe), sets)), "")
    name = os.fspath(recipe)
    content = at_home(apply_settings(_read(name), sets))
    try:
        return parse(Recipe, content, "")
    except UserError as error:
        if not _is_file(name):
            raise
        raise UserError(f"{name}: {error}") from None


def apply_settings(content: dict[str, Any], sets: Sequence[str]) -> dict[str, Any]:
    """`content` with "a.b=c" settings put over it, values read as YAML. Raises UserError for one that is not
    written so."""
    for setting in sets:
        content = _apply_setting(content, setting)
    return content


def _is_file(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml") or "/" in name


def _read(name: str) -> dict[str, Any]:
    if _is_file(name):
        text = read_text(name, LARGEST)
    elif name in (known := bundled_recipes()):
        text = (resources.files("sparc3.recipe") / "bundled" / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        raise unknown("recipe", name, known)
    return _yaml(text, name)


class _Loader(yaml.SafeLoader):
    """Plain data: no key twice; no alias, which could stand for more than fits into memory; 2:4 is text, not
    124."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(
                None,
                None,
                f"the alias *{event.anchor} is not read: write out what it stands for",
                event.start_mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        made = super().construct_mapping(node, deep)
        if len(made) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key is there twice", node.start_mark)
        return made

    def construct_number(self, node: yaml.ScalarNode) -> int | float | str:
        """YAML 1.1 counts 2:4 as two minutes and four seconds; the recipe means two of every four."""
        text = self.construct_scalar(node)
        if ":" in text:
            return text
        return self.construct_yaml_int(node) if node.tag.endswith(":int") else self.construct_yaml_float(node)


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)


def _yaml(text: str, where: str) -> dict[str, Any]:
    try:
        content = _Loader(text).get_single_data()
    except (
        Exception
    ) as error:  # a scalar with a tag of its own can make the safe loader raise nearly anything
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{where}{place} is not YAML: {getattr(error, 'problem', None) or 'it cannot be read'}; mend "
            "that place"
        ) from None
    if not isinstance(content, dict):
        raise UserError(
            f"{where} holds no recipe; a recipe is a YAML mapping with name, model, references, …"
        )
    if odd := [key for key in content if not isinstance(key, str)]:
        raise UserError(
            f"{where} has the key {short(odd[0])}, which is no name; a recipe is a YAML mapping with name, "
            "model, references, …"
        )
    return dict(content)


def _apply_setting(content: dict[str, Any], setting: str) -> dict[str, Any]:
    key, equals, value = setting.partition("=")
    if not equals or not key:
        raise UserError(f"--set {setting}: write it as a.b=value")
    path = key.split(".")
    changed = dict(content)
    inner = changed
    for part in path[:-1]:
        below = inner.get(part)
        if below is not None and not isinstance(below, dict):
            raise UserError(f"--set {setting}: {part} is not a section")
        inner[part] = dict(below or {})
        inner = inner[part]
    inner[path[-1]] = _yaml(f"value: {value}" if value.strip() else "value: null", f"--set {setting}")[
        "value"
    ]
    return changed
