"""Find the bytes of a circuit's units in a GGUF, and compute their replacement: zeros, or blocks with smaller
scales."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..circuits.circuit import Circuit
from ..errors import UserError
from ..models.families import FAMILIES
from .gguf_names import Location, find_rows, locate, require_same_architecture

SCALES = {
    **dict.fromkeys("Q4_0 Q5_0 Q8_0 IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ1_S IQ4_NL IQ4_XS".split(), (0,)),
    **dict.fromkeys("Q4_1 Q5_1 Q4_K Q5_K".split(), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}
"""GGML type → byte offsets of a block's 16-bit scales, to which every weight of the block is proportional.
Scaling is refused for quantised types that are not listed."""


@dataclass(frozen=True)
class Change:
    """`count` pieces of `length` bytes of a tensor, `stride` bytes apart.

    Attributes:
        type: the tensor's GGML type.
        offset: offset of the first piece from the beginning of the file.
        before, after: the concatenated bytes of all pieces.
    """

    tensor: str
    type: str
    offset: int
    length: int
    stride: int
    count: int
    before: bytes = b""
    after: bytes = b""

    def fits(self, size: int) -> bool:
        """Whether the change lies inside a file of `size` bytes, and `before` has the right length."""
        numbers = (self.offset, self.length, self.stride, self.count)
        return (
            all(type(n) is int and n >= 0 for n in numbers)
            and self.offset + self.stride * max(0, self.count - 1) + self.length <= size
            and len(self.before) == self.length * self.count
        )


def plan_changes(path: Path, reader: Any, architecture: str, circuit: Circuit) -> tuple[list[Change], str]:
    """The changes that remove a circuit from a file, and a sentence on what was verified. Nothing is written.

    Raises:
        UserError: a circuit of weights or of another model, or blocks that cannot represent the change.
    """
    if circuit.unit == "weight":
        raise UserError(
            "single weights cannot be removed from a GGUF, because a quantised block has one scale for 32 or "
            "more weights; ablate the Hugging Face model, and convert the result"
        )
    if reader.byte_order != "I":  # gguf's GGUFReader: "I" is this machine's order, "S" the swapped one
        raise UserError(f"{path} has the opposite byte order to this machine; convert it first")
    if (split := reader.fields.get("split.count")) and int(split.contents()) > 1:
        raise UserError(f"{path} is one part of a split GGUF; join the parts with llama-gguf-split --merge")
    file = _GgufTensors(path, reader, architecture, circuit)
    changes = [
        (change, strength)
        for name in circuit.members
        for strength, units in circuit.by_strength(name)
        for change in file.changes(name, units, strength)
    ]
    types = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    weakened = [_weaken(change, reader.data, types[change.tensor], strength) for change, strength in changes]
    name = reader.fields.get("general.name")
    title = f" (the file calls itself {name.contents()})" if name else ""
    checked = (
        f"architecture {architecture}, {file.layers} layers; {file.compared} of {len(circuit.members)} "
        f"tensor sizes compared and equal{title}; a quantised file does not tell whether its weights come "
        "from the model that the circuit was found on"
    )
    return weakened, checked


class _GgufTensors:
    """The tensors of a GGUF, accessed by Hugging Face's names."""

    def __init__(self, path: Path, reader: Any, architecture: str, circuit: Circuit) -> None:
        self.path, self.architecture, self.circuit = path, architecture, circuit
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.fields = reader.fields
        self.layers = int(self._read_metadata("block_count"))
        model_type = require_same_architecture(circuit.model.get("architecture"), architecture, path)
        self.family = FAMILIES[model_type]
        sizes = circuit.provenance.get("sizes") or {}
        equal = [name for name, size in sizes.items() if self._compare_size(name, size)]
        self.compared = len(set(equal) & set(circuit.members))

    def _read_metadata(self, key: str, layer: int = 0, fallback_key: str | None = None) -> int:
        field = self.fields.get(f"{self.architecture}.{key}")
        if field is None and fallback_key:
            return self._read_metadata(fallback_key, layer)
        if field is None:
            raise UserError(f"{self.path} lacks {self.architecture}.{key} in its metadata; download it again")
        value = field.contents()
        return int(value[layer] if isinstance(value, list) else value)

    def _find(self, name: str) -> tuple[Location, Any, tuple[int, ...]]:
        location = locate(name, self.family, self.architecture, self.layers)
        tensor = self.tensors.get(f"{location.tensor}.weight")
        if tensor is None:
            raise UserError(
                f"{self.path} has no tensor {location.tensor}.weight, where {name} should be; use the model "
                "it was made on"
            )
        # GGUF lists a shape from the fastest-changing dimension: [in, out] for torch's [out, in].
        return location, tensor, tuple(int(n) for n in reversed(tensor.shape))

    def _heads(self, location: Location) -> tuple[int, int]:
        layer = int(location.tensor.split(".")[1])
        return (
            self._read_metadata("attention.head_count", layer),
            self._read_metadata("attention.head_count_kv", layer, "attention.head_count"),
        )

    def _compare_size(self, name: str, size: object) -> bool:
        """Whether a site's number of units could be compared, which it cannot for a fused q, k or v. Raises
        UserError if the file's tensor has another number."""
        location, _, shape = self._find(name)
        if location.part in ("q", "k", "v"):
            return False
        rows = shape[-2] // 2 if location.part else shape[-2]  # fused gate and up are equally long
        actual = self._heads(location)[0] if self.circuit.unit == "head" else rows
        if actual != size:
            raise UserError(
                f"the circuit was found on a model with {size} {self.circuit.unit}s in {name}, and "
                f"{self.path} has {actual}; use the model it was made on"
            )
        return True

    def changes(self, name: str, units: tuple[int, ...], strength: float) -> Iterator[Change]:
        """The changes for these members of a site, without their bytes."""
        import numpy

        location, tensor, shape = self._find(name)
        indices = numpy.array(units, dtype=numpy.int64)
        if not len(indices):
            return
        if self.circuit.unit == "head":
            yield from self._list_head_changes(location, tensor, shape, indices)
            return
        rows = find_rows(location, indices, shape, *self._heads(location), self.architecture)
        # A gated MLP's product is linear in up, so that scaling the neuron's row is the same as scaling its
        # column of down. In a plain MLP the non-linearity is between them.
        if strength != 1 and location.role == "mlp.up" and self.family.gated is None:
            raise UserError(
                f"at strength {strength:g} single columns of the MLP's down matrix must change, "
                "but a GGUF block spans several columns; use strength 1, or ablate the Hugging Face model"
            )
        yield from _list_row_changes(tensor, rows, shape[-1])
        bias = self.tensors.get(f"{location.tensor}.bias")
        if bias is not None:
            yield from _list_row_changes(bias, rows, 1)

    def _list_head_changes(
        self, location: Location, tensor: Any, shape: tuple[int, ...], heads: Any
    ) -> Iterator[Change]:
        from gguf import GGML_QUANT_SIZES

        count = self._heads(location)[0]
        if location.role != "attn.o" or int(heads.max()) >= count or shape[-1] % count:
            raise UserError(
                f"the circuit names head {heads.max()} of {location.tensor}, which has {count}; use the "
                "model it was made on"
            )
        width = shape[-1] // count
        block, size = GGML_QUANT_SIZES[tensor.tensor_type]
        row = shape[-1] // block * size
        for first, last in _find_runs(heads):
            start, stop = first * width, (last + 1) * width
            if start % block or stop % block:
                raise UserError(
                    f"head {first if start % block else last} of {location.tensor} ends inside a block of "
                    f"{tensor.tensor_type.name}: heads have {width} columns, blocks {block}; use a file of "
                    "narrower blocks, or ablate the Hugging Face model"
                )
            begin, length = int(tensor.data_offset) + start // block * size, (stop - start) // block * size
            type_name, rows = tensor.tensor_type.name, int(tensor.n_bytes) // row
            yield Change(tensor.name, type_name, begin, length, row, rows)


