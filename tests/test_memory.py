"""What is not computed, what is computed twice to save memory, and what happens when memory runs out all the same."""

from typing import Any

import pytest
from tiny import samples, tiny
from unchanged import fingerprint, require_same

from sparc3.attribution import attribute


def rows_seen(module: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many positions each call of a linear module computes."""
    seen, plain = [], module.forward
    monkeypatch.setattr(module, "forward", lambda x: seen.append(x.numel() // x.shape[-1]) or plain(x))  # type: ignore[func-returns-value]
    return seen


def test_padding_is_not_computed_and_the_last_layer_only_where_the_target_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
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
