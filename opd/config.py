"""The whole configuration: recipes and dotted overrides -> the frozen dataclasses of `opd.schema`.

`load_config(["recipe=tiny", "optim.lr=1e-4"])` reads recipes/tiny.yaml, applies the overrides, refuses unknown keys
(naming the nearest one) and wrong values, and returns a `Config`.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opd.schema import Config
from opd.validate import validate

PROJECT_ROOT = Path(__file__).resolve().parent.parent
RECIPES_DIR = PROJECT_ROOT / "recipes"
SYNTHETIC_PREFIX = "synthetic:"
_HOLDS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "text",
    "list[str]": "a list of texts, [a, b]", "list[float]": "a list of numbers, [0.9, 0.98]", "dict": "a mapping, {name: value}",
}  # fmt: skip


def load_config(argv: list[str], check: bool = True) -> Config:
    """Recipe file + `section.key=value` overrides -> Config. check=False: values that cannot be run are let pass.

    Raises ValueError with one line that names the key, where it stands and how to mend it.
    """
    overrides = _parse_overrides(argv)
    if "recipe" not in overrides:
        raise ValueError(f"no recipe given: add recipe=NAME, one of {', '.join(list_recipes())}")
    recipe_path = find_recipe(str(overrides["recipe"]))
    values = _read_recipe(recipe_path)
    values.pop("recipe", None)
    _check_keys(values, Config, where=str(recipe_path))
    for dotted, value in overrides.items():
        _check_dotted(dotted)
        _set_dotted(values, dotted, value)
    config = _build(values)
    if check:
        for one in parts_of(config):
            validate(one)
    return config


def parts_of(config: Config) -> list[Config]:
    """The configs of the runs that one config stands for: itself, or the stages of a ladder, or the arms compared."""
    if config.compare:
        from opd.compare import arm_configs

        return [arm.config for arm in arm_configs(config)]
    if config.stages:
        from opd.ladder import stage_configs

        return [stage for _, stage in stage_configs(config)]
    return [config]


def derive(config: Config, overrides: list[dict[str, Any]], where: str) -> Config:
    """`config` with nested overrides laid over it, the last on top. Raises ValueError for unknown keys."""
    values: Any = config.to_dict()
    for changes in overrides:
        if not isinstance(changes, dict):
            raise ValueError(f"{where}: must be a mapping of sections and keys, not {changes!r}")
        _check_keys(changes, Config, where)
        values = _laid_over(values, changes, Config)
    return _build(values)


def _laid_over(values: dict[str, Any], changes: dict[str, Any], cls: type) -> dict[str, Any]:
    """Sections are merged; keys, those that hold mappings too, are replaced."""
    merged = dict(values)
    for name, value in changes.items():
        section = _section_of(cls, name)
        merged[name] = _laid_over(values[name], value, section) if section else value
    return merged


def config_from_dict(values: dict[str, Any]) -> Config:
    """The Config of a dictionary made by `Config.to_dict` (workers get their config this way)."""
    return _build(values)


def list_recipes() -> list[str]:
    return sorted(path.stem for path in RECIPES_DIR.glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """Path of a recipe given by name or by path. Raises ValueError with the list of recipes."""
    if name.endswith((".yaml", ".yml")):
        if Path(name).is_file():
            return Path(name)
        raise ValueError(f"recipe={name}: there is no such file; recipes by name: {', '.join(list_recipes())}")
    path = RECIPES_DIR / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"recipe={name}: unknown recipe; there are {', '.join(list_recipes())}")
    return path


def resolve_path(path: str) -> str:
    """A path from a recipe: as it is, else relative to the project; a Hub id is handed back unchanged."""
    candidate = Path(path).expanduser()
    if candidate.exists():
        return str(candidate.resolve())
    if not candidate.is_absolute() and (PROJECT_ROOT / candidate).exists():
        return str((PROJECT_ROOT / candidate).resolve())
    return path


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: the recipe cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a recipe is a mapping of keys to values")
    return values


def take_flag(argv: list[str], name: str) -> tuple[bool, list[str]]:
    """Whether `name=true` is among the arguments, and the others. Raises ValueError for another value."""
    values = [argument.lstrip("-").partition("=") for argument in argv]
    for key, _, value in values:
        if key == name and value not in ("true", "false"):
            raise ValueError(f"{name}={value}: must be true or false")
    others = [argument for argument, (key, _, _) in zip(argv, values, strict=True) if key != name]
    return (name, "=", "true") in values, others


def _parse_overrides(argv: list[str]) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    for argument in argv:
        name, equals, text = argument.partition("=")
        dotted = name.lstrip("-")
        if not equals or not dotted:
            raise ValueError(f"argument {argument!r}: write it as section.key=value")
        try:
            value = yaml.safe_load(text) if text else ""
        except yaml.YAMLError as error:
            raise ValueError(
                f"argument {argument!r}: the value cannot be read: {' '.join(str(error).split())}"
            ) from error
        # YAML reads off, no and 1e5 as no text; where a key holds text, they stand as they were typed.
        is_text = _type_of(dotted).startswith("str") and not isinstance(value, str | list | dict | None)
        overrides[dotted] = text if is_text else value
    return overrides


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as text; here it is a number."""
    if isinstance(value, str):
        try:
            return float(value) if any(c in value for c in "eE") and value[0] in "+-.0123456789" else value
        except (ValueError, IndexError):
            return value
    return value


