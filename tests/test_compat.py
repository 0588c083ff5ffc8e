"""Private names of torch, Transformers and Accelerate stand in one module."""

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

import smartfrz_hf
from smartfrz_hf import _compat

PACKAGE = Path(smartfrz_hf.__file__).parent
LIBRARIES = ("torch", "transformers", "accelerate", "safetensors", "huggingface_hub")
# Objects that the package meets. Their private names may not be used even where a class of the package has the same.
MET = (
    Accelerator,
    DistributedDataParallel,
    FSDPModule,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    nn.Module(),
    torch,
    torch.Tensor,
    torch.optim.Optimizer,
    torch.utils.data.DataLoader,
)
# Documented in spite of the underscore: what a model implements for Transformers, and the methods of named tuples.
DOCUMENTED = {"_init_weights", "_asdict", "_replace"}
PICKLING = {"__getstate__", "__setstate__", "__reduce__", "__reduce_ex__"}


def is_private(name: str) -> bool:
    if name in DOCUMENTED or name == "_":
        return False
    return name in PICKLING or (name.startswith("_") and not name.endswith("__"))


LIBRARY_NAMES = {name for met in MET for name in dir(met) if is_private(name)}


def own_names(tree: ast.Module) -> set[str]:
    """Private names that a file defines."""
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                names.add(name)
    return {name for name in names if is_private(name)}


def foreign_names(source: str) -> list[str]:
    """Private names that a file uses and that are not its own, each with its line."""
    tree = ast.parse(source)
    own, found = own_names(tree), []
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                names = [part for alias in aliases for part in alias.name.split(".")]
            case ast.ImportFrom(module=module, names=aliases, level=level):
                names = [*(module or "").split("."), *(alias.name for alias in aliases)]
                if level or names[0] == "__future__":
                    names = [name for name in names if name not in ("_compat", "__future__")]
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name):
                continue  # see `test_no_private_name_of_a_base_class`
            case ast.Attribute(attr=name):
                names = [name]
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr" | "setattr" | "delattr"),
                args=[_, ast.Constant(value=str(name)), *_],
            ):
                names = [name]
            case _:
                continue
        found += [
            f"line {node.lineno}: {name}"
            for name in names
            if is_private(name) and (name not in own or name in LIBRARY_NAMES)
        ]
    return found


def own_attributes(cls: type) -> set[str]:
    """Private names that a class defines, in its body or on `self`."""
    (path,) = {Path(importlib.import_module(cls.__module__).__file__)}
    bodies = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and node.name == cls.__name__
    ]
    used = {
        node.attr
        for body in bodies
        for node in ast.walk(body)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
    }
    return {name for name in used | set(vars(cls)) if is_private(name)}


def classes() -> list[type]:
    names = [info.name for info in pkgutil.walk_packages(smartfrz_hf.__path__, "smartfrz_hf.")]
    modules = [importlib.import_module(name) for name in names]
    return [
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__
    ]


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "_compat.py"],
    ids=lambda path: path.relative_to(PACKAGE).as_posix(),
)
def test_no_private_name_of_another_module(path):
    assert foreign_names(path.read_text()) == []


def test_no_private_name_of_a_base_class():
    # Classes of torch, for one, set private attributes when they are made.
    made = set(vars(nn.Module()))
    clashes = set()
    for cls in classes():
        library = [base for base in cls.__mro__ if base.__module__.split(".")[0] in LIBRARIES]
        theirs = {name for base in library for name in vars(base)} | (made if nn.Module in library else set())
        for base in cls.__mro__:
            if base.__module__.startswith("smartfrz_hf") and base.__module__ != _compat.__name__:
                clashes |= {f"{base.__module__}.{base.__name__}.{name}" for name in own_attributes(base) & theirs}
    assert not clashes


@pytest.mark.parametrize(
    "line",
    [
        "import torch._dynamo",
        "from torch._dynamo import config",
        "from .weights import _Held",
        "torch._dynamo.reset()",
        "tensor._version",
        "model.model._modules['a']",
        "getattr(model, '_orig_mod', model)",
        "ddp.__setstate__(ddp.__getstate__())",
        "super()._save_checkpoint(model, trial)",
        "class A:\n    def f(self, module):\n        self._modules = module._modules",
    ],
)
def test_private_names_are_found(line):
    assert foreign_names(line)


@pytest.mark.parametrize(
    "line",
    [
        "from .. import _compat",
        "from .._compat import tensor_version",
        "module.__dict__['forward'] = patch",
        "class A:\n    def __init__(self):\n        self._x = 1\n    def f(self, other):\n        return other._x",
    ],
)
def test_own_names_are_left_alone(line):
    assert not foreign_names(line)


def test_every_function_is_used():
    text = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py") if path.name != "_compat.py")
    public = [
        name
        for name, value in vars(_compat).items()
        if not name.startswith("_") and (name.isupper() or getattr(value, "__module__", "") == _compat.__name__)
    ]
    assert [name for name in public if name not in text] == []