def _list_row_changes(tensor: Any, rows: Any, width: int) -> Iterator[Change]:
    """Changes of whole rows of `width` elements; adjacent rows form one piece."""
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[tensor.tensor_type]
    if width % block:
        raise UserError(
            f"{tensor.name}: a row of {width} is not a whole number of {tensor.tensor_type.name} blocks; use "
            "a file of another type"
        )
    length = width // block * size
    for first, last in _find_runs(rows):
        begin, piece_length = int(tensor.data_offset) + first * length, (last - first + 1) * length
        yield Change(tensor.name, tensor.tensor_type.name, begin, piece_length, 0, 1)


def _find_runs(indices: Any) -> list[tuple[int, int]]:
    """(first, last) of each run of consecutive indices."""
    import numpy

    parts = numpy.split(indices, numpy.flatnonzero(numpy.diff(indices) != 1) + 1)
    return [(int(part[0]), int(part[-1])) for part in parts if len(part)]


def _weaken(change: Change, data: Any, ggml_type: Any, strength: float) -> Change:
    """The change with its bytes: those in the file, and their replacement."""
    import numpy

    byte_indices = (
        change.offset + change.stride * numpy.arange(change.count)[:, None] + numpy.arange(change.length)
    )
    before = numpy.asarray(data[byte_indices])
    after = make_zeros(before, ggml_type) if strength == 1 else scale_blocks(before, ggml_type, 1 - strength)
    return replace(change, before=before.tobytes(), after=after.tobytes())


