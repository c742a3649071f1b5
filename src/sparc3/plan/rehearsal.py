"""The rehearsal: run sparc3's own code and the model's once, on one batch of tensors without content, so
that no formula for any architecture is needed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..attribution.methods import Method, settings_for
from ..attribution.patching import freeze
from ..attribution.sums import Settings, Sums
from ..evaluation import generate, perplexity, tasks
from ..experiment import prune_sequentially
from ..models.sites import layers_of
from ..samples.batches import Batch, Encoded, make_batch
from .costs import Hardware, Shaped, TensorCosts

CPU = torch.device("cpu")
FEW = 1
"""For a larger batch whose samples are processed one by one, rehearse this number of samples and twice as
many, and extrapolate linearly."""


@dataclass(frozen=True)
class Cost:
    """The cost of one batch.

    Attributes:
        live: the largest number of bytes at once, without the weights.
        operations: floating-point operations.
        tokens: number of padded tokens, from which the cost of a whole set is computed.
    """

    live: int
    operations: float
    seconds: float
    tokens: int

    def extrapolate(self, other: "Cost", steps: float) -> "Cost":
        """The cost on the line from this to `other`, after so many steps of their difference."""

        def along(start: float, end: float) -> float:
            return start + (end - start) * steps

        return Cost(
            round(along(self.live, other.live)),
            along(self.operations, other.operations),
            along(self.seconds, other.seconds),
            round(along(self.tokens, other.tokens)),
        )


class Rehearsal:
    """The cost of one batch of each kind of work on the hardware; work of the same shape is rehearsed
    once."""

    def __init__(self, shaped: Shaped, hardware: Hardware) -> None:
        self.shaped, self.hardware = shaped, hardware
        self._known: dict[Any, Cost] = {}

    def attribution(
        self, settings: Settings, roles: tuple[str, ...], groups: Sequence[Sequence[Encoded]]
    ) -> Cost:
        """The cost of the largest of these batches. For weights, whose sums are allocated in the first
        batch, a second batch is included.

        With a GPU, the sums of weights are not counted here, wherever they are.
        """
        method, settings = settings_for(replace(settings, sums_device="cpu"), roles)
        if method.run is None:
            return Cost(0, 0.0, 0.0, 1)
        samples = len(groups[0])
        # |neuron| scores are summed sample by sample, so that a large batch would be slow to rehearse.
        by_sample = settings.neuron == "abs" and settings.unit == "neuron" and method.targeted
        if by_sample and samples > 2 * FEW:
            small, large = (
                self._attribution(method, settings, roles, [groups[0][:count]]) for count in (FEW, 2 * FEW)
            )
            return small.extrapolate(large, samples / FEW - 1)
        needs_second = settings.unit == "weight" and method.targeted
        return self._attribution(method, settings, roles, groups[: 2 if needs_second else 1])

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
            preallocated = (
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

            return self._count(
                key, work, sum(len(group) * len(group[0].ids) for group in groups), preallocated
            )

    def sequential(self, roles: tuple[str, ...], groups: Sequence[Sequence[Encoded]]) -> Cost:
        """The cost of sequential pruning with all batches, which stay in memory between layers."""
        small, large = (self._sequential(roles, groups[0], count) for count in (1, 2))
        return small.extrapolate(large, len(groups) - 1)

    def _sequential(self, roles: tuple[str, ...], group: Sequence[Encoded], count: int) -> Cost:
        model, tokens = self.shaped.model, count * len(group) * len(group[0].ids)
        with self.shaped.active(), freeze(model), torch.no_grad():
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
                        flow.hidden = flow.run_layer(layer)

            return self._count(("sequential", roles, len(group), len(group[0].ids), count), work, tokens, [])

    def every_logit(self, group: Sequence[Encoded]) -> Cost:
        """The cost of a batch with log-probabilities at every position, as in lm-evaluation-harness."""
        rows, length = len(group), len(group[0].ids)

        @torch.inference_mode()
        def work() -> None:
            self.shaped.model(input_ids=make_batch(group, CPU).ids, use_cache=False).logits.log_softmax(-1)

        return self._run(("logits", rows, length), work, rows * length)

    def windows(self, metric: str, length: int, limit: int) -> Cost:
        """The cost of a batch of at most `limit` windows of perplexity or KL."""
        variant: tuple[Any, ...] = (nullcontext(),) if metric == "kl" else ()
        observe: Any = perplexity.divergence_observations if variant else perplexity.perplexity_observations
        rows = max(1, min(limit, perplexity.batch_tokens(metric, self.hardware.kind) // length))
        batch = [((0,) * length, length - 1)] * rows
        return self._run(
            (metric, length, rows), lambda: observe(self.shaped.model, batch, *variant), rows * length
        )

    def contrasts(self, group: Sequence[Encoded]) -> Cost:
        """The cost of a batch of texts whose logit difference is measured."""
        key = ("ioi", len(group), len(group[0].ids))
        return self._run(
            key, lambda: tasks.logit_differences(self.shaped.model, group), len(group) * len(group[0].ids)
        )

    def generation(self, limit: int, prompt: int, new: int, temperature: float) -> Cost:
        """The cost of generating a batch of at most `limit` texts: one pass over the prompts, and `new`
        times the cost of the last step, with all other tokens in the cache."""
        rows = min(limit, generate.ROWS)
        tokens = rows * (prompt + new)
        read_cost = self._run(
            ("read", rows, prompt, temperature), lambda: self._read(rows, prompt, temperature), tokens
        )
        step_cost = self._run(
            ("step", rows, prompt, new, temperature),
            lambda: self._step(rows, prompt, new, temperature),
            tokens,
        )
        read_seconds, step_seconds = read_cost.seconds, max(0.0, step_cost.seconds - read_cost.seconds)
        return Cost(
            max(read_cost.live, step_cost.live),
            read_cost.operations + (step_cost.operations - read_cost.operations) * new,
            read_seconds + step_seconds * new,
            tokens,
        )

    @torch.inference_mode()
    def _read(self, rows: int, prompt: int, temperature: float) -> Any:
        from transformers import DynamicCache

        ids = torch.zeros(rows, prompt, dtype=torch.int64)
        cache = DynamicCache(config=self.shaped.model.config)
        mask = torch.ones_like(ids)
        logits = self.shaped.model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        self._draw(ids, logits, temperature)
        return cache

    @torch.inference_mode()
    def _step(self, rows: int, prompt: int, new: int, temperature: float) -> None:
        cache = self._read(rows, prompt, temperature)
        # The last step finds prompt + new − 2 positions in the cache, and its own token makes one more.
        for index, layer in enumerate(cache.layers):
            grown = [
                tensor.new_empty(*tensor.shape[:2], max(0, new - 2), tensor.shape[3])
                for tensor in (layer.keys, layer.values)
            ]
            cache.update(*grown, index)
        ids = torch.zeros(rows, 1, dtype=torch.int64)
        mask = torch.ones(rows, prompt + max(0, new - 2) + 1, dtype=torch.int64)
        with self._use_decoding_experts():
            logits = self.shaped.model(
                input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits
        self._draw(ids, logits, temperature)

    @contextmanager
    def _use_decoding_experts(self) -> Iterator[None]:
        """Inside, experts are computed as `generate` does in its decoding steps on a GPU: from a copy of
        their matrices for each token (batched_mm)."""
        config = self.shaped.model.config
        previous = getattr(config, "_experts_implementation", None)
        if self.hardware.kind == "cpu" or previous != "grouped_mm":
            yield
            return
        config._experts_implementation = "batched_mm"
        try:
            yield
        finally:
            config._experts_implementation = previous

    def _draw(self, ids: torch.Tensor, logits: torch.Tensor, temperature: float) -> None:
        scores = logits[:, -1].to(copy=True, dtype=torch.float32)
        if temperature > 0:
            generate.SeededDraw(temperature, [[0.5]] * len(ids), ids.shape[1])(ids, scores)

    def _run(self, key: Any, work: Callable[[], object], tokens: int) -> Cost:
        with self.shaped.active():
            return self._count(key, work, tokens, [])

    def _count(
        self, key: Any, work: Callable[[], object], tokens: int, preallocated: list[torch.Tensor]
    ) -> Cost:
        if key not in self._known:
            with TensorCosts(self.hardware, [*self.shaped.held, *preallocated]) as ledger:
                work()
            self._known[key] = Cost(ledger.peak, ledger.operations, ledger.seconds, tokens)
        return self._known[key]
