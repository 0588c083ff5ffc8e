"""The command line: `smartfrz harvest` records training runs, `fit` makes a predictor of them, `push` shares it."""

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

app = typer.Typer(help="Adaptive layer freezing for Hugging Face Transformers.", no_args_is_help=True)


@app.callback()
def main() -> None:
    """Keep the commands named even while there are few of them."""


def _open(room: str) -> ModuleType:
    """A module of `harvest/`, whose packages the rest does without."""
    try:
        return import_module(f".harvest.{room}", __package__)
    except ModuleNotFoundError as error:
        typer.echo(f"This command needs the package {error.name}: pip install 'smartfrz_hf[harvest]'", err=True)
        raise typer.Exit(1) from error


@app.command()
def harvest(
    runs: Annotated[Path, typer.Argument(help="JSON list of the runs.", exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Option(help="Folder that gets one Parquet file a run; runs already there are kept.")],
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of local copies of the data, DATA/*.parquet. Default: the Hub.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Runs at a time; they share the cores.")] = 1,
) -> None:
    """Record full training runs: weight snapshots, learning rates, and each unit's CKA to its own end."""
    room = _open("runs")
    try:
        failures = room.harvest(_open("specs").read_specs(runs), out, data_dir, processes)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    for line in failures:
        typer.echo(f"failed: {line}", err=True)
    if failures:
        typer.echo("The other runs are kept; the same command tries the failed ones again.", err=True)
        raise typer.Exit(1)


@app.command()
def fit(
    runs: Annotated[Path, typer.Argument(help="Folder that `smartfrz harvest` filled.", exists=True, file_okay=False)],
    out: Annotated[Path, typer.Option(help="Folder that gets the predictor and its model card.")],
    hold_out_family: Annotated[
        list[str] | None, typer.Option(help="Model family kept out of training, such as resnet; may be repeated.")
    ] = None,
    hold_out_task: Annotated[
        list[str] | None, typer.Option(help="Data set kept out of training, such as glue/cola; may be repeated.")
    ] = None,
    cka: Annotated[float, typer.Option(min=0, max=1, help="CKA from which a unit has settled in any case.")] = 0.9998,
    change_left: Annotated[
        float, typer.Option(min=0, max=1, help="Share of its change that a settled unit may still have to come.")
    ] = 0.01,
    form: Annotated[str, typer.Option(help="What a snapshot is to the predictor: dynamics or weights.")] = "dynamics",
    window: Annotated[int, typer.Option(min=2, help="Snapshots in a history.")] = 20,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training rows.")] = 30,
    seed: Annotated[int, typer.Option(help="Of the initial weights and the order of the rows.")] = 0,
    results: Annotated[Path | None, typer.Option(help="JSON file that gets what was measured.")] = None,
) -> None:
    """Fit a predictor to recorded runs, judge it on what was held out, and write it with its model card."""
    try:
        summary = _open("fit").fit_and_judge(
            runs,
            out,
            set(hold_out_family or []),
            set(hold_out_task or []),
            cka,
            change_left,
            form,
            window,
            epochs,
            seed,
        )
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error
    if results is not None:
        results.parent.mkdir(parents=True, exist_ok=True)
        results.write_text(json.dumps(summary, indent=2) + "\n")
    for name, part in (("training", summary["training"]), ("held out", summary["held_out"])):
        typer.echo(f"{name:>9}: {part['rows']} rows, AUC {part['auc']:.3f}, average precision {part['ap']:.3f}")
    for rule, part in summary["held_out"]["rules"].items():
        typer.echo(f"{'rule':>9}: AUC {part['auc']:.3f}, average precision {part['ap']:.3f}  {rule}")


@app.command()
def push(
    predictor: Annotated[Path, typer.Argument(help="Folder that `smartfrz fit` wrote.", exists=True, file_okay=False)],
    repo: Annotated[str, typer.Argument(help="USER/NAME on the Hub; made if it is not there.")],
    private: Annotated[
        bool | None, typer.Option(help="Whether a repository that is made is private. Default: the account's.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, made if it is not there. Default: the main one.")
    ] = None,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload predictor",
) -> None:
    """Put a predictor with its model card on the Hub. Uses the token of `hf auth login` or HF_TOKEN."""
    from .predictor import push_predictor

    try:
        typer.echo(push_predictor(predictor, repo, private, revision, message=message))
    except (OSError, ValueError) as error:
        typer.echo(f"{error}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app()
