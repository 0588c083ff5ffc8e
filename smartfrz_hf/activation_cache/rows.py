"""Putting a batch together from rows at hand and rows that still have to be computed."""

from collections.abc import Iterable, Mapping

import torch

from .calls import Call
from .front import SkippableFront

# Position of the first element that is kept of a row, and the end; `(0, -1)` where a row is kept whole.
Span = tuple[int, int]


def plan(depths: list[int], depth: int) -> dict[int, list[int]] | None:
    """
    Which rows to compute from which depth.

    Args:
        depths (`list[int]`): of each row, units that it has been through; `0` if it was not found.
        depth (`int`): units of the front.

    Returns:
        `dict[int, list[int]]`, or `None` if it is as cheap to compute all rows from the start.
    """
    groups: dict[int, list[int]] = {}
    for row, found in enumerate(depths):
        if found != depth:
            groups.setdefault(found, []).append(row)
    cost = sum(len(rows) * (depth - start) for start, rows in groups.items())
    return None if cost >= len(depths) * depth else groups


def left_out(groups: dict[int, list[int]], rows: int, depth: int, compared: int) -> list[float]:
    """
    Share of a batch's rows for which each unit did not run. The stem runs for all, and again for rows that are computed.

    Args:
        groups (`dict[int, list[int]]`): what [`plan`] has returned.
        rows (`int`): rows of the batch.
        depth (`int`): units of the front.
        compared (`int`): rows that were computed beside, to compare them.
    """
    again = sum(map(len, groups.values()))
    ran = [sum(len(part) for start, part in groups.items() if start <= unit) for unit in range(1, depth)]
    return [-(again + compared) / rows, *(1 - (count + compared) / rows for count in ran)]


def assemble(
    front: SkippableFront,
    call: Call,
    spans: list[Span],
    at_hand: dict[int, torch.Tensor],
    groups: dict[int, list[int]],
) -> torch.Tensor:
    """What crosses the boundary: activations at hand, and the others computed from where they were left."""
    parts = {
        start: front.run(call, rows, start, stack(call, spans, rows, at_hand) if start else None)
        for start, rows in groups.items()
    }
    computed = {row: part[i] for start, part in parts.items() for i, row in enumerate(groups[start])}
    if len(computed) == call.rows and len(parts) == 1:
        return parts.popitem()[1]
    ready = {row: kept for row, kept in at_hand.items() if row not in computed}
    hidden = stack(call, spans, range(call.rows), ready, like=next(iter((ready or computed).values())))
    for row, values in computed.items():
        hidden[row] = values
    return hidden


def stack(
    call: Call,
    spans: list[Span],
    rows: Iterable[int],
    at_hand: Mapping[int, torch.Tensor],
    like: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows at hand as one batch on the model's device, with zeros for padding and for rows that are not at hand."""
    rows = list(rows)
    like = at_hand[rows[0]] if like is None else like
    padded = spans[0][1] >= 0
    shape = (len(rows), *((call.length, *like.shape[1:]) if padded else like.shape))

    def fill(batch: torch.Tensor, which: list[int]) -> torch.Tensor:
        for place in which:
            row = rows[place]
            (batch[place, slice(*spans[row])] if padded else batch[place]).copy_(at_hand[row])
        return batch

    known = [i for i, row in enumerate(rows) if row in at_hand]
    whole = len(known) == len(rows) and (not padded or all(spans[row] == (0, call.length) for row in rows))
    make = torch.empty if whole else torch.zeros
    on_host = [i for i in known if at_hand[rows[i]].device.type == "cpu"]
    beside = [i for i in known if at_hand[rows[i]].device.type != "cpu"]
    if on_host or call.device.type == "cpu":
        # Pinned memory is kept for the next batch, and several times as fast to copy from.
        batch = make(shape, dtype=like.dtype, device="cpu", pin_memory=call.device.type == "cuda")
        batch = fill(batch, on_host).to(call.device, non_blocking=True)
    else:
        batch = make(shape, dtype=like.dtype, device=call.device)
    return fill(batch, beside)


def cut(hidden: torch.Tensor, spans: list[Span], rows: Iterable[int]) -> list[torch.Tensor]:
    """What is kept of some rows."""
    return [hidden[row, slice(*spans[row])] if spans[row][1] >= 0 else hidden[row] for row in rows]
