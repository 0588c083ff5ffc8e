"""Taking a call of the backbone apart, row by row, and naming each row by its content."""

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

# They reach the head or only say what to give back.
NOT_READ = ("labels", "num_items_in_batch", "return_dict", "return_loss")
# What they ask for lies inside the front, so it has to run.
NEEDS_FULL_FORWARD = ("output_attentions", "output_hidden_states", "output_router_logits", "use_cache")


@dataclass(frozen=True)
class Call:
    """
    One call of the backbone.

    Attributes:
        tensors (`dict[str, torch.Tensor]`): arguments with one entry per row, `(rows, ...)`.
        others (`dict[str, Any]`): plain values, and what the front does not read.
        rows (`int`): rows of the batch.
        mask (`torch.Tensor`, *optional*): attention mask of shape `(rows, length)`, `0` where there is padding.
        context (`tuple`): what is the same for all rows of many batches: the arguments' names, types and shapes but
            for a padded length, the plain values, and autocast.
    """

    tensors: dict[str, torch.Tensor]
    others: dict[str, Any]
    rows: int
    mask: torch.Tensor | None
    context: tuple

    @property
    def length(self) -> int | None:
        """Padded length of the rows, where there is a mask."""
        return None if self.mask is None else self.mask.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return next(iter(self.tensors.values())).device

    @property
    def layout(self) -> tuple:
        """What the shapes inside the model depend on, but for the number of rows."""
        return self.context, self.length

    def arguments(self, rows: Sequence[int] | None = None) -> dict[str, Any]:
        """Keyword arguments of the call on some of the rows."""
        if rows is None:
            return self.tensors | self.others
        return take_rows(self.tensors | self.others, rows, self.rows)

    def cut(self, length: int, content: int | None = None) -> "Call":
        """
        The first positions of the rows, where there is a mask.

        Args:
            length (`int`): how many; at most those there are, as more may be more than the model has positions for.
            content (`int`, *optional*): from which one on there is padding, whatever was there.

        Returns:
            [`Call`]: padding in it holds what the first position holds.
        """
        if self.mask is None:
            return self
        mask = self.mask[:, :length].clone()
        mask[:, content if content is not None else length :] = 0
        inside = unpadded(mask)
        tensors = dict(self.tensors)
        for name, value in tensors.items():
            if value is self.mask:
                tensors[name] = mask
            elif self.is_aligned(value):
                value = value[:, :length]
                here = inside.view(*inside.shape, *[1] * (value.ndim - 2))
                tensors[name] = torch.where(here, value, value[:, :1])
        return replace(self, tensors=tensors, mask=mask)

    def is_aligned(self, value: torch.Tensor) -> bool:
        """Whether a tensor has one entry per position of the mask."""
        return self.mask is not None and value.shape[:2] == self.mask.shape


def take_rows(arguments: Mapping[str, Any], rows: Sequence[int], of: int) -> dict[str, Any]:
    """Some rows of all tensors among the arguments that have `of` of them."""
    return {
        name: value[list(rows)] if isinstance(value, torch.Tensor) and value.ndim and len(value) == of else value
        for name, value in arguments.items()
    }


