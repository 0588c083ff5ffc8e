"""One call of the model's backbone: its arguments by row, and a name for each row by its content."""

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch

# The frozen front does not read them: they reach the loss, or only choose the form of the output.
NOT_READ = ("num_items_in_batch", "return_dict", "return_loss")
# What they ask for comes from inside the front, so the front has to run.
NEEDS_FULL_FORWARD = ("output_attentions", "output_hidden_states", "output_router_logits", "use_cache")
NOT_BY_ROW = "`{}` does not have one entry per row of `{}`; give it one for each, or train without packing"
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Call:
    """
    One call of the backbone.

    Attributes:
        tensors (`dict[str, torch.Tensor]`): arguments with one entry per row, `(rows, ...)`.
        others (`dict[str, Any]`): plain values, and what the front does not read.
        rows (`int`): rows of the batch.
        mask (`torch.Tensor`, *optional*): attention mask of shape `(rows, length)`, `0` at padding.
        context (`tuple`): what all rows of many batches have in common: names, types and shapes of the arguments except for
            rows and padded length, the plain values, and the autocast dtype.
    """

    tensors: dict[str, torch.Tensor]
    others: dict[str, Any]
    rows: int
    mask: torch.Tensor | None
    context: tuple

    @property
    def length(self) -> int | None:
        """Padded length of the rows, if there is a mask."""
        return None if self.mask is None else self.mask.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of the inputs."""
        return next(iter(self.tensors.values())).device

    @property
    def layout(self) -> tuple:
        """What the shapes inside the model depend on, except for the number of rows."""
        return self.context, self.length

    @cached_property
    def padding(self) -> tuple[bool, bool, bool]:
        """Whether some row has padding in front, behind, and within what it shows."""
        if self.mask is None:
            return False, False, False
        within = content(self.mask) & self.mask.eq(0)
        front, behind, holes = torch.stack(
            [self.mask[:, 0].eq(0).any(), self.mask[:, -1].eq(0).any(), within.any()]
        ).tolist()
        return front, behind, holes

    def arguments(self, rows: Sequence[int] | None = None) -> dict[str, Any]:
        """Keyword arguments of the call, for all rows or for some of them."""
        if rows is None:
            return self.tensors | self.others
        index = torch.tensor(list(rows), device=self.device)
        others = {name: value[index] if self._is_by_row(value) else value for name, value in self.others.items()}
        return {name: value[index] for name, value in self.tensors.items()} | others

    def is_aligned(self, name: str, value: torch.Tensor) -> bool:
        """Whether an argument has one entry per position of the mask."""
        return self.mask is not None and value.shape[:2] == self.mask.shape and not name.startswith("decoder_")

    def crop(self, start: int, end: int) -> "Call":
        """The call with the positions from `start` to `end` only."""
        assert self.mask is not None
        tensors = {n: v[:, start:end] if self.is_aligned(n, v) else v for n, v in self.tensors.items()}
        return replace(self, tensors=tensors, mask=self.mask[:, start:end])

    def refill(self, row: int) -> "Call":
        """The call with other content in the padding of one row: that of its first position which is not padding."""
        assert self.mask is not None
        padding = ~content(self.mask)
        padding[:row] = padding[row + 1 :] = False
        first = int(self.mask[row].ne(0).int().argmax())
        tensors = dict(self.tensors)
        for name, value in tensors.items():
            if value is not self.mask and self.is_aligned(name, value):
                tensors[name] = torch.where(
                    padding.view(*padding.shape, *[1] * (value.ndim - 2)), value[:, first : first + 1], value
                )
        return replace(self, tensors=tensors)

    def with_second_row(self) -> "Call":
        """The call of one row with a second one, in which each position holds what the one before it holds in the first."""
        tensors = self.add_second_row(self.tensors)
        return replace(self, tensors=tensors, rows=2, mask=None if self.mask is None else tensors["attention_mask"])

    def add_second_row(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments of one row with that of [`Call.with_second_row`]."""
        return {
            name: torch.cat([value, self._shifted(name, value)]) if self._is_by_row(value) else value
            for name, value in arguments.items()
        }

    def _shifted(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if value.ndim < 2 or name.endswith("mask"):
            return value
        dim = 1 if value.ndim < 4 else -1  # the columns of images
        places = torch.arange(value.shape[dim], device=value.device)
        if self.mask is not None and self.is_aligned(name, value):
            shown = places[content(self.mask)[0]]  # padding stays as it is
            places[shown[1:]] = shown[:-1]
        else:
            places[1:] -= 1
        return value.index_select(dim, places)

    def _is_by_row(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == self.rows


def bind(signature: inspect.Signature, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """All arguments by keyword, or `None` if some have no name."""
    bound: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            return None
        bound |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return bound


def read_call(signature: inspect.Signature, args: tuple, kwargs: dict[str, Any], config: Any) -> Call | str:
    """
    Read the arguments of a call of the backbone.

    Args:
        signature (`inspect.Signature`): of the backbone's forward pass.
        args (`tuple`): positional arguments.
        kwargs (`dict[str, Any]`): keyword arguments.
        config (`PreTrainedConfig`): of the backbone; may ask for hidden states or attentions.

    Returns:
        [`Call`], or the reason why the cache cannot serve the call: it asks for something from inside the front, gives or
        asks for past keys and values, or has an argument that is neither a plain value nor a tensor with one entry per row.
    """
    bound = bind(signature, args, kwargs)
    if bound is None:
        return "its arguments have no names"
    for name in NEEDS_FULL_FORWARD:
        if bound.get(name) or (name != "use_cache" and bound.get(name) is None and getattr(config, name, False)):
            return f"`{name}` is asked for"
    tensors: dict[str, torch.Tensor] = {}
    others: dict[str, Any] = {name: bound.pop(name) for name in NOT_READ if name in bound}
    if not isinstance(bound.get("labels"), torch.Tensor):  # else a decoder may be fed with them
        others |= {name: bound.pop(name) for name in ("labels",) if name in bound}
    plain: list[tuple[str, Any]] = []
    for name, value in bound.items():
        if isinstance(value, torch.Tensor):
            if value.requires_grad:
                return f"`{name}` requires a gradient"
            tensors[name] = value
        elif value is None or isinstance(value, bool | int | float | str):
            others[name] = value
            if value is not None:
                plain.append((name, value))
        else:
            return f"`{name}` is a {type(value).__name__}"
    by_row = [name for name, value in tensors.items() if value.ndim]
    if not by_row:
        return "none of its arguments is a tensor with one entry per row"
    count = len(tensors[by_row[0]])
    for name, value in tensors.items():
        if not value.ndim or len(value) != count:
            return NOT_BY_ROW.format(name, by_row[0])
    if not count:
        return f"`{by_row[0]}` has no rows"
    mask = tensors.get("attention_mask")
    if mask is not None and (mask.ndim != 2 or mask.is_floating_point()):
        mask = None
    if "use_cache" in signature.parameters:  # blocks that do not run have no keys and values to return
        others["use_cache"] = False
    device = next(iter(tensors.values())).device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    call = Call(tensors, others, count, mask, ())
    shapes = []
    for name, value in tensors.items():
        free = 2 if call.is_aligned(name, value) else 1
        shapes.append((name, str(value.dtype), free, tuple(value.shape[free:])))
    return replace(call, context=(tuple(sorted(shapes)), tuple(sorted(plain)), str(autocast)))


def content(mask: torch.Tensor) -> torch.Tensor:
    """Positions from the first to the last one that the mask shows: `bool` of shape `(rows, length)`."""
    shown = mask.ne(0)
    return shown.cummax(1).values & shown.flip(1).cummax(1).values.flip(1)


def _mix(z: torch.Tensor) -> torch.Tensor:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014), on `int64` with wrap-around."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return z ^ ((z >> 31) & ((1 << 33) - 1))


@lru_cache(maxsize=64)
def _factors(name: str, count: int, device: torch.device) -> torch.Tensor:
    """Two odd random factors per position, of shape `(2, count)`; the first ones are the same for any count."""
    start = torch.tensor(_seeds(name.encode()), device=device)
    return _mix(start[:, None] + torch.arange(count, device=device)) | 1


def _seeds(name: bytes) -> list[int]:
    digest = hashlib.blake2b(name, digest_size=16).digest()
    return [int.from_bytes(digest[i : i + 8], "little", signed=True) for i in (0, 8)]


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of each element as an integer of the same size; a complex one has two, in a last dimension more."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.view(INTEGERS[tensor.element_size()])


def name_rows(
    call: Call, settings: bytes, without_padding: bool, shifts_freely: bool
) -> tuple[list[bytes], list[tuple[int, int]]]:
    """
    Name each row of a batch by the content that the front reads.

    Two multilinear hashes modulo 2^64 with independent odd factors per position. For elements of up to 32 bits, two given rows
    that differ have the same pair of hashes with a probability below 2^-64.

    Args:
        call ([`Call`]): the batch.
        settings (`bytes`): whatever else the front's output depends on.
        without_padding (`bool`): leave padding out, so that a row has the same name at any padded length.
        shifts_freely (`bool`): padding in front of a row makes no difference either; else its length is part of the name.

    Returns:
        `tuple[list[bytes], list[tuple[int, int]]]`: 16 bytes per row, and the first position and the end of what is to be kept
        of each row, `(0, -1)` where rows have no positions, equal where there is nothing to keep.
    """
    device, rows = call.device, call.rows
    trimmed = without_padding and call.mask is not None
    # With its padding, a row is another one at another length; the hashes do not see zeros at the end.
    seeds = _seeds(settings + repr(call.context if trimmed else call.layout).encode())
    hashes = torch.tensor(seeds, device=device)[:, None].expand(2, rows)
    starts, ends = torch.zeros(rows, dtype=torch.long, device=device), torch.full((rows,), -1, device=device)
    if trimmed:
        assert call.mask is not None
        inside = content(call.mask)
        sizes = inside.sum(1)
        starts = inside.int().argmax(1)
        ends = starts + sizes
        places = torch.arange(inside.shape[1], device=device)
        order = (places + starts[:, None]) % len(places)  # content first
        inside = places < sizes[:, None]
        if not shifts_freely:
            hashes = hashes + starts * _factors("start", 1, device)
    for name, value in call.tensors.items():
        bits = as_integers(value.detach()).long()
        if trimmed and call.is_aligned(name, value):
            shape = (*inside.shape, *[1] * (bits.ndim - 2))
            bits = bits.gather(1, order.view(shape).expand_as(bits)) * inside.view(shape)
        bits = bits.reshape(rows, -1)
        # Powers of two, so that few tables serve all lengths.
        count = bits.shape[1]
        factors = _factors(name, 1 << (count - 1).bit_length(), device)[:, :count]
        hashes = hashes + torch.stack([(bits * factor).sum(1) for factor in factors])
    table = torch.cat([_mix(hashes), starts[None], ends[None]]).T.cpu().contiguous()
    return [row[:16] for row in map(bytes, table.numpy())], [(s, e) for s, e in table[:, 2:].tolist()]
