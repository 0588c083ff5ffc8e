"""The examples in the docstrings run."""

import doctest
import importlib
import pkgutil
import re

import pytest

import smartfrz_hf

MODULES = [info.name for info in pkgutil.walk_packages(smartfrz_hf.__path__, "smartfrz_hf.")]
FENCE = re.compile(r"^ *```.*$", re.MULTILINE)


class Parser(doctest.DocTestParser):
    """Leaves out the fences around code, which are no part of what an example prints."""

    def parse(self, string, name="<string>"):
        return super().parse(FENCE.sub("", string), name)


def examples(name):
    module = importlib.import_module(name)
    return [test for test in doctest.DocTestFinder(parser=Parser(), exclude_empty=True).find(module) if test.examples]


@pytest.mark.parametrize("name", [name for name in MODULES if examples(name)])
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in examples(name):
        report = []
        assert not runner.run(test, out=report.append).failed, "".join(report)
