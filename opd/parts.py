"""The runs that one config stands for, each with its name and with those that come before it."""

from __future__ import annotations

from dataclasses import dataclass

from opd.compare import arm_configs
from opd.ladder import stage_configs
from opd.schema import Config


@dataclass(frozen=True)
class Part:
    """One run.

    title    how messages call it; empty where the config is a single run
    before   name -> config of the runs that have ended when this one begins: what `stage:NAME` can mean here
    """

    title: str
    config: Config
    before: dict[str, Config]


def named_parts(config: Config) -> list[Part]:
    """In the order in which they run. Of a comparison those of the first seed: the others differ in the seed alone."""
    if not config.compare and not config.stages:
        return [Part("", config, {})]
    if config.compare:
        seed = config.compare["seeds"][0]
        named = [
            (arm.setting, arm.name, f"setting {arm.setting}, arm {arm.name}", arm.config)
            for arm in arm_configs(config)
            if arm.seed == seed
        ]
    else:
        named = [("", name, f"stage {name}", stage) for name, stage in stage_configs(config)]
    parts: list[Part] = []
    before: dict[str, dict[str, Config]] = {}
    for group, name, title, one in named:
        earlier = before.setdefault(group, {})
        parts.append(Part(title, one, dict(earlier)))
        earlier[name] = one
    return parts
