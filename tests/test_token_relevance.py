"""Token relevance: figures worked out by hand, and laws that hold for every model and target."""

import pytest
import torch
from tiny import paper_model, tiny
from transformers import LlamaConfig, LlamaForCausalLM
from unchanged import fingerprint

from sparc3 import Sample, UserError
from sparc3.attribution.token_relevance import TokenRelevance, attribute_tokens
from sparc3.doctor.checks import relevance_ledger


def averaging_model() -> LlamaForCausalLM:
    """Attention that averages: queries and keys are zero, so each position reads all up to it alike."""
    config = LlamaConfig(
        vocab_size=3, hidden_size=2, intermediate_size=2, num_hidden_layers=1, num_attention_heads=1
    )
    config.rms_norm_eps = 0.0
    model = LlamaForCausalLM(config).double().eval()
    layer = model.model.layers[0]
    with torch.no_grad():
        for weight in layer.parameters():
            weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.tensor([[1, 1], [1, -1], [0, 1]]))
        model.lm_head.weight.copy_(torch.tensor([[1, 0], [1, 2], [0, 1]]))
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.fill_(1)
        model.model.norm.weight.fill_(5**0.5)
        layer.self_attn.v_proj.weight.copy_(torch.eye(2))
        layer.self_attn.o_proj.weight.copy_(torch.tensor([[2, 0], [0, 1]]))
    return model


@pytest.mark.parametrize(
    ("method", "relevance"), [("cp-lrp", [1, 2]), ("lrp", [0.5, 1.5]), ("gradient", [0, -0.2])]
)
def test_two_tokens_on_paper(method: str, relevance: list[float]) -> None:
    """Tokens A = (1, 1) and B = (1, −1), both of rms 1. At B attention gives W_o (A + B)/2 = (2, 0), so
    h = (3, −1), of rms √5, which the last norm's gain takes back. Logits (3, 1, −1), so y = 3 and ĝ = (1, 0).
    B by itself: (1, −1) · (1, 0) = 1. W_oᵀ ĝ = (2, 0), half of it to each value: A (1, 1) · (1, 0) = 1,
    B (1, −1) · (1, 0) = 1. CP-LRP: A 1, B 2, together y; AttnLRP lets half through a value: A ½, B 1½.

    Plain gradient: ∂y/∂h = (1, 0) − 3 h / 10 = (0.1, 0.3), so B by itself −0.2; a norm's gradient is at right
    angles to its input, so nothing is left of what goes through attention.
    """
    (found,) = attribute_tokens(averaging_model(), [[0, 1]], method=method)
    assert found.relevance.tolist() == pytest.approx(relevance, abs=1e-6)
    assert found.y == pytest.approx(3)
    assert (found.tokens, found.targets, found.positions) == (("[0]", "[1]"), ("[0]",), (1,))


def test_one_token_on_paper() -> None:
    """The model of test_attribution: its ledger has 8 at the embedding by CP-LRP, and 1 by AttnLRP."""
    for method, relevance in (("cp-lrp", 8), ("lrp", 1)):
        (found,) = attribute_tokens(paper_model(), [[3]], method=method)
        assert found.relevance.tolist() == pytest.approx([relevance], abs=1e-5)


@pytest.mark.parametrize("target", ["predicted", "next"])
def test_cp_relevance_of_all_tokens_is_the_target(target: str) -> None:
    """In a model without biases and learned positions nothing else gets any."""
    samples = [[3, 1, 4, 1, 5, 9], [2, 7]]
    for found in attribute_tokens(tiny("llama"), samples, method="cp-lrp", target=target):
        assert float(found.relevance.sum()) == pytest.approx(found.y, rel=1e-5)
        assert len(found.targets) == (1 if target == "predicted" else len(found.tokens) - 1)


def test_log_probabilities_are_explained_as_such() -> None:
    """Gradient × input against autograd at the embeddings, and y against the model's own loss."""
    model, ids = tiny("llama"), [3, 1, 4, 1, 5]
    (found,) = attribute_tokens(model, [ids], method="gradient", target="logprob")
    x = model.get_input_embeddings()(torch.tensor([ids])).detach().requires_grad_()
    loss = model(inputs_embeds=x, labels=torch.tensor([ids])).loss
    assert found.y == pytest.approx(-float(loss.detach()) * (len(ids) - 1), rel=1e-5)
    (gradient,) = torch.autograd.grad(-loss * (len(ids) - 1), x)
    torch.testing.assert_close(
        found.relevance, (gradient * x).sum(-1)[0].detach().float(), rtol=1e-4, atol=1e-6
    )
    (logits,) = attribute_tokens(model, [ids], method="gradient", target="next")
    assert not torch.allclose(found.relevance, logits.relevance, rtol=1e-2)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_it_is_what_the_ledger_has_at_the_embeddings(name: str) -> None:
    model, ids = tiny(name), [3, 1, 4, 1, 5, 9, 2, 6]
    for method in ("lrp", "cp-lrp"):
        (found,) = attribute_tokens(model, [ids], method=method)
        book = relevance_ledger(model, ids, cp=method == "cp-lrp")
        torch.testing.assert_close(found.relevance, book.tokens.float(), rtol=1e-5, atol=1e-6)
        assert found.y == pytest.approx(book.target)


def test_texts_and_contrasts(demo: tuple[object, object]) -> None:
    model, tokenizer = demo
    text = "It was a rainy day and Mary went to the"
    sample = Sample(text=text, target=" garden", contrast=" park")
    (contrast,) = attribute_tokens(model, [sample], tokenizer=tokenizer, target="contrast")
    (plain,) = attribute_tokens(model, [text], tokenizer=tokenizer)
    assert "".join(plain.tokens).strip().endswith("Mary went to the")
    assert (contrast.targets, contrast.against) == ((" garden",), (" park",))
    assert contrast.relevance.shape == plain.relevance.shape == (len(plain.tokens),)
    assert plain.relevance.isfinite().all()
    assert plain.relevance.abs().sum() > 0


def test_the_model_is_as_before() -> None:
    model = tiny("opt")
    before = fingerprint(model)
    attribute_tokens(model, [[1, 2, 3]])
    assert fingerprint(model) == before


def test_other_methods_have_no_token_relevance() -> None:
    with pytest.raises(UserError, match="wanda"):
        attribute_tokens(tiny("llama"), [[1]], method="wanda")


def test_a_notebook_shows_a_heat_map() -> None:
    tokens, values = ("<b>", "\n", " fool"), torch.tensor([-1.0, 0.0, 2.0])
    shown = TokenRelevance(tokens, values, (" x",), (2,), (" y",), 1.5, "lrp")._repr_html_()
    assert "&lt;b&gt;" in shown
    assert "<b>x" not in shown.replace("<b> x</b>", "")
    assert [part.split(")")[0] for part in shown.split("rgba(")[1:]] == [
        "47, 95, 179, 0.38",
        "47, 95, 179, 0.00",
        "200, 71, 27, 0.75",
    ]


def test_epsilon_is_that_of_attribute() -> None:
    """At a token's embedding the first norm and map come after it, so a large ε damps what arrives there."""
    plain, damped, again = (
        attribute_tokens(tiny("llama"), [[3, 1, 4, 1, 5]], epsilon=epsilon)[0].relevance
        for epsilon in (0.0, 0.5, 0.5)
    )
    assert torch.equal(damped, again)
    assert float(damped.abs().sum()) < 0.9 * float(plain.abs().sum())
