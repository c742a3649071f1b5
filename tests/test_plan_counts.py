"""What `plan` lists against what runs do: the same evaluations and files of scores, and the tokens that go through the model at each stage."""

import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from sparc3 import load_recipe, run
from sparc3.evaluation.metrics import Prepared
from sparc3.experiment.work_list import list_work
from sparc3.plan.costs import Hardware, Shaped
from sparc3.plan.lengths import tokenizer_at_hand
from sparc3.plan.rehearsal import Rehearsal
from sparc3.plan.stages import Stages

HERE = Hardware("a test", "cpu", {2: 1e11, 4: 1e11, 8: 1e11}, 1e10, 1e-5, 1e10)
FEW = ["references.general.count=6", "evaluation.perplexity.count=4"]
TOXICITY = [
    "references.undesired.count=5",
    "evaluation.toxicity.count=3",
    "evaluation.toxicity.generations=2",
    "evaluation.toxicity.max_new_tokens=4",
]
RUNS: dict[str, list[str]] = {
    "demo": [
        *FEW,
        *TOXICITY,
        "evaluation.ioi.count=8",
        "selection.count=20",
        "compare.counts=[5, 20]",
        "compare.random_draws=2",
        "cards.alone=2",
    ],
    "demo, seeds apart": [
        *FEW,
        *TOXICITY,
        "references.general.seeds=[3, 8]",
        "references.undesired.seeds=[3, 8]",
        "evaluation.ioi.count=8",
        "attribution.neuron=signed",
        "selection={count: 60, rounds: 2, seeds: apart}",
        "compare={methods: [gradient], counts: [40], random_draws: 2}",
    ],
    "demo-tune": [
        *FEW,
        *TOXICITY,
        "references.matched.count=4",
        "evaluation.kl.count=3",
        "compare.counts=[4]",
        "compare.methods=[aura, det0, wanda, random]",
        "selection.tune.counts=[4, 8]",
        "selection.tune.prompts=2",
        "selection.tune.texts=3",
        "selection.tune.rounds=[1, 2]",
        "selection.tune.strengths=[0.5, 1.0]",
        "selection.tune.penalties=[1.0, 2.0]",
        "selection.tune.targets=[predicted]",
        "selection.tune.max_perplexity_increase=5.0",
        "selection.tune.neurons=[signed]",
        "cards.alone=1",
        "compare.random_draws=1",
    ],
    "demo-ioi": [
        "references.task.count=6",
        "references.task.seeds=[0, 1]",
        "discover.sparsities=[0.3, 0.9]",
        "evaluation.ioi.count=8",
    ],
    "demo-compress": [
        *FEW,
        "evaluation.ioi.count=8",
        "compress.fractions=[0.3, 0.5]",
        "evaluation.perplexity.seq_len=64",
    ],
    "demo-repetition": [
        *FEW,
        "references.undesired.count=4",
        "references.undesired.max_new_tokens=8",
        "references.undesired.max_rur=1.0",
        "evaluation.repetition.count=3",
        "evaluation.repetition.max_new_tokens=4",
        "compare.counts=[5, 40]",
        "compare.random_draws=1",
    ],
    "demo-samples": [
        "references.general.count=6",
        "references.general.seeds=[0, 1]",
        "compress.samples=[2, 6]",
        "evaluation.perplexity.count=4",
        "evaluation.perplexity.seq_len=64",
    ],
}
WRITTEN = {"toxicity", "repetition", "fluency", "search, fluency", "choosing undesired"}
"""What a model writes may end early: of these the plan has the most that there can be."""


PADDING = 0


class Seen:
    """Tokens that go through the model, by what is being done."""

    def __init__(self) -> None:
        self.tokens: Counter[str] = Counter()
        self.now = "nothing"

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        before, self.now = self.now, what
        try:
            yield
        finally:
            self.now = before

    def during(self, function: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.doing(name(*args, **kwargs)):
                return function(*args, **kwargs)

        return wrapped


@pytest.fixture
def seen(demo: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """Every stage of a run on the embedded model, named as the plan names it."""
    found = Seen()

    def watch(where: str, name: Callable[..., str]) -> None:
        module, _, attribute = where.rpartition(".")
        place: Any = importlib.import_module(f"sparc3.{module}")
        monkeypatch.setattr(place, attribute, found.during(getattr(place, attribute), name))

    watch("experiment.score.attribute", lambda *_, method, **__: f"scores, {method}")
    watch("experiment.compress.attribute", lambda *_, method, **__: f"scores, {method}")
    watch("experiment.compress.prune_sequentially", lambda *_, **__: "scores, wanda-sequential")
    watch("attribution.activations.expertise", lambda *_, **__: "scores, expertise")
    watch("experiment.run.protect_units", lambda *_: "protection")
    watch("experiment.gather.gather", lambda request, *_: f"choosing {request.source}")
    watch("experiment.neuron_cards._find_strongest_activations", lambda *_: "cards")
    watch("experiment.token_maps.attribute_tokens", lambda *_, **__: "token maps")
    watch("experiment.search.measure", lambda *_, **__: "search")
    measure = Prepared.measure

    def measured(self: Prepared, *args: Any, **kwargs: Any) -> Any:
        with found.doing(f"search, {self.metric.name}" if found.now == "search" else self.metric.name):
            return measure(self, *args, **kwargs)

    monkeypatch.setattr(Prepared, "measure", measured)
    monkeypatch.setattr("sparc3.experiment.run.load_model", lambda *_, **__: demo)

    def count(_: Any, args: tuple[Any, ...]) -> None:
        found.tokens[found.now] += int((args[0] != PADDING).sum())

    hook = demo[0].get_input_embeddings().register_forward_pre_hook(count)
    yield found
    hook.remove()


@pytest.mark.parametrize("name", RUNS)
def test_a_plan_lists_what_the_run_does(
    name: str, seen: Seen, demo: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(name.partition(",")[0], RUNS[name])
    stages = Stages(recipe, Rehearsal(Shaped(demo[0].config, torch.float32), HERE), tokenizer_at_hand("demo"))
    planned = {stage.name: stage for stage in stages.all()}
    lists: list[Any] = []
    monkeypatch.setattr(
        "sparc3.experiment.run.list_work", lambda *given: lists.append(list_work(*given)) or lists[-1]
    )
    run(recipe, tmp_path / "run")
    assert lists == [stages.work]
    assert stages.work.summary in (tmp_path / "run/log.txt").read_text()
    made = {path.stem for path in (tmp_path / "run/evaluation").glob("*.json")}
    left = len(list((tmp_path / "run/scores").glob("*.safetensors")))
    if name == "demo-tune":  # what a search finds decides how far it goes: the plan has the most
        whole = next(one for one in made if one.startswith("aura@") and one not in stages.work.evaluations)
        assert made - {whole} <= set(stages.work.evaluations)
        assert 0.5 * stages.work.score_files < left <= stages.work.score_files
    else:
        assert made == set(stages.work.evaluations)
        assert left == stages.work.score_files
    alone = list((tmp_path / "run/evaluation").glob("alone/*.json"))
    assert len(alone) == stages.work.alone
    done = {
        what: tokens // 2 if what == "kl" else tokens for what, tokens in seen.tokens.items()
    }  # KL reads the same text twice
    assert {what.replace("demo-loop", "undesired") for what in done} == set(planned)
    for what, stage in planned.items():
        measured = done[what.replace("choosing undesired", "choosing demo-loop")]
        if name == "demo-tune" or what in WRITTEN:
            assert 0.3 * stage.tokens < measured <= stage.tokens, what
        else:
            assert measured == stage.tokens, what
