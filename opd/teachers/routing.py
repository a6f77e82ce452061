"""Which teacher an utterance goes to, where a recipe has several.

A route's match names fields of a manifest's line: those that every line has (`task`, `audio`, ...; `language` by any of
its names) or any other. Values are compared as they are written: `0` of a recipe and `"0"` of a manifest are the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from opd.teachers.languages import EVERY_LANGUAGE, find_language, known_languages, language_of
from opd.types import Utterance

if TYPE_CHECKING:
    from opd.schema import Config, TeacherConfig


OWN_FIELDS = {field.name for field in dataclasses.fields(Utterance)} - {"extra"}


class Router:
    """The teachers of a config by name, in the order of its routes; one named "" without routes."""

    def __init__(self, config: Config) -> None:
        self.teachers = config.teacher.by_route()
        self.matches: dict[str, Mapping[str, Any]] = {
            name: config.teacher.routes[name].get("match") or {} if name else {} for name in self.teachers
        }

    def route(self, utterance: Utterance) -> str | None:
        """Name of the first teacher that takes the utterance; None where none does."""
        return next((name for name, match in self.matches.items() if _matches(utterance, match)), None)

    def path_of(self, utterance: Utterance) -> str:
        """Where the model of the utterance's teacher is."""
        return str(self._teacher(utterance).path)

    def gate_of(self, utterance: Utterance) -> float | None:
        """The WER beyond which the utterance's teacher is not believed; None where it always is."""
        return self._teacher(utterance).gate_max_wer

    @property
    def has_gate(self) -> bool:
        return any(teacher.gate_max_wer is not None for teacher in self.teachers.values())

    def _teacher(self, utterance: Utterance) -> TeacherConfig:
        name = self.route(utterance)
        assert name is not None, "all utterances were checked to have a teacher"
        return self.teachers[name]

    def split(self, utterances: Sequence[Utterance]) -> dict[str, list[int]]:
        """Teacher -> the utterances' indices, in the order of the routes. All are routed (see `check`)."""
        rows: dict[str, list[int]] = {}
        names = [self.route(utterance) for utterance in utterances]
        for name in self.teachers:
            if members := [index for index, own in enumerate(names) if own == name]:
                rows[name] = members
        return rows

    def check(self, utterances: Sequence[Utterance]) -> set[str]:
        """Names of the teachers that have an utterance among these.

        Raises ValueError for an utterance without a teacher, or whose language its teacher cannot be told.
        """
        sections = {name: dataclasses.asdict(teacher) for name, teacher in self.teachers.items()}
        known = {name: known_languages(section) for name, section in sections.items()}
        checked: set[tuple[str, str | None]] = set()
        found: set[str] = set()
        for utterance in utterances:
            name = self.route(utterance)
            if name is None:
                raise ValueError(
                    f"utterance {utterance.id!r} (language {utterance.language}) has no teacher: none of teacher.routes "
                    f"({', '.join(self.teachers)}) matches it; add a route, one without `match` takes all that is left"
                )
            found.add(name)
            languages = known[name]
            if languages is not None and (name, utterance.language) not in checked:
                checked.add((name, utterance.language))
                try:
                    language_of(utterance, sections[name], languages)
                except ValueError as error:
                    raise ValueError(f"teacher.routes.{name}: {error}" if name else str(error)) from error
        return found


def _matches(utterance: Utterance, match: Mapping[str, Any]) -> bool:
    """Whether an utterance has, for each field of the match, one of its values."""
    for field, wanted in match.items():
        values = list(wanted) if isinstance(wanted, list | tuple) else [wanted]
        if field == "language":
            if utterance.language is None or _language(utterance.language) not in {_language(str(v)) for v in values}:
                return False
        elif _written(_value(utterance, field)) not in map(_written, values):
            return False
    return True


def _value(utterance: Utterance, field: str) -> Any:
    """A field of the utterance's line; None where it has none."""
    return getattr(utterance, field) if field in OWN_FIELDS else utterance.extra.get(field)


def _written(value: Any) -> str | None:
    """A value as text: 0, 0.0 and "0" are one; so are true and "true"."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return None if value is None else str(value)


@cache
def _language(name_or_iso: str) -> str:
    """One form of a language's name, whether it is known or not."""
    try:
        return find_language(name_or_iso, EVERY_LANGUAGE).iso
    except ValueError:
        return name_or_iso.strip().lower()
