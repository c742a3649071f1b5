"""Which bytes of a GGUF hold a circuit's units, and what they become: zeros, or blocks with smaller
scales."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..circuits.circuit import Circuit
from ..errors import UserError
from ..models.families import FAMILIES
from .gguf_names import Location, locate, require_same_architecture, rows_of

SCALES = {
    **dict.fromkeys("Q4_0 Q5_0 Q8_0 IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ1_S IQ4_NL IQ4_XS".split(), (0,)),
    **dict.fromkeys("Q4_1 Q5_1 Q4_K Q5_K".split(), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}
"""Where in a block its 16-bit scales are, in bytes; every weight of the block is proportional to them.
For quantised types not listed, scaling is refused."""


@dataclass(frozen=True)
class Change:
    """`count` pieces of `length` bytes of a tensor, `stride` bytes apart.

    Attributes:
        type: the tensor's GGML type.
        offset: of the first, from the beginning of the file.
        before, after: the bytes of all pieces, one after the other.
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
        """Whether it lies in a file of `size` bytes and `before` has the right length."""
        numbers = (self.offset, self.length, self.stride, self.count)
        return (
            all(type(n) is int and n >= 0 for n in numbers)
            and self.offset + self.stride * max(0, self.count - 1) + self.length <= size
            and len(self.before) == self.length * self.count
        )


def plan_changes(path: Path, reader: Any, architecture: str, circuit: Circuit) -> tuple[list[Change], str]:
    """The changes that take a circuit out of a file, and in words what was checked. Nothing is written.

    Raises:
        UserError: weights, another model's circuit, or blocks that cannot hold the change.
    """
    if circuit.unit == "weight":
        raise UserError(
            "single weights cannot be taken out of a GGUF: a block of a quantised type holds 32 or more of "
            "them under one scale; ablate the Hugging Face model, and convert the result"
        )
    if reader.byte_order != "I":
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
    done = [_weaken(change, reader.data, types[change.tensor], strength) for change, strength in changes]
    name = reader.fields.get("general.name")
    called = f" (the file calls itself {name.contents()})" if name else ""
    checked = (
        f"architecture {architecture}, {file.layers} layers; {file.compared} of {len(circuit.members)} "
        f"tensor sizes compared and equal{called}; a quantised file does not tell whether its weights come "
        "from the model that the circuit was found on"
    )
    return done, checked


class _GgufTensors:
    """The tensors of a GGUF, as a circuit of Hugging Face's names asks for them."""

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
        where = locate(name, self.family, self.architecture, self.layers)
        tensor = self.tensors.get(f"{where.tensor}.weight")
        if tensor is None:
            raise UserError(
                f"{self.path} has no tensor {where.tensor}.weight, where {name} should be; use the model it "
                "was made on"
            )
        return where, tensor, tuple(int(n) for n in reversed(tensor.shape))

    def _heads(self, where: Location) -> tuple[int, int]:
        layer = int(where.tensor.split(".")[1])
        return (
            self._read_metadata("attention.head_count", layer),
            self._read_metadata("attention.head_count_kv", layer, "attention.head_count"),
        )

    def _compare_size(self, name: str, size: object) -> bool:
        """Whether a site's number of units was compared: not that of a fused q, k or v. Raises UserError
        where the file's tensor has another number."""
        where, _, shape = self._find(name)
        if where.part in ("q", "k", "v"):
            return False
        rows = shape[-2] // 2 if where.part else shape[-2]
        here = self._heads(where)[0] if self.circuit.unit == "head" else rows
        if here != size:
            raise UserError(
                f"the circuit was found on a model with {size} {self.circuit.unit}s in {name}, and "
                f"{self.path} has {here}; use the model it was made on"
            )
        return True

    def changes(self, name: str, units: tuple[int, ...], strength: float) -> Iterator[Change]:
        """The pieces of one site's members, still without their bytes."""
        import numpy

        where, tensor, shape = self._find(name)
        indices = numpy.array(units, dtype=numpy.int64)
        if not len(indices):
            return
        if self.circuit.unit == "head":
            yield from self._columns_of_heads(where, tensor, shape, indices)
            return
        rows = rows_of(where, indices, shape, *self._heads(where), self.architecture)
        if strength != 1 and where.role == "mlp.up" and self.family.gated is None:
            raise UserError(
                f"at strength {strength:g} single columns of the MLP's down matrix must change, "
                "but a GGUF block spans several columns; use strength 1, or ablate the Hugging Face model"
            )
        yield from _rows(tensor, rows, shape[-1])
        bias = self.tensors.get(f"{where.tensor}.bias")
        if bias is not None:
            yield from _rows(bias, rows, 1)

    def _columns_of_heads(
        self, where: Location, tensor: Any, shape: tuple[int, ...], heads: Any
    ) -> Iterator[Change]:
        from gguf import GGML_QUANT_SIZES

        count = self._heads(where)[0]
        if where.role != "attn.o" or int(heads.max()) >= count or shape[-1] % count:
            raise UserError(
                f"the circuit names head {heads.max()} of {where.tensor}, which has {count}; use the model "
                "it was made on"
            )
        width = shape[-1] // count
        block, size = GGML_QUANT_SIZES[tensor.tensor_type]
        row = shape[-1] // block * size
        for first, last in _runs(heads):
            start, stop = first * width, (last + 1) * width
            if start % block or stop % block:
                raise UserError(
                    f"head {first if start % block else last} of {where.tensor} ends inside a block of "
                    f"{tensor.tensor_type.name}: heads have {width} columns, blocks {block}; use a file of "
                    "narrower blocks, or ablate the Hugging Face model"
                )
            begin, length = int(tensor.data_offset) + start // block * size, (stop - start) // block * size
            type_name, rows = tensor.tensor_type.name, int(tensor.n_bytes) // row
            yield Change(tensor.name, type_name, begin, length, row, rows)


