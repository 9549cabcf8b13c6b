"""What the reference pages are made of: every public name says what it is, and every parameter what it means."""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import numpyro_bism
import pyro_bism

PACKAGES = pytest.mark.parametrize("package", [pyro_bism, numpyro_bism], ids=lambda package: package.__name__)


def modules(package):
    found = [package]
    for each in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        found.append(importlib.import_module(each.name))
    return found


RESULTS = ("bism", "evaluation", "sampling.chains", "rivals", "hypergradients.problem", "losses", "divergences")


def public(package):
    """What users import by name, what these take and return, and the equations of the losses."""
    found = {f"{package.__name__}.{name}": getattr(package, name) for name in package.__all__}
    for module in modules(package):
        short = module.__name__.removeprefix(f"{package.__name__}.")
        if short == "losses":
            found |= {f"{module.__name__}.{name}": getattr(module, name) for name in module.__all__}
        for name, thing in vars(module).items():
            is_own = isinstance(thing, type) and thing.__module__ == module.__name__ and not name.startswith("_")
            is_type = is_own and (hasattr(thing, "_fields") or is_protocol(thing))
            if is_type and short.startswith(RESULTS):
                found.setdefault(f"{module.__name__}.{name}", thing)
    unique = {id(thing): name for name, thing in reversed(found.items())}
    return {name: thing for name, thing in found.items() if unique[id(thing)] == name and is_code(thing)}


def is_code(thing):
    return isinstance(thing, type) or inspect.isfunction(thing)


def is_protocol(thing):
    return bool(getattr(thing, "_is_protocol", False))


def described(doc):
    return set(re.findall(r":(?:param|ivar|cvar) (\w+):", doc or ""))


def parameters(function):
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


def own_methods(thing):
    for name, method in vars(thing).items():
        if inspect.isfunction(method) and not name.startswith("_"):
            yield name, method


def is_documented_by_host(thing, method):
    """Whether an overridden method's docstring is that of the host's base class, which has a style of its own."""
    documented = (base for base in thing.__mro__ if getattr(vars(base).get(method), "__doc__", None))
    owner = next(documented, thing)
    return owner.__module__.split(".")[0] != thing.__module__.split(".")[0]


def problems(name, thing):
    doc = thing.__doc__ or ""
    first = doc.strip().split("\n\n")[0]
    if not re.match(r"[A-ZΑ-Ω`:∂dlvφθ‖½∇]", first) or first.startswith((":ivar", ":param")) or "." not in first:
        yield f"{name}: no sentence first: {first[:60]!r}"
    if isinstance(thing, type):
        fields = getattr(thing, "_fields", None)
        if fields is None and dataclasses.is_dataclass(thing):
            fields = [f.name for f in dataclasses.fields(thing) if not f.name.startswith("_")]
        if fields is None and "__init__" in vars(thing):
            fields = [] if is_protocol(thing) else parameters(thing.__init__)
            doc += thing.__init__.__doc__ or ""
        if fields:
            missing = sorted(set(fields) - described(doc))
            if missing and len(missing) > 0:
                yield f"{name}: {missing} are not described"
        for method, function in own_methods(thing):
            if is_documented_by_host(thing, method):
                continue
            inherited = inspect.getdoc(getattr(thing, method))
            if not inherited:
                yield f"{name}.{method}: no docstring"
            elif set(parameters(function)) - described(inherited) - named_in(inherited):
                missing = sorted(set(parameters(function)) - described(inherited) - named_in(inherited))
                yield f"{name}.{method}: {missing} are not described"
    else:
        missing = sorted(set(parameters(thing)) - described(doc) - named_in(doc))
        if missing:
            yield f"{name}: {missing} are not described"


def named_in(doc):
    """Parameters that the sentence itself is about: ``v``, ``state`` between backticks."""
    return set(re.findall(r"``(\w+)``", doc or ""))


@PACKAGES
def test_every_public_name_and_parameter_is_described(package):
    found = [problem for name, thing in public(package).items() for problem in problems(name, thing)]
    assert not found, "\n".join(found)


@PACKAGES
def test_every_docstring_opens_with_a_sentence(package):
    """Private ones too: a list of fields is none."""
    found = []
    for module in modules(package):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                doc = ast.get_docstring(node) or "."
                if doc.startswith((":ivar", ":param", ":returns")):
                    found.append(f"{module.__name__}.{getattr(node, 'name', '')}: {doc[:60]!r}")
    assert not found, "\n".join(found)


@PACKAGES
def test_every_public_name_has_a_page(package):
    """Those that are imported from the package stand on its own page; others on that of a module in the Makefile."""
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    pages = re.search(r"PAGES := ((?:.*\\\n)*.*)", makefile).group(1).replace("\\", " ").split()
    shown = set()
    for page in pages:
        module = importlib.import_module(f"{package.__name__}.{page}")
        own = [
            n
            for n, x in vars(module).items()
            if not n.startswith("_") and getattr(x, "__module__", "") == module.__name__
        ]
        shown |= {id(getattr(module, name)) for name in getattr(module, "__all__", own)}
    root = {id(getattr(package, name)) for name in package.__all__}
    missing = [name for name, thing in public(package).items() if id(thing) not in root | shown]
    assert not missing
