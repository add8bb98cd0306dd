"""Docstrings of all public names say what a reader of help() needs: arguments with their shapes, results, errors."""

import ast
import inspect
import re
import textwrap

import pytest
import torch
from torch import nn

import fastmargin as fm

MODULES = (fm.checkpoint, fm.compat.insightface, fm.compat.pml, fm.evaluation, fm.models, fm.optim)
TORCH = (nn.Module, torch.optim.Optimizer)  # methods that override theirs are described there, but for forward
SHAPED = re.compile(r"\bTensor\b|\bArray\b|\bndarray\b")
SHAPE = re.compile(r"\[[^\]]*\]|scalar")
RAISES = re.compile(r"(^|\.)_?(check|require)(_|$)")


def described(home, names):
    """(name, object) of the functions and classes of the package among these."""
    found = [(f"{home.__name__}.{name}", getattr(home, name)) for name in names]
    return [(name, it) for name, it in found if inspect.isfunction(it) or inspect.isclass(it)]


def public_names():
    yield from described(fm, fm.__all__)
    for module in MODULES:
        own = [name for name, it in vars(module).items() if getattr(it, "__module__", None) == module.__name__]
        yield from described(module, getattr(module, "__all__", [name for name in own if not name.startswith("_")]))


def methods(kind):
    """The public methods of a class that the package defines, also in a base class."""
    for name, _ in inspect.getmembers(kind, lambda it: inspect.isfunction(it) or isinstance(it, property)):
        home = next(base for base in kind.__mro__ if name in vars(base))
        foreign = any(issubclass(kind, base) and hasattr(base, name) for base in TORCH) and name != "forward"
        if not name.startswith("_") and home.__module__.startswith("fastmargin") and not foreign:
            yield f"{home.__module__}.{home.__name__}.{name}", vars(home)[name]


def whole_surface():
    surface = {}
    for name, it in public_names():
        surface[name] = it
        if inspect.isclass(it):
            surface |= dict(methods(it))
    return surface


SURFACE = whole_surface()


def sections(it):
    """{"": the text before, "Args": ..., "Returns": ..., ...} of a docstring."""
    text, found, current = inspect.getdoc(it) or "", {"": ""}, ""
    for line in text.splitlines():
        if heading := re.fullmatch(r"(Args|Attributes|Returns|Yields|Raises):", line):
            current = heading[1]
            found[current] = ""
        else:
            current = current if line.startswith(" ") or not line else ""
            found[current] += line + "\n"
    return found


def entries(section):
    """{name: its text} of a section, a line of several names once for each."""
    found, names = {}, []
    for line in textwrap.dedent(section).splitlines():
        if heading := re.match(r"([\w*]+(?:, [\w*]+)*): ", line):
            names = [name.strip() for name in heading[1].split(",")]
        for name in names:
            found[name] = found.get(name, "") + line + "\n"
    return found


def signature(it):
    return inspect.signature(it.__init__ if inspect.isclass(it) else it, eval_str=False)


def can_raise(function):
    """Whether its body raises, or calls what is there to raise: check_*, require*."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return any(isinstance(node, ast.Raise) for node in ast.walk(tree)) or any(map(RAISES.search, calls))


def faults(it):
    """What the docstring of a function or class lacks."""
    if isinstance(it, property):
        return [] if inspect.getdoc(it) else ["no docstring"]
    parts = sections(it)
    if inspect.isclass(it) and hasattr(it, "_fields"):
        fields, listed = it.__annotations__, entries(parts.get("Attributes", ""))
        return [f"Attributes without {name}" for name in fields if name not in listed] + [
            f"no shape of {name}" for name in fields if SHAPED.search(str(fields[name])) and not shaped(listed, name)
        ]
    found = [] if parts[""].strip() else ["no first line"]
    listed, given = entries(parts.get("Args", "")), signature(it)
    own_init = not inspect.isclass(it) or "__init__" in vars(it)
    for name, parameter in given.parameters.items() if own_init else ():
        if name == "self":
            continue
        if name not in listed:
            found.append(f"Args without {name}")
        elif SHAPED.search(str(parameter.annotation)) and not shaped(listed, name):
            found.append(f"no shape of {name}")
    found += [f"Args has {name}, which is no parameter" for name in listed if own_init and name not in given.parameters]
    if not inspect.isclass(it) and given.return_annotation not in (None, "None", inspect.Signature.empty):
        result = parts.get("Returns", parts.get("Yields", ""))
        found += [] if result else ["no Returns"]
        found += ["no shape of the result"] * bool(
            SHAPED.search(str(given.return_annotation)) and result and not SHAPE.search(result)
        )
    if own_init and can_raise(it.__init__ if inspect.isclass(it) else it) and "Raises" not in parts:
        found.append("no Raises")
    return found


def shaped(listed, name):
    return SHAPE.search(listed.get(name, "")) is not None


@pytest.mark.parametrize("name", SURFACE)
def test_a_docstring_says_shapes_results_and_errors(name):
    assert faults(SURFACE[name]) == []


def undescribed(x: torch.Tensor, k: int, extra: int) -> torch.Tensor:
    """Of x.

    Args:
        x: the rows.
        k: a number [k].
        gone: no parameter.
    """
    if k < 0:
        raise ValueError(k)
    return x


def test_what_a_docstring_lacks_is_seen():
    lacking = ["no shape of x", "Args without extra", "Args has gone, which is no parameter", "no Returns", "no Raises"]
    assert faults(undescribed) == lacking
    names = {name.rpartition(".")[2] for name in SURFACE}
    assert names >= {*fm.__all__, "row_margins", "load_weight", "ClassSGD", "tar_at_far"} - {
        "__version__", "checkpoint", "compat", "evaluation", "models", "optim"
    }  # fmt: skip


def test_help_shows_shapes():
    assert "[b, d]" in inspect.getdoc(fm.MarginHead.forward)
