"""`python -m smartfrz_hf`: the command line, where `smartfrz` is not on the path."""

from .cli import app

if __name__ == "__main__":
    app(prog_name="smartfrz")