def _section_of(cls: type, name: str) -> type | None:
    section = {f.name: f for f in dataclasses.fields(cls)}[name]
    factory = section.default_factory
    return factory if factory is not MISSING and dataclasses.is_dataclass(factory) else None  # type: ignore[return-value]


def _type_of(dotted: str) -> str:
    """The type of a key as opd/schema.py has it, such as "str | None"; "" for sections and what is no key."""
    cls: type = Config
    *sections, last = dotted.split(".")
    for name in sections:
        if name not in _names(cls) or (section := _section_of(cls, name)) is None:
            return ""
        cls = section
    if last not in _names(cls) or _section_of(cls, last) is not None:
        return ""
    return str({f.name: f for f in dataclasses.fields(cls)}[last].type)


def _names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _unknown(dotted: str, where: str) -> ValueError:
    """Names the keys whose last part is like that of `dotted`; else the keys of its section; else where all are shown."""
    section, _, last = dotted.rpartition(".")
    keys = _all_keys()
    of_section = [key for key in keys if section and key.startswith(f"{section}.")]
    candidates = _with_last_part_like(last, of_section) or _with_last_part_like(last, keys)
    sections = [key.rpartition(".")[0] for key in candidates]
    if same := difflib.get_close_matches(section, sections, n=1) if section else []:
        candidates = [key for key in candidates if key.rpartition(".")[0] == same[0]]
    if candidates:
        hint = f"did you mean {' or '.join(candidates[:3])}?"
    elif of_section:
        hint = f"{section} has {', '.join(key.rpartition('.')[2] for key in of_section)}"
    else:
        hint = "print_config=true shows every key"
    return ValueError(f"{where}: unknown key {dotted}; {hint}")


def _with_last_part_like(name: str, keys: list[str]) -> list[str]:
    """Keys with this very last part; else with one that has all its words; else with the one that is spelt most alike."""
    lasts = [key.rpartition(".")[2] for key in keys]
    words = set(name.split("_"))
    near = [name] if name in lasts else [last for last in lasts if words <= set(last.split("_"))]
    near = near or difflib.get_close_matches(name, lasts, n=1)
    return [key for key, last in zip(keys, lasts, strict=True) if last in near]


def _check_keys(values: dict[str, Any], cls: type, where: str, prefix: str = "") -> None:
    for name, value in values.items():
        if name not in _names(cls):
            raise _unknown(f"{prefix}{name}", where)
        section = _section_of(cls, name)
        if section is not None:
            if not isinstance(value, dict):
                raise ValueError(f"{where}: {prefix}{name} is a section; write its keys below it")
            _check_keys(value, section, where, f"{prefix}{name}.")


def _all_keys() -> list[str]:
    keys = []
    for f in dataclasses.fields(Config):
        section = _section_of(Config, f.name)
        keys += [f"{f.name}.{g.name}" for g in dataclasses.fields(section)] if section else [f.name]
    return keys


