"""The doctor passes what is right, fails what is wrong, refuses what it does not know, and never runs a checkpoint's code."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_attribution import SHARED
from tiny import samples, tiny
from torch import Tensor, nn
from unchanged import fingerprint, require_same

from sparc3.attribution import patching, rules
from sparc3.doctor import examine as whole
from sparc3.doctor.checks import Finding
from sparc3.doctor.examine import Specimen, shrink_config
from sparc3.doctor.second_opinion import exact_copy, record_flows
from sparc3.errors import UnsupportedModel
from sparc3.models.families import FAMILIES
from sparc3.models.sites import sites_of

Call = Callable[..., Any]


def examined(
    name: str = "llama-bias", change: Callable[[Any], None] = lambda model: None, **changes: Any
) -> whole.Examination:
    model = tiny(name, dtype=torch.float32, **changes)
    change(model)
    return whole.examine_specimen(Specimen(model, samples(3), ()))


# The command ----------------------------------------------------------------------------------------------------------


def test_without_a_model_it_tells_what_is_here(sparc3: Call) -> None:
    code, out, err = sparc3("doctor")
    said = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert (code, err) == (0, "")
    assert said["torch"] == torch.__version__
    assert {"Python", "transformers", "CUDA", "hub", "accelerate"} <= set(said)


def test_the_demo_passes(sparc3: Call) -> None:
    code, out, _ = sparc3("doctor", "demo")
    assert code == 0
    assert "mlp.up" in out
    assert " neurons" in out
    assert " heads" in out
    assert out.count(" pass ") == 6
    assert "FAIL" not in out


def test_a_pretrained_checkpoint_passes(sparc3: Call) -> None:
    folder = SHARED / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip("no ../shared/models/stories260k here")
    assert sparc3("doctor", folder)[0] == 0


def test_a_checkpoint_without_a_tokenizer_is_fed_random_tokens(tmp_path: Path, sparc3: Call) -> None:
    tiny("gpt2", dtype=torch.float32).save_pretrained(tmp_path)
    code, out, _ = sparc3("doctor", tmp_path)
    assert code == 0
    assert "random tokens" in out
    assert "random weights" not in out


@pytest.mark.parametrize("alone", ["folder", "file"])
def test_of_a_configuration_alone_it_makes_random_weights_and_says_so(
    alone: str, tmp_path: Path, sparc3: Call
) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model(
        "qwen3",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=90,
    ).save_pretrained(tmp_path)
    code, out, _ = sparc3("doctor", tmp_path if alone == "folder" else tmp_path / "config.json")
    assert code == 0
    assert "random weights" in out
    assert " layers, " not in out


def test_a_failed_check_ends_with_exit_code_1_and_its_name(
    monkeypatch: pytest.MonkeyPatch, sparc3: Call
) -> None:
    plain = rules.sigmoid_factor
    monkeypatch.setitem(patching.ACTIVATIONS, "SiLUActivation", lambda x: 0.9 * plain(x))
    code, out, err = sparc3("doctor", "demo")
    assert code == 1
    assert "FAIL" in out
    assert "AttnLRP" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("kind", ["t5", "bert", "mamba"])
def test_another_architecture_is_refused_by_name(kind: str, tmp_path: Path, mistake: Call) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    assert f"'{kind}'" in mistake("doctor", tmp_path)
    assert f"'{kind}'" in mistake("doctor", tmp_path / "config.json")


@pytest.mark.parametrize("kind", ["own", "falcon"])
def test_code_from_a_checkpoint_is_not_run(kind: str, tmp_path: Path, sparc3: Call) -> None:
    config = {
        "model_type": kind,
        "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    }
    small = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 40}
    (tmp_path / "config.json").write_text(json.dumps({**config, **small}))
    (tmp_path / "own.py").write_text("raise SystemExit('this code ran')")
    code, out, err = sparc3("doctor", tmp_path)
    if kind == "own":
        assert code == 2
        assert "Python code" in err
    else:  # transformers has its own Falcon, which is used
        assert code == 0
        assert "FalconForCausalLM" in out


def test_a_configuration_without_what_its_architecture_needs_is_refused_by_name(
    tmp_path: Path, mistake: Call
) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model("hunyuan_v1_dense").save_pretrained(tmp_path)
    assert "head_dim" in mistake("doctor", tmp_path)


def test_mistakes_are_one_line(tmp_path: Path, mistake: Call) -> None:
    assert "./nomodel" in mistake("doctor", "./nomodel")
    assert "'float32'" in mistake("doctor", "demo", "--dtype", "float23")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_act": "sinus"}')
    assert re.search("llama.*'sinus'", mistake("doctor", tmp_path))


# The checks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["llama-bias", "opt", "gpt2", "gemma2", "falcon", "bloom", "gpt-neo", "phi3"]
)
def test_families_pass_and_are_left_as_they_were(name: str) -> None:
    model = tiny(name, dtype=torch.float32)
    before = fingerprint(model)
    found = whole.examine_specimen(Specimen(model, samples(3), ()))
    assert not found.failures, found.failures
    require_same(fingerprint(model), before)
    figures = [finding.value for finding in found.findings if finding.is_passed]
    assert len(figures) == 6
    assert figures[2] < (1e-8 if name == "bloom" else 1e-12), "the copy computes in float64 throughout"


def test_a_wrong_share_of_the_attention_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def shared(query_key_value: Any, asked: rules.RuleSet) -> tuple[Tensor, ...]:
        shares = (0.0, 0.5, 0.5) if asked == rules.ATTN_LRP else asked.shares
        return tuple(
            rules.scale_relevance(x, share) for x, share in zip(query_key_value, shares, strict=True)
        )

    monkeypatch.setattr(patching, "_share_out", shared)
    assert [finding.name for finding in examined().failures] == [
        "AttnLRP equals its rules on torch's functions"
    ]


def test_relevance_that_is_lost_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = patching._gain
    monkeypatch.setattr(patching, "_gain", lambda norm, family: 1.001 * plain(norm, family))
    assert "CP-LRP's ledger adds up to the logit" in [finding.name for finding in examined().failures]


def test_a_changed_forward_value_and_a_lasting_change_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = rules.rms_norm
    monkeypatch.setattr(rules, "rms_norm", lambda x, norm, gain, eps: plain(x, norm, gain, eps) * (1 + 1e-6))
    assert "forward values are the same under the rules" in [finding.name for finding in examined().failures]
    monkeypatch.undo()

    def forgetful(model: Any) -> None:
        norm = model.model.norm
        norm.register_forward_hook(lambda *_: norm.__dict__.update(last=object()))

    restored = next(finding for finding in examined(change=forgetful).failures if "restored" in finding.name)
    assert "model.norm" in restored.note


def test_what_overflows_in_bfloat16_fails_and_names_the_site() -> None:
    def huge(model: Any) -> None:
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(float("inf"))

    found = {finding.name: finding for finding in examined(change=huge).findings}
    assert found["relevance is finite in bfloat16"].is_passed is False
    assert "layers" in found["relevance is finite in bfloat16"].note


def test_an_unknown_module_in_the_path_is_refused_by_its_place() -> None:
    with pytest.raises(UnsupportedModel, match=r"model\.norm\b.*Softsign"):
        examined(change=lambda model: setattr(model.model, "norm", nn.Softsign()))


def test_no_figure_and_nan_do_not_pass() -> None:
    assert [Finding("x", value, 1.0).is_passed for value in (None, float("nan"), 2.0, 1.0)] == [
        False,
        False,
        False,
        True,
    ]
    assert Finding("x", 2.0).is_passed is None


def test_second_opinion_leaves_the_model_alone_and_knows_no_names() -> None:
    model = exact_copy(tiny("gpt2", dtype=torch.float32))
    before = fingerprint(model)
    seen = record_flows(model, samples()[0], sites_of(model, ("mlp.up", "attn.o")))
    require_same(fingerprint(model), before)
    assert all(flow.z.dtype == flow.of_z.dtype == torch.float64 for flow in seen.values())


def test_a_large_configuration_gives_a_small_model_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig

    monkeypatch.setattr(whole, "LARGE", 1000)
    config = AutoConfig.for_model(
        "qwen2",
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=5,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=1300,
    )
    model, note = whole.random_model(config)
    assert re.search(r"\b2 of 5 layers.*\b1,000 of 1,300 tokens.*\b8 of 16 heads", note)
    assert all(parameter.std() > 0 for parameter in model.parameters())


# Smaller models of a configuration ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "kept"),
    [
        (
            "llama",
            {
                "hidden_size": 4096,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "num_hidden_layers": 32,
                "intermediate_size": 14336,
            },
            (2, 8, 1024, 3584),
        ),
        (
            "gemma3_text",
            {
                "hidden_size": 2560,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "num_hidden_layers": 34,
                "intermediate_size": 10240,
                "head_dim": 256,
            },
            (6, 4, 1280, 5120),
        ),
        (
            "falcon",
            {
                "hidden_size": 4544,
                "num_attention_heads": 71,
                "num_hidden_layers": 32,
                "ffn_hidden_size": 18176,
            },
            (2, 2, 128, None),
        ),
        (
            "gpt_neo",
            {
                "hidden_size": 2560,
                "num_layers": 32,
                "num_heads": 20,
                "attention_types": [[["global", "local"], 16]],
            },
            (2, 2, 256, None),
        ),
    ],
)
def test_smaller_keeps_heads_as_wide_and_every_kind_of_layer(
    kind: str, settings: dict[str, Any], kept: tuple[int, ...]
) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind, **settings)
    small, cuts = shrink_config(config)
    layers, heads, width, inner = kept
    assert (small.num_hidden_layers, small.num_attention_heads, small.hidden_size) == (layers, heads, width)
    assert inner is None or small.intermediate_size == inner
    assert small.hidden_size / small.num_attention_heads == config.hidden_size / config.num_attention_heads
    assert set(getattr(small, "layer_types", None) or []) == set(getattr(config, "layer_types", None) or [])
    assert f"{layers} of {config.num_hidden_layers} layers" in cuts


# The page of supported models -----------------------------------------------------------------------------------------


def test_the_committed_table_lists_exactly_the_rows_of_the_code() -> None:
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    table = page.partition("<!-- models:")[2].partition("<!-- end of models -->")[0]
    rows = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]]
        for line in table.splitlines()
        if line.startswith("| `")
    ]
    assert [row[0] for row in rows] == sorted(FAMILIES)
    for kind, models, up, out, gap, difference in rows:
        assert models == FAMILIES[kind].models != ""
        assert (up, out) == (FAMILIES[kind].describe_role("mlp.up"), FAMILIES[kind].describe_role("attn.o"))
        assert float(gap) <= (1e-8 if kind == "bloom" else 1e-12)
        assert float(difference) <= 1e-6
