"""jsonargparse's parser, with help texts and error messages about options and values instead of Python's types.

A type is described by the values that a user may write (`describe_type`). The help of a command names the environment
variables once, not with every option. Error messages are rewritten by regular expressions on jsonargparse's own text;
pyproject.toml gives the range of versions whose text they know. The text of another version is passed on as it is. No
torch here.
"""

import re
from argparse import Action, _SubParsersAction
from collections.abc import Iterable
from difflib import get_close_matches
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin

from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from fastmargin.driver.config import TermConfig

VALUES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", NoneType: "null"}
GIVEN = re.compile(
    r"(?:(?:Got value|Given value|Unexpected import path format): |Importing ')(.*?)(?:' is not allowed.*)?$", re.M
)


def describe_type(kind: Any) -> str:
    """'bf16, fp16 or null' for Literal["bf16", "fp16"] | None."""
    parts = list(describe_parts(kind))
    return " or ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def describe_parts(kind: Any) -> Iterable[str]:
    if get_origin(kind) is Literal:
        yield from map(str, get_args(kind))
    elif get_origin(kind) is tuple:
        yield f"[{', '.join('...' if part is ... else describe_type(part) for part in get_args(kind))}]"
    elif get_origin(kind) is dict:
        yield "a weight and options by name, as in --terms.center.weight 0.01"
    elif kind in VALUES:
        yield VALUES[kind]
    else:  # a union
        for part in get_args(kind):
            yield from describe_parts(part)


def kind_of(action: Action) -> Any:
    return getattr(action, "_typehint", action.type)


def suggestion(name: str, known: Iterable[str]) -> str:
    """The known option that a misspelled one is close to, as an addition to a message; empty if there is none."""
    return "".join(f"; did you mean {close}?" for close in get_close_matches(name, known, 1, 0.85))


class Formatter(DefaultHelpFormatter):
    def _get_type_str(self, action: Action) -> str | None:
        return describe_type(kind_of(action)) or None

    def _format_action_invocation(self, action: Action) -> str:
        lines = super()._format_action_invocation(action).splitlines()
        return "".join(line.strip().removeprefix("ARG:   ") for line in lines if "ENV:   " not in line)


class Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        super().error(self.reworded(message), ex)

    def reworded(self, message: str) -> str:
        """The message in our words if it is of a kind that is known and about an option of this parser, else as it is.

        A parser and the parser of its subcommand may both be given a message: one that is reworded stays as it is.
        """
        options = {name: action for action in self._actions for name in (action.dest, *action.option_strings)}
        if (found := re.match(r'Parser key "(.+?)":', message)) and (action := options.get(found[1])):
            given = GIVEN.findall(message)
            said = f" is {given[-1]!r}" if given else f": {message.splitlines()[-1].strip()}"
            return f"{found[1]}{said}; want {describe_type(kind_of(action))}"
        if (found := re.match(r"argument (--\S+): expected one argument", message)) and found[1] in options:
            return f"{found[1]} has no value; want {describe_type(kind_of(options[found[1]]))}"
        if (found := re.match(r"unrecognized arguments: (--[^\s=]+)", message)) and "did you mean" not in message:
            return message + suggestion(found[1], options)
        if found := re.match(r"Subcommand '(.+)' does not accept option '(.+)'", message):
            return self._unknown_option(found[1], found[2]) or message
        if found := re.match(r"the following arguments are required: (.+)", message):
            names = [name.partition(".")[2] for name in found[1].split(", ")]  # without the command
            if all(names):
                return f"{', '.join('RUN' if name == 'run' else f'--{name}' for name in names)} is required"
        return message

    def _unknown_option(self, command: str, option: str) -> str | None:
        """The message for an unknown option of a command; None if there is no such command."""
        for action in self._actions:
            if isinstance(action, _SubParsersAction) and command in action.choices:
                known = [entry.dest for entry in action.choices[command]._actions]
                return f"{command} has no option {option}{suggestion(option, known)}"
        return None


def new_parser(**options: Any) -> Parser:
    """The parser of a command. (jsonargparse makes parsers of its own for the values of a mapping.)

    No value is ever imported: where jsonargparse expects an object or anything at all, as in `terms`, it would import
    the class that a text names. The setting holds for all of its parsers in this process.
    """
    set_parsing_settings(
        import_path_denylist=["*"], import_path_allowlist=[f"{TermConfig.__module__}.{TermConfig.__qualname__}"]
    )
    return Parser(exit_on_error=False, env_prefix="FASTMARGIN", default_env=True, formatter_class=Formatter, **options)
