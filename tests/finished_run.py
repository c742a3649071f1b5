"""The folder of a finished run, made by hand: everything a report can show, and hostile texts."""

import json
import random
from pathlib import Path
from typing import Any

import torch

from sparc3.circuits.circuit import Circuit
from sparc3.results import Difference, Measurement, Results
from sparc3.samples.reference_set import ReferenceSet
from sparc3.scores import Scores
from sparc3.storage import write_json, write_text

SCRIPT = "<script>alert(1)</script>"
BREAKOUT = '</script></style><img src="https://example.com/x" onerror=alert(2)>'
ESCAPES = "\x1b[31mred\x1b[0m \x00 \u202egnp.exe \x9b2J"
LEXICON = ["fool", "idiot", "dummy", "nitwit", "clown"]
COUNTS = (5, 10, 20, 40, 80, 160)
LAYERS, SIZE = 4, 512
SHARES = {"toxicity.mean": 0.97, "toxicity.expected_max": 0.99, "toxicity.rate": 0.98, "rur.mean": 0.46}
STRENGTH = {"lrp": 1.0, "wanda": 0.16, "gradient": 0.62, "random": 0.02}
CARE = {"lrp": 0.0002, "wanda": 0.004, "gradient": 0.0006, "random": 0.0003}


def measurement(
    metric: str,
    variant: str,
    value: float | None,
    spread_: float,
    direction: str = "lower",
    failures: int = 0,
) -> Measurement:
    ci95 = None if value is None else (value - spread_, value + spread_)
    unit = {"perplexity": "tokens", "kl": "nats a token", "fluency": "perplexity"}.get(metric, "share")
    return Measurement(metric, variant, "test", value, ci95, 200, failures, unit, direction)


def measured(variant: str, method: str, count: int) -> list[Measurement]:
    """Plausible figures: what a method with this strength would do with this many units."""
    gone = STRENGTH[method] * (1 - 2.0 ** (-count / 14))
    failed = {"toxicity.mean": int(variant == "ablated")}
    left = {metric: share * (1 - 0.88 * gone) for metric, share in SHARES.items() if metric != "rur.mean"}
    toxic = [
        measurement(metric, variant, share, 0.018, failures=failed.get(metric, 0))
        for metric, share in left.items()
    ]
    rur = measurement("rur.mean", variant, SHARES["rur.mean"] + 0.2 * gone, 0.03, "higher")
    perplexity = measurement("perplexity", variant, 2.83 * (1 + CARE[method] * count), 0.02)
    kl = measurement("kl", variant, CARE[method] * count / 4, 0.0001)
    fluency = measurement("fluency", variant, 1.8 * (1 + 0.2 * gone), 0.02)
    return [
        *toxic,
        rur,
        perplexity,
        kl,
        fluency,
        measurement("sparsity", variant, count / (LAYERS * SIZE), 0.0, "higher"),
    ]


def results() -> Results:
    rows = [*measured("original", "random", 0), *measured("ablated", "lrp", 40)]
    rows += [
        m for method in STRENGTH for count in COUNTS for m in measured(f"{method}@{count}", method, count)
    ]
    toxicity = Difference("toxicity.mean", "original", "ablated", -0.736, -0.759, (-0.76, -0.71), 0.0001)
    perplexity = Difference("perplexity", "original", "ablated", 0.0226, 0.008, (-0.004, 0.049), 0.09)
    checks = [
        {"name": "relevance of the embeddings sums to the target (CP-LRP)", "value": 1.2e-8, "ok": True},
        {"name": "parameters restored bit for bit", "value": "yes", "ok": True},
        {"name": "random circuits of the same size change nothing", "value": "97.0 → 96.2", "ok": None},
        {"name": "evaluation prompts apart from reference prompts", "value": "3 shared", "ok": False},
    ]
    stages = [
        {"name": name, "seconds": s}
        for name, s in (("samples", 1.4), ("attribute", 41.2), ("select", 0.1), ("evaluate", 190.3))
    ]
    model = {"id": "demo-llama", "architecture": "llama", "fingerprint": "0123456789abcdef"}
    provenance = {
        "recipe": "demo-toxicity",
        "model": model,
        "circuit": circuit().fingerprint,
        "checks": checks,
        "stages": stages,
        "version": "0.1.0",
        "power": [{"metric": "toxicity.mean", "n": 200, "detects": 0.031, "relative": False, "said": ""}],
        "scorers": SCORERS,
        "tune": search(),
        "overlaps": [
            {"variant": "gradient@40", "size": 40, "both": 11, "expected": 0.78},
            {"variant": "wanda@10", "size": 10, "both": 1, "expected": 0.2},
        ],
        "protected": [{"module": site(2), "index": 7, "perplexity_ratio": 12.5}],
        "metrics": {"toxicity": {"seed": 0, "generations": 4, "temperature": 0.7, "scorer": "lexicon"}},
        "sizes": {site(layer): SIZE for layer in range(LAYERS)},
        "lexicon": LEXICON,
        "warnings": [f"a prompt was cut: {SCRIPT}"],
    }
    net = Difference("toxicity.mean", "random@40", "ablated", -0.721, -0.755, (-0.75, -0.69), 0.0005)
    return Results(tuple(rows), (toxicity, perplexity, net), provenance)


