"""
Writes `docs/models.md`, the table of architectures, from what is proved on a tiny model of each.

Results are kept in `runs/models.json`, so that a run that was cut off goes on. Name architectures to prove these again and leave the
other lines as they are.
"""

import argparse
import json
import logging
import re
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "utils"))

import transformers  # noqa: E402
from proofs import prove  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES  # noqa: E402
from zoo import COMPOSITES, TIMM, build_tiny, make_batch  # noqa: E402

PAGE, RESULTS = ROOT / "docs" / "models.md", ROOT / "runs" / "models.json"
SECONDS = 60  # of the processor, for one architecture
# Parts of architectures that are listed themselves.
PARTS = ("_text", "_vision", "_audio", "_encoder", "_decoder", "_model", "_text_model", "_vqmodel", "_video")
NOT_BUILT = "not built"
NOTE = re.compile(r"no \((\d+)\)")
NOT_BY_ROW = re.compile(r"^`\w+` does not (have one entry per row).*")  # one note, whichever argument it is

HEADER = """# Models

Each line of the table was proved on a tiny model with random weights, by `make models`, with Transformers {version}. {summary}

- **Blocks** are found by `find_blocks(model)`, and run in this order: hooks on them fire so. Each parameter is in exactly one of
  stem, blocks and head. Where the order comes from *data*, the model does not run on a batch that is made up from its
  configuration, and the first rows of the training data show it: `SmartFRZCallback`, `SmartFRZTrainer` take them by themselves,
  and elsewhere it is `find_blocks(model, inputs=batch)` or `FreezingRun(..., inputs=batch)`.
- **Saved**: share of the FLOPs of a step that go when the first half of the units (stem included) is frozen. No fewer go than with
  `requires_grad_(False)` and `eval()` by hand, and the gradients behind the front are the same. `*`: the backward pass still runs
  through frozen blocks, since something other than their weights asks for gradients there.
- **Cache**: whether rows that come again are served by the activation cache, at that depth; if not, see the notes for why. The cache
  then stands aside, and says so in one line.
- **Checkpointing**: gradients are the same with activation checkpointing on. `none`: the model has none.
- **LoRA** on all linear layers: the units stay the same, and the frozen front gets no gradient.
- **Shared**: parameters with several names. A shared parameter freezes with the first unit that reads it.

An encoder-decoder has the units of its encoder, then those of its decoder; a model with several towers those of each tower, in the order
in which they run. What feeds a decoder or a later tower, such as its embeddings or a projector, belongs to its first block. So a
vision tower can freeze as a whole while the projector and the language model train. To freeze it from the start and the language model
as it settles, freeze it by hand before training, in one line, such as `model.model.vision_tower.requires_grad_(False)`.

Embeddings that an encoder, a decoder and an output layer share (T5, BART) freeze with the stem, and are then frozen in the decoder and
the output layer too, which one line in the log says. Training them on would change what the frozen encoder returns at each step. To
train the output layer on, untie it: `config.tie_word_embeddings = False`.

Any other `torch.nn.Module` with a list of blocks works in the same way: models of timm (`timm/...` in the table, and `timm_wrapper` for
those that Transformers loads) and torchvision, or your own. The first rows of
the training data show the order. Where nothing repeats, name what can freeze: `SmartFRZConfig(blocks=["conv1", "conv2"])`.

| Architecture | Model | Blocks | Order from | Saved | Cache | Checkpointing | LoRA | Shared |
|---|---|---|---|---|---|---|---|---|
"""


def architectures() -> list[str]:
    """All that are proved."""
    whole = [
        name
        for name in MODEL_MAPPING_NAMES
        if not any(name.endswith(part) and name.removesuffix(part) in MODEL_MAPPING_NAMES for part in PARTS)
    ]
    return sorted({*whole, *COMPOSITES, *(f"timm/{name}" for name in TIMM)})


