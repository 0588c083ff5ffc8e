"""The options of a SmartFRZ run on a command line. Imports no torch."""

from dataclasses import field, fields, make_dataclass

from .config import SmartFRZConfig

PREFIX = "smartfrz_"
# The options of `SmartFRZConfig` for a command line (`HfArgumentParser`), prefixed so that none collides.
SmartFRZArguments = make_dataclass(
    "SmartFRZArguments",
    [(PREFIX + f.name, f.type, field(default=f.default, metadata=f.metadata)) for f in fields(SmartFRZConfig)],
    namespace={
        "__module__": __name__,  # by which pickle finds the class; from Python 3.12 on it is set anyway
        "__doc__": "Options of [`SmartFRZConfig`] for [`~transformers.HfArgumentParser`], as `--smartfrz_policy` etc.",
        "to_config": lambda self: SmartFRZConfig(
            **{f.name: getattr(self, PREFIX + f.name) for f in fields(SmartFRZConfig)}
        ),
    },
)
