"""The options of a command: from the fields of dataclasses, on the command line and in YAML files."""

import dataclasses
import inspect
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from ..common.process import PROG
from ..common.user_files import read_text
from .user_errors import Stop, user_errors

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


LONGEST_CONFIG, DEEPEST_CONFIG = 1 << 20, 8


def make_parser(name: str, command: Callable[[list[str]], int]) -> "ArgumentParser":
    """A command's parser, explained by its docstring, with the option --config."""
    with user_errors():
        from jsonargparse import ArgumentParser
    parser = ArgumentParser(
        prog=f"{PROG} {name}",
        description=inspect.cleandoc(command.__doc__ or ""),
        exit_on_error=False,
        allow_abbrev=False,  # what looks for --preset before the options are read knows whole names only
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    return parser


def parse(parser: "ArgumentParser", arguments: Sequence[str]) -> "Namespace":
    """The options that arguments and config files give; Stop for what they must not be."""
    with argument_errors(parser), tempfile.TemporaryDirectory() as folder:
        return parser.parse_args([_lists_in_config(parser, x, folder) for x in with_underscores(arguments)])


@contextmanager
def argument_errors(parser: "ArgumentParser") -> Iterator[None]:
    """Parsing depends on the arguments alone, so any error of argparse and jsonargparse is one of theirs."""
    try:
        yield
    except Stop:
        raise
    except Exception as error:
        raise Stop(f"{error}: see {parser.prog} --help") from error


def with_underscores(arguments: Sequence[str]) -> list[str]:
    """--batch-size as --batch_size, which is how the options are called in YAML; --config FILE as --config=FILE."""
    options = (x.partition("=") if x.startswith("--") else (x, "", "") for x in arguments)
    result = ["--" + name[2:].replace("-", "_") + rest + x if name[:2] == "--" else name for name, rest, x in options]
    while "--config" in result[:-1]:
        place = result.index("--config")
        result[place : place + 2] = [f"--config={result[place + 1]}"]
    return result


def _lists_in_config(parser: "ArgumentParser", argument: str, folder: str) -> str:
    """--config=FILE, or a copy of it in a folder where single values stand for lists, as in target: energy."""
    import yaml

    name, _, path = argument.partition("=")
    content = read_yaml(path) if name == "--config" else {}
    wanting = False
    for action in parser._actions:
        *groups, last = action.dest.split(".")
        values: Any = content
        for group in groups:
            values = values.get(group) if isinstance(values, dict) else None
        if action.nargs and isinstance(values, dict) and isinstance(values.get(last), (str, int, float)):
            values[last] = [values[last]]
            wanting = True
    if not wanting:
        return argument
    copy = Path(folder) / Path(path).name
    copy.write_text(yaml.safe_dump(content))
    return f"{name}={copy}"


def add_fields(parser: "ArgumentParser", kind: Any, prefix: str = "", leave_out: Sequence[str] = ()) -> None:
    """An option for each field of a dataclass, with its help from the docstring."""
    hints = get_type_hints(kind)
    described = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", inspect.cleandoc(kind.__doc__), re.MULTILINE)
    texts = {name: " ".join(text.split()).replace("%", "%%") for name, text in described}
    for field in dataclasses.fields(kind):
        if field.name in leave_out:
            continue
        option, text = f"--{prefix}{field.name}", texts[field.name]
        if isinstance(field.default, bool):
            parser.add_argument(option, action="store_true", default=field.default, help=text)
        elif isinstance(field.default, tuple):
            several = len(field.default) if field.name in ("fractions", "betas") else "+"
            parser.add_argument(
                option, nargs=several, type=get_args(hints[field.name])[0], default=list(field.default), help=text
            )
        else:
            parser.add_argument(option, type=hints[field.name], default=field.default, help=text)


def read_yaml(path: str) -> dict[str, Any]:
    """The options in a config file.

    Raises:
        Stop: if it cannot be read, or is no dictionary of options.
    """
    import yaml

    try:
        text = read_text(path)
        if len(text) > LONGEST_CONFIG:
            raise ValueError(f"longer than {LONGEST_CONFIG} characters")
        depth = 0
        for event in yaml.parse(text):
            if isinstance(event, yaml.AliasEvent):  # a few YAML aliases can stand for more than any memory holds
                raise ValueError("it has an alias (*)")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST_CONFIG:
                raise ValueError(f"nested deeper than {DEEPEST_CONFIG}")
        content = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise Stop(f"config must be a YAML file of options, not {path}: {error}") from error
    content = {} if content is None else content
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise Stop(f"config must be a YAML file of options, not {path}: it has no names of options")
    return content