def bind(signature: inspect.Signature, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """All arguments by keyword, or `None` if some have no name."""
    bound: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            return None
        bound |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return bound


def read_call(signature: inspect.Signature, args: tuple, kwargs: dict[str, Any], config: Any) -> Call | None:
    """
    Take a call of the backbone apart.

    Args:
        signature (`inspect.Signature`): of the backbone's forward pass.
        args (`tuple`): what it is called with.
        kwargs (`dict[str, Any]`): what it is called with by keyword.
        config (`PreTrainedConfig`): of the backbone; may ask for hidden states or attentions.

    Returns:
        [`Call`] or `None`: the latter if the batch has to be computed, because the call asks for something inside the
        front, hands in or asks for past keys and values, or has an argument that is neither plain nor given by row.
    """
    bound = bind(signature, args, kwargs)
    if bound is None or any(bound.get(name) for name in NEEDS_FULL_FORWARD):
        return None
    if any(getattr(config, name, False) and bound.get(name) is None for name in NEEDS_FULL_FORWARD[:-1]):
        return None
    tensors: dict[str, torch.Tensor] = {}
    others: dict[str, Any] = {name: bound.pop(name) for name in NOT_READ if name in bound}
    plain: list[tuple[str, Any]] = []
    for name, value in bound.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif value is None or isinstance(value, (bool, int, float, str)):
            others[name] = value
            if value is not None:
                plain.append((name, value))
        else:
            return None
    rows = {len(value) if value.ndim else None for value in tensors.values()}
    if len(rows) != 1 or not (count := rows.pop()):
        return None
    mask = tensors.get("attention_mask")
    if mask is not None and (mask.ndim != 2 or mask.is_floating_point()):
        mask = None
    if "use_cache" in signature.parameters:  # keys and values of blocks that do not run could not be given back
        others["use_cache"] = False
    device = next(iter(tensors.values())).device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    shapes = []
    for name, value in tensors.items():
        free = 2 if mask is not None and value.shape[:2] == mask.shape else 1
        shapes.append((name, str(value.dtype), free, tuple(value.shape[free:])))
    return Call(tensors, others, count, mask, (tuple(sorted(shapes)), tuple(sorted(plain)), str(autocast)))


def unpadded(mask: torch.Tensor) -> torch.Tensor:
    """Where there is no padding behind a row's last unmasked position: `bool` of shape `(rows, length)`."""
    return mask.ne(0).flip(1).cummax(1).values.flip(1)


def _mix(z: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014), on `int64` with wrap-around."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return z ^ ((z >> 31) & ((1 << 33) - 1))


@lru_cache(maxsize=64)
def _factors(name: str, count: int, device: torch.device) -> torch.Tensor:
    """Two odd random factors per position, of shape `(2, count)`; the first ones are the same for any count."""
    seeds = hashlib.blake2b(name.encode(), digest_size=16).digest()
    start = torch.tensor([int.from_bytes(seeds[i : i + 8], "little", signed=True) for i in (0, 8)])
    return (_mix(start[:, None] + torch.arange(count)) | 1).to(device)


def _bits(value: torch.Tensor) -> torch.Tensor:
    """The bits of each element as an integer."""
    if not value.is_floating_point():
        return value.long()
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return value.contiguous().view(sizes[value.element_size()]).long()


def fingerprints(call: Call) -> tuple[list[bytes], list[int]]:
    """
    Name each row of a batch by the content that the front reads.

    Two multilinear hashes modulo 2^64 with independent odd factors per position. For elements of up to 32 bits, two
    given rows that differ share both with a probability below 2^-64. Padding behind a row's last unmasked position is left
    out, so any padded length gives the same name; padding in front shifts the row, and is part of it.

    Args:
        call ([`Call`]): the batch.

    Returns:
        `tuple[list[bytes], list[int]]`: 16 bytes per row, and how many positions each row has without the padding
        behind it (`0` if all are masked, and `-1` where there is no mask).
    """
    device = call.device
    seeds = hashlib.blake2b(repr(call.context).encode(), digest_size=16).digest()
    hashes = torch.tensor([int.from_bytes(seeds[i : i + 8], "little", signed=True) for i in (0, 8)], device=device)
    hashes = hashes[:, None].expand(2, call.rows)
    ends = torch.full((call.rows,), -1, device=device)
    inside = None
    if call.mask is not None:
        inside = unpadded(call.mask)
        ends = inside.sum(1)
    for name, value in call.tensors.items():
        bits = _bits(value)
        if inside is not None and call.is_aligned(value):
            bits = bits * inside.view(*inside.shape, *[1] * (bits.ndim - 2))
        bits = bits.reshape(call.rows, -1)
        # Powers of two, so that few tables serve all lengths.
        count = bits.shape[1]
        factors = _factors(name, 1 << (count - 1).bit_length(), device)[:, :count]
        hashes = hashes + torch.stack([(bits * factor).sum(1) for factor in factors])
    table = torch.cat([_mix(hashes), ends[None]]).T.cpu()
    return [row[:16] for row in map(bytes, table.contiguous().numpy())], table[:, 2].tolist()
