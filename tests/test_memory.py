"""What is not computed, what is computed twice to save memory, and what happens when memory runs out all the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import Words, samples, tiny
from torch.multiprocessing.reductions import StorageWeakRef
from unchanged import fingerprint, require_same

from sparc3 import Sparc3Error
from sparc3.attribution import attribute as engine
from sparc3.attribution import relevance
from sparc3.attribution import relevance as watching
from sparc3.attribution.attribute import attribute
from sparc3.evaluation import generate as generation
from sparc3.evaluation import perplexity
from sparc3.models.families import ROLES
from sparc3.models.memory import out_of_memory
from sparc3.models.sites import family_of


class Spoken(Words):
    pad_token_id = eos_token_id = 0

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(f"w{token}" for token in ids)


def rows_seen(module: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many positions each call of a linear module computes."""
    seen, plain = [], module.forward
    monkeypatch.setattr(module, "forward", lambda x: seen.append(x.numel() // x.shape[-1]) or plain(x))  # type: ignore[func-returns-value]
    return seen


def test_padding_is_not_computed_and_the_last_layer_only_where_the_target_reads_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ids = tiny("llama"), samples(4)
    first, last = ((layer.mlp.up_proj, layer.self_attn.k_proj) for layer in model.model.layers)
    seen = [rows_seen(module, monkeypatch) for module in (*first, *last)]
    before = fingerprint(model)
    attribute(model, ids, batch_tokens=1000)
    tokens = sum(len(one) for one in ids)
    assert tokens < 4 * max(len(one) for one in ids)
    assert seen == [[tokens], [tokens], [len(ids)], [tokens]]
    attribute(model, ids, batch_tokens=1000, target="next")
    assert [calls[1] for calls in seen] == [tokens, tokens, tokens - len(ids), tokens]
    require_same(fingerprint(model), before)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "falcon", "gemma2", "mixtral"])
@pytest.mark.parametrize(
    "ask",
    [{"neuron": "signed"}, {"neuron": "abs"}, {"unit": "head", "sites": ("attn.o",)}, {"unit": "weight"}],
)
def test_computing_layers_twice_gives_the_same_scores(name: str, ask: dict[str, Any]) -> None:
    model, ids = tiny(name), samples(4)
    model.train()
    before = fingerprint(model)
    sites = tuple(role for role in ROLES if role in family_of(model).roles)
    once, *twice = (
        attribute(model, ids, **{"sites": sites, **ask}, gradient_checkpointing=how)
        for how in (False, True, "offload")
    )
    require_same(fingerprint(model), before)
    for site in once:
        for found in twice:
            assert (once[site] - found[site]).abs().max() <= 1e-6 * once[site].abs().max()


def kept_for_the_backward_pass(model: Any, ids: list[list[int]], **options: Any) -> int:
    """Bytes that autograd keeps of one sample, each storage once, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        attribute(model, ids, **options)
    return sum(kept.values())


def test_a_checkpointed_layer_keeps_its_input_alone() -> None:
    model, ids = tiny("llama"), samples(4)
    once, twice = (
        kept_for_the_backward_pass(model, ids, target="next", gradient_checkpointing=how)
        for how in (False, True)
    )
    assert twice < once / 3


@pytest.mark.parametrize("ask", [{"neuron": "abs"}, {"unit": "weight"}])
def test_the_inputs_of_layers_wait_elsewhere_and_nothing_holds_them_here(
    ask: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere is a copy here, since a CPU has no other place; what counts is that after the forward pass the original is gone."""
    model, ids, here, target_of = tiny("llama"), samples(4), list[StorageWeakRef](), relevance.target_of

    class Elsewhere(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory: bool) -> None:
            super().__init__(self.away, torch.clone)

        def away(self, tensor: torch.Tensor) -> torch.Tensor:
            if tensor.numel():  # torch's checkpoint saves an empty one beside what it was given
                here.append(StorageWeakRef(tensor.untyped_storage()))
            return tensor.clone()

    def target(*given: Any) -> torch.Tensor:
        y = target_of(*given)
        assert len(here) == len(model.model.layers)
        assert all(one.expired() for one in here)
        here.clear()
        return y

    expected = attribute(model, ids, gradient_checkpointing=False, **ask)
    monkeypatch.setattr(watching, "save_on_cpu", Elsewhere)
    monkeypatch.setattr(relevance, "target_of", target)
    found = attribute(model, ids, gradient_checkpointing="offload", **ask)
    for site in expected:
        assert (expected[site] - found[site]).abs().max() <= 1e-6 * expected[site].abs().max()


