"""What `plan` says against what is measured: torch's own allocator, resident memory, and the paper's models by their configurations alone."""

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from configs import PARAMETERS, PUBLISHED

from sparc3 import Scores, UserError, select
from sparc3.attribution.methods import settings_for
from sparc3.attribution.sums import Settings, Sums
from sparc3.evaluation import generate as generation
from sparc3.evaluation import perplexity
from sparc3.evaluation import tasks as ioi
from sparc3.experiment.gather import score_by_model
from sparc3.experiment.work_list import count_selected
from sparc3.models.families import ROLES
from sparc3.models.load import load_config
from sparc3.models.sites import sites_of
from sparc3.plan.acceptance import prompts_read
from sparc3.plan.costs import SHEETS, Hardware, Shaped, find_hardware
from sparc3.plan.plan import plan
from sparc3.plan.rehearsal import Rehearsal
from sparc3.recipe.schema import bundled_recipes, load_recipe
from sparc3.samples.batches import Encoded, group_by_length, make_batch
from sparc3.samples.sources import Request, gather, request_for

HERE = Hardware("a test", "cpu", {2: 1e11, 4: 1e11, 8: 1e11}, 1e10, 1e-5, 1e10)
CLOSE = 0.2


def some_ids(length: int, seed: int) -> tuple[int, ...]:
    """Unlike tokens, which routers send to unlike experts."""
    return tuple(torch.randint(3, 400, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


SOME = [Encoded(i, some_ids(length, i), (length - 1,)) for i, length in enumerate([100] * 20 + [60] * 10)]
FOLLOWED = [Encoded(i, some_ids(100, i), tuple(range(99)), (5,) * 99) for i in range(12)]
KINDS: dict[str, tuple[tuple[str, str, str, str], tuple[str, ...], list[Encoded]]] = {
    "neurons, abs": (("lrp", "neuron", "predicted", "abs"), ("mlp.up",), SOME),
    "neurons, signed": (("lrp", "neuron", "predicted", "signed"), ("mlp.up",), SOME),
    "neurons, next": (("lrp", "neuron", "next", "signed"), ("mlp.up",), FOLLOWED),
    "neurons, gradient": (("gradient", "neuron", "predicted", "abs"), ("mlp.up",), SOME),
    "neurons, wanda": (("wanda", "neuron", "predicted", "abs"), ("mlp.up",), SOME),
    "heads": (("lrp", "head", "predicted", "abs"), ("attn.o",), SOME),
    "weights": (("lrp", "weight", "predicted", "abs"), ROLES, SOME),
}


OWN: dict[str, dict[str, int]] = {
    "llama": {"intermediate_size": 704},
    "mixtral": {"intermediate_size": 512, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 12,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 512,
        "decoder_sparse_step": 1,
    },
    "olmoe": {"intermediate_size": 256, "num_experts": 16, "num_experts_per_tok": 4},
}
"""model_type → what its configuration has beside the common."""


def random_model(kind: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=1000,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        **OWN[kind],
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def models(demo: tuple[Any, Any]) -> Callable[[str], Any]:
    return cache(lambda name: demo[0] if name == "demo" else random_model(name))


DENSE = ("demo", "llama")
ATTRIBUTED = [
    *product(DENSE, KINDS),
    ("mixtral", "neurons, abs"),
    ("mixtral", "weights"),
    ("qwen2_moe", "neurons, signed"),
    ("olmoe", "neurons, wanda"),
    ("olmoe", "heads"),
]
EVALUATED = [
    *product(DENSE, ("perplexity", "kl", "greedy", "sampled", "ioi")),
    ("mixtral", "perplexity"),
    ("qwen2_moe", "greedy"),
    ("olmoe", "ioi"),
]


def allocated(work: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator gave out at once during the work."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(("name", "kind"), ATTRIBUTED)
def test_memory_of_an_attribution_is_as_predicted(models: Callable[[str], Any], name: str, kind: str) -> None:
    model = models(name)
    (method, unit, target, neuron), roles, samples = KINDS[kind]
    chosen, settings = settings_for(Settings(method, unit, target, neuron, "mean"), roles)
    groups = group_by_length(samples, 1024)

    def work() -> None:
        sums, sites = Sums(settings), sites_of(model, roles)
        for _ in chosen.run(
            model, [make_batch(group, model.device) for group in groups], sites, settings, sums
        ):
            pass
        scores = {site.name: chosen.finish(site, sums.totals.pop(site.name), sums) for site in sites}
        assert len(scores) == len(sites)

    predicted = Rehearsal(Shaped(model.config, torch.float32), HERE).attribution(settings, roles, groups)
    measured = allocated(work)
    print(f"{name}, {kind}: predicted {predicted.live / 1e6:.1f} MB, given out {measured / 1e6:.1f} MB")
    assert predicted.live == pytest.approx(measured, rel=CLOSE)
    assert predicted.operations > 0


class _NoTokenizer:
    pad_token_id, eos_token_id = 0, None

    def decode(self, row: object, **options: Any) -> str:
        return ""


@pytest.mark.parametrize(("name", "kind"), EVALUATED)
def test_memory_of_an_evaluation_is_as_predicted(
    models: Callable[[str], Any], name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models(name)
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)  # every text gets its full length
    rehearsal = Rehearsal(Shaped(model.config, torch.float32), HERE)
    windows = [(some_ids(256, i), 255) for i in range(4)]
    texts = [Encoded(i, some_ids(20, i), (19,), (1,), (2,)) for i in range(32)]
    rows = [(list(some_ids(20, draw)), draw) for draw in range(40)]
    works: dict[str, tuple[Any, Callable[[], object]]] = {
        "perplexity": (
            lambda: rehearsal.windows("perplexity", 256, 10),
            lambda: perplexity.perplexity_observations(model, windows),
        ),
        "kl": (
            lambda: rehearsal.windows("kl", 256, 10),
            lambda: perplexity.divergence_observations(model, windows, nullcontext()),
        ),
        "greedy": (
            lambda: rehearsal.generation(40, 20, 24, 0.0),
            lambda: generation._generate_batch(model, _NoTokenizer(), rows, 24, 0.0, 0),
        ),
        "sampled": (
            lambda: rehearsal.generation(40, 20, 24, 0.7),
            lambda: generation._generate_batch(model, _NoTokenizer(), rows, 24, 0.7, 0),
        ),
        "ioi": (lambda: rehearsal.contrasts(texts), lambda: ioi.logit_differences(model, texts)),
    }
    predict, work = works[kind]
    assert predict().live == pytest.approx(allocated(work), rel=CLOSE)


def config_file(folder: Path, hub_id: str) -> str:
    path = folder / f"{hub_id.replace('/', '--')}.json"
    path.write_text(json.dumps(PUBLISHED[hub_id]))
    return str(path)


@pytest.mark.parametrize("name", [name for name in bundled_recipes() if not name.startswith("demo")])
def test_recipes_fit_the_real_configurations_of_their_models(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    config = load_config(config_file(tmp_path, recipe.model.id))
    shaped = Shaped(config, torch.bfloat16)
    assert shaped.model.num_parameters() == PARAMETERS[recipe.model.id]
    layers = config.num_hidden_layers
    assert len(shaped.sites(recipe.attribution.sites)) == layers * len(recipe.attribution.sites)
    for spec in recipe.references.values():
        assert (spec.seq_len or 0) <= config.max_position_embeddings
    section = recipe.compare if recipe.job == "correct" else getattr(recipe, recipe.job)
    for method in (recipe.attribution.method, *section.methods):
        if method in ("aura", "det0", "wanda-sequential"):
            continue
        asked = recipe.attribution
        settings_for(Settings(method, asked.unit, asked.target, asked.neuron, asked.reduce), asked.sites)


def test_the_flagship_is_planned_from_its_configuration_alone(
    sparc3: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    recipe = ("llama3-8b-toxicity", "--set", "attribution.neuron=signed", "--set", "compare.methods=[random]")
    config = config_file(tmp_path, "meta-llama/Meta-Llama-3-8B")
    began = time.process_time()
    code, out, err = sparc3("plan", *recipe, "--hardware", "h100", "--config", config)
    assert (code, err) == (0, "")
    assert time.process_time() - began < 30
    assert out.splitlines()[0].startswith("llama3-8b-toxicity on h100: fits, about ")
    assert "458,752 neurons in 32 sites" in out
    assert "8.03 billion parameters in bfloat16" in out
    code, out, _ = sparc3(
        "plan",
        *recipe,
        "--set",
        "evaluation={perplexity: {protocol: blocks}}",
        "--hardware",
        "t4",
        "--config",
        config,
    )
    assert code == 0
    assert "does not fit" in out.splitlines()[0]


def test_the_headline_is_a_range_where_the_model_chooses_prompts(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"text": "prompt {number}"}}\n' for number in range(1000)))
    for source, most in ((prompts, 700), ("realtoxicityprompts", 69_609)):  # 70 % are for reference
        recipe = load_recipe("opt-125m-toxicity", [f"references.undesired.source={source}"])
        assert prompts_read(recipe.references["undesired"]) == (256, most)
    few = ["references.general.count=2", "references.undesired.count=2", "compare={methods: []}"]
    few += ["evaluation={perplexity: {source: demo-general, count: 2}}", "cards.most=0"]
    found = plan(load_recipe("demo-repetition", few), hardware="a100")
    choosing, *others = found.stages
    assert choosing.more / choosing.seconds == pytest.approx(64 / 4 - 1)
    assert not any(stage.more for stage in others)
    assert found.most_seconds - found.seconds == pytest.approx(choosing.more)
    assert any(re.search(r"\b8 prompts.*\b128$", note) for note in found.notes)
    slow = replace(found, stages=(choosing * (1000 / choosing.seconds), *others))
    assert re.search(r"about 17 min to 4\.\d h$", slow.text().splitlines()[0])


def test_a_few_prompts_narrow_the_range(
    tmp_path: Path, demo: tuple[Any, Any], sparc3: Callable[..., tuple[int, str, str]]
) -> None:
    """On the embedded model: the share that fits is that of a count by hand, and the prompts that a run reads lie in
    the range; without the model or a set that it chooses, the flag is refused."""
    from sparc3.plan.acceptance import TriedPrompts, try_prompts

    prompts = tmp_path / "prompts.jsonl"
    rows = [("demo-angry", 150), ("demo-polite", 450)]
    texts = [one.text for kind, many in rows for one in gather(Request(kind, many))]
    prompts.write_text("".join(json.dumps({"text": text}) + "\n" for text in dict.fromkeys(texts)))
    chosen = f"{{source: {prompts}, count: 20, choose_by: completion, min_toxicity: 0.5, scorer: lexicon, "
    chosen += "max_new_tokens: 16}"
    few = ["references.general.count=2", f"references.undesired={chosen}", "compare={methods: []}"]
    few += ["evaluation={perplexity: {source: demo-general, count: 2}}", "cards.most=0"]
    recipe = load_recipe("demo", few)
    spec = recipe.references["undesired"]
    tried = try_prompts(recipe, 48)["undesired"]
    read: list[str] = []
    score = score_by_model(spec, *demo)

    def watched(some: list[str]) -> list[tuple[str, float | None]]:
        read.extend(some)
        return score(some)

    found = gather(request_for(spec, count=10), None, watched)  # the run's own way
    by_hand = {sample.text for sample in gather(request_for(spec, count=1), None, watched)}
    assert len(found) == 10
    assert by_hand <= set(read)
    fitting = sum(value is not None and value >= 0.5 for _, value in score(read[:48]))
    assert tried == TriedPrompts(48, fitting)
    assert 0 < fitting < 48
    wide, narrow = prompts_read(spec), prompts_read(spec, TriedPrompts(48, 2))
    assert wide[0] <= narrow[0] <= narrow[1] <= wide[1]
    low, high = TriedPrompts(48, 2).interval
    assert (low, high) == (pytest.approx(0.0115, abs=1e-3), pytest.approx(0.1397, abs=1e-3))
    whole = request_for(spec.model_copy(update={"source": "realtoxicityprompts"}))
    large = prompts_read(whole, TriedPrompts(48, 2))
    assert large == (math.ceil(20 / high / 256) * 256, math.ceil(20 / low / 256) * 256)
    assert prompts_read(whole, TriedPrompts(48, 0))[1] == 69_609
    options = [part for setting in few for part in ("--set", setting)]
    code, out, err = sparc3("plan", "demo", *options, "--hardware", "a100", "--try-prompts", "48")
    assert code == 0, err
    assert f"{fitting} of 48" in out
    for name, flags in (("opt-125m-toxicity", ["--try-prompts", "4"]), ("demo", ["--try-prompts", "4"])):
        code, _, err = sparc3("plan", name, "--hardware", "a100", *flags)
        assert code == 2
        assert "--try-prompts" in err


def test_more_devices_take_less_time(tmp_path: Path) -> None:
    recipe = load_recipe("opt-125m-ioi", ["discover.sparsities=[0.5]", "discover.methods=[lrp, random]"])
    config = config_file(tmp_path, "facebook/opt-125m")
    one, four = (plan(recipe, hardware="a100", gpus=gpus, config=config) for gpus in (1, 4))
    assert four.seconds == pytest.approx(one.seconds / 4)
    assert four.peak == one.peak
    assert (one.units, one.sites, one.scores) == (36_864, 12, 4 * 36_864)
    assert one.dtype == "float16"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("demo", "--hardware", "h10"), "'h100'"),
        (("demoo",), "'demo'"),
        (("llama3-8b-toxicity",), "--config"),
        (("demo", "--gpus", "0"), "--gpus"),
        (("demo", "--set", "attribution.sites=[mlp.gate]", "--config", "OPT"), "'mlp.gate'"),
        (("demo", "--config", "nowhere/config.json"), "nowhere/config.json"),
    ],
)
def test_mistakes_are_one_line(
    mistake: Callable[..., str],
    arguments: Sequence[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    opt = config_file(tmp_path, "facebook/opt-125m")
    assert said in mistake("plan", *(opt if argument == "OPT" else argument for argument in arguments))


def test_an_a100_goes_by_its_memory() -> None:
    assert [find_hardware(name).memory for name in ("a100", "A100-40", "a100-80")] == [40e9, 40e9, 80e9]


def test_hardware_names_are_said(mistake: Callable[..., str]) -> None:
    said = mistake("plan", "demo", "--hardware", "abacus")
    assert all(name in said for name in SHEETS)


MEASURED = """
import json, resource, sys
from pathlib import Path
import torch
import transformers
import sparc3.attribution.attribute, sparc3.evaluation.evaluate
from sparc3 import attribute
from sparc3.evaluation import perplexity
from sparc3.models.families import ROLES
from transformers import AutoConfig, AutoModelForCausalLM

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

def work(settings, length):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).eval()
    sample = torch.randint(3, 1000, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    if sys.argv[2] == "perplexity":
        perplexity.perplexity_observations(model, [(tuple(sample), length - 1)] * 2)
    else:
        unit, sites = ("weight", [role for role in ROLES if role != "mlp.gate" or settings["model_type"] != "opt"]) if sys.argv[2] == "weights" else ("neuron", ("mlp.up",))
        attribute(model, [sample, sample[::-1]], unit=unit, sites=sites, neuron="signed" if sys.argv[2] == "signed" else "abs")

settings = json.loads(sys.argv[1])
small = {"hidden_size": 64, "intermediate_size": 64, "ffn_dim": 64, "num_hidden_layers": 1, "word_embed_proj_dim": 64, "num_attention_heads": 4,
         "num_key_value_heads": 4}
work({**settings, **{key: value for key, value in small.items() if key in settings}}, 8)  # libraries load what they load late
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = resident()
work(settings, 512)
peak = int([line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")][0].split()[1]) * 1024
print(peak - before)
"""
COMMON = {"vocab_size": 4096, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2}
MEDIUM: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        **COMMON,
    },
    "wide": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        **COMMON,
    },
    "opt": {
        "model_type": "opt",
        "hidden_size": 768,
        "word_embed_proj_dim": 768,
        "ffn_dim": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "pad_token_id": 0,
        **COMMON,
    },
}
KEPT = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Makes the C library give back what is freed, most of which it keeps by default."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["neurons", "signed", "weights", "perplexity"])
@pytest.mark.parametrize(("name", "malloc"), [*((name, {}) for name in MEDIUM), ("llama", KEPT)])
def test_resident_memory_of_a_larger_model_is_as_predicted(
    name: str, kind: str, malloc: dict[str, str]
) -> None:
    """What a process of its own grows by, the model among it."""
    from transformers import AutoConfig

    given = {
        **{name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")},
        **malloc,
    }
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, json.dumps(MEDIUM[name]), kind],
        capture_output=True,
        text=True,
        check=True,
        env=given,
    )
    measured = int(done.stdout.splitlines()[-1])
    shaped = Shaped(AutoConfig.for_model(**MEDIUM[name]), torch.float32)
    rehearsal = Rehearsal(shaped, HERE)
    groups = group_by_length([Encoded(i, (5,) * 512, (511,)) for i in range(2)], 1024)
    if kind == "perplexity":
        live = rehearsal.windows("perplexity", 512, 2).live
    else:
        unit, roles = (
            ("weight", tuple(role for role in ROLES if role != "mlp.gate" or name != "opt"))
            if kind == "weights"
            else ("neuron", ("mlp.up",))
        )
        live = rehearsal.attribution(
            Settings("lrp", unit, "predicted", "signed" if kind == "signed" else "abs", "mean"), roles, groups
        ).live
    predicted = shaped.weights + (live if malloc else HERE.held_bytes(live))
    print(
        f"{name}, {kind}: tensors {(shaped.weights + live) / 1e6:.0f} MB, predicted {predicted / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB"
    )
    assert predicted == pytest.approx(measured, rel=CLOSE)


