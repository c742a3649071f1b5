"""AurA and Det-0: the AUROC against one counted by hand, damping in the weights against damping in a hook."""

from typing import Any

import pytest
import torch
from tiny import tiny
from unchanged import fingerprint, require_same

from sparc3 import UserError
from sparc3.attribution.activations import aura_factors, auroc, expertise
from sparc3.circuits.ablate import Damping, damp
from sparc3.models.sites import family_of, layers_of, sites_of
from sparc3.samples.reference_set import ReferenceSet, Sample
from sparc3.scores import Scores


def test_auroc_by_hand_with_ties() -> None:
    # Pairs (positive, negative): 1 against 0, 1, 1 is 1 + ½ + ½; 3 beats all; 1 again: 2 + 3 + 2 of 9.
    assert float(
        auroc(torch.tensor([[1.0], [3.0], [1.0]]), torch.tensor([[1.0], [0.0], [1.0]]))[0]
    ) == pytest.approx(7 / 9)


def test_auroc_is_the_rank_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    positive, negative = (torch.randint(0, 6, (n, 5), generator=generator).float() for n in (7, 11))
    both = torch.cat([positive, negative])
    for column in range(5):
        values = both[:, column]
        ranks = torch.tensor(
            [float((values < v).sum()) + (float((values == v).sum()) + 1) / 2 for v in values]
        )
        u = float(ranks[:7].sum()) - 7 * 8 / 2
        assert float(auroc(positive, negative)[column]) == pytest.approx(u / 77, abs=1e-12)


def test_factors_are_auras() -> None:
    scores = Scores({"a": torch.tensor([0.4, 0.5, 0.75, 1.0]), "b": torch.tensor([0.9, 0.75])})
    assert aura_factors(scores)["a"].tolist() == [1.0, 1.0, 0.5, 0.0]
    assert aura_factors(scores)["b"].tolist() == pytest.approx([0.2, 0.5])
    two = aura_factors(scores, {"a": (2, 3), "b": (0,)})
    assert two["a"].tolist() == [1.0, 1.0, 0.5, 0.0]
    assert two["b"].tolist() == pytest.approx([0.2, 1.0])


def test_expertise_reads_the_largest_activation_and_the_completion() -> None:
    model = tiny("opt", dtype=torch.float32)
    one = [Sample(input_ids=(3, 5, 7, 9)), Sample(input_ids=(4, 6))]
    other = [Sample(input_ids=(8, 10, 12))]
    before = fingerprint(model)
    found = expertise(model, ReferenceSet(tuple(one)), ReferenceSet(tuple(other)))
    require_same(before, fingerprint(model))
    site = sites_of(model, ["mlp.up"])[0]
    largest = []
    with torch.no_grad():
        for sample in (*one, *other):
            outputs: list[Any] = []
            hook = site.module.register_forward_hook(lambda m, a, out, outputs=outputs: outputs.append(out))
            model(torch.tensor([sample.input_ids]))
            hook.remove()
            largest.append(outputs[0].reshape(-1, site.out).amax(0))
    expected = auroc(torch.stack(largest[:2]), torch.stack(largest[2:]))
    assert found[site.name].tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["llama-bias", "opt", "gpt2", "phi3", "glm", "bloom"])
def test_damping_scales_the_neurons_output_and_is_undone(name: str) -> None:
    model = tiny(name)
    sites = sites_of(model, ["mlp.up"])
    factors = {site.name: torch.linspace(0, 1, site.out) for site in sites}
    ids = torch.tensor([[3, 5, 7, 9, 4]])
    before = fingerprint(model)
    with damp(model, Damping(factors)), torch.no_grad():
        found = model(ids).logits
    require_same(before, fingerprint(model))
    hooks = []
    for site, layer in zip(sites, layers_of(model), strict=True):
        down = layer.get_submodule(family_of(model).roles["mlp.down"])
        hooks.append(
            down.register_forward_pre_hook(
                lambda m, args, f=factors[site.name]: (args[0] * f.double(), *args[1:])
            )
        )
    with torch.no_grad():
        expected = model(ids).logits
    for hook in hooks:
        hook.remove()
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)  # a factor is float32
    assert not torch.allclose(found, model(ids).logits)


def test_damping_of_another_model_is_refused() -> None:
    with pytest.raises(UserError, match="nowhere"), damp(tiny("llama"), Damping({"nowhere": torch.ones(3)})):
        pass
