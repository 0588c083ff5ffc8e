"""
The command line: `smartfrz estimate` tells in advance what a run would save, and `smartfrz report` makes a page of a run.
`harvest` records training runs, `evaluate`, `fit` and `fit-start` train a predictor on them, `card` writes its model card, and
`push` uploads it.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from math import isfinite
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

DEFAULT_LABEL, DEFAULT_TARGET = "rewind-shift-0.03", "kept"

# `--batch_size`, as in the scripts of Transformers, is `--batch-size`.
app = typer.Typer(no_args_is_help=True, context_settings={"token_normalize_func": lambda word: word.replace("_", "-")})


def _tell_version(asked: bool) -> None:
    if asked:
        from . import __version__

        typer.echo(f"smartfrz_hf {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Adaptive layer freezing for Hugging Face Transformers."""


def _finite(value: float) -> float:
    if not isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def _positive(value: float) -> float:
    if not _finite(value) > 0:
        raise typer.BadParameter(f"{value:g} is not above 0")
    return value


RunsFolder = Annotated[
    Path, typer.Argument(help="Folder of the runs that `smartfrz harvest` recorded.", exists=True, file_okay=False)
]
EvaluationFile = Annotated[
    Path, typer.Option(help="JSON file that `smartfrz evaluate` wrote for these runs.", exists=True, dir_okay=False)
]


@contextmanager
def _errors_told() -> Iterator[None]:
    """Say what is wrong without a traceback, and exit with 1."""
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        typer.echo(f"{error}", err=True)
        raise typer.Exit(1) from error


