"""The table of architectures says what is proved here, for some of them; `make models` proves all."""

import re

import pytest
from models_page import PAGE, architectures, line
from proofs import prove
from versions import RENAMED

pytestmark = pytest.mark.skipif(not RENAMED, reason="the page tells of the newest versions")

TEXT = PAGE.read_text()
ROWS = {match[1]: match[0] for match in re.finditer(r"^\| `([^`]+)` \| .*\|$", TEXT.split("## Not served")[0], re.M)}
NOTES = re.findall(r"^\d+\. (.*)$", TEXT, re.M)
SOME = [
    *("roberta", "distilbert", "electra", "mpnet", "squeezebert", "modernbert", "opt", "qwen3", "gemma2", "bloom"),
    *(
        "marian",
        "pegasus",
        "speech-encoder-decoder",
        "hubert",
        "wavlm",
        "vit",
        "convnextv2",
        "poolformer",
        "blip",
        "detr",
    ),
]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # peft 0.21 still asks for it
@pytest.mark.parametrize("name", [*SOME, "timm_wrapper", "timm/resnet18", "timm/vit_tiny_patch16_224"])
def test_rows_are_what_is_proved(name):
    if "timm" in name:
        pytest.importorskip("timm")
    notes = list(NOTES)
    assert line(prove(name), notes) == ROWS[name]


def test_page_is_complete():
    assert len(ROWS) >= 150
    assert list(ROWS) == sorted(ROWS) and set(ROWS) <= set(architectures())
    assert f"{len(ROWS)} architectures." in TEXT
    used = {int(number) for number in re.findall(r"no \((\d+)\)", TEXT)}
    assert used == set(range(1, len(NOTES) + 1))
