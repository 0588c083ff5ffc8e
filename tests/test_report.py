"""The report of a run: a page that parses, loads nothing, and says what the run did."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from training import Rows, predictor_that_loses, smartfrz, train
from typer.testing import CliRunner

from smartfrz_hf import Decision, Policy, SmartFRZCallback, checkpoint
from smartfrz_hf.cli import app
from smartfrz_hf.report import read_run, write_report
from smartfrz_hf.report import runs as recorded
from smartfrz_hf.report.charts import number, ticks
from smartfrz_hf.signals import pilot
from smartfrz_hf.signals.pilot_signals import PilotSignals

BROWSER = ("chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files")
DARK = ("--force-dark-mode", "--blink-settings=preferredColorScheme=0")
VOID = {"meta", "br", "img", "input", "link", "hr"}


class Checker(HTMLParser):
    """Fails where tags are not closed in order, and collects addresses and text."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for key, value in attrs if key in ("href", "src", "xlink:href")]
        assert tag != "script"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def check(path):
    page = path.read_text()
    checker = Checker()
    checker.feed(page)
    assert not checker.open and not checker.addresses
    assert not re.search(r"https?://|@import|url\(", page)
    return checker.text, page


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    options = {
        "save_strategy": "steps",
        "save_steps": 10,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "logging_steps": 2,
    }
    callback = smartfrz(0.9, first_decision=5, decide_every=5, record_every=1, max_depth=2)
    train(folder / "frozen", [callback], **options).save_state()
    train(folder / "plain", **options).save_state()
    return folder


def test_page(runs, tmp_path):
    text, page = check(write_report(runs / "frozen", tmp_path / "report.html", runs / "plain", tmp_path / "png"))
    for said in (
        "2 of 5 units are frozen after 20 optimizer steps; the first froze at step 5.",
        "compute saved",
        "bert.encoder.layer.0",
        "bert.encoder.layer.3, step 15: probability 0.900",
        "stem: frozen from step 5 to 20",
        "eval_loss, over time",
        "against plain",
        "decide_every",
        "transformers",
        "seconds saved",
        "What the predictor looked at",
        "bert.encoder.layer.0, snapshot of step 5: attention 0.333",
    ):
        assert said in text, said
    assert "prefers-color-scheme: dark" in page and page.count('class="narrow"') == page.count('class="wide"') > 4
    assert {path.name for path in (tmp_path / "png").iterdir()} == {
        "timeline.png",
        "attention.png",
        "loss.png",
        "eval_loss.png",
    }


def test_a_checkpoint_a_plain_run_and_a_run_in_which_nothing_froze(runs, tmp_path):
    text, _ = check(write_report(runs / "frozen" / "checkpoint-10", tmp_path / "early.html"))
    assert "after 10 optimizer steps" in text
    text, _ = check(write_report(runs / "plain", tmp_path / "plain.html"))
    assert "without SmartFRZ" in text
    train(tmp_path / "never", [SmartFRZCallback(policy="never")], save_strategy="steps", save_steps=10)
    text, _ = check(write_report(tmp_path / "never", tmp_path / "never.html"))
    assert "Nothing froze in 20 optimizer steps." in text


def test_the_start_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(pilot, "is_fresh", lambda block: False)
    monkeypatch.setattr(PilotSignals, "agreement", 0.1)
    monkeypatch.setattr(PilotSignals, "contributions", torch.ones(5))
    callback = SmartFRZCallback(predictor=predictor_that_loses(0.4), activation_cache=False)
    train(tmp_path, [callback], dataset=Rows(160), max_steps=40, save_strategy="steps", save_steps=40)
    assert callback.ledger.start.depth == 3 and callback.ledger.start.points_lost[3] == pytest.approx(0.24)
    text, _ = check(write_report(tmp_path, tmp_path / "report.html"))
    for said in (
        "The start stage",
        "The first 4 steps were a pilot",
        "up to bert.encoder.layer.1 (decided)",
        "by 2.50.",
    ):
        assert said in text, said
    assert "start stage, after 4 steps: froze 3 units (from the start: expected to save" in str(callback.ledger)


def test_names_are_escaped(runs, tmp_path):
    shutil.copytree(runs / "plain", tmp_path / "<b>&")
    _, page = check(write_report(tmp_path / "<b>&", tmp_path / "report.html"))
    assert "&lt;b&gt;&amp;" in page


def test_what_trains_again_in_the_last_step_is_not_frozen(tmp_path):
    units = [{"step": 5, "depth": 2, "apart": [], "units": ["stem", "block"]}]
    again = [{"step": 20, "depth": 0, "apart": [], "units": ["stem", "block"]}]
    frozen, thawed = (
        recorded.SavedRun(tmp_path, [], {"global_step": 20}, {"ledger": {"stages": stages}})
        for stages in (units, units + again)
    )
    assert frozen.freeze_steps == {"stem": 5, "block": 5} and thawed.freeze_steps == {}
    assert thawed.frozen_spans == frozen.frozen_spans == {"stem": [(5, 20)], "block": [(5, 20)]}


def test_time_runs_forward_with_the_steps(runs):
    run = read_run(runs / "frozen")
    times = [run.time_at(step) for step in range(21)]
    assert times == sorted(times) and times[0] == 0 and times[-1] == pytest.approx(run.seconds, rel=1e-6)


def test_folders_without_a_run_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        read_run(tmp_path)
    for content in ("{", "[]", "null"):
        (tmp_path / "trainer_state.json").write_text(content)
        with pytest.raises(ValueError, match="trainer_state.json cannot be read"):
            read_run(tmp_path)