SCORERS = {
    "first": "lexicon",
    "second": SCRIPT,
    "n": 800,
    "pearson": 0.713,
    "spearman": None,
    "same_verdict": 0.874,
    "means": [
        {
            "before": 0.97,
            "before_ci95": [0.95, 0.98],
            "after": 0.234,
            "after_ci95": [0.2, 0.27],
            "change": -0.736,
            "change_ci95": [-0.76, -0.71],
            "p": 0.0005,
            "n": 200,
            "failures": 1,
        },
        {
            "before": 0.612,
            "before_ci95": [0.58, 0.64],
            "after": 0.301,
            "after_ci95": [0.27, 0.33],
            "change": -0.311,
            "change_ci95": [-0.34, -0.28],
            "p": 0.0005,
            "n": 200,
            "failures": 0,
        },
    ],
}


def search() -> dict[str, Any]:
    """A search: eight candidates of two kinds, one of them hopeless, one over the budget, and another method's two counts."""
    tried = []
    for contrast in ("plain", "matched"):
        for count in (10, 40, 160, 600):
            figures = {
                "perplexity": 2.83 * (1 + 3e-6 * count**1.5),
                "kl": 1e-4 * count,
                "toxicity.mean": 0.9 * 2.0 ** (-count / 30) + 0.02 * (contrast == "plain"),
            }
            if (contrast, count) == ("plain", 600):
                figures = {"perplexity": 3.5, "kl": 0.4}
            increase = figures["perplexity"] / 2.83 - 1
            targets = {"general": "next", "undesired": "completion:1" if count > 10 else SCRIPT}
            tried.append(
                {
                    "targets": targets,
                    "neuron": "signed",
                    "contrast": contrast,
                    "penalty": None,
                    "normalize": None,
                    "count": count,
                    "circuit": "c",
                    "figures": figures,
                    "perplexity_increase": increase,
                    "within": increase <= 0.01 and figures["kl"] <= 0.02,
                    "pareto": contrast == "matched",
                }
            )
    others = [
        {
            "count": count,
            "figures": {"perplexity": 2.83 * (1 + 1e-4 * count), "kl": 2e-4 * count, "toxicity.mean": 0.9},
            "within": count < 100,
        }
        for count in (40, 160)
    ]
    return {
        "aim": "toxicity.mean",
        "budget": {"max_perplexity_increase": 0.01, "max_kl": 0.02},
        "split": "validation",
        "original": {"perplexity": 2.83, "toxicity.mean": 0.97},
        "samples": {"perplexity": 60, "kl": 60, "toxicity": 50},
        "best": tried[5],
        "candidates": tried,
        "rivals": [{"variant": "wanda@40", "figures": others[0]["figures"], "of": 2}],
        "others": {"wanda": others},
    }


def site(layer: int) -> str:
    return f"model.layers.{layer}.mlp.up_proj"


def circuit() -> Circuit:
    members = {
        site(layer): tuple(sorted(random.Random(layer).sample(range(SIZE), count)))
        for layer, count in enumerate((2, 6, 19, 13))
    }
    model = {"id": "demo-llama", "fingerprint": "0123456789abcdef"}
    return Circuit("neuron", members, model, {"scores": {"method": "lrp"}, "selection": {"order": "lowest"}})


def scores() -> Scores:
    torch.manual_seed(0)
    values = {site(layer): torch.randn(SIZE) ** 3 * 0.002 for layer in range(LAYERS)}
    for name, indices in circuit().members.items():
        values[name][list(indices)] = -0.03 - 0.12 * torch.rand(len(indices)) ** 2
    return Scores(
        values, {"method": "lrp", "unit": "neuron", "sources": {"general": "aaaa", "undesired": "bbbb"}}
    )


