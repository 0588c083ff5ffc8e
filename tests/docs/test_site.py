"""The site builds without a warning, and the page on troubleshooting has every message."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from messages import PACKAGE, first_sentence, raised, warned

ROOT = Path(__file__).parents[2]
QUOTES = re.findall(r"^> (.+)$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
REFUSALS = [PACKAGE / name for name in ("checks.py", "model/discovery.py", "model/stem.py", "model/units.py")]
REFUSALS += [PACKAGE / "estimation" / name for name in ("__init__.py", "loop.py", "task.py")]
REFUSALS += [PACKAGE / name for name in ("checkpoint.py", "run.py", "stages.py", "trainer.py", "cost/plotting.py")]
REFUSALS += [PACKAGE / name for name in ("distributed/consensus.py", "policies/registry.py", "policies/static.py")]
REFUSALS += [PACKAGE / "config.py"]
REFUSALS += [PACKAGE / name for name in ("predictor/hub.py", "report/figures.py", "report/runs.py")]
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if "predictor_training" not in path.parts]
MESSAGES = [message for path in REFUSALS for message in raised(path)] + [m for path in FILES for m in warned(path)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocstrings", reason="the site needs the extra `docs`")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_references_in_docstrings_are_links(site):
    page = (site / "api" / "index.html").read_text()
    assert re.search(r'href="#smartfrz_hf.SmartFRZConfig"><code>SmartFRZConfig</code>', page)
    assert re.search(r'href="https://huggingface.co/docs/transformers/[^"]*TrainingArguments"><code>', page)
    assert "[<code>" not in page and "(<code>float</code>, <em>optional</em>, defaults to <code>0.005</code>)" in page


def test_links_to_files_that_are_no_pages_lead_to_the_repository(site):
    for page in site.rglob("*.html"):
        assert not re.search(r'href="[^":]*\.(py|md|json)"', page.read_text()), page


def test_every_refusal_and_warning_has_its_remedy():
    assert len(MESSAGES) > 40
    missing = sorted({first_sentence(message) for message in MESSAGES if not quotes_of(message)})
    assert not missing, f"docs/troubleshooting.md does not tell what to do about {missing}"


def test_every_message_on_the_page_exists():
    said = {quote for message in MESSAGES for quote in quotes_of(message)}
    assert said == set(QUOTES)


def quotes_of(message):
    return [quote for quote in QUOTES if message.startswith(quote)]