@pytest.mark.parametrize(
    "missing", ["state", "format", "version", "state.ledger", "state.units", "state.ledger.stages"]
)
def test_a_damaged_state_is_refused(runs, tmp_path, missing):
    shutil.copytree(runs / "frozen", tmp_path / "run")
    file = max((tmp_path / "run").glob("**/smartfrz_state.json"))
    content = part = json.loads(file.read_text())
    *path, key = missing.split(".")
    for name in path:
        part = part[name]
    del part[key]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"smartfrz_state.json is damaged \(KeyError: '{key}'\)"):
        read_run(file.parent)


def test_another_format_is_refused(runs, tmp_path):
    shutil.copytree(runs / "frozen", tmp_path / "run")
    file = max((tmp_path / "run").glob("**/smartfrz_state.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 1, "version": "0.0.9"}))
    with pytest.raises(ValueError, match=r"version 0.0.9 of smartfrz_hf, in format 1; .* Install that version"):
        read_run(file.parent)


class Odd(Policy):
    """Freezes units that are not next to each other, with numbers of NumPy and half of what a report would show."""

    by_unit = True

    def decide(self, observation):
        odd = {"probabilities": list(np.full(5, 0.5, np.float32)), "attentions": [[0.5, 0.5]] * 5}
        return Decision(0, "odd", apart={0, 1, 2, 4} if observation.step else (), **odd)


def test_a_policy_of_ones_own(tmp_path):
    callback = SmartFRZCallback(order="independent", first_decision=5, policy=Odd())
    train(tmp_path, [callback], save_strategy="steps", save_steps=10)
    _, page = check(write_report(tmp_path, tmp_path / "report.html"))
    names = [callback.ledger.units[unit] for unit in (0, 1, 2, 4)]
    assert f"{', '.join(names)} froze" in page and "What the predictor looked at" not in page


def test_command(runs, tmp_path):
    done = CliRunner().invoke(app, ["report", str(runs / "frozen"), "--out", str(tmp_path / "page.html")])
    assert done.exit_code == 0 and (tmp_path / "page.html").is_file()
    both = [str(runs / "frozen"), str(runs / "plain")]
    done = CliRunner().invoke(app, ["report", *both])
    assert done.exit_code == 0 and (runs / "plain" / "smartfrz_report.html").is_file()
    assert CliRunner().invoke(app, ["report", *both, "--out", "x.html"]).exit_code == 2
    assert CliRunner().invoke(app, ["report", both[0], "--out", str(tmp_path)]).exit_code == 0
    assert (tmp_path / "smartfrz_report.html").is_file()
    assert CliRunner().invoke(app, ["report", str(tmp_path)]).exit_code == 1


@pytest.mark.parametrize(("low", "high"), [(0, 20), (0.693, 0.6931), (-3, 1e6), (5, 5)])
def test_ticks_are_few_and_inside(low, high):
    found = ticks(low, high, 5)
    assert len(found) <= 7 and all(low - 1e-9 <= tick <= max(high, low + 1) + 1e-9 for tick in found)


def test_numbers_are_short_and_plain():
    values = (0.12345, 7, 7.25, 999.4, 999.6, -999.6, 12345.6)
    assert [*map(number, values)] == ["0.123", "7", "7.25", "999", "1,000", "-1,000", "12,346"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
@pytest.mark.parametrize(("scheme", "background"), [([], (255, 255, 255)), (DARK, (20, 24, 27))])
@pytest.mark.parametrize("width", [500, 1100])
def test_screenshot(runs, tmp_path, width, scheme, background):
    """The page is drawn in the colors of the reader's scheme, and the chart of the units is in it."""
    image = pytest.importorskip("PIL.Image")
    write_report(runs / "frozen", tmp_path / "report.html", runs / "plain")
    command = [*BROWSER, f"--screenshot={tmp_path / 'page.png'}", f"--window-size={width},1400", *scheme]
    subprocess.run([*command, (tmp_path / "report.html").as_uri()], check=True, capture_output=True, timeout=120)
    page = image.open(tmp_path / "page.png").convert("RGB")
    colors = {color: count for count, color in page.getcolors(1 << 24)}
    assert max(colors, key=colors.get) == background
    frozen = (125, 151, 165) if background == (255, 255, 255) else (86, 112, 126)
    assert colors.get(frozen, 0) > 1000


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
@pytest.mark.parametrize("width", [375, 1100])
def test_nothing_is_wider_than_the_screen(runs, tmp_path, width):
    """In a frame, as a browser's window has a least width. The page itself says how wide it is."""
    write_report(runs / "frozen", tmp_path / "report.html", runs / "plain")
    (tmp_path / "frame.html").write_text(
        f'<iframe src="report.html" style="width:{width}px;height:900px;border:0"></iframe><p id=w></p><script>onload=()=>'
        "{const d=frames[0].document.documentElement;w.textContent=`scroll ${d.scrollWidth} client ${d.clientWidth}`}</script>"
    )
    command = [*BROWSER, "--virtual-time-budget=3000", "--dump-dom", (tmp_path / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    scroll, client = map(int, re.search(r"scroll (\d+) client (\d+)", done.stdout).groups())
    assert 0 < client <= width and scroll <= client


def test_it_reads_the_files_that_a_checkpoint_has():
    """The report does without torch, so it does not import these names."""
    assert (recorded.STATE_FILE, recorded.FORMAT) == (checkpoint.STATE_FILE, checkpoint.FORMAT)
