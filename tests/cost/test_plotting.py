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
    pixels = colours(tmp_path / "some.png")
    # 20 + 60 + 100 steps of training against 80 + 40 steps frozen; labels hide a little.
    assert 1.2 < pixels[active] / pixels[frozen] < 1.9
    ledger.plot(tmp_path / "method.png")
    assert (tmp_path / "method.png").read_bytes() == (tmp_path / "some.png").read_bytes()


def test_a_run_that_has_not_begun_can_be_drawn(tmp_path):
    plot_timeline(Ledger(), tmp_path / "empty.png")
    plot_timeline(Ledger(units=["stem"], stages=[Stage(0, 1, ["stem"], "a")]), tmp_path / "no_steps.pdf")
    assert all((tmp_path / name).stat().st_size for name in ("empty.png", "no_steps.pdf"))