@contextmanager
def _arguments_refused() -> Iterator[None]:
    """Say what is wrong with the arguments, and exit with 2; or with the machine, such as a full disk, and exit with 1."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the system; our own have no number
            typer.echo(f"{error}", err=True)
            raise typer.Exit(1) from error
        raise typer.BadParameter(str(error)) from error


@contextmanager
def _evaluation_in(file: Path) -> Iterator[dict[str, Any]]:
    """What `smartfrz evaluate` wrote into a file. Something else is refused."""
    with _arguments_refused():
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError(f"{file} holds no evaluation; write it with `smartfrz evaluate`.")
            yield content
        except KeyError as error:
            raise ValueError(f"{file} lacks {error}; write it with `smartfrz evaluate`.") from error


def _write_json(content: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _import(module: str) -> ModuleType:
    """Import a module of `predictor_training`, which needs packages that the rest of the library does not."""
    try:
        return import_module(f".predictor_training.{module}", __package__)
    except ModuleNotFoundError as error:
        typer.echo(
            f"This command needs the package {error.name}: pip install 'smartfrz_hf[predictor-training]'", err=True
        )
        raise typer.Exit(1) from error


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Output folders of the Trainer, or checkpoints.", exists=True, file_okay=False),
    ],
    plain: Annotated[
        Path | None,
        typer.Option(help="A run without freezing, to be shown beside each.", exists=True, file_okay=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="HTML file or folder, for one run. Default: smartfrz_report.html in its folder."),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Folder for the charts as PNG files; needs matplotlib.")] = None,
) -> None:
    """Write a page on each run: what froze when and why, losses and metrics, compute, cache and options."""
    from .report import write_report

    if len(runs) > 1 and (out is not None or png is not None):
        raise typer.BadParameter("--out and --png are for one run; leave them out, or give one run.")
    for run in runs:
        page = out or run
        with _errors_told():
            typer.echo(write_report(run, page / "smartfrz_report.html" if page.is_dir() else page, plain, png))


@app.command()
def estimate(
    model: Annotated[str, typer.Option(help="Model on the Hub or in a folder.")],
    task: Annotated[
        str,
        typer.Option(
            help="GLUE task, data set on the Hub, or a local file or folder (parquet, csv, json, jsonl, txt). Texts or images with "
            "labels are classified; texts without labels train a language model."
        ),
    ],
    epochs: Annotated[float, typer.Option(min=0.01, callback=_finite, help="Passes over the training data.")] = 3.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per step.")] = 32,
    learning_rate: Annotated[float, typer.Option(callback=_positive, help="Peak learning rate.")] = 5e-5,
    warmup: Annotated[
        float, typer.Option(min=0, callback=_finite, help="Warm-up: below 1 a fraction of the run, else steps.")
    ] = 0.1,
    max_length: Annotated[int, typer.Option(min=1, help="Most tokens of a text.")] = 128,
    train_rows: Annotated[int | None, typer.Option(min=1, help="Training rows. Default: all.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with a folder for the task.", exists=True, file_okay=False)
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Train in mixed precision.")] = False,
    from_scratch: Annotated[bool, typer.Option("--from-scratch", help="Start from random weights.")] = False,
    operating_point: Annotated[str, typer.Option(help="conservative, balanced or aggressive.")] = "balanced",
    target_saving: Annotated[float | None, typer.Option(help="Share of the compute to be saved instead.")] = None,
    seconds: Annotated[float, typer.Option(min=1, callback=_finite, help="About how long to measure.")] = 30.0,
) -> None:
    """Tell what freezing would save in a training on this machine, and whether it pays. Takes about a minute."""
    import tempfile

    from transformers.utils import logging

    from .config import SmartFRZConfig
    from .estimation import estimate
    from .estimation.task import task_trainer

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with _errors_told():
        config = SmartFRZConfig(operating_point=operating_point, target_saving=target_saving)
        with tempfile.TemporaryDirectory() as folder:
            trainer, rows = task_trainer(
                model,
                task,
                data_dir,
                from_scratch,
                train_rows,
                max_length,
                output_dir=folder,
                num_train_epochs=epochs,
                per_device_train_batch_size=batch_size,
                learning_rate=learning_rate,
                warmup_steps=warmup,
                report_to="none",
                bf16=bf16,
            )
            typer.echo(estimate(trainer, config, seconds=seconds, rows=rows))


@app.command()
def harvest(
    runs: Annotated[Path, typer.Argument(help="JSON file with the list of runs.", exists=True, dir_okay=False)],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for one Parquet file per run. Runs that are already there are kept.", file_okay=False
        ),
    ],
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of local copies of the data, DATA/*.parquet. Default: the Hub.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Number of runs at a time; they share the CPU cores.")] = 1,
) -> None:
    """Record full training runs: weight snapshots, learning rates, and the similarity of outputs to the final ones."""
    with _arguments_refused():
        failures = _import("harvest").harvest(_import("specs").read_specs(runs), out, data_dir, processes)
    for line in failures:
        typer.echo(f"failed: {line}", err=True)
    if failures:
        typer.echo("The other runs are recorded. Run the same command again to retry the failed ones.", err=True)
        raise typer.Exit(1)


@app.command()
def evaluate(
    runs: RunsFolder,
    out: Annotated[
        Path, typer.Option(help="JSON file for the evaluation. Two charts are written next to it.", dir_okay=False)
    ],
    label: Annotated[
        str, typer.Option(help="What counts as converged, such as cka-0.99, settled or rewind-shift-0.03.")
    ] = DEFAULT_LABEL,
    target: Annotated[
        str,
        typer.Option(
            help="What the predictor learns. label: whether the unit has converged. kept: by the rewind test, the "
            "share of the run's change that is kept if the front freezes, so that expensive mistakes count for more."
        ),
    ] = DEFAULT_TARGET,
    form: Annotated[str, typer.Option(help="Input of the predictor: dynamics or weights.")] = "dynamics",
    window: Annotated[int, typer.Option(min=2, help="Number of snapshots in a history.")] = 20,
    weights_per_unit: Annotated[int, typer.Option(min=1, help="Number of sampled weights in a snapshot.")] = 1024,
    front_probe: Annotated[
        bool | None,
        typer.Option(
            help="Whether the inputs include how the outputs on the front probe change. Default: with dynamics."
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Number of epochs over the freezing stages.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the initial weights and the order of the stages.")] = 0,
) -> None:
    """Hold out each model family, and each data set, once, and evaluate predictors and simple rules on them."""
    from .predictor import SmartFRZPredictorConfig

    evaluation, options = _import("evaluation"), _import("fit").FitOptions(epochs=epochs, seed=seed)
    with _arguments_refused():
        config = SmartFRZPredictorConfig(
            form=form,
            window=window,
            weights_per_unit=weights_per_unit,
            front_probe=form == "dynamics" if front_probe is None else front_probe,
        )
        out.parent.mkdir(parents=True, exist_ok=True)  # before the long part
        results = evaluation.evaluate(runs, label, target, config, options)
        _write_json(results, out)
        _import("card").draw_charts(results, out.parent, prefix=f"{out.stem}_")
    for name in evaluation.GROUPS:
        typer.echo(f"\n{name.replace('_', ' ')}: {results[name]['rows']} rows")
        for rule, part in [("predictor", results[name]), *results[name]["rules"].items()]:
            typer.echo(f"  AUC {part['auc']:.3f}, average precision {part['ap']:.3f}  {rule}")


@app.command()
def fit(
    runs: RunsFolder,
    evaluation: EvaluationFile,
    out: Annotated[Path, typer.Option(help="Folder for the predictor, its model card and charts.", file_okay=False)],
) -> None:
    """Fit a predictor to all runs, in the way that was evaluated, and save it with its model card."""
    with _evaluation_in(evaluation) as evaluated:
        _import("evaluation").fit_evaluated(runs, evaluated, out)
    typer.echo(f"Saved the predictor in {out}. Load it with SmartFRZConfig(predictor={str(out)!r}).")


@app.command()
def fit_start(
    results: Annotated[
        Path,
        typer.Argument(help="Folder that benchmarks/predictor/start/harvest.py wrote.", exists=True, file_okay=False),
    ],
    predictor: Annotated[
        Path,
        typer.Argument(
            help="Folder of a predictor; the start predictor is added to it.", exists=True, file_okay=False
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="JSON file for the evaluation on held-out families and tasks.", dir_okay=False)
    ],
) -> None:
    """Fit what decides which front freezes from the start, evaluate it, and add it to a predictor."""
    from .predictor import load_predictor

    start = _import("start")
    with _arguments_refused():
        pairs = _import("start_pairs").read_pairs(results)
        evaluation = start.evaluate_start(pairs)
        joined = start.add_start(load_predictor(predictor.resolve()), pairs, evaluation)
        _write_json(evaluation, out)
        joined.save_pretrained(predictor)
    for group in ("family", "task"):
        for rule, by_tolerance in evaluation[group].items():
            for tolerance, found in by_tolerance.items():
                typer.echo(
                    f"{group} held out, {rule} {tolerance}: saved {found['saved']:.1%}, points lost "
                    f"{found['points_lost']:+.2f} (worst {found['worst']:+.2f})"
                )
    typer.echo(f"Limits: {evaluation['limits']}. Added to {predictor}.")


@app.command()
def card(
    predictor: Annotated[Path, typer.Argument(help="Folder of the predictor.", exists=True, file_okay=False)],
    evaluation: EvaluationFile,
) -> None:
    """Write the model card and the charts of a predictor again, from its evaluation."""
    with _evaluation_in(evaluation) as evaluated:
        _import("card").write_card(evaluated, predictor)


@app.command()
def push(
    predictor: Annotated[Path, typer.Argument(help="Folder that `smartfrz fit` wrote.", exists=True, file_okay=False)],
    repo: Annotated[str, typer.Argument(help="USER/NAME on the Hub; created if it does not exist.")],
    private: Annotated[
        bool | None, typer.Option(help="Whether a created repository is private. Default: the setting of the account.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, created if it does not exist. Default: the main branch.")
    ] = None,
    message: Annotated[str, typer.Option(help="Commit message.")] = "Upload predictor",
) -> None:
    """Upload a predictor with its model card to the Hub, with the token of `hf auth login` or HF_TOKEN."""
    from .predictor import push_predictor

    with _errors_told():
        typer.echo(push_predictor(predictor, repo, private, revision, message=message))
