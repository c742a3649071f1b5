"""Models whose weights accelerate keeps on the CPU. Here the other device is the CPU too, but gets copies, which are counted."""

import dataclasses
import logging
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from test_experiment import SMALL
from tiny import samples, tiny
from torch.utils import backend_registration

from sparc3 import UserError, ablate_, ablated, attribute, export, load_model, run, select
from sparc3.checkpoints.shrink import relative_logit_difference
from sparc3.circuits.ablate import Damping, damp, targets_by_name
from sparc3.doctor.checks import relevance_ledger
from sparc3.doctor.examine import Specimen, examine_specimen
from sparc3.doctor.second_opinion import all_sites, record_flows
from sparc3.evaluation.generate import complete
from sparc3.evaluation.perplexity import negative_log_likelihoods
from sparc3.experiment.prune_sequentially import prune_sequentially
from sparc3.models import load as models
from sparc3.models.families import ROLES
from sparc3.models.fingerprint import model_fingerprint
from sparc3.models.load import load_weights
from sparc3.models.offloading import RESERVE, copy_model, gpu_room, is_offloaded, named_values
from sparc3.models.sites import family_of, shadow, sites_of
from sparc3.plan.plan import plan

accelerate = pytest.importorskip("accelerate")


class Copies:
    """Bytes of the weights that are on the device at this moment, and the most there ever were."""

    live = peak = 0

    def of(self, value: torch.Tensor) -> torch.Tensor:
        held = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().copy()
        weakref.finalize(held, self.gone, held.nbytes)
        self.live += held.nbytes
        self.peak = max(self.peak, self.live)
        return torch.from_numpy(held).view(value.dtype).view(value.shape)

    def gone(self, size: int) -> None:
        self.live -= size


@pytest.fixture(autouse=True)
def copies(monkeypatch: pytest.MonkeyPatch) -> Copies:
    """Lets accelerate fill a parameter with a copy, as it does from the CPU to a GPU."""
    made, plain = Copies(), accelerate.hooks.set_module_tensor_to_device

    def put(module: Any, name: str, device: Any, value: torch.Tensor | None = None, **options: Any) -> None:
        tied = value is not None and value.data_ptr() in (options.get("tied_params_map") or ())
        plain(module, name, device, value=value if value is None or tied else made.of(value), **options)

    monkeypatch.setattr(accelerate.hooks, "set_module_tensor_to_device", put)
    return made


def offloaded(model: Any) -> Any:
    return accelerate.cpu_offload(model, execution_device="cpu")


GPU = torch.device("cpu")
"""What accelerate, which compares with the text "cpu", takes for another device."""


def half_offloaded(model: Any) -> Any:
    """As a small GPU has it: with the last layer, the norm and the head on the CPU, and the embeddings where they are tied to the head."""
    tied = "cpu" if model.config.tie_word_embeddings else GPU
    parts = {
        "model.embed_tokens": tied,
        "model.layers.0": GPU,
        "model.layers.1": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": GPU,
        "lm_head": "cpu",
    }
    return accelerate.dispatch_model(model, parts, main_device=GPU)


def pair(name: str = "llama", **changes: Any) -> Iterator[Any]:
    return (tiny(name, **changes), offloaded(tiny(name, **changes)))


