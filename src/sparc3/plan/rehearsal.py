"""The rehearsal: sparc3's own code and the model's run once on one batch that has no content. So no formula
for any architecture stands here."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..attribution.methods import Method, settings_for
from ..attribution.patching import frozen
from ..attribution.sums import Settings, Sums
from ..evaluation import generate, perplexity, tasks
from ..experiment import prune_sequentially
from ..models.sites import layers_of
from ..samples.batches import Batch, Encoded, make_batch
from .costs import Hardware, Shaped, TensorCosts

CPU = torch.device("cpu")
FEW = 1
"""Of a larger batch whose samples are gone through one by one, so many are rehearsed, and twice as many, and
the rest lies on that line."""


@dataclass(frozen=True)
class Cost:
    """Of one batch.

    Attributes:
        live: most bytes at once beside the weights.
        tokens: padded ones, so that what a whole set costs can be told from one batch.
    """

    live: int
    operations: float
    seconds: float
    tokens: int

    def beyond(self, more: "Cost", steps: float) -> "Cost":
        """So many times as much further along the line from this to `more`."""

        def along(one: float, two: float) -> float:
            return one + (two - one) * steps

        return Cost(
            round(along(self.live, more.live)),
            along(self.operations, more.operations),
            along(self.seconds, more.seconds),
            round(along(self.tokens, more.tokens)),
        )


class Rehearsal:
    """What one batch of each kind of work costs on the hardware; work of the same shape is rehearsed once."""

    def __init__(self, shaped: Shaped, hardware: Hardware) -> None:
        self.shaped, self.hardware = shaped, hardware
        self._known: dict[Any, Cost] = {}

    def attribution(
        self, settings: Settings, roles: tuple[str, ...], groups: Sequence[Sequence[Encoded]]
    ) -> Cost:
        """Of the largest of these batches; of weights, whose sums grow in the first batch, with what a second
        adds.

        Sums of weights beside a GPU are not counted here, wherever they are.
        """
        method, settings = settings_for(replace(settings, sums_device="cpu"), roles)
        if method.run is None:
            return Cost(0, 0.0, 0.0, 1)
        many = len(groups[0])
        if (
            settings.neuron == "abs" and settings.unit == "neuron" and method.targeted and many > 2 * FEW
        ):  # sample by sample: much to go through
            few, more = (
                self._attribution(method, settings, roles, [groups[0][:count]]) for count in (FEW, 2 * FEW)
            )
            return few.beyond(more, many / FEW - 1)
        twice = settings.unit == "weight" and method.targeted
        return self._attribution(method, settings, roles, groups[: 2 if twice else 1])

    def _attribution(
        self, method: Method, settings: Settings, roles: tuple[str, ...], groups: Sequence[Sequence[Encoded]]
    ) -> Cost:
        assert method.run
        run, batches = method.run, list[Batch]()
        key = (
            settings,
            roles,
            tuple((len(group), len(group[0].ids), len(group[0].positions)) for group in groups),
        )
        with self.shaped.active():
            sites, sums = self.shaped.sites(roles), Sums(settings)
            apart = (
                [sums.matrix(site) for site in sites]
                if settings.unit == "weight" and method.targeted and self.hardware.kind == "cuda"
                else []
            )

            def work() -> None:
                batches.extend(make_batch(group, CPU) for group in groups)
                for _ in run(self.shaped.model, batches, sites, settings, sums):
                    pass
                if self.hardware.kind == "cpu":
                    for site in sites:
                        method.finish(site, sums.totals.pop(site.name), sums)

            return self._count(key, work, sum(len(group) * len(group[0].ids) for group in groups), apart)

    def sequential(self, roles: tuple[str, ...], groups: Sequence[Sequence[Encoded]]) -> Cost:
        """Of all batches on their way through the layers: each waits before a layer until the layer is
        pruned."""
        few, more = (self._sequential(roles, groups[0], count) for count in (1, 2))
        return few.beyond(more, len(groups) - 1)

    def _sequential(self, roles: tuple[str, ...], group: Sequence[Encoded], count: int) -> Cost:
        model, many = self.shaped.model, count * len(group) * len(group[0].ids)
        with self.shaped.active(), frozen(model), torch.no_grad():
            sites = self.shaped.sites(roles)

            def work() -> None:
                flows = [
                    prune_sequentially.capture_layer_inputs(model, make_batch(group, CPU))
                    for _ in range(count)
                ]
                for index, layer in enumerate(layers_of(model)):
                    prune_sequentially.layer_scores(
                        layer, [site for site in sites if site.layer == index], flows, {}
                    )
                    for flow in flows:
                        flow.hidden = flow.through(layer)

            return self._count(("sequential", roles, len(group), len(group[0].ids), count), work, many, [])

    def every_logit(self, group: Sequence[Encoded]) -> Cost:
        """Of a batch whose every position's log-probabilities are had, as lm-evaluation-harness has them."""
        rows, length = len(group), len(group[0].ids)

        @torch.inference_mode()
        def work() -> None:
            self.shaped.model(input_ids=make_batch(group, CPU).ids, use_cache=False).logits.log_softmax(-1)

        return self._run(("logits", rows, length), work, rows * length)

    def windows(self, metric: str, length: int, many: int) -> Cost:
        """Of a batch of `many` windows of perplexity or KL at most."""
        more: tuple[Any, ...] = (nullcontext(),) if metric == "kl" else ()
        observe: Any = perplexity.divergence_observations if more else perplexity.perplexity_observations
        rows = max(1, min(many, perplexity.batch_tokens(metric, self.hardware.kind) // length))
        batch = [((0,) * length, length - 1)] * rows
        return self._run(
            (metric, length, rows), lambda: observe(self.shaped.model, batch, *more), rows * length
        )

    def contrasts(self, group: Sequence[Encoded]) -> Cost:
        """Of a batch of texts whose logit difference is asked for."""
        key = ("ioi", len(group), len(group[0].ids))
        return self._run(
            key, lambda: tasks.logit_differences(self.shaped.model, group), len(group) * len(group[0].ids)
        )

    def generation(self, many: int, prompt: int, new: int, temperature: float) -> Cost:
        """Of a batch of `many` texts at most: the prompts read at once, and a step with all but the last
        token in the cache, `new` times."""
        rows = min(many, generate.ROWS)
        tokens = rows * (prompt + new)
        first = self._run(
            ("read", rows, prompt, temperature), lambda: self._read(rows, prompt, temperature), tokens
        )
        step = self._run(
            ("step", rows, prompt, new, temperature),
            lambda: self._step(rows, prompt, new, temperature),
            tokens,
        )
        read, more = first.seconds, max(0.0, step.seconds - first.seconds)
        return Cost(
            max(first.live, step.live),
            first.operations + (step.operations - first.operations) * new,
            read + more * new,
            tokens,
        )

    @torch.inference_mode()
    def _read(self, rows: int, prompt: int, temperature: float) -> Any:
        from transformers import DynamicCache

        ids, cache = (
            torch.zeros(rows, prompt, dtype=torch.int64),
            DynamicCache(config=self.shaped.model.config),
        )
        mask = torch.ones_like(ids)
        logits = self.shaped.model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        self._draw(ids, logits, temperature)
        return cache

    @torch.inference_mode()
    def _step(self, rows: int, prompt: int, new: int, temperature: float) -> None:
        cache = self._read(rows, prompt, temperature)
        for index, layer in enumerate(cache.layers):
            more = [
                tensor.new_empty(*tensor.shape[:2], max(0, new - 2), tensor.shape[3])
                for tensor in (layer.keys, layer.values)
            ]
            cache.update(*more, index)
        ids, mask = (
            torch.zeros(rows, 1, dtype=torch.int64),
            torch.ones(rows, prompt + max(0, new - 2) + 1, dtype=torch.int64),
        )
        with self._decoding():
            logits = self.shaped.model(
                input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits
        self._draw(ids, logits, temperature)

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        """On a GPU, `generate` computes a step's experts from a copy of their matrices for each token."""
        config = self.shaped.model.config
        had = getattr(config, "_experts_implementation", None)
        if self.hardware.kind == "cpu" or had != "grouped_mm":
            yield
            return
        config._experts_implementation = "batched_mm"
        try:
            yield
        finally:
            config._experts_implementation = had

    def _draw(self, ids: torch.Tensor, logits: torch.Tensor, temperature: float) -> None:
        scores = logits[:, -1].to(copy=True, dtype=torch.float32)
        if temperature > 0:
            generate.SeededDraw(temperature, [[0.5]] * len(ids), ids.shape[1])(ids, scores)

    def _run(self, key: Any, work: Callable[[], object], tokens: int) -> Cost:
        with self.shaped.active():
            return self._count(key, work, tokens, [])

    def _count(self, key: Any, work: Callable[[], object], tokens: int, apart: list[torch.Tensor]) -> Cost:
        if key not in self._known:
            with TensorCosts(self.hardware, [*self.shaped.held, *apart]) as ledger:
                work()
            self._known[key] = Cost(ledger.peak, ledger.operations, ledger.seconds, tokens)
        return self._known[key]