def make_zeros(before: Any, ggml_type: Any) -> Any:
    """As many zero bytes as in `before`. Raises UserError for a type in which all-zero bytes do not decode
    to zero weights."""
    import numpy
    from gguf import GGML_QUANT_SIZES, dequantize

    after = numpy.zeros_like(before)
    try:
        decodes_to_zero = not dequantize(
            numpy.zeros((1, GGML_QUANT_SIZES[ggml_type][1]), numpy.uint8), ggml_type
        ).any()
    except NotImplementedError:  # gguf cannot decode every type
        decodes_to_zero = False
    if not decodes_to_zero:
        raise UserError(
            f"blocks of type {ggml_type.name} cannot represent zeros as zero bytes; give a file of another "
            "type"
        )
    return after


def scale_blocks(before: Any, ggml_type: Any, factor: float) -> Any:
    """Blocks [..., bytes] with weights `factor` times as large.

    Weights in F32, F16 and BF16 are rounded to their type, as in a checkpoint. Quantised ones keep their
    codes, and their scales are multiplied.

    Raises:
        UserError: a scale times the factor cannot be represented exactly, or the type's scales are not 16-bit
            floats.
    """
    import numpy
    from gguf import GGML_QUANT_SIZES, dequantize, quantize

    if ggml_type.name in ("F32", "F16", "BF16"):
        scaled = dequantize(before, ggml_type).astype(numpy.float64) * factor
        return numpy.ascontiguousarray(quantize(scaled.astype(numpy.float32), ggml_type)).view(numpy.uint8)
    if ggml_type.name not in SCALES:
        raise UserError(
            f"the scales of blocks of type {ggml_type.name} cannot be multiplied by {factor:g}; use strength "
            "1, or a file of another type"
        )
    after = before.reshape(-1, GGML_QUANT_SIZES[ggml_type][1]).copy()
    for offset in SCALES[ggml_type.name]:
        scale = after[:, offset : offset + 2].copy().view(numpy.float16).astype(numpy.float64)
        after[:, offset : offset + 2] = (scale * factor).astype(numpy.float16).view(numpy.uint8)
    blocks = before.reshape(after.shape)
    expected = dequantize(blocks, ggml_type).astype(numpy.float64) * factor
    if not numpy.array_equal(dequantize(after, ggml_type), expected.astype(numpy.float32)):
        raise UserError(
            f"{factor:g} times a scale of type {ggml_type.name} is not always a 16-bit number, so that the "
            "change would not be exact; use a strength of 0.5 or 0.75, whose factors are powers of two, or 1"
        )
    return after.reshape(before.shape)
