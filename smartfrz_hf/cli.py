"""The command line: `smartfrz harvest` records training runs, `smartfrz fit` makes a predictor of them."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Adaptive layer freezing for Hugging Face Transformers.", no_args_is_help=True)


@app.callback()
def main() -> None:
    """Keep the commands named even while there are few of them."""


@app.command()
def harvest(
    runs: Annotated[Path, typer.Argument(help="JSON list of the runs.", exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Option(help="Folder that gets one folder a run; runs already there are kept.")],
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of local copies of the data, DATA/*.parquet. Default: the Hub.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Runs at a time; they share the cores.")] = 1,
) -> None:
    """Record full training runs: weight snapshots, learning rates, and each unit's CKA to its own end."""
    from .harvest.runs import harvest, read_specs

    try:
        failures = harvest(read_specs(runs), out, data_dir, processes)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    for line in failures:
        typer.echo(f"failed: {line}", err=True)
    if failures:
        typer.echo("The other runs are kept; the same command tries the failed ones again.", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
