"""Which activations have the bits that computing them anew would give."""

import hashlib
from typing import Any

import torch

from ..model.units import Unit
from .calls import Call, unpadded
from .prefix import Prefix

# A row's attention sums over its keys in steps of one vector register; whether a key lies in the last, incomplete step
# changes the order of the sum. 64 bytes is the widest register of any CPU.
REGISTER = 64
ANY_SIZE = range(2**32)


class Exactness:
    """
    Finds out, by trying, what the bits of an activation depend on besides the content of its row.

    Kernels choose the order of their sums by the shape of the batch. From some number of positions (rows times length)
    on, the order within a row is the same for any batch, and so are its bits. Below, an activation is used again only
    in a batch of the same shape. With some lengths of narrow attention heads, even the row's place in the batch counts,
    since some kernels sum in another order where a thread's memory is not aligned.

    Args:
        prefix ([`Prefix`]): the front of the model.
        wanted (`bool`): whether bits matter; if not, all activations of a row are taken for the same.
    """

    def __init__(self, prefix: Prefix, wanted: bool):
        self.prefix, self.wanted = prefix, wanted
        self._tried: dict[tuple, int] = {}
        self._least: dict[tuple, int | None] = {}
        self._padding: dict[tuple, bool] = {}
        self._steady: dict[tuple, bool] = {}

    def forget(self) -> None:
        """The front has grown, so what was tried does not hold."""
        self._tried.clear()
        self._least.clear()
        self._padding.clear()

    def is_due(self, call: Call) -> bool:
        """Whether a batch is so much larger than those tried that it has to be tried."""
        return self.wanted and self._is_steady(call) and positions(call) >= 2 * self._tried.get(call.context, 0)

    def calibrate(self, call: Call, hidden: torch.Tensor) -> bool:
        """
        Find out how few rows, and which padding, leave the bits of `hidden` as they are.

        Args:
            call ([`Call`]): the batch.
            hidden (`torch.Tensor`): what crosses the boundary for it, `(rows, ...)`.

        Returns:
            `bool`: whether activations that passed for exact before do so no longer.
        """
        context, length = call.context, call.length or 1
        least, size = None, 1 << max(0, (call.rows // 2).bit_length() - 1)
        ends = [-1] * call.rows if call.mask is None else unpadded(call.mask).sum(1).tolist()
        while size and call.rows > 1:
            rows = [row * call.rows // size for row in range(size)]
            if not same_bits(self.prefix.run(call, rows), hidden[rows], [ends[row] for row in rows]):
                break
            least, size = size, size // 2
        before, free = self._least.get(context), self._padding.get(context, False)
        self._tried[context] = positions(call)
        self._least[context] = None if least is None else least * length
        self._padding[context] = least is not None and self._padding_is_free(call, least)
        now = self._least[context]
        return before is not None and (now is None or now > before or (free and not self._padding[context]))

    def least_rows(self, call: Call) -> int:
        """Fewest rows of this batch's length that may be computed by themselves."""
        if not self.wanted:
            return 1
        least = self._least.get(call.context) if self._is_steady(call) else None
        return call.rows if least is None else min(call.rows, -(-least // (call.length or 1)))

    def sizes(self, call: Call) -> range:
        """Sizes of batches, in positions, in which a row of some key has the bits that it has in this one."""
        if not self.wanted or not self._is_steady(call):
            return ANY_SIZE
        least = self._least.get(call.context)
        if least is None or positions(call) < least:
            return ANY_SIZE
        return range(least, 2 * self._tried[call.context])

    def classify(self, call: Call, names: list[bytes], ends: list[int]) -> list[bytes]:
        """
        Add to each row's name the shapes that its bits depend on.

        Args:
            call ([`Call`]): the batch.
            names (`list[bytes]`): of its rows, by content.
            ends (`list[int]`): positions of each row without the padding behind it.

        Returns:
            `list[bytes]`: the keys of its activations.
        """
        if not self.wanted:
            return names
        if not self._is_steady(call):
            return [_derive(name, (call.rows, call.length, row)) for row, name in enumerate(names)]
        least = self._least.get(call.context)
        if least is None or positions(call) < least:
            shape: tuple[Any, ...] = (call.rows, call.length)
            return [_derive(name, shape) for name in names]
        if call.length is None:
            return names
        whole = _whole(call.length, self._step(call)) if self._padding[call.context] else 0
        return [name if end <= whole else _derive(name, (call.length,)) for name, end in zip(names, ends, strict=True)]

    def _is_steady(self, call: Call) -> bool:
        """Whether a row has the same bits anywhere in the batch, as the first block tells."""
        if call.layout not in self._steady:
            rows = [row % call.rows for row in range(4)]  # enough to lie on either side of any thread's share
            hidden = self.prefix.run(call, rows, end=2)
            mirrored = self.prefix.run(call, rows[::-1], end=2)
            self._steady[call.layout] = torch.equal(hidden, mirrored.flip(0))
        return self._steady[call.layout]

    def _step(self, call: Call) -> int:
        """Numbers in a register."""
        size = next((value.element_size() for value in self.prefix.stack.backbone.parameters()), 4)
        return REGISTER // (2 if torch.is_autocast_enabled(call.device.type) else size)

    def _padding_is_free(self, call: Call, least: int) -> bool:
        """Whether rows have the same bits whatever the padding behind them, but for a last, incomplete step."""
        if call.length is None:
            return True
        content, step = max(1, call.length // 2), self._step(call)
        lengths = {call.length - less for less in (0, 1, step // 2 + 3)}
        lengths = {length for length in lengths if _whole(length, step) >= content}
        if len(lengths) < 2:
            return False
        rows = list(range(min(call.rows, max(2, least) + least)))  # no fewer than `least` of the shortest
        first, *others = [call.cut(length, content) for length in sorted(lengths, reverse=True)]
        assert first.mask is not None
        ends = unpadded(first.mask[rows]).sum(1).tolist()
        hidden = self.prefix.run(first, rows)
        return all(same_bits(self.prefix.run(other, rows), hidden, ends) for other in others)


def same_bits(a: torch.Tensor, b: torch.Tensor, ends: list[int]) -> bool:
    """Whether two batches of activations agree to the last bit, but for padding."""
    if any(end >= 0 for end in ends):
        return all(torch.equal(a[row, :end], b[row, :end]) for row, end in enumerate(ends))
    return torch.equal(a, b)


def positions(call: Call) -> int:
    """Size of a batch."""
    return call.rows * (call.length or 1)


def _whole(length: int, step: int) -> int:
    return length // step * step


def _derive(name: bytes, shape: tuple[Any, ...]) -> bytes:
    return hashlib.blake2b(name + repr(shape).encode(), digest_size=16).digest()


@torch.no_grad()
def name_front(unit: Unit, before: int) -> int:
    """
    A number that names what an activation comes from: the machinery and the weights.

    Args:
        unit ([`Unit`]): the last of the front.
        before (`int`): what names the front without it; `0` for none.
    """
    modules = [module for top in unit.modules.values() for module in top.modules()]
    tensors = [tensor for module in modules for tensor in (*module._parameters.values(), *module._buffers.values())]
    digest = hashlib.blake2b(before.to_bytes(8, "little"), digest_size=8)
    for tensor in tensors:
        if tensor is not None:
            digest.update(_machinery(tensor.device))
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return int.from_bytes(digest.digest(), "little")


def _machinery(device: torch.device) -> bytes:
    """What the order of sums may depend on, besides the batch."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name} {torch.get_num_threads()}".encode()
