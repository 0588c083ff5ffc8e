"""
Griffe extension: docstrings in the form of Hugging Face become Markdown.

Sections ("Args:", "Raises:", "Parameters that control ...:") become lists, and [`Name`] or [`~module.Name`] becomes a link: to
this site for names that docs/api.md lists, to the documentation of Transformers for its classes. Other names of the package stay
code. One that does not exist fails `mkdocs build --strict`.
"""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import griffe

PACKAGE = "smartfrz_hf"
LISTED = re.findall(r"^::: (\S+)$", Path(__file__).with_name("api.md").read_text(), re.MULTILINE)
REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?![(\[])")
MATH = re.compile(r"\\\((.+?)\\\)")
SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Example|Parameters [\w ]+):$")
# `name (type): text` with a type that may hold parentheses, or `ValueError: text`.
ITEM = re.compile(r"(?P<name>[\w*, ]+?)(?: \((?P<type>.*?)\))?:(?:\s+(?P<text>.*))?$")
OTHERS = ("accelerate", "huggingface_hub", "torch")
TRANSFORMERS = "https://huggingface.co/docs/transformers/main_classes"
TRANSFORMERS_PAGES = {
    "Trainer": "trainer",
    "TrainingArguments": "trainer",
    "TrainerCallback": "callback",
    "TrainerControl": "callback",
    "TrainerState": "callback",
    "PreTrainedModel": "model",
    "PreTrainedConfig": "configuration",
}


class HuggingFaceDocstrings(griffe.Extension):
    """Rewrites the docstrings of the package once all of it is loaded, so that names can be resolved."""

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        """Rewrite every docstring of `smartfrz_hf`."""
        if pkg.path != PACKAGE:
            return
        for item in documented(pkg):
            assert item.docstring is not None
            text = MATH.sub(
                r"`\1`", item.docstring.value
            )  # no renderer of formulas is needed, nor loaded from elsewhere
            item.docstring.value = link(sections(text), item)


def documented(item: griffe.Object) -> Iterator[griffe.Object]:
    """All objects below `item` that have a docstring."""
    if item.docstring is not None:
        yield item
    for member in item.members.values():
        if not member.is_alias:
            yield from documented(member)


def sections(text: str) -> str:
    """Headings and lists in place of sections."""
    lines, done = inspect.cleandoc(text).split("\n"), []
    while lines:
        line = lines.pop(0)
        match = SECTION.match(line)
        if match is None:
            done.append(line)
            continue
        done += ["", f"**{match[1]}**", ""]
        body = []
        while lines and (not lines[0] or lines[0].startswith(" ")):
            body.append(lines.pop(0))
        content = inspect.cleandoc("\n" + "\n".join(body))
        done += [content if match[1] in ("Returns", "Example") else items(content), ""]
    return "\n".join(done)


def items(text: str) -> str:
    """A list with an entry for each `name (type): text`, whose further lines are indented or not."""
    done: list[str] = []
    for line in text.split("\n"):
        match = None if line.startswith(" ") else ITEM.match(line)
        if match is None:
            done.append(f"    {line.strip()}" if line.strip() else "")
            continue
        names = ", ".join(f"**`{name.strip()}`**" for name in match["name"].split(","))
        kind = f" ({match['type']})" if match["type"] else ""
        done.append(f"- {names}{kind}: {match['text'] or ''}")
    return "\n".join(done)


def link(text: str, item: griffe.Object) -> str:
    """Links in place of [`Name`]."""

    def replace(match: re.Match) -> str:
        short, name = match.groups()
        shown = name.rpartition(".")[2] if short else name
        first, _, rest = name.partition(".")
        if first in OTHERS:
            return f"`{shown}`"
        if first == "transformers":
            page = TRANSFORMERS_PAGES.get(rest.partition(".")[0])
            return f"[`{shown}`]({TRANSFORMERS}/{page}#transformers.{rest})" if page else f"`{shown}`"
        path = name if first == PACKAGE else resolve(item, name)
        on_site = any(path == listed or path.startswith(f"{listed}.") for listed in LISTED)
        return f"[`{shown}`][{path}]" if on_site or not exists(item.package, path) else f"`{shown}`"

    return REFERENCE.sub(replace, text)


def resolve(item: griffe.Object, name: str) -> str:
    """Path of what `name` means where `item` stands. What the package exports goes by its public path."""
    first, dot, rest = name.partition(".")
    if first in map(str, item.package.exports or ()):
        return f"{PACKAGE}.{name}"
    try:
        return item.resolve(first) + dot + rest
    except griffe.NameResolutionError:
        return name


def exists(package: griffe.Module, path: str) -> bool:
    """Whether the package has something at this path."""
    try:
        package[path.removeprefix(f"{PACKAGE}.")]
    except KeyError:
        return False
    return True