def test_sums_of_weights_are_beside_a_gpu(demo: tuple[Any, Any]) -> None:
    groups = group_by_length(SOME, 1024)
    for method in ("lrp", "wanda"):
        settings = Settings(method, "weight", "predicted", "abs", "mean")
        here, there = (
            Rehearsal(Shaped(demo[0].config, torch.float32), on).attribution(settings, ROLES, groups).live
            for on in (HERE, SHEETS["h100"])
        )
        assert 0 < there < here or (method == "wanda" and there == here)  # whose sums are small


def test_experts_are_planned_with_even_routing(tmp_path: Path) -> None:
    from transformers import AutoConfig

    shared: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    sizes = {
        "intermediate_size": 128,
        "num_local_experts": 8,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
    }
    done = {}
    for active in (2, 4):
        path = tmp_path / f"{active}.json"
        AutoConfig.for_model("mixtral", **shared, **sizes, num_experts_per_tok=active).to_json_file(path)
        recipe = load_recipe("llama2-7b-compress", ["model.dtype=bfloat16"])
        done[active] = plan(recipe, hardware="h100", config=str(path))
    assert done[2].units == 2 * (4 * 64 * 64 + 8 * 3 * 64 * 128)
    assert any("expert" in note for note in done[2].notes)
    read = {active: next(s for s in found.stages if s.name == "perplexity") for active, found in done.items()}
    # Each token's products: twice 2 of 8 experts' matrices more, in both layers.
    more = 2 * 2 * (3 * 64 * 128) * 2 * read[2].tokens
    assert read[4].operations - read[2].operations == pytest.approx(more, rel=0.01)


