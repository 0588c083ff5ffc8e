"""The command line: `smartfrz harvest` records training runs, `evaluate` and `fit` make a predictor of them, `push` shares it."""

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

DEFAULT_LABEL, DEFAULT_TARGET = "rewind-shift-0.03", "kept"

app = typer.Typer(help="Adaptive layer freezing for Hugging Face Transformers.", no_args_is_help=True)


@app.callback()
def main() -> None:
    """Keep the commands named even while there are few of them."""


def _open(module: str) -> ModuleType:
    """A module of `predictor_training/`, whose packages the rest does without."""
    try:
        return import_module(f".predictor_training.{module}", __package__)
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
def evaluate(
    runs: Annotated[Path, typer.Argument(help="Folder that `smartfrz harvest` filled.", exists=True, file_okay=False)],
    out: Annotated[Path, typer.Option(help="JSON file that gets what was measured; two charts go beside it.")],
    label: Annotated[
        str, typer.Option(help="What counts as converged, such as cka-0.99, settled or rewind-shift-0.03.")
    ] = DEFAULT_LABEL,
    target: Annotated[
        str,
        typer.Option(
            help="What the predictor learns: label, whether it has converged; or kept, by the rewind test, what share of "
            "the way stays if the front freezes, so that dear mistakes count for more."
        ),
    ] = DEFAULT_TARGET,
    form: Annotated[str, typer.Option(help="What a snapshot is to the predictor: dynamics or weights.")] = "dynamics",
    window: Annotated[int, typer.Option(min=2, help="Snapshots in a history.")] = 20,
    weights_per_unit: Annotated[int, typer.Option(min=1, help="Sampled weights in a snapshot.")] = 1024,
    front_probe: Annotated[
        bool | None,
        typer.Option(
            help="Whether the predictor is told how the front probe probe_features, and looks at it in training. Default: with the "
            "form dynamics."
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the freezing stages.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the initial weights and the order of the stages.")] = 0,
) -> None:
    """Leave each model family, and each data set, out once; judge predictors and simple rules there."""
    from .predictor import SmartFRZPredictorConfig

    judging, options = _open("judge"), _open("fit").FitOptions(epochs=epochs, seed=seed)
    try:
        told = form == "dynamics" if front_probe is None else front_probe
        config = SmartFRZPredictorConfig(form=form, window=window, weights_per_unit=weights_per_unit, front_probe=told)
        found = judging.judge(runs, label, target, config, options)
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=2) + "\n")
    _open("charts").draw_charts(found, out.parent, prefix=f"{out.stem}_")
    for name in judging.GROUPS:
        entries = [("predictor", found[name]), *found[name]["rules"].items()]
        typer.echo(f"\n{name.replace('_', ' ')}: {found[name]['rows']} rows")
        for rule, part in entries:
            typer.echo(f"  AUC {part['auc']:.3f}, average precision {part['ap']:.3f}  {rule}")


@app.command()
def fit(
    runs: Annotated[Path, typer.Argument(help="Folder that `smartfrz harvest` filled.", exists=True, file_okay=False)],
    evaluation: Annotated[
        Path, typer.Option(help="What `smartfrz evaluate` wrote of these runs.", exists=True, dir_okay=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder that gets the predictor, its model card and charts.")],
) -> None:
    """Fit a predictor to all runs, in the way that was evaluated, and write it with its model card."""
    try:
        _open("judge").make(runs, json.loads(evaluation.read_text()), out)
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise typer.BadParameter(f"{error}") from error
    typer.echo(f"{out} holds the predictor; load it with SmartFRZConfig(predictor={str(out)!r}).")


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