def result(name: str) -> dict[str, Any]:
    """The row of an architecture, or why there is none."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {SECONDS} seconds")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        try:
            make_batch(build_tiny(name))
        except Exception as error:
            return {"type": name, NOT_BUILT: f"{type(error).__name__}: {error}"}
        return prove(name)
    except Exception as error:
        return {"type": name, "failed": f"{type(error).__name__}: {error}"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def line(row: dict[str, Any], notes: list[str]) -> str:
    """One line of the table. Reasons are added to `notes`."""

    def note(text: str) -> str:
        if text not in notes:
            notes.append(text)
        return f"no ({notes.index(text) + 1})"

    saved = "" if row["saved"] is None else f"{row['saved']:.0%}{'' if row['cut'] else ' *'}"
    cells = [
        f"`{row['type']}`",
        row["model"],
        ", ".join(f"`{part.split(' ')[0]}`" for part in row["stacks"].split(", ")),
        "itself" if row["found"] == "itself" else "data",
        saved,
        "yes" if row["cache"] == "served" else note(NOT_BY_ROW.sub(r"its arguments do not \1 each", row["cache"])),
        {"no": "none"}.get(row["checkpointing"], row["checkpointing"]),
        row["peft"] if row["peft"] == "yes" else note(row["peft"].removeprefix("no: ").removeprefix("no ")),
        f"{len(row['tied'])}" if row["tied"] else "",
    ]
    return f"| {' | '.join(cells)} |"


# What the first version refused: encoder-decoders, speech models, models with two towers, pyramids, DETR, and timm's wrapper.
ONCE_REFUSED = (
    *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "encoder-decoder", "led", "longt5", "m2m_100"),
    *("marian", "mbart", "mt5", "mvp", "pegasus", "pegasus_x", "plbart", "prophetnet", "speech_to_text"),
    *("switch_transformers", "t5", "umt5", "vision-encoder-decoder", "whisper"),
    *("hubert", "wav2vec2", "wav2vec2-conformer", "wavlm"),
    *("blip", "clip", "llava", "paligemma", "qwen2_vl", "siglip"),
    *("detr", "poolformer", "segformer", "timm_wrapper"),
)


def summary_of(lines: dict[str, str]) -> str:
    """How many architectures have what the table is about, in a sentence or two."""

    def has_everything(text: str) -> bool:
        return "| no (" not in text

    def cached(text: str) -> bool:
        return text.split(" | ")[5] == "yes"

    whole = sum(map(has_everything, lines.values()))
    refused = [name for name in ONCE_REFUSED if name in lines]
    return (
        f"{len(lines)} architectures are in the table: {whole} with everything that it is about, and "
        f"{sum(map(cached, lines.values()))} with rows served by the cache. Of the {len(ONCE_REFUSED)} that the first version "
        f"refused (encoder-decoders, speech, two towers and others), {len(refused)} are in it, "
        f"{sum(has_everything(lines[name]) for name in refused)} with everything."
    )


def page(lines: dict[str, str], notes: list[str], failed: dict[str, str]) -> str:
    """
    The whole page.

    Args:
        lines (`dict[str, str]`): lines of the table, by architecture.
        notes (`list[str]`): what the numbers in them stand for. Those that no line has any more are left out.
        failed (`dict[str, str]`): what happens with an architecture that is not served.
    """
    used = sorted({int(number) for text in lines.values() for number in NOTE.findall(text)})
    places = {old: new for new, old in enumerate(used, start=1)}
    renumber = lambda match: f"no ({places[int(match[1])]})"  # noqa: E731
    table = "\n".join(NOTE.sub(renumber, text) for _, text in sorted(lines.items()))
    end = "\n".join(f"{places[number]}. {notes[number - 1]}" for number in used)
    text = HEADER.format(version=transformers.__version__, summary=summary_of(lines))
    text += f"{table}\n\n{len(lines)} architectures. Notes:\n\n{end}\n"
    if failed:
        text += "\n## Not served\n\n| Architecture | What happens |\n|---|---|\n"
        text += "\n".join(f"| `{name}` | {reason} |" for name, reason in sorted(failed.items())) + "\n"
    return text


def read_page() -> tuple[dict[str, str], list[str], dict[str, str]]:
    """Lines, notes, and what is not served, of the page as it is."""
    table, _, rest = PAGE.read_text().partition("## Not served")
    lines = {match[1]: match[0] for match in re.finditer(r"^\| `([^`]+)` \| .*\|$", table, re.M)}
    failed = {match[1]: match[2] for match in re.finditer(r"^\| `([^`]+)` \| (.*) \|$", rest, re.M)}
    return lines, re.findall(r"^\d+\. (.*)$", table, re.M), failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", help="architectures to prove again; by default, all that have no result yet"
    )
    names = parser.parse_args().names
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("smartfrz_hf").setLevel(logging.ERROR)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    for name in names or [name for name in architectures() if name not in results]:
        began = time.perf_counter()
        results[name] = result(name)
        print(f"{name}: {time.perf_counter() - began:.1f} s, {results[name]}", flush=True)  # noqa: T201
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True))
    lines, notes, failed = read_page() if names else ({}, [], {})
    for name, row in sorted(results.items()):
        lines.pop(name, None)
        failed.pop(name, None)
        if "units" in row:
            lines[name] = line(row, notes)
        elif "failed" in row:
            failed[name] = row["failed"].splitlines()[0][:300]
    PAGE.write_text(page(lines, notes, failed))


if __name__ == "__main__":
    main()
