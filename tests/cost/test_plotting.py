"""The freeze timeline is drawn from a ledger alone."""

from PIL import Image

from smartfrz_hf.cost.ledger import Flops, Ledger, Stage
from smartfrz_hf.cost.plotting import ACTIVE, FROZEN, plot_timeline


def colours(path):
    image = Image.open(path).convert("RGB")
    return {colour: count for count, colour in image.getcolors(maxcolors=10**6)}


def test_timeline(tmp_path):
    units = ["stem", "block.0", "block.1"]
    ledger = Ledger(units=units, max_steps=100, spent=Flops(3, 3), full=Flops(3, 6))
    plot_timeline(ledger, tmp_path / "none.png")
    ledger.stages = [Stage(20, 1, units[:1], "a"), Stage(60, 2, units[1:2], "b")]
    plot_timeline(ledger, tmp_path / "some.png")
    active, frozen = (tuple(bytes.fromhex(colour[1:])) for colour in (ACTIVE, FROZEN))
    assert frozen not in colours(tmp_path / "none.png")
    found = colours(tmp_path / "some.png")
    # 20 + 60 + 100 steps of training against 80 + 40 steps frozen; labels hide a little.
    assert 1.2 < found[active] / found[frozen] < 1.9
