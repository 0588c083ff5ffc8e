"""Rows as the store keeps them: exactly, or in a narrower format."""

import struct
from dataclasses import dataclass

import torch

FORMATS = ("bfloat16", "exact", "float16", "int8")
# Front; dimensions; the row's dtype; the dtype of its values.
HEADER = struct.Struct("<QI16s16s")
ALIGNMENT = 16


@dataclass(frozen=True)
class PackedRow:
    """
    One stored row.

    Attributes:
        front (`int`): digest of the front that has computed the row.
        dtype (`torch.dtype`): of the row as it was put.
        values (`torch.Tensor`): contiguous, on the CPU, in the stored format.
        scale (`torch.Tensor`, *optional*):
            What `int8` values are multiplied with, one `float32` per vector of the last dimension.
    """

    front: int
    dtype: torch.dtype
    values: torch.Tensor
    scale: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the values and their scale."""
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def unpack(self) -> torch.Tensor:
        """The row in the dtype in which it was put. An exact one shares memory with `values`."""
        if self.scale is None:
            return self.values.to(self.dtype)
        return (self.values * self.scale).to(self.dtype)


def packed_bytes(row: torch.Tensor, dtype: str) -> int:
    """Bytes that a row will take, or more if the format turns out not to hold it."""
    exact = row.numel() * row.element_size()
    if dtype == "exact" or not row.is_floating_point() or not row.dim() or not row.numel():
        return exact
    if dtype == "int8":
        return min(exact, row.numel() + 4 * (row.numel() // row.shape[-1]))
    return min(exact, 2 * row.numel())


@torch.no_grad()
def pack(row: torch.Tensor, front: int, dtype: str) -> PackedRow:
    """
    Copy a row into the store's format.

    A row is kept as it is where the format cannot hold it (it is not floating-point, has a NaN or an infinity, or
    overflows `float16`) or would not make it smaller.

    Args:
        row (`torch.Tensor`): on any device, with any strides.
        front (`int`): stored with the row.
        dtype (`str`): one of `FORMATS`.
    """
    values, scale = row, None
    if packed_bytes(row, dtype) < row.numel() * row.element_size():
        widest = torch.finfo(torch.float32 if dtype == "int8" else getattr(torch, dtype)).max
        # Never true of a NaN.
        if row.abs().amax().item() <= widest:
            values, scale = _quantize(row.float()) if dtype == "int8" else (row.to(getattr(torch, dtype)), None)
    # A copy even from the CPU: the row is a view of a batch that is soon gone.
    values = values.to("cpu", copy=True, memory_format=torch.contiguous_format)
    return PackedRow(front, row.dtype, values, None if scale is None else scale.cpu())


def to_bytes(row: PackedRow, reserve: int = 0) -> bytearray:
    """The row in bytes: `reserve` zeros for the caller, header, shape, scale and values."""
    names = [str(dtype).removeprefix("torch.").encode() for dtype in (row.dtype, row.values.dtype)]
    shape = struct.pack(f"<{row.values.dim()}Q", *row.values.shape)
    head = bytes(reserve) + HEADER.pack(row.front, row.values.dim(), *names) + shape
    parts: list[bytes | memoryview] = [head, bytes(-len(head) % ALIGNMENT)]
    for tensor in (row.scale, row.values):
        if tensor is not None:
            parts.append(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return bytearray().join(parts)


def front_of(blob: bytearray | memoryview, reserve: int = 0) -> int:
    """The front of a row in bytes, without reading the row."""
    return int(HEADER.unpack_from(blob, reserve)[0])


def from_bytes(blob: bytearray, reserve: int = 0) -> PackedRow:
    """What [`to_bytes`] was given, sharing the memory of `blob`."""
    front, dimensions, *names = HEADER.unpack_from(blob, reserve)
    dtype, stored = (getattr(torch, name.rstrip(b"\0").decode()) for name in names)
    start = reserve + HEADER.size
    shape = struct.unpack_from(f"<{dimensions}Q", blob, start)
    start += 8 * dimensions
    start += -start % ALIGNMENT
    body, scale = torch.frombuffer(blob, dtype=torch.uint8)[start:], None
    if stored == torch.int8 != dtype:
        vectors = torch.Size((*shape[:-1], 1))
        scale, body = body[: 4 * vectors.numel()].view(torch.float32).view(vectors), body[4 * vectors.numel() :]
    return PackedRow(front, dtype, body.view(stored).view(shape), scale)


def _quantize(row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric `int8` of shape `(..., features)` and its scale of shape `(..., 1)`: `absmax / 127` per vector."""
    # A vector of zeros has no scale of its own.
    scale = (row.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(row.dtype).tiny)
    return (row / scale).round().to(torch.int8), scale
