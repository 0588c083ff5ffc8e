"""
MkDocs hooks: pages made of files outside docs/, and links of the pages to files that are not on the site.

The Markdown files link to each other by their paths in the repository, so that they can be read there, too. On the site, a
link to a file that is no page leads to the repository.
"""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Page or picture of the site: the file that it is made of.
GENERATED = {
    "charts/default_settings.png": "benchmarks/quality/compare/charts/default_settings.png",
    "charts/step_time.png": "benchmarks/speed/results/step_time.png",
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "method_card.md": "benchmarks/predictor/method_card.md",
}
LINK = re.compile(r"(?P<text>\]\()(?P<target>[^)\s#]+)(?P<heading>#[^)\s]+)?\)")
CODE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages and pictures."""
    for page, source in GENERATED.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links of a page to where their targets are on the site, or else in the repository."""
    uri = page.file.src_uri
    folder = (ROOT / GENERATED.get(uri, f"docs/{uri}")).parent
    pages = {(ROOT / source).resolve(): page for page, source in GENERATED.items()}

    def rewrite(match: re.Match) -> str:
        target, heading = match["target"], match["heading"] or ""
        if ":" in target:
            return match[0]
        path = (folder / target).resolve()
        if path in pages:
            target = pages[path]
        elif path.is_relative_to(ROOT / "docs"):
            target = path.relative_to(ROOT / "docs").as_posix()
        else:
            kind = "tree" if path.is_dir() else "blob"
            return f"]({config.repo_url}/{kind}/main/{path.relative_to(ROOT).as_posix()}{heading})"
        return f"]({os.path.relpath(target, os.path.dirname(uri) or '.')}{heading})"

    parts, end = [], 0
    for block in CODE.finditer(markdown):
        parts += [LINK.sub(rewrite, markdown[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, LINK.sub(rewrite, markdown[end:])])
