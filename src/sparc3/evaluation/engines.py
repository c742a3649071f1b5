"""Engines that generate continuations instead of transformers: llama.cpp, on a GGUF file."""

import hashlib
import importlib.metadata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..errors import Sparc3Error, UserError
from .generate import Row, use_engine

SLOTS = 16
"""Number of texts that llama.cpp generates in parallel."""


class LlamaCpp:
    """llama.cpp, in this process, on one GGUF file.

    It samples with its own random numbers, which depend only on the prompt, the seed and the number of the
    generation, so the original and the ablated file get the same ones. Batches are summed in varying
    order, so a second run may differ where two tokens are almost equally likely.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._server: Any = None
        self._context = 0

    def write(self, rows: list[Row], new: int, temperature: float, seed: int) -> list[str]:
        """The continuation of each row, (token ids, number of the generation), of up to `new` tokens.

        Raises:
            Sparc3Error: llama.cpp cannot load the file, or refuses a prompt.
        """
        self._start(max(len(ids) for ids, _ in rows) + new)
        with ThreadPoolExecutor(SLOTS) as pool:
            return list(pool.map(lambda row: self._write_one(row[0], row[1], new, temperature, seed), rows))

    def _start(self, context: int) -> None:
        """A server whose slots have room for `context` tokens each."""
        import xllamacpp

        if self._context >= context:
            return
        self._server, self._context = None, context
        settings = xllamacpp.CommonParams()
        settings.model.path = str(self.path)
        settings.n_parallel, settings.n_ctx = SLOTS, SLOTS * context
        # Its threads spin while they wait: more threads than free cores make it many times slower.
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
        settings.verbosity, settings.warmup = -1, False
        # The server caches each slot's context for a chat's next turn; here no prompt occurs twice.
        settings.cache_ram_mib, settings.n_ctx_checkpoints, settings.cache_idle_slots = 0, 0, False
        try:
            self._server = xllamacpp.Server(settings)
        except RuntimeError as error:
            raise Sparc3Error(
                f"llama.cpp cannot load {self.path} ({error}); leave out --engine llama.cpp"
            ) from None

    def _write_one(self, ids: list[int], number: int, new: int, temperature: float, seed: int) -> str:
        draw = int(hashlib.sha256(f"{seed}/{number}/{ids}".encode()).hexdigest()[:8], 16)
        answer = self._server.handle_completions(
            {
                "prompt": ids,
                "n_predict": new,
                "temperature": temperature,
                "samplers": ["temperature"],
                "repeat_penalty": 1.0,
                "seed": draw % (2**32 - 1),  # the largest seed means a random one
                "cache_prompt": False,
            }
        )
        if "choices" not in answer:
            raise Sparc3Error(f"llama.cpp refuses a prompt of {len(ids)} tokens: {answer}")
        return str(answer["choices"][0]["text"])


def require_llama_cpp() -> str:
    """The version of llama.cpp, for the provenance. Raises UserError if it is not installed."""
    if find_spec("xllamacpp") is None:
        raise UserError("engine llama.cpp needs the package xllamacpp; run: pip install xllamacpp")
    return f"llama.cpp (xllamacpp {importlib.metadata.version('xllamacpp')})"


@contextmanager
def llama_cpp(path: Path) -> Iterator[None]:
    """Inside, llama.cpp generates all continuations with this file, whatever model `complete` gets."""
    with use_engine(LlamaCpp(path).write):
        yield