def test_beside_a_gpu_the_last_thing_to_try_is_offloading(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, tries, target_of = tiny("llama"), samples(4), list[Any](), relevance.target_of
    checkpointed = relevance.checkpoint_layers

    def noted(model: Any, *, offload: bool) -> Any:
        tries.append("offload" if offload else True)
        return checkpointed(model, offload=offload)

    def short_of_memory(model: Any, batch: Any) -> torch.Tensor:
        if not tries or tries[-1] is True:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return target_of(model, batch)

    monkeypatch.setattr(relevance, "checkpoint_layers", noted)
    monkeypatch.setattr(relevance, "target_of", short_of_memory)
    with pytest.raises(Sparc3Error, match=r"sample \d, .*memory"):
        attribute(model, ids)
    assert tries == [True]
    tries.clear()
    monkeypatch.setattr(engine, "_has_own_memory", lambda model: True)
    assert len(attribute(model, ids)) == 2
    assert tries == [True, "offload"]
    tries.clear()
    assert len(attribute(model, ids)) == 2
    assert tries == ["offload"]


def test_a_sample_that_does_not_fit_is_computed_twice_and_later_calls_begin_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ids = tiny("llama"), samples(4)
    expected, tries = attribute(model, ids, gradient_checkpointing=False), []
    target_of = relevance.target_of

    def short_of_memory(model: Any, batch: Any) -> torch.Tensor:
        tries.append((len(batch.samples), "forward" in model.model.layers[0].__dict__))
        if (tries[-1] != (1, True) and max(batch.lengths) > 5) or len(batch.samples) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return target_of(model, batch)

    monkeypatch.setattr(relevance, "target_of", short_of_memory)
    first = attribute(model, ids)
    assert (4, False) in tries
    assert (1, False) in tries
    tries.clear()
    second = attribute(model, ids)
    assert set(tries) == {(1, True)}
    for site in expected:
        for found in (first, second):
            assert (expected[site] - found[site]).abs().max() <= 1e-6 * expected[site].abs().max()
    with pytest.raises(Sparc3Error, match=r"sample \d, .*memory"):
        attribute(tiny("llama"), ids, gradient_checkpointing=False)


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (
            RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
            True,
        ),  # of memory pinned for a GPU
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_the_end_of_memory(error: Exception, short: bool) -> None:
    assert out_of_memory(error) == short


def test_generation_and_perplexity_remember_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = tiny("llama"), []
    model.generation_config.eos_token_id = None

    def short_of_memory(plain: Callable[..., Any], rows: int) -> Callable[..., Any]:
        def work(*args: Any, **options: Any) -> Any:
            sizes.append(len(args[rows]))
            if sizes[-1] > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return plain(*args, **options)

        return work

    monkeypatch.setattr(generation, "_generate_batch", short_of_memory(generation._generate_batch, 2))
    monkeypatch.setattr(
        perplexity, "perplexity_observations", short_of_memory(perplexity.perplexity_observations, 1)
    )
    prompts = [f"w{index + 3} w5" for index in range(8)]
    windows = [(tuple(range(3 + index, 11 + index)), 4) for index in range(8)]
    expected = [perplexity.perplexity_observations(model, [window])[0] for window in windows]
    for work in (
        lambda: generation.complete(model, Spoken(), prompts, max_new_tokens=3, batch=8),  # type: ignore[arg-type]
        lambda: perplexity.negative_log_likelihoods(model, windows, False),
    ):
        sizes.clear()
        first = work()
        assert sizes == [8, 4, 2, 2, 2, 2]
        sizes.clear()
        assert work() == first
        assert sizes == [2, 2, 2, 2]
    assert first == pytest.approx(expected, rel=1e-12)
