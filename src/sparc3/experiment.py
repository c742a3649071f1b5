"""A whole run: the recipe's stages in order, each kept in the run folder and not done again when its output is there and fits."""

import fcntl
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from . import distributed
from .ablation import ablated
from .attribution import attribute
from .circuit import Circuit
from .circuits import union
from .errors import DamagedFile, UserError
from .evaluation.evaluate import evaluated_on, fingerprint_of, measure, prepare, to_results
from .evaluation.metrics import Prepared, SampledSettings, ToxicitySettings, require_metric
from .evaluation.observations import Evaluation
from .evaluation.scorers import lexicon_words
from .evaluation.statistics import pooled
from .evaluation.toxicity import completion_scores
from .files import file_digest, fingerprint, read_text, write_json, write_text
from .models import describe, load_model, require_loadable, sites_of
from .recipe import Recipe, Reference, load_recipe
from .report import write_report
from .results import Results
from .samples import ReferenceSet, Request, gather, is_path, overlap
from .scores import Scores
from .selection import candidates, contrast, excluding, random_like, select
from .version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("sparc3")
Noun = TypeVar("Noun", ReferenceSet, Scores, Circuit, Evaluation)


def run(
    recipe: "str | os.PathLike[str] | Mapping[str, Any] | Recipe",
    out: str | os.PathLike[str],
    *,
    resume: bool = True,
    progress: bool = False,
) -> Results:
    """Run a recipe into the folder `out`, and write its results and its report.

    Args:
        recipe: a bundled recipe's name, a YAML path, its content, or a Recipe.
        resume: use what an earlier, unfinished or finished run of the same recipe left in `out`.

    Raises:
        UserError: a recipe that does not fit, `out` holding another run, or one that is going on; prompts that are in a reference and an
            evaluation set.
    """
    loaded = load_recipe(recipe)
    require_loadable(loaded.model.id, dtype=loaded.model.dtype, device=loaded.model.device)
    folder = Path(out)
    distributed.start()
    with _claimed(folder, loaded, resume), _logged(folder):
        stages = _Run(loaded, folder, progress)
        results = stages.all()
    return results


@contextmanager
def _claimed(folder: Path, recipe: Recipe, resume: bool) -> Iterator[None]:
    """Hold the folder's lock, which dies with the process, after checking that the folder is this recipe's or empty."""
    if not distributed.is_main():
        distributed.wait()
        yield
        return
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115  held until the run ends
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}; choose a folder that can be written") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another run is going on in {folder}; wait for it, or choose another --out") from None
        _require_same(folder, recipe, resume)
        write_text(folder / "recipe.yaml", recipe.to_yaml())
        distributed.wait()
        yield


def _require_same(folder: Path, recipe: Recipe, resume: bool) -> None:
    known = folder / "recipe.yaml"
    others = [entry.name for entry in folder.iterdir() if entry.name not in (".lock", "log.txt") and not entry.name.endswith(".tmp")]
    if not others:
        return
    if not known.is_file():
        raise UserError(f"{folder} holds files ({others[0]}, …) that are not a run's; choose an empty --out")
    if read_text(known) != recipe.to_yaml():
        raise UserError(f"{folder} holds another run (its recipe.yaml differs from this recipe); choose another --out, or remove it")
    if not resume:
        raise UserError(f"{folder} holds this run already; leave out --no-resume to go on with it, or choose another --out")


@contextmanager
def _logged(folder: Path) -> Iterator[None]:
    """Stage lines also go to log.txt while the run lasts."""
    if not distributed.is_main():
        yield
        return
    handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    earlier = log.level
    log.setLevel(min(earlier or logging.INFO, logging.INFO))
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(earlier)
        handler.close()


