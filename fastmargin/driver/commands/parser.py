"""jsonargparse's parser, whose help and whose mistakes speak of options and values, not of Python's types.

Types are spelled as a user writes their values (`wanted`). The environment is named once, by whoever describes the
command, and not with every option. No torch here.
"""

import re
from argparse import Action, _SubParsersAction
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin

from jsonargparse import ArgumentParser, DefaultHelpFormatter

VALUES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", NoneType: "null"}
TYPES = (("bf16", "bfloat16"), ("fp16", "float16"))
GIVEN = re.compile(r"(?:Got value|Given value|Unexpected import path format): (.*)")


def wanted(kind: Any) -> str:
    """'bf16, fp16 or null' of Literal["bf16", "fp16"] | None."""
    parts = list(values(kind))
    return " or ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def values(kind: Any) -> Iterable[str]:
    if get_origin(kind) is Literal:
        yield from map(str, get_args(kind))
    elif get_origin(kind) is tuple:
        yield f"[{', '.join('...' if part is ... else wanted(part) for part in get_args(kind))}]"
    elif get_origin(kind) is dict:
        yield "a weight and options by name, as in --terms.center.weight 0.01"
    elif kind in VALUES:
        yield VALUES[kind]
    else:  # a union
        for part in get_args(kind):
            yield from values(part)


def usual(arguments: Sequence[str]) -> list[str]:
    """plan and simulate have hyphens and bfloat16, train has underscores and bf16: these take the other's, too."""
    plans = next((word for word in arguments if not word.startswith("-")), "") in ("plan", "simulate")
    types = dict(TYPES) if plans else {long: short for short, long in TYPES}
    said, option = [], ""
    for word in arguments:
        name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if name:
            option = name = name.replace("_", "-") if plans else name
        kinds = types if option.endswith(("compute-dtype", "compute_dtype", "precision")) else {}
        said.append(name + equals + kinds.get(value, value))
    return said


def kind_of(action: Action) -> Any:
    return getattr(action, "_typehint", action.type)


def meant(name: str, known: Iterable[str]) -> str:
    return "".join(f"; did you mean {close}?" for close in get_close_matches(name, known, 1, 0.85))


class Formatter(DefaultHelpFormatter):
    def _get_type_str(self, action: Action) -> str | None:
        return wanted(kind_of(action)) or None

    def _format_action_invocation(self, action: Action) -> str:
        lines = super()._format_action_invocation(action).splitlines()
        return "".join(line.strip().removeprefix("ARG:   ") for line in lines if "ENV:   " not in line)


class Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        super().error(self.reworded(message), ex)

    def reworded(self, message: str) -> str:
        """Of a mistake in an option of this parser; any other is as it is, and so is one that has been here."""
        options = {name: action for action in self._actions for name in (action.dest, *action.option_strings)}
        if (found := re.match(r'Parser key "(.+?)":', message)) and (action := options.get(found[1])):
            given = GIVEN.findall(message)
            said = f" is {given[-1]!r}" if given else f": {message.splitlines()[-1].strip()}"
            return f"{found[1]}{said}; want {wanted(kind_of(action))}"
        if found := re.match(r"argument (--\S+): expected one argument", message):
            return f"{found[1]} has no value; want {wanted(kind_of(options[found[1]]))}"
        if (found := re.match(r"unrecognized arguments: (--[^\s=]+)", message)) and "did you mean" not in message:
            return message + meant(found[1], options)
        if found := re.match(r"Subcommand '(.+)' does not accept option '(.+)'", message):
            commands = next(action for action in self._actions if isinstance(action, _SubParsersAction))
            known = [action.dest for action in commands.choices[found[1]]._actions]
            return f"{found[1]} has no option {found[2]}{meant(found[2], known)}"
        if found := re.match(r"the following arguments are required: (.+)", message):
            names = [name.split(".", 1)[1] for name in found[1].split(", ")]
            return f"{', '.join('RUN' if name == 'run' else f'--{name}' for name in names)} is required"
        return message


def new_parser(**options: Any) -> Parser:
    """Of a command. (jsonargparse makes others by itself, for what is in a mapping.)"""
    return Parser(exit_on_error=False, env_prefix="FASTMARGIN", default_env=True, formatter_class=Formatter, **options)
