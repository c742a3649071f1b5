"""Each rule by itself: forward values are the function's own, and relevance x · ĝ goes where the rule says."""

from collections.abc import Callable

import pytest
import reference
import torch
from torch import Tensor, nn

from sparc3.attribution import rules
from sparc3.attribution.patching import ACTIVATIONS


def flow(y: Tensor, *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(R of y, R of each input) for a random ĝ at y."""
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=y.dtype)
    found = torch.autograd.grad(y, inputs, grad, allow_unused=True)
    return y.detach() * grad, [
        torch.zeros_like(x) if g is None else x.detach() * g for x, g in zip(inputs, found, strict=True)
    ]


def values(*shape: int, seed: int = 0) -> Tensor:
    return (
        2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ).requires_grad_()


def activation(kind: str) -> Callable[[Tensor], Tensor]:
    from transformers import activations
    from transformers.models.bloom.modeling_bloom import BloomGelu

    return {"BloomGelu": BloomGelu}.get(kind) or getattr(activations, kind, None) or getattr(nn, kind)  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_relevance_passes_an_activation_unchanged(kind: str) -> None:
    function, x = activation(kind)(), values(200)  # type: ignore[call-arg]
    y = rules.identity_rule(x, function, ACTIVATIONS[kind])
    assert torch.equal(y, function(x))
    after, (before,) = flow(y, x)
    assert torch.allclose(before, after, rtol=1e-8, atol=1e-10)
    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    assert (
        torch.autograd.grad(rules.identity_rule(zero, function, ACTIVATIONS[kind]).sum(), zero)[0]
        .isfinite()
        .all()
    )


def test_relevance_passes_a_soft_cap_unchanged_even_at_its_ceiling_and_at_zero() -> None:
    x = torch.tensor([0.0, 1e-9, 0.5, -3.0, 1e4], dtype=torch.float64, requires_grad=True)
    y = rules.soft_cap(x, 2.0)
    assert torch.equal(y, torch.tanh(x / 2.0) * 2.0)
    after, (before,) = flow(y, x)
    assert torch.allclose(before, after, rtol=1e-12)
    assert torch.autograd.grad(rules.soft_cap(x, 2.0).sum(), x)[0][0] == 1


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_gated_product_shares_its_relevance_out(share: float) -> None:
    gate, up = values(50), values(50, seed=1)
    y = rules.gated_product(gate, up, nn.functional.silu, rules.sigmoid_factor, share)
    assert torch.equal(y, nn.functional.silu(gate) * up)
    after, (to_gate, to_up) = flow(y, gate, up)
    assert torch.allclose(to_gate, share * after)
    assert torch.allclose(to_up, (1 - share) * after)


def test_norms_are_linear_maps_at_a_constant_statistic() -> None:
    x, gain, bias = values(5, 8), values(8, seed=1).detach(), values(8, seed=2).detach()
    y = rules.rms_norm(x, lambda x: gain * x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt(), gain, 1e-5)
    after, (before,) = flow(y, x)
    assert torch.allclose(before, after)
    y = rules.layer_norm(x, lambda x: nn.functional.layer_norm(x, (8,), gain, bias), gain, 1e-5)
    run = reference.Propagation(nn.Linear(1, 1), cp=True)
    run.state = {"norm.weight": gain, "norm.bias": bias}
    after, (before,) = flow(y, x)
    assert torch.allclose(y, run.layer_norm("norm", x))
    assert torch.allclose(before, run.layer_norm_back("norm", x.detach(), after))
    plain = rules.layer_norm(x, lambda x: nn.functional.layer_norm(x, (8,)), None, 1e-5)
    after, (before,) = flow(plain, x)
    assert torch.allclose(before.sum(1), after.sum(1))


def test_scaled_relevance_is_scaled_and_factor_zero_is_a_constant() -> None:
    x = values(9)
    after, (before,) = flow(rules.scale_relevance(x, 0.25), x)
    assert torch.equal(before, after * 0.25)
    assert not rules.scale_relevance(x, 0.0).requires_grad
    assert torch.equal(rules.scale_relevance(x, 0.0), x)


def test_capped_attention_is_gemmas_and_its_relevance_that_of_explicit_messages() -> None:
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    query, key, value = values(1, 4, 5, 6), values(1, 2, 5, 6, seed=1), values(1, 2, 5, 6, seed=2)
    mask = torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    module = nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    theirs, _ = eager_attention_forward(module, query, key, value, mask, scaling=0.4, softcap=3.0)
    mine, weights = rules.explicit_attention(module, query, key, value, mask, scaling=0.4, softcap=3.0)
    assert torch.equal(mine, theirs)
    after, (to_query, to_key, to_value) = flow(mine, query, key, value)
    expected = [torch.zeros_like(x) for x in (query, key, value)]
    for head in range(4):
        q, k, v, a = (
            query[0, head].detach(),
            key[0, head // 2].detach(),
            value[0, head // 2].detach(),
            weights[0, head].detach().double(),
        )
        from_weights, from_values = reference.matmul_rule(a, v, after[0, :, head])
        capped = torch.tanh(q @ k.T * 0.4 / 3.0) * 3.0
        of_scores = reference.softmax_rule(capped, a, from_weights)  # the cap passes relevance unchanged
        from_query, from_key = reference.matmul_rule(q * 0.4, k.T, of_scores)
        expected[0][0, head] += from_query
        expected[1][0, head // 2] += from_key.T
        expected[2][0, head // 2] += from_values
    for found, wanted in zip((to_query, to_key, to_value), expected, strict=True):
        assert float((found - wanted).norm() / wanted.norm()) < 1e-6  # the softmax is float32, as Gemma's
