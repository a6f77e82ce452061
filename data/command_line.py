"""The `key=value` arguments of this package's command lines."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path


def key_values(arguments: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """{key: value} of `key=value` arguments. Raises ValueError for an unknown or repeated key and for a bare word."""
    values: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in known:
            raise ValueError(f"unknown argument {argument!r}; there are {', '.join(f'{name}=...' for name in known)}")
        if key in values:
            raise ValueError(f"{key}= is given twice: give it once")
        values[key] = value
    return values


def wants_help(arguments: Collection[str]) -> bool:
    return not {"-h", "--help"}.isdisjoint(arguments)


def check_writable(key: str, path: Path, *, is_folder: bool = False) -> None:
    """Makes the folder that a command is to write `path` in (or `path` itself) and tries it, before any work is done.

    Raises ValueError that begins with the key as it was given, such as "out=" or "--output ".
    """
    if path.is_dir() and not is_folder:
        raise ValueError(f"{key}{path}: is a folder: name a file")
    folder = path if is_folder else path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass  # without a name: nothing is to be seen of it
    except OSError as error:
        raise ValueError(
            f"{key}{path}: cannot be written ({folder}: {error.strerror}); choose a writable place"
        ) from error


def one_of(values: dict[str, str], key: str, *choices: str) -> str:
    """The value of `key`, by default the first choice. Raises ValueError that lists the choices."""
    value = values.get(key, choices[0])
    if value not in choices:
        raise ValueError(f"{key}={value}: must be one of {', '.join(choices)}")
    return value