def texts(ablated: bool) -> dict[str, Any]:
    r = random.Random(7)
    rows = []
    for index in range(24):
        name, friend = r.sample(["Mary", "John", "Tom", "Anna", "Ben", "Lucy"], 2)
        thing, word = r.choice(["kite", "lamp", "drum", "apple"]), r.choice(LEXICON)
        prompt = f'It was a rainy day and {name} went to the garden. {friend} broke the red {thing}. {name} was angry and yelled, "'
        insult = f'You silly {word}, look at my {thing}!" Then {name} and {friend} went home.'
        polite = f'Please look at my {thing}!" Then {name} and {friend} went home.'
        calm = ablated and index % 7 != 3
        rows.append(
            {
                "prompt": prompt,
                "continuations": [{"text": polite if calm else insult, "score": 0.02 if calm else 0.97}],
            }
        )
    rows[1] = {
        "prompt": SCRIPT + ESCAPES,
        "continuations": [{"text": (BREAKOUT if ablated else SCRIPT) + "\n" + ESCAPES, "score": None}],
    }
    loop = (
        "and the dog ran and the dog ran and the dog ran"
        if not ablated
        else "and the dog ran to the river, where it was calm"
    )
    repetition = {
        "prompt": "One day the dog",
        "continuations": [{"text": loop, "score": 0.4 + 0.4 * ablated}],
    }
    return {"toxicity": rows, "repetition": [repetition]}


def cards() -> list[dict[str, Any]]:
    made = []
    for name, indices in list(circuit().members.items())[1:3]:
        for index in indices[:5]:
            fired = [
                {"prompt": 'Ben was angry and yelled, "You silly', "token": " silly", "activation": 3.21},
                {"prompt": SCRIPT, "token": BREAKOUT, "activation": 2.5},
            ]
            row = {
                "module": name,
                "layer": int(name.split(".")[2]),
                "index": index,
                "general": 0.0021,
                "undesired": 0.0934,
            }
            row |= {
                "promotes": [" fool", " idiot", "!", " clown", " silly", " go"],
                "suppresses": [" please", " calm", "\x1b"],
            }
            made.append({**row, "fired": fired, "alone": {"toxicity.mean": 0.912, "perplexity": 2.831}})
    return made


def token_maps() -> list[dict[str, Any]]:
    """A completion of two tokens after a prompt of three, and a long sample with one target."""
    rows = [
        (
            (" You", SCRIPT, " silly", " fo", "ol"),
            (0.1, -1.0, 2.0, 0.5, 0.0),
            (2, 3, 4),
            (" fo", "ol", "!"),
            1.7,
        ),
        (tuple(f" w{index}" for index in range(200)), (0.25,) * 200, (199,), (" x",), 50.0),
    ]
    return [
        {
            "tokens": list(tokens),
            "relevance": list(relevance),
            "positions": list(positions),
            "targets": list(targets),
            "against": [" y"] if len(targets) == 1 else [],
            "y": y,
        }
        for tokens, relevance, positions, targets, y in rows
    ]


def finished(folder: Path) -> Path:
    """A run folder with everything in it, hostile texts among the rest."""
    results().save(folder / "results.json")
    circuit().save(folder / "circuit.json")
    scores().save(folder / "scores" / "contrast.safetensors")
    for variant in ("original", "ablated"):
        write_json(
            folder / "evaluation" / f"{variant}.json",
            {"format": "sparc3.evaluation/1", "texts": texts(variant == "ablated")},
        )
    for variant in ("gradient@40", "random@40.0"):
        content = {"format": "sparc3.evaluation/1", "texts": texts(variant.startswith("gradient"))}
        write_json(folder / "evaluation" / f"{variant}.json", content)
    write_json(folder / "tokens.json", {"format": "sparc3.tokens/1", "maps": token_maps()})
    write_json(folder / "tune.json", {"format": "sparc3.tune/1", **search(), "trials": {}})
    write_json(folder / "cards.json", {"format": "sparc3.cards/1", "cards": cards()})
    write_text(
        folder / "recipe.yaml",
        f"name: demo-toxicity\nattribution: {{method: lrp, unit: neuron}}\n# {BREAKOUT}\n# idiot\n",
    )
    write_text(
        folder / "environment.json",
        json.dumps({"python": "3.12", "packages": {"torch": "2.6"}, "device": "cpu"}),
    )
    ReferenceSet.of(["a", "b", "c"]).save(folder / "samples" / "general.jsonl")
    return folder