def _rows(tensor: Any, rows: Any, width: int) -> Iterator[Change]:
    """Whole rows of `width` elements, neighbours in one piece."""
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[tensor.tensor_type]
    if width % block:
        raise UserError(f"{tensor.name} of {tensor.tensor_type.name} has no whole blocks in a row of {width}")
    length = width // block * size
    for first, last in _runs(rows):
        begin, whole = int(tensor.data_offset) + first * length, (last - first + 1) * length
        yield Change(tensor.name, tensor.tensor_type.name, begin, whole, 0, 1)


def _runs(indices: Any) -> list[tuple[int, int]]:
    """First and last of each run of neighbours."""
    import numpy

    parts = numpy.split(indices, numpy.flatnonzero(numpy.diff(indices) != 1) + 1)
    return [(int(part[0]), int(part[-1])) for part in parts if len(part)]


def _weaken(change: Change, data: Any, ggml_type: Any, strength: float) -> Change:
    """The change with its bytes: those of the file, and what they become."""
    import numpy

    where = change.offset + change.stride * numpy.arange(change.count)[:, None] + numpy.arange(change.length)
    before = numpy.asarray(data[where])
    after = zeros(before, ggml_type) if strength == 1 else scale_blocks(before, ggml_type, 1 - strength)
    return replace(change, before=before.tobytes(), after=after.tobytes())


def zeros(before: Any, ggml_type: Any) -> Any:
    """Bytes of zero weights, as many as `before`. Raises UserError for a type in which all-zero
    bytes do not decode to zero."""
    import numpy
    from gguf import GGML_QUANT_SIZES, dequantize

    after = numpy.zeros_like(before)
    try:
        decodes_to_zero = not dequantize(
            numpy.zeros((1, GGML_QUANT_SIZES[ggml_type][1]), numpy.uint8), ggml_type
        ).any()
    except NotImplementedError:
        decodes_to_zero = False
    if not decodes_to_zero:
        raise UserError(
            f"no block of zeros is known for tensors of type {ggml_type.name}; give a file of another type"
        )
    return after


def scale_blocks(before: Any, ggml_type: Any, factor: float) -> Any:
    """Blocks [..., bytes] of weights `factor` times as large.

    Weights of F32, F16 and BF16 are rounded to their type, as in a checkpoint of it. Quantised ones keep
    their codes, and their scales are multiplied.

    Raises:
        UserError: a scale times the factor cannot be represented in the scale's type, or the type's scales
        are no 16-bit floats.
    """
    import numpy
    from gguf import GGML_QUANT_SIZES, dequantize, quantize

    if ggml_type.name in ("F32", "F16", "BF16"):
        wide = dequantize(before, ggml_type).astype(numpy.float64) * factor
        return numpy.ascontiguousarray(quantize(wide.astype(numpy.float32), ggml_type)).view(numpy.uint8)
    if ggml_type.name not in SCALES:
        raise UserError(
            f"the scales of blocks of type {ggml_type.name} cannot be multiplied by {factor:g}; use strength "
            "1, or a file of another type"
        )
    after = before.reshape(-1, GGML_QUANT_SIZES[ggml_type][1]).copy()
    for place in SCALES[ggml_type.name]:
        scale = after[:, place : place + 2].copy().view(numpy.float16).astype(numpy.float64)
        after[:, place : place + 2] = (scale * factor).astype(numpy.float16).view(numpy.uint8)
    blocks = before.reshape(after.shape)
    wanted = dequantize(blocks, ggml_type).astype(numpy.float64) * factor
    if not numpy.array_equal(dequantize(after, ggml_type), wanted.astype(numpy.float32)):
        raise UserError(
            f"{factor:g} times a scale of type {ggml_type.name} is not always a 16-bit number, so that the "
            "change would not be exact; use a strength of 0.5 or 0.75, whose factors are powers of two, or 1"
        )
    return after.reshape(before.shape)