ANY_UNIT: list[dict[str, Any]] = [
    {"count": 2, "scope": "site"},
    {"fraction": 0.29, "scope": "site"},
    {"fraction": 0.3},
    {"count": 7},
]


@pytest.mark.parametrize(
    ("unit", "selection"),
    [
        *product(("neuron", "head", "weight"), ANY_UNIT),
        ("weight", {"count": 3, "scope": "row"}),
        ("weight", {"scope": "2:4"}),
    ],
)
def test_a_plan_knows_how_many_units_a_selection_takes(
    demo: tuple[Any, Any], unit: str, selection: dict[str, Any]
) -> None:
    sites = sites_of(demo[0], ["attn.o"] if unit == "head" else ["mlp.up"])
    shape = {
        "weight": lambda site: (site.out, site.inp),
        "head": lambda site: (site.heads,),
        "neuron": lambda site: (site.out,),
    }[unit]
    scores = Scores({site.name: torch.rand(*shape(site)) for site in sites}, {"unit": unit})
    assert count_selected(**{"scope": "global", **selection}, unit=unit, sites=sites) == len(
        select(scores, **selection)
    )


def test_sums_on_the_gpu_are_planned_there(tmp_path: Path) -> None:
    config = config_file(tmp_path, "meta-llama/Llama-2-7b-hf")
    here, there = (
        plan(
            load_recipe(
                "llama2-7b-compress", ["compress.methods=[lrp]", f"attribution.sums_device={device}"]
            ),
            hardware="h100",
            config=config,
        )
        for device in ("cpu", "cuda")
    )
    assert there.peak_at == "scores, lrp"
    assert there.peak > there.weights + 4 * there.units > here.peak
    with pytest.raises(UserError, match="sums_device"):
        load_recipe("llama2-7b-compress", ["attribution.sums_device=gpu"])


def test_a_configuration_that_cannot_be_built_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**PUBLISHED["meta-llama/Llama-2-7b-hf"], "hidden_act": "nonsense"}))
    with pytest.raises(UserError) as caught:
        plan("llama2-7b-compress", hardware="h100", config=str(path))
    assert "\n" not in str(caught.value)
