"""The FLOPs in a checkpoint of smartfrz_hf 0.1."""

from collections.abc import Mapping
from typing import Any

from .passes import backward_of_chain


def upgrade_meter_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """
    The state of a meter from a checkpoint of format 1, for [`ComputeMeter.load_state_dict`].

    Format 1 holds the sums so far and what each unit costs, but not how its backward pass depends on other units. What
    the run has spent is kept; from there on a unit's backward pass is needed while that unit trains.
    """
    units = len(state["_step"])
    full = state["_full_pass"]
    return {
        "costs": full
        and {
            "forward": [flops["forward"] for flops in full],
            "backward": [
                {hex(units): part for units, part in backward_of_chain(unit, flops["backward"]).items()}
                for unit, flops in enumerate(full)
            ],
        },
        "update": [flops["optimizer"] for flops in state["_full_step"] or []] or [0.0] * units,
        "elements": {},
        "steps": {},
        "passes": 0,
        "forward_elements": 0,
        "probe_elements": 0,
        "skipped_elements": [0.0] * units,
        "earlier": {"spent": state["spent"], "full": state["full"]},
    }
