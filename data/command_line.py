"""The `key=value` arguments of this package's command lines."""

from __future__ import annotations

from collections.abc import Collection, Iterable


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


def one_of(values: dict[str, str], key: str, *choices: str) -> str:
    """The value of `key`, by default the first choice. Raises ValueError that lists the choices."""
    value = values.get(key, choices[0])
    if value not in choices:
        raise ValueError(f"{key}={value}: must be one of {', '.join(choices)}")
    return value
