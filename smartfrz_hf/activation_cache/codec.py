"""Rows as the store keeps them: exactly, or in a narrower format."""

import struct
from dataclasses import dataclass, replace

import torch
from safetensors.torch import load, save

FORMATS = ("bfloat16", "exact", "float16", "int8")
# In front of the bytes of a row: a checksum of all that follows, its key and its front.
HEADER = struct.Struct("<8s16sQ")
CHECKSUM_BYTES = 8


@dataclass(frozen=True)
class PackedRow:
    """
    One stored row.

    Attributes:
        front (`int`): digest of the front that has computed the row.
        dtype (`torch.dtype`): of the row as it was put.
        values (`torch.Tensor`): contiguous, in the stored format.
        scale (`torch.Tensor`, *optional*): factor of `int8` values, one `float32` per vector of the last dimension.
    """

    front: int
    dtype: torch.dtype
    values: torch.Tensor
    scale: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the values and their scale."""
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def to(self, device: torch.device | str) -> "PackedRow":
        """The row on a device."""
        return replace(
            self, values=self.values.to(device), scale=None if self.scale is None else self.scale.to(device)
        )

    def unpack(self) -> torch.Tensor:
        """The row in the dtype in which it was put. An exact one shares memory with `values`."""
        return self.values.to(self.dtype) if self.scale is None else (self.values * self.scale).to(self.dtype)


def packed_bytes(row: torch.Tensor, dtype: str) -> int:
    """Bytes that a row will take, or more if the format turns out not to hold it."""
    if dtype == "exact" or not row.is_floating_point() or not row.dim() or not row.numel():
        return row.nbytes
    narrow = row.numel() + 4 * (row.numel() // row.shape[-1]) if dtype == "int8" else 2 * row.numel()
    return min(row.nbytes, narrow)


@torch.no_grad()
def pack(row: torch.Tensor, front: int, dtype: str) -> PackedRow:
    """
    Copy a row into one of the `FORMATS`, on its device. It is kept as it is where the format cannot hold it (it is not floating-point, not
    finite, or overflows `float16`) or would not make it smaller.
    """
    values, scale = row, None
    if packed_bytes(row, dtype) < row.nbytes:
        largest = torch.finfo(torch.float32 if dtype == "int8" else getattr(torch, dtype)).max
        if row.abs().amax().item() <= largest:  # never true of NaN
            values, scale = _quantize(row.float()) if dtype == "int8" else (row.to(getattr(torch, dtype)), None)
    # The row is a view of a batch that is soon gone.
    values = values.to(values.device, copy=True, memory_format=torch.contiguous_format)
    return PackedRow(front, row.dtype, values, scale)


def to_bytes(row: PackedRow, key: bytes) -> bytes:
    """The row in bytes, with a header whose checksum is still missing."""
    tensors = {str(row.dtype).removeprefix("torch."): row.values}
    if row.scale is not None:
        tensors["scale"] = row.scale
    return HEADER.pack(b"", key, row.front) + save(tensors)


def from_bytes(blob: bytes) -> PackedRow:
    """What [`to_bytes`] was given."""
    tensors = load(blob[HEADER.size :])
    scale = tensors.pop("scale", None)
    ((dtype, values),) = tensors.items()
    return PackedRow(HEADER.unpack_from(blob)[2], getattr(torch, dtype), values, scale)


def _quantize(row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric `int8` of shape `(..., features)` and its scale of shape `(..., 1)`: `absmax / 127` per vector."""
    # A vector of zeros has no scale of its own.
    scale = (row.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(row.dtype).tiny)
    return (row / scale).round().to(torch.int8), scale
