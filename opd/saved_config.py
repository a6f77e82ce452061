"""The config.yaml of a run directory: read, filled up with defaults, compared with the config of now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

CONFIG_FILE = "config.yaml"
_RESTORE = f"restore it (every checkpoint has a copy of it, {CONFIG_FILE}), or choose another run_dir"


def load_saved_config(path: Path) -> dict[str, Any]:
    """The config.yaml of a run directory. Raises ValueError where it cannot be read."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path}: the saved config cannot be read ({' '.join(str(error).split())}); {_RESTORE}"
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: the saved config is not a mapping of keys to values; {_RESTORE}")
    return config


def with_defaults(saved: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The saved config with sections, and keys of sections, that it lacks."""
    filled = defaults | saved
    for name, section in defaults.items():
        if isinstance(section, dict) and isinstance(saved.get(name), dict):
            filled[name] = section | saved[name]
    return filled


def changes(saved: dict[str, Any], now: dict[str, Any], frozen_keys: list[str]) -> list[str]:
    """`key was old, is now new` for every leaf below the frozen keys that differs."""
    found = []
    for frozen in frozen_keys:
        old, new = _leaves(saved, frozen), _leaves(now, frozen)
        for leaf in sorted(old.keys() | new.keys()):
            before, after = old.get(leaf, "(absent)"), new.get(leaf, "(absent)")
            if before != after:
                found.append(f"{leaf} was {before}, is now {after}")
    return found


def _leaves(config: dict[str, Any], dotted: str) -> dict[str, Any]:
    value: Any = config
    for part in dotted.split("."):
        if not isinstance(value, dict) or part not in value:
            return {}
        value = value[part]
    if not isinstance(value, dict):
        return {dotted: value}
    return {leaf: item for name in value for leaf, item in _leaves(config, f"{dotted}.{name}").items()}