def seen(model: Any) -> dict[str, Any]:
    """Values, flags, attributes and hooks. accelerate's empty parameters are others after each forward pass, and are no part of it."""
    found: dict[str, Any] = {
        f"{name}: value": value.detach().numpy().tobytes() for name, value in named_values(model)
    }
    found |= {f"{name}: flag": parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        found[f"{name}: attributes"] = {key: id(value) for key, value in module.__dict__.items()}
        found[f"{name}: parameters"] = {
            key: value is None or value.is_meta for key, value in module._parameters.items()
        }
    return found


ASKED: list[dict[str, Any]] = [
    {"neuron": "abs"},
    {"neuron": "signed"},
    {"unit": "weight"},
    {"unit": "head", "sites": ("attn.o",)},
    {"method": "cp-lrp"},
    {"method": "gradient"},
    {"method": "wanda"},
    {"method": "activation", "sites": ("mlp.up",)},
    {"method": "magnitude"},
    {"unit": "weight", "reduce": "mean_abs"},
]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        *(
            (name, offloaded)
            for name in ("llama", "llama-bias", "gpt2", "opt-350m", "gemma2", "pythia", "qwen2-moe-mixed")
        ),
        *((name, half_offloaded) for name in ("llama", "llama-bias", "gemma2", "mixtral")),
    ],
)
def test_an_offloaded_model_has_the_same_scores(name: str, place: Callable[[Any], Any]) -> None:
    plain, model = tiny(name), place(tiny(name))
    assert is_offloaded(model)
    assert not is_offloaded(plain)
    assert model_fingerprint(model) == model_fingerprint(plain)
    before = seen(model)
    for ask in ASKED:
        asked = {"sites": tuple(role for role in ROLES if role in family_of(plain).roles), **ask}
        found, expected = (attribute(each, samples(4), **asked) for each in (model, plain))
        assert found.provenance == expected.provenance
        assert all(torch.equal(found[site], expected[site]) for site in expected), ask
        assert seen(model) == before


@pytest.mark.parametrize("vocabulary", [40, 200])
@pytest.mark.parametrize("unit", ["neuron", "weight"])
@pytest.mark.parametrize("method", ["lrp", "gradient"])
def test_weights_are_copied_one_layer_at_a_time(
    copies: Copies, method: str, unit: str, vocabulary: int
) -> None:
    model = offloaded(tiny("llama", num_hidden_layers=8, vocab_size=vocabulary))
    layer, head = layer_and_head(model)
    assert (head > layer) == (vocabulary == 200)
    peaks = {}
    for again in ("auto", False):
        copies.peak = 0
        attribute(model, samples(4), method=method, unit=unit, gradient_checkpointing=again)
        assert copies.live == 0
        peaks[again] = copies.peak
    assert max(layer, head) <= peaks["auto"] <= 1.05 * max(layer, head)
    assert peaks[False] >= 7 * layer + head  # so much the backward pass would hold otherwise


def layer_and_head(model: Any) -> tuple[int, int]:
    sizes = {name: value.nbytes for name, value in named_values(model)}
    return sum(size for name, size in sizes.items() if ".layers.0." in name), sizes["lm_head.weight"]


def test_other_backward_passes_copy_one_layer_at_a_time_too(copies: Copies) -> None:
    plain, model = pair(num_hidden_layers=8)
    one, two = (relevance_ledger(each, samples(1)[0]) for each in (plain, model))
    assert (one.target, one.gap, one.biases) == (two.target, two.gap, two.biases)
    assert torch.equal(one.tokens, two.tokens)
    sites = [all_sites(each) for each in (plain, model)]
    first, second = record_flows(plain, samples(1)[0], sites[0]), record_flows(model, samples(1)[0], sites[1])
    assert all(
        torch.equal(first[site].of_a, second[site].of_a) and torch.equal(first[site].of_z, second[site].of_z)
        for site in first
    )
    assert copies.peak <= 1.05 * (sum(layer_and_head(model)))


def test_a_pass_that_fails_leaves_the_values_as_they_are() -> None:
    plain, model = pair()
    before, up = seen(model), model.model.layers[1].mlp.up_proj
    circuit = select(attribute(plain, samples(4)), count=9)

    def fails(x: Any) -> None:
        raise MemoryError

    with shadow(up, "_old_forward", fails), pytest.raises(MemoryError):
        model(torch.tensor(samples(1)))
    assert not up.weight.is_meta  # a copy, left on the device, which nobody may take for the weight
    with ablated(model, circuit), ablated(plain, circuit):
        assert model_fingerprint(model) == model_fingerprint(plain)
        assert torch.equal(model(torch.tensor(samples(1))).logits, plain(torch.tensor(samples(1))).logits)
    assert seen(model) == before


