"""An estimate as text."""

from textwrap import fill
from typing import TYPE_CHECKING

from ..cost.ledger import text_table

if TYPE_CHECKING:
    from .forecast import Estimate

WIDTH = 100  # characters of a line


def summary(estimate: "Estimate") -> str:
    """
    The tables that `smartfrz estimate` prints, and the answer.

    Args:
        estimate ([`Estimate`]): to show.
    """
    profile = estimate.profile
    epochs = profile.total_steps / profile.steps_per_epoch
    lines = [
        f"{profile.model}: {len(profile.units)} units, {profile.trainable:,} of {profile.parameters:,} parameters train.",
        f"{profile.total_steps:,} steps of {profile.rows_per_step} rows"
        + (f", {epochs:.3g} epochs of {profile.rows:,} rows" if epochs else "")
        + f", on {profile.device}. Measured in {profile.seconds:.0f} s.",
        "",
        *_by_depth(estimate),
        "",
    ]
    if estimate.points:
        lines += [f"What freezes after the first {profile.pilot_steps} steps, by operating point:", ""]
        lines += [*_by_point(estimate), ""]
    return "\n".join([*lines, fill(f"Does it pay? {estimate.verdict}", WIDTH)])


def _by_depth(estimate: "Estimate") -> list[str]:
    """The table of what each depth costs, with its notes."""
    profile, depths = estimate.profile, estimate.depths
    rows = [("frozen", "s/step", "cached", "memory", "cache", "compute saved", "time saved", "points lost")]
    for at in depths:
        mark = "" if at.depth in estimate.measured else "*"
        rows.append(
            (
                f"{at.depth}{mark}" if at.depth else "0 (plain)",
                f"{at.step_seconds:.3g}",
                "-" if at.cached_step_seconds is None else f"{at.cached_step_seconds:.3g}",
                readable(at.memory),
                readable(at.cache_bytes) if at.cache_bytes else "-",
                f"{at.compute_saved:.0%}",
                f"{1 - min(at.seconds, at.cached_seconds) / depths[0].seconds:.0%}",
                "-" if at.points_lost is None else f"{at.points_lost:.1f}",
            )
        )
    notes = [] if len(estimate.measured) == len(depths) else ["*: between measured depths"]
    if profile.cache_off is not None:
        notes.append(f"The activation cache was not measured: {profile.cache_off}")
    else:
        notes.append(
            "cached: a step whose rows all come from the activation cache, which holds all rows in the size under cache"
        )
        if any(at.cache_bytes > estimate.cache_room for at in depths):
            room = readable(estimate.cache_room)
            notes.append(f"the cache has room for {room}; `cache_memory` and `cache_disk` give it more")
    return [*text_table(rows), fill(f"({'; '.join(notes)}.)", WIDTH)]


def _by_point(estimate: "Estimate") -> list[str]:
    """The table of what each operating point freezes, with its note."""
    rows = [("point", "freezes", "compute saved", "time saved", "memory saved", "points lost", "learning rate")]
    for point in estimate.points:
        spread = "" if point.sure else f" ({point.least}-{point.most})"
        rows.append(
            (
                point.name + (" <" if point is estimate.chosen else ""),
                f"{point.depth} of {len(estimate.profile.units)}{spread}",
                f"{point.compute_saved:.0%}",
                f"{point.time_saved:.0%}",
                f"{point.memory_saved:.0%}",
                "-" if point.points_lost is None else f"{point.points_lost:.1f}",
                f"x {point.rate_factor:.2f}",
            )
        )
    if all(point.sure for point in estimate.points):
        return text_table(rows)
    note = "in brackets: the range that slightly shorter pilots gave, which says how certain the decision is"
    return [*text_table(rows), fill(f"({note}.)", WIDTH)]


def readable(size: float) -> str:
    """A number of bytes, with three digits and a unit of powers of 1,000."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 999.5:  # three digits of more would be "1e+03"
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