def _check_dotted(dotted: str) -> None:
    parts = dotted.split(".")
    if parts[0] not in _names(Config):
        raise _unknown(dotted, "command line")
    section = _section_of(Config, parts[0])
    if section is None:
        holds_keys = str({f.name: f for f in dataclasses.fields(Config)}[parts[0]].type).startswith("dict")
        if len(parts) > 1 and not holds_keys:
            raise ValueError(f"command line: {parts[0]} has no keys below it; write {parts[0]}=value")
        return
    if len(parts) == 1:
        raise ValueError(f"command line: {dotted} is a section; write {dotted}.key=value")
    names = {f.name: f for f in dataclasses.fields(section)}
    if parts[1] not in names:
        raise _unknown(dotted, "command line")
    if len(parts) > 2 and not str(names[parts[1]].type).startswith("dict"):
        raise ValueError(f"command line: {'.'.join(parts[:2])} has no keys below it; write {'.'.join(parts[:2])}=value")


def _set_dotted(values: dict[str, Any], dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    for part in path:
        values = values.setdefault(part, {})
    values[last] = value


def _numbers_below(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _numbers_below(value) for name, value in values.items()}
    return _number(values)


def _typed(values: dict[str, Any], cls: type, prefix: str = "") -> dict[str, Any]:
    """The values with numbers where their keys hold numbers. Raises ValueError for what cannot be meant as text."""
    typed = {}
    for name, value in values.items():
        kind = _type_of(f"{prefix}{name}")
        section = _section_of(cls, name) if name in _names(cls) else None
        if section is not None and isinstance(value, dict):
            value = _typed(value, section, f"{name}.")
        elif kind.startswith("dict"):
            value = _numbers_below(value)
        elif kind.startswith(("int", "float")):
            value = _number(value)
            if kind.startswith("int") and isinstance(value, float) and value.is_integer():
                value = int(value)
        elif kind.startswith("str") and isinstance(value, bool):
            raise ValueError(
                f"{prefix}{name}={value}: must be text; put it in quotes (YAML reads on, off, yes and no as true or false)"
            )
        elif kind == "str | None" and value == "":
            raise ValueError(f"{prefix}{name}= is empty: give it a value, or leave it out ({prefix}{name}=null)")
        typed[name] = value
    return typed


def _build(values: dict[str, Any]) -> Config:
    base = OmegaConf.structured(Config)
    OmegaConf.set_readonly(base, False)
    for name in base:
        if OmegaConf.is_config(base._get_node(name)):  # type: ignore[union-attr]
            OmegaConf.set_readonly(base._get_node(name), False)  # type: ignore[arg-type]
    values = _typed(values, Config)
    try:
        merged = OmegaConf.merge(base, OmegaConf.create(values))
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise _of_another_type(values, error) from error
    assert isinstance(config, Config), "OmegaConf hands back the structured type"
    return config


def _of_another_type(values: dict[str, Any], error: OmegaConfBaseException) -> ValueError:
    """What a key was given, and what it holds."""
    dotted = str(getattr(error, "full_key", None) or "").partition("[")[0]
    kind, none, _ = _type_of(dotted).partition(" | None")
    holds = _HOLDS.get("dict" if kind.startswith("dict") else kind)
    if holds is None:
        return ValueError(f"config key {dotted}: {' '.join(str(error).splitlines()[:1])}")
    value: Any = values
    for part in dotted.split("."):
        value = value[part]
    shown = "null" if value is None else value
    return ValueError(f"{dotted}={shown}: must be {holds}{', or null' if none else ''}")


def describe(config: Config) -> str:
    """The resolved config as YAML, each key with its one-line meaning."""
    lines = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            lines.append(f"{f.name}:")
            lines += [_describe_key(g, getattr(value, g.name), "  ") for g in dataclasses.fields(value)]
        else:
            lines.append(_describe_key(f, value, ""))
    return "\n".join(lines)


def _describe_key(f: dataclasses.Field, value: Any, indent: str) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000).split("\n")[0]
    return f"{indent}{f.name}: {text}".ljust(46) + f"  # {f.metadata['meaning']}"