@pytest.mark.parametrize("name", ["llama-bias", "gpt2", "opt", "phi3", "qwen3-moe"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_an_offloaded_model_is_ablated_and_restored(name: str, strength: float) -> None:
    plain, model = pair(name)
    before, ids, windows = seen(model), samples(4), [(tuple(one), len(one) - 1) for one in samples(4)]
    for ask in (
        {},
        {"unit": "head", "sites": ("attn.o",)},
        {"unit": "weight", "method": "magnitude", "sites": ("attn.q", "mlp.down")},
    ):
        circuit = dataclasses.replace(select(attribute(plain, ids, **ask), count=3), strength=strength)
        with ablated(model, circuit):
            changed = negative_log_likelihoods(model, windows, False)
            with ablated(plain, circuit):
                assert changed == negative_log_likelihoods(plain, windows, False)
                assert model_fingerprint(model) == model_fingerprint(plain)
        assert changed != negative_log_likelihoods(plain, windows, False)
        attribute(model, ids, method="wanda")  # what was computed in inference mode does not stand in its way
        assert seen(model) == before
    factors = Damping(
        {site: torch.linspace(0, 1, len(values)) for site, values in attribute(plain, ids).items()}
    )
    with damp(model, factors), damp(plain, factors):
        assert model_fingerprint(model) == model_fingerprint(plain)
    assert seen(model) == before
    for each in (plain, model):
        ablate_(each, circuit)
    assert model_fingerprint(model) == model_fingerprint(plain)
    assert seen(model) != before


def test_sequential_pruning_of_an_offloaded_model() -> None:
    one, two = (prune_sequentially(each, samples(4), fraction=0.5) for each in pair())
    assert one.fingerprint == two.fingerprint


@pytest.mark.parametrize("from_memory", [False, True])
@pytest.mark.parametrize("name", ["llama-bias", "mixtral"])
def test_the_exported_checkpoint_is_the_same(tmp_path: Path, name: str, from_memory: bool) -> None:
    tiny(name, dtype=torch.float32).save_pretrained(tmp_path / "source")
    models = load_weights(tmp_path / "source"), offloaded(load_weights(tmp_path / "source"))
    circuit = select(attribute(models[0], samples(4)), count=5)
    for model, out in zip(models, ("one", "two"), strict=True):
        if from_memory:
            ablate_(model, select(attribute(model, samples(4)), count=5, order="highest"))
        export(model, None, circuit, tmp_path / out)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert [
        file
        for file in files
        if (tmp_path / "one" / file).read_bytes() != (tmp_path / "two" / file).read_bytes()
    ] == []


def test_a_shrunk_export_of_an_offloaded_model(tmp_path: Path) -> None:
    tiny("llama", dtype=torch.float32).save_pretrained(tmp_path / "source")
    model = offloaded(load_weights(tmp_path / "source"))
    circuit = select(attribute(model, samples(4)), count=3, scope="site")
    for out in ("files", "memory"):
        loaded = load_weights(export(model, None, circuit, tmp_path / out, shrink=True))
        assert loaded.config.intermediate_size == 21
        with ablated(model, circuit):
            assert relative_logit_difference(model, loaded) < 1e-5
        model.model.layers[0].mlp.up_proj._hf_hook.weights_map["weight"][0] += 1


def test_the_doctor_examines_an_offloaded_model() -> None:
    plain, model = pair("llama-bias", dtype=torch.float32)
    twin = copy_model(model)
    assert model_fingerprint(twin) == model_fingerprint(model)
    assert not is_offloaded(twin)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    found = [examine_specimen(Specimen(each, samples(3), ())) for each in (plain, model)]
    assert not found[0].failures
    assert found[0].findings == found[1].findings


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="torch cannot pretend a device",
)
@pytest.mark.parametrize(
    ("name", "away"),
    [("llama", "model"), ("llama-bias", "model.layers.1"), ("gpt2", "transformer.h"), ("gemma2", "nothing")],
)
def test_no_two_devices_meet(name: str, away: str) -> None:
    """Where this machine's GPU is the CPU, a weight that was left there would go unnoticed."""
    if Version(transformers.__version__) < Version("5.20"):
        pytest.skip("transformers before 5.20 uses operations that torch's pretended device lacks")
    script = Path(__file__).parent / "pretended_gpu.py"
    done = subprocess.run([sys.executable, script, name, away], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 15
    assert lines.pop(0) == "what a copy takes from the GPU is on the cpu"
    assert all(line.endswith("gpu:0") for line in lines if line != "{'unit': 'weight'} total cpu")


def test_weights_on_the_disk_are_refused_in_one_line(tmp_path: Path) -> None:
    circuit = select(attribute(tiny("llama"), samples(4)), count=5)
    model = accelerate.disk_offload(tiny("llama", dtype=torch.float32), tmp_path, execution_device="cpu")
    damping = Damping({site.name: torch.full((site.out,), 0.5) for site in sites_of(model, ["mlp.up"])})
    uses: list[Callable[[], object]] = [
        lambda: attribute(model, samples(4)),
        lambda: ablated(model, circuit).__enter__(),
        lambda: ablate_(model, circuit),
        lambda: targets_by_name(model, circuit),
        lambda: damp(model, damping).__enter__(),
    ]
    for use in uses:
        with pytest.raises(UserError, match=r"^model\.embed_tokens\.weight .*'llama' .*disk"):
            use()


def test_a_gpu_keeps_room_for_activations_and_the_cpu_takes_the_rest() -> None:
    gib = 2**30
    room = gpu_room({0: 12 * gib, 1: gib, "cpu": 20 * gib}, 16 * gib, "m")
    assert room == {0: 12 * gib - RESERVE, 1: 0, "cpu": 18 * gib}
    with pytest.raises(UserError, match=r"'m' .*\b30 GiB.*\b28 GiB"):
        gpu_room({0: 12 * gib, "cpu": 20 * gib}, 30 * gib, "m")
    with pytest.raises(UserError, match=r"GPU .*\b2 GiB"):
        gpu_room({0: gib, 1: 2 * gib, "cpu": 20 * gib}, gib, "m")
    assert gpu_room({"cpu": 20 * gib}, gib, "m") == {"cpu": 18 * gib}


def test_the_room_on_a_cpu_is_that_of_its_control_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "available", lambda device: 2**20)
    with pytest.raises(UserError, match=r" GiB.* GiB"):
        load_model("demo", device="map")


@pytest.fixture
def small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--device map` finds room for half of the demo's layers; transformers and accelerate load and place it as ever."""
    parts = dict.fromkeys(("model.layers.0", "model.layers.1", "model.rotary_emb"), GPU)
    away = dict.fromkeys(
        ("model.embed_tokens", "model.layers.2", "model.layers.3", "model.norm", "lm_head"), "cpu"
    )
    monkeypatch.setattr(models, "_plan_placement", lambda *asked: {"device_map": parts | away})


def test_the_front_door_offloads_and_says_so(small_gpu: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sparc3"):
        model, tokenizer = load_model("demo", device="map")
    assert [line for line in caplog.messages if "2 of 4 layers" in line and "CPU" in line]
    plain, _ = load_model("demo", device="cpu")
    prompts = ["Tom was glad", "Anna went to the shop and said"]
    for temperature in (0.0, 1.0):
        texts = [
            complete(each, tokenizer, prompts, max_new_tokens=12, temperature=temperature)
            for each in (model, plain)
        ]
        assert texts[0] == texts[1]


def test_a_plan_for_a_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    one, two = (plan({**SMALL, "model": {**SMALL["model"], "device": device}}) for device in ("cpu", "map"))
    assert one.peak == two.peak


@pytest.mark.slow
def test_a_run_on_an_offloaded_model(small_gpu: None, tmp_path: Path) -> None:
    recipe = {**SMALL, "compare": {"methods": ["wanda", "det0"], "counts": [3], "random_draws": 2}}
    mapped = run({**recipe, "model": {**SMALL["model"], "device": "map"}}, tmp_path / "mapped")
    plain = run(recipe, tmp_path / "plain")
    assert mapped.measurements == plain.measurements
    assert mapped.provenance["circuit"] == plain.provenance["circuit"]
