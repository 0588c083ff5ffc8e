"""The HTML page of a report: one file that loads nothing."""

from collections.abc import Callable, Iterable, Mapping
from html import escape
from typing import Any

from .charts import Curve, attention, curves, number, timeline
from .runs import SavedRun

WIDE, NARROW = 880, 330  # pixels of a chart on a desktop and on a phone
MOST_METRICS = 6
STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1d2429; --soft: #5d6a72; --edge: #d9e0e4; --panel: #f5f7f8;
  --frozen: #7d97a5; --active: #f0e2d8; --score: #d4691f; --plain: #6b7780; }
@media (prefers-color-scheme: dark) { :root { --back: #14181b; --text: #e4e9ec; --soft: #9aa7af; --edge: #333c42;
  --panel: #1c2226; --frozen: #56707e; --active: #2d2722; --score: #f08a3c; --plain: #97a4ac; } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 960px; padding: 16px; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: .3em 0; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin: 2em 0 .6em }
p, figcaption { color: var(--soft); margin: .4em 0 } figure { margin: 0 0 1.4em }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 10px; margin: 1em 0 }
.tile { background: var(--panel); border: 1px solid var(--edge); border-radius: 8px; padding: 10px 12px }
.tile b { display: block; font-size: 1.35rem } .tile span { color: var(--soft); font-size: .85rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: .9rem }
th, td { text-align: left; padding: 5px 10px 5px 0; border-bottom: 1px solid var(--edge); vertical-align: top }
td { overflow-wrap: anywhere } td.n, th.n { text-align: right } td.n { font-variant-numeric: tabular-nums; white-space: nowrap }
code { font-size: .95em; overflow-wrap: anywhere } summary { cursor: pointer; margin: 1em 0 .5em; font-weight: 600 }
svg { display: block; max-width: 100% } svg text { fill: var(--soft); font: 12px system-ui, sans-serif }
.trains { fill: var(--active) } .score { fill: var(--score) } .frozen { fill: var(--frozen) }
.grid { stroke: var(--edge) } polyline { fill: none; stroke-width: 2; stroke-linejoin: round }
.line0 { stroke: var(--score) } .line1 { stroke: var(--plain); stroke-dasharray: 6 4 }
.dot0 { fill: var(--score) } .dot1 { fill: var(--plain) }
.key { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: .85rem; color: var(--soft); margin: .3em 0 }
.key i { display: inline-block; width: 14px; height: 12px; margin-right: 6px; border-radius: 2px; vertical-align: -1px }
.narrow { display: none } @media (max-width: 640px) { .narrow { display: block } .wide { display: none } }
"""


def page(run: SavedRun, plain: SavedRun | None = None) -> str:
    """
    The report of a run.

    Args:
        run ([`SavedRun`]): to report on.
        plain ([`SavedRun`], *optional*): the same training without freezing, shown beside it.

    Returns:
        `str`: an HTML document.
    """
    name = run.folder.resolve().name
    parts = [f"<h1>{escape(name)}</h1>", f"<p>{escape(_headline(run))}</p>", _tiles(run, plain)]
    if run.state is not None:
        parts.append("<h2>Units</h2>")
        parts.append(
            '<div class="key"><span><i style="background:var(--active)"></i>trains</span><span><i '
            'style="background:var(--score)"></i>trains; the stronger the color, the higher the probability '
            'that it can freeze</span><span><i style="background:var(--frozen)"></i>frozen</span></div>'
        )
        parts.append(_both(lambda width: timeline(run, width)))
        parts += [_stages(run), _attention(run), _start(run)]
    charts = [chart for key in ("loss", *run.metrics[:MOST_METRICS]) for chart in _charts(key, run, plain)]
    if charts:
        key = "" if plain is None else _legend(run, plain)
        parts += ["<h2>Loss and metrics</h2>", key, *charts]
    if len(run.curve("freeze/compute_saved")) > 1:
        saved = [(step, 100 * share) for step, share in run.curve("freeze/compute_saved")]
        parts.append("<h2>Compute</h2>")
        parts.append(_chart("compute saved so far, %", {"compute saved": saved}, "optimizer step"))
    parts += ["<h2>Details</h2>", _details(run, plain)]
    title = f"SmartFRZ: {escape(name)}"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _both(draw: Callable[[int], str]) -> str:
    return f'<div class="wide">{draw(WIDE)}</div><div class="narrow">{draw(NARROW)}</div>'


def _legend(run: SavedRun, plain: SavedRun) -> str:
    names = [escape(each.folder.resolve().name) for each in (run, plain)]
    return (
        f'<div class="key"><span><i style="background:var(--score)"></i>{names[0]}</span>'
        f'<span><i style="background:var(--plain)"></i>{names[1]} (dashed)</span></div>'
    )


def _chart(label: str, named: Mapping[str, Curve], x_label: str) -> str:
    drawn = _both(lambda width: curves(named, width, x_label, label))
    return f"<figure><figcaption>{escape(label)}</figcaption>{drawn}</figure>"


def _charts(key: str, run: SavedRun, plain: SavedRun | None) -> list[str]:
    """A chart over the steps; over seconds, too, where a plain run is beside it and times are known."""
    runs = {"with SmartFRZ": run} | ({} if plain is None else {"plain": plain})
    by_step = {name: each.curve(key) for name, each in runs.items() if each.curve(key)}
    if not by_step:
        return []
    drawn = [_chart(key, by_step, "optimizer step")]
    by_time = {
        name: [(at, y) for x, y in runs[name].curve(key) if (at := runs[name].time_at(x)) is not None]
        for name in by_step
    }
    if len(by_time) > 1 and all(by_time.values()):
        drawn.append(_chart(f"{key}, over time", by_time, "seconds of training"))
    return drawn


def _frozen(stage: dict[str, Any]) -> int:
    """Units that are frozen from a stage on, also those behind units that train."""
    return stage["depth"] + len(stage["apart"])


def _headline(run: SavedRun) -> str:
    if run.state is None:
        return f"{run.steps:,} optimizer steps, without SmartFRZ."
    if not run.ledger["stages"]:
        return f"Nothing froze in {run.steps:,} optimizer steps."
    first, units = run.ledger["stages"][0], len(run.state["units"])
    return (
        f"{_frozen(run.ledger['stages'][-1])} of {units} units are frozen after {run.steps:,} optimizer steps; the first "
        f"froze at step {first['step']:,}."
    )


def _tiles(run: SavedRun, plain: SavedRun | None) -> str:
    tiles = []
    if run.state is not None:
        stages = run.ledger["stages"]
        tiles.append((f"{_frozen(stages[-1]) if stages else 0} of {len(run.state['units'])}", "units frozen"))
    spent, full = (sum((run.ledger.get(key) or {}).values()) for key in ("spent", "full"))
    if full:
        tiles.append((f"{1 - spent / full:.1%}", "compute saved"))
        tiles.append((f"{spent:.3g}", f"FLOPs, of {full:.3g} in full"))
        if gap := run.ledger.get("gap"):
            label = "of the compute ran back through units frozen behind units that train"
            tiles.append((f"{gap / full:.1%}", label))
    if run.seconds is not None:
        share = ""
        if plain is not None and plain.seconds:
            share = f", {run.seconds / plain.seconds - 1:+.0%} against plain"
        tiles.append((f"{number(round(run.seconds, 1))} s", f"training time{share}"))
    cache = run.ledger.get("cache")
    if cache and cache["rows"]:
        tiles.append((f"{cache['hits'] / cache['rows']:.0%}", f"of {cache['rows']:,} rows found in the cache"))
        held = sum(cache.get(f"bytes_{where}", 0) for where in ("device", "memory", "disk")) / 1e6
        tiles.append((f"{number(round(held, 1))} MB", "held by the cache"))
        saved = round(cache["seconds_saved"], 1)
        label = "saved by the cache" if saved >= 0 else "lost to the cache: it took longer than it saved"
        tiles.append((f"{number(abs(saved))} s", label))
    for key in ("loss", *run.metrics[:2]):
        if curve := run.curve(key):
            other = plain.curve(key) if plain is not None else []
            beside = f" (plain: {number(other[-1][1])})" if other else ""
            tiles.append((number(curve[-1][1]), f"{key}, last{beside}"))
    boxes = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(text)}</span></div>' for value, text in tiles
    )
    return f'<div class="tiles">{boxes}</div>'


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]], numbers: Iterable[int] = ()) -> str:
    right = set(numbers)

    def line(cells: Iterable[Any], tag: str) -> str:
        tagged = (
            f"<{tag}{' class=n' if i in right else ''}>{escape(str(cell))}</{tag}>" for i, cell in enumerate(cells)
        )
        return f"<tr>{''.join(tagged)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table><thead>{line(head, "th")}</thead><tbody>{body}</tbody></table></div>'


def _stages(run: SavedRun) -> str:
    assert run.state is not None
    order = {unit: place for place, unit in enumerate(run.state["units"])}
    rows, before = [], 0
    for stage in run.ledger["stages"]:
        frozen, units = _frozen(stage), stage["units"]
        what = "froze" if frozen > before else "train again"
        in_a_row = order[units[-1]] - order[units[0]] == len(units) - 1  # not always with `order="independent"`
        long = len(units) > 3 and in_a_row
        names = f"{units[0]} to {units[-1]} ({len(units)} units)" if long else ", ".join(units)
        rows.append((f"{stage['step']:,}", f"{names} {what}", frozen, stage["reason"]))
        before = frozen
    return _table(("step", "what", "frozen", "why"), rows, (0, 2)) if rows else ""


def _attention(run: SavedRun) -> str:
    """Which snapshots of the weight history the predictor attended to when it froze each unit."""
    if not run.attentions:
        return ""
    told = (
        "Before it decides, the predictor looks back over the last snapshots of a unit's weights. The stronger the color, the "
        "more attention a snapshot got when the unit froze, relative to the highest value of its row. A snapshot without an "
        "earlier one to compare it with gets none."
    )
    return f"<h2>What the predictor looked at</h2><p>{told}</p>{_both(lambda width: attention(run, width))}"


def _start(run: SavedRun) -> str:
    """What the start stage saw and decided."""
    start = run.ledger.get("start")
    if start is None:  # without a pilot
        return ""
    assert run.state is not None
    units, lost = ["nothing", *run.state["units"]], start["points_lost"] or []
    rows = [
        (
            f"{'up to ' if depth else ''}{units[depth]}{' (decided)' if depth == start['depth'] else ''}",
            f"{saving:.0%}",
            *([number(round(lost[depth], 1))] if depth < len(lost) else []),
        )
        for depth, saving in enumerate(start["savings"])
    ]
    froze = (
        f"{start['depth']} units froze, with the weights that they had at the start"
        if start["depth"]
        else "nothing froze"
    )
    told = (
        f"The first {start['step']} steps were a pilot in which everything trains. Then {froze} ({start['reason']})."
    )
    if start["depth"]:
        told += f" The learning rate of the rest is multiplied by {start['rate_factor']:.2f}."
    head = ("frozen from the start", "compute saved", *(["predicted points lost"] if lost else []))
    return f"<h2>The start stage</h2><p>{escape(told)}</p>{_table(head, rows, (1, 2))}"


def _details(run: SavedRun, plain: SavedRun | None) -> str:
    parts = []
    sizes = run.ledger.get("unit_parameters") or {}
    if sizes and run.state is not None:
        rows = [(unit, f"{size:,}", run.freeze_steps.get(unit, "–")) for unit, size in sizes.items()]
        parts.append(_section("Parameters by unit", _table(("unit", "trainable", "froze at step"), rows, (1, 2))))
    cache = run.ledger.get("cache")
    if cache:
        parts.append(
            _section(
                "Activation cache", _table(("", ""), ((k.replace("_", " "), _plain(v)) for k, v in cache.items()))
            )
        )
    if run.state is not None:
        options = run.state["config"].items()
        parts.append(
            _section("Configuration", _table(("option", "value"), ((k, v) for k, v in options if v is not None)))
        )
    known = ("num_train_epochs", "max_steps", "train_batch_size", "total_flos", "best_metric", "best_global_step")
    for each, title in ((run, "Trainer"), (plain, "Trainer of the plain run")):
        if each is not None and each.trainer:
            values = ((key, _plain(each.trainer[key])) for key in known if each.trainer.get(key) is not None)
            parts.append(_section(title, _table(("", ""), values)))
    if run.versions:
        parts.append(_section("Versions", _table(("library", "version"), run.versions.items())))
    return "".join(parts)


def _plain(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return number(value) if isinstance(value, float) else "–" if value is None else value


def _section(title: str, content: str) -> str:
    return f"<details open><summary>{escape(title)}</summary>{content}</details>"