@dataclass
class _Run:
    """One run while it goes on; each method is a stage."""

    recipe: Recipe
    folder: Path
    progress: bool

    def all(self) -> Results:
        began = time.perf_counter()
        recipe = self.recipe
        self.stages: dict[str, float] = {}
        with self.stage("model"):
            self.model, self.tokenizer = load_model(recipe.model.id, dtype=recipe.model.dtype, device=recipe.model.device)
            self.described = describe(self.model)
            if distributed.is_main():
                write_json(self.folder / "environment.json", environment(self.model))
            log.info("model %s: %s, fingerprint %s, %s on %s", self.described["id"], f"{self.model.num_parameters():,} parameters",
                     self.described["fingerprint"], str(self.model.dtype).removeprefix("torch."), self.model.device)  # fmt: skip
        with self.stage("samples"):
            self.references: dict[str, ReferenceSet] = {}
            for name, spec in recipe.references.items():
                self.references[name] = self.reference(name, spec)
            self.prepared = [self.prepare(name) for name in recipe.evaluation]
            self.refuse_overlap()
        with self.stage("scores"):
            circuit, scores = self.circuit()
        with self.stage("evaluation"):
            results = self.evaluate(circuit, scores)
        self.report(results)
        log.info("done in %.0f s", time.perf_counter() - began)
        return results

    def report(self, results: Results) -> None:
        if distributed.is_main():
            results.save(self.folder / "results.json")
            log.info("report: %s", write_report(self.folder))
        distributed.wait()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.stages[name] = round(time.perf_counter() - began, 2)

    def kept(
        self, path: str, made_from: str, load: Callable[[Path], Noun], is_of: Callable[[Noun], object], make: Callable[[], Noun]
    ) -> Noun:
        """The noun at `path` if it was made from the same things, else a new one, which is saved there by rank 0."""
        where = self.folder / path
        found: Noun | None = None
        if where.is_file():
            try:
                found = load(where)
            except DamagedFile as error:
                log.warning("%s; making it again", error)
        if distributed.first(found is not None and is_of(found) == made_from):
            log.info("%s is there", path)
            return found or load(where)
        made = make()
        if distributed.is_main():
            made.save(where)
        distributed.wait()
        return made

    # samples -------------------------------------------------------------------------------------------------------

    def reference(self, name: str, spec: Reference) -> ReferenceSet:
        request = Request(
            spec.source, spec.count, spec.split, spec.seq_len, spec.seeds, spec.choose_by, spec.min_toxicity, spec.max_toxicity,
            taken=self.held_by_others(name, spec.source),
        )
        settings = ToxicitySettings(scorer=spec.scorer, max_new_tokens=spec.max_new_tokens, source=spec.source)
        return self.samples(
            name, {"spec": spec.model_dump(), "taken": sorted(request.taken)}, spec.source,
            lambda: gather(request, self.tokenizer, completion_scores(self.model, self.tokenizer, settings)),
        )

    def held_by_others(self, name: str, source: str) -> frozenset[str]:
        """Prompts that sets gathered earlier took from the same source; of two sets of one source, the later gets what is left."""
        earlier = [found for other, found in self.references.items() if other != name and self.recipe.references[other].source == source]
        return frozenset(sample.text for found in earlier for sample in found if sample.text)

    def samples(self, name: str, asked: dict[str, Any], source: str, make: Callable[[], ReferenceSet]) -> ReferenceSet:
        digest = file_digest(source) if is_path(source) else None
        made_from = fingerprint({**asked, "file": digest, "model": self.described["fingerprint"], "version": __version__})
        path = f"samples/{name}.jsonl"
        found = self.kept(path, made_from, ReferenceSet.load, lambda s: s.source.get("made_from"), lambda: _marked(make(), made_from))
        log.info("samples %s: %d from %s", name, len(found), Path(source).name)
        return found

    def prepare(self, name: str) -> Prepared:
        settings = self.recipe.metrics()[name]
        if not isinstance(settings, SampledSettings):
            return prepare(name, settings, self.model, self.tokenizer)
        taken: dict[str, frozenset[str]] = {}
        for reference, spec in self.recipe.references.items():
            held = frozenset(s.text for s in self.references[reference] if s.text)
            taken[spec.source] = taken.get(spec.source, frozenset()) | held
        asked = {"metric": name, "settings": settings.model_dump(), "taken": sorted(taken.get(settings.source, ()))}
        samples = self.samples(
            f"evaluation-{name}", asked, settings.source, lambda: prepare(name, settings, self.model, self.tokenizer, taken).samples
        )
        return Prepared(require_metric(name), settings, samples)

    def refuse_overlap(self) -> None:
        for prepared in (p for p in self.prepared if p.metric.prompts):
            for name, reference in self.references.items():
                if same := overlap(reference, prepared.samples):
                    raise UserError(
                        f"{len(same)} prompts of evaluation.{prepared.metric.name} are also in references.{name}; an effect must be shown on prompts "
                        "that were not used to find the circuit: give another file, or a split or choose_by that keeps them apart"
                    )

    # scores and circuit --------------------------------------------------------------------------------------------

    def scores(self, name: str, method: str, before: Circuit | None = None, place: str = "") -> Scores:
        """Scores of one reference set by one method, on the model without the circuit `before`."""
        settings = self.recipe.attribution
        target = self.recipe.references[name].target or settings.target
        asked = {**settings.model_dump(exclude={"batch_tokens", "method", "target"}), "method": method, "target": target}
        made_from = fingerprint(
            {**asked, "samples": self.references[name].fingerprint, "model": self.described["fingerprint"],
             "without": before.fingerprint if before else None, "version": __version__}
        )

        def make() -> Scores:
            began = time.perf_counter()
            with ablated(self.model, before or Circuit(settings.unit, {})):
                made = attribute(
                    self.model, self.references[name], tokenizer=self.tokenizer, **asked, batch_tokens=settings.batch_tokens, progress=self.progress
                )
            took = time.perf_counter() - began
            seen = made.provenance
            log.info("scores %s, %s: %d samples, %d tokens, %.3f s a sample, %d skipped", method, name, seen["samples"], seen["tokens"],
                     took / max(1, len(self.references[name])), len(seen["skipped"]))  # fmt: skip
            return Scores(dict(made), {**made.provenance, "made_from": made_from, "seconds": round(took, 3)})

        path = f"scores/{place}{'' if method == settings.method else method + '.'}{name}.safetensors"
        return self.kept(path, made_from, Scores.load, lambda s: s.provenance.get("made_from"), make)

    def contrasted(self, method: str, before: Circuit | None = None, place: str = "") -> Scores:
        sets = {name: self.scores(name, method, before, place) for name in self.references}
        # Wanda's scores grow with the number of tokens, so that two sets compare only after scaling.
        normalize = "l1" if method == "wanda" else self.recipe.selection.normalize
        made = contrast(sets["general"], sets["undesired"], matched=sets.get("matched"), penalty=self.recipe.selection.penalty, normalize=normalize)
        return excluding(made, before) if before else made

    def circuit(self) -> tuple[Circuit, Scores]:
        """The circuit to remove, found in as many rounds as the recipe says, and the contrast of the first round."""
        chosen = self.recipe.selection
        method = self.recipe.attribution.method
        contrast_scores = first = self.contrasted(method)
        found = Circuit(self.recipe.attribution.unit, {}, self.described)
        for turn in range(chosen.rounds):
            if turn:
                contrast_scores = self.contrasted(method, found, f"round{turn + 1}.")
            if chosen.count is not None:
                now = chosen.count * (turn + 1) // chosen.rounds - chosen.count * turn // chosen.rounds
                part = select(contrast_scores, count=now, scope=chosen.scope)
            else:
                part = select(contrast_scores, fraction=chosen.fraction, scope=chosen.scope)
            # Later rounds see the model without the earlier units, but the whole belongs to the model as it was.
            found = replace(union(found, replace(part, model=self.described)), provenance=part.provenance)
        made_from = fingerprint({"selection": chosen.model_dump(), "scores": first.fingerprint, "units": found.fingerprint})
        found = replace(found, model=self.described, provenance={**found.provenance, "made_from": made_from})
        if distributed.is_main():
            first.save(self.folder / "scores/contrast.safetensors")
            found.save(self.folder / f"circuit{found.suffix}")
        log.info("circuit: %d of %d %ss in %d sites", len(found), first.units, found.unit, sum(1 for n in found.counts.values() if n))
        return found, first

    # evaluation ----------------------------------------------------------------------------------------------------

    def variants(self, circuit: Circuit, scores: Scores) -> Iterator[tuple[str, list[Circuit]]]:
        """Every variant with the circuits that make it: one, or several draws whose figures are pooled."""
        compare, method = self.recipe.compare, self.recipe.attribution.method
        sizes = {name: tensor.numel() for name, tensor in scores.items()}
        yield "original", [Circuit(circuit.unit, {}, self.described)]
        yield "ablated", [circuit]
        counts = {count: select(scores, count=count) for count in compare.counts if self.enough(scores, count, method)}
        if self.recipe.selection.count is not None:
            counts[len(circuit)] = circuit
        for count, chosen in sorted(counts.items()):
            yield f"{method}@{count}", [chosen]
        for other in (m for m in compare.methods if m != "random"):
            theirs = self.contrasted(other)
            for count in compare.counts:
                if self.enough(theirs, count, other):
                    yield f"{other}@{count}", [select(theirs, count=count)]
        random_counts = counts if "random" in compare.methods else {len(circuit): circuit}
        for count, chosen in sorted(random_counts.items()):
            if compare.random_draws:
                yield f"random@{count}", [random_like(chosen, sizes, seed) for seed in range(compare.random_draws)]

    def enough(self, scores: Scores, count: int, method: str) -> bool:
        there = candidates(scores)
        if count > there:
            self.warnings.append(f"{method}@{count} was left out: the contrast has {there} candidates")
            log.warning(self.warnings[-1])
        return count <= there

    def evaluate(self, circuit: Circuit, scores: Scores) -> Results:
        self.warnings: list[str] = []
        known: dict[str, Evaluation] = {}
        evaluations = []
        for variant, circuits in self.variants(circuit, scores):
            draws = []
            for number, one in enumerate(circuits):
                name = variant if len(circuits) == 1 else f"{variant}.{number}"
                if one.fingerprint not in known:
                    known[one.fingerprint] = self.evaluation(name, one)
                draws.append(replace(known[one.fingerprint], variant=variant))
            evaluations.append(draws[0] if len(draws) == 1 else _pooled(draws))
        provenance = {
            "recipe": self.recipe.name,
            "made_from": self.recipe.fingerprint,
            "model": self.described,
            "circuit": circuit.fingerprint,
            "count": len(circuit),
            "sizes": {name: tensor.numel() for name, tensor in scores.items()},
            **evaluated_on(self.prepared),
            "lexicon": self.lexicon(),
            "checks": self.checks(scores, evaluations),
            "stages": [{"name": name, "seconds": seconds} for name, seconds in self.stages.items()],
            "warnings": self.warnings + self.chosen_by_outcome(),
            "version": __version__,
        }
        results = to_results(evaluations, provenance)
        for metric in dict.fromkeys(d.metric for d in results.differences):
            d = results.difference(metric)
            before = results.find(metric).value
            change = f"{d.relative:+.1%}" if d.relative is not None else "-"
            log.info("%s: %.4g → %.4g (%s)", metric, before, results.find(metric, "ablated").value, change)
        return results

    def evaluation(self, variant: str, circuit: Circuit) -> Evaluation:
        made_from = fingerprint(
            {"model": self.described["fingerprint"], "without": circuit.fingerprint, "on": fingerprint_of(self.prepared), "version": __version__}
        )

        def make() -> Evaluation:
            with ablated(self.model, circuit):
                made = measure(self.model, self.tokenizer, self.prepared, variant, made_from, self.progress)
            log.info("evaluated %s in %.1f s", variant, made.seconds)
            return made

        return self.kept(f"evaluation/{variant}.json", made_from, Evaluation.load, lambda e: e.made_from, make)

    def lexicon(self) -> list[str]:
        words = [lexicon_words(p.settings.scorer) for p in self.prepared if isinstance(p.settings, ToxicitySettings)]
        return sorted({word for some in words for word in some})

    def chosen_by_outcome(self) -> list[str]:
        return [
            f"the prompts of {p.metric.name} were chosen by this model's own completions: any change of the model moves them towards the mean; "
            "read the effect beside its null"
            for p in self.prepared if getattr(p.settings, "choose_by", None) == "completion"
        ]  # fmt: skip

    def checks(self, scores: Scores, evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
        """The short list at the end: what a careful reader would ask first."""
        expected = [site.name for site in sites_of(self.model, self.recipe.attribution.sites)]
        files = sorted(p for p in self.folder.rglob("*") if p.is_file() and not p.name.startswith("."))
        parts = [Scores.load(self.folder / "scores" / f"{name}.safetensors") for name in self.references]
        skipped = sum(len(part.provenance["skipped"]) for part in parts)
        seconds = [f"{n} {p.provenance['seconds'] / max(1, p.provenance['samples']):.3f} s" for n, p in zip(self.references, parts, strict=True)]
        failures = {e.variant: max((o.failures for o in e.observations), default=0) for e in evaluations}
        worst = max(failures, key=lambda v: failures[v])
        found = [
            ("sites attributed", f"{len(scores)} of {len(expected)}", set(scores) == set(expected)),
            ("samples with a non-finite relevance", f"{skipped} left out", skipped == 0),
            ("share of |relevance| by layer, undesired set", _shares(parts[list(self.references).index("undesired")]), None),
            ("time per sample", ", ".join(seconds), None),
            ("failed measurements", f"{failures[worst]} at most ({worst})", failures[worst] == 0),
            ("files", f"{len(files)}, {sum(p.stat().st_size for p in files) / 1e6:.1f} MB", None),
        ]
        for name, value, ok in found:
            log.info("check %s: %s%s", name, value, "" if ok is not False else "  ← look at this")
        return [{"name": name, "value": value, "ok": ok} for name, value, ok in found]


def _shares(scores: Scores) -> str:
    """Percent of Σ|relevance| in each site, sites in order."""
    sums = [float(tensor.abs().sum()) for tensor in scores.values()]
    total = sum(sums) or 1.0
    return " ".join(f"{100 * s / total:.0f}" for s in sums) + " %"


def _pooled(draws: list[Evaluation]) -> Evaluation:
    columns = zip(*(draw.observations for draw in draws), strict=True)
    return Evaluation(draws[0].variant, tuple(pooled(list(column)) for column in columns))


def _marked(samples: ReferenceSet, made_from: str) -> ReferenceSet:
    return ReferenceSet(samples.samples, {**samples.source, "made_from": made_from})


def environment(model: "PreTrainedModel") -> dict[str, Any]:
    """What the run ran on: versions and hardware, nothing that names the user or the machine."""
    import torch
    import transformers

    return {
        "format": "sparc3.environment/1",
        "sparc3": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "ranks": distributed.world(),
    }
