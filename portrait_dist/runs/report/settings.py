"""The settings of a run as the report shows them: ``config.yaml`` beside the run's recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from portrait_dist import config, files, recipes
from portrait_dist.errors import InputError
from portrait_dist.recipes import reading

NOT_REPEATED = ("recipe", "run.name", "run.resume")
"""Settings that name a run and do not change what it computes."""


@dataclass(frozen=True)
class Row:
    """One setting.

    Args:
        key: such as ``train.lr``.
        value: as text.
        base: the recipe's value as text; empty where the run has the same.
        help: its meaning; empty for keys that this version does not know.
        changed: whether the value differs from the recipe's.
    """

    key: str
    value: str
    base: str
    help: str
    changed: bool


@dataclass(frozen=True)
class RunSettings:
    """What ``config.yaml`` says.

    Args:
        path: the file.
        values: key → text; empty where the file is missing or cannot be read.
        text: the whole file.
        problem: why there are no values, or an empty string.
    """

    path: Path
    values: Mapping[str, str] = field(default_factory=dict)
    text: str = ""
    problem: str = ""

    @property
    def recipe(self) -> str:
        """The recipe of the package that the run started from, else an empty string."""
        name = self.values.get("recipe", "")
        return name if name in recipes.names() else ""

    def rows(self) -> list[Row]:
        """Return every setting, compared with the run's recipe (the defaults without one)."""
        known, base = config.settings(), config.load(self.recipe or None)
        found = []
        for key, text in self.values.items():
            setting = known.get(config.owner_of(key))
            if setting is not None and setting.kind is dict:  # no recipe of the package has any
                found.append(Row(key, text, "", setting.help, changed=True))
                continue
            if setting is None:
                found.append(Row(key, text, "", "", changed=False))
                continue
            usual = config.value_of(base, key)
            changed = _parsed(key, text) != usual and key != "recipe"
            found.append(Row(key, text, plain(usual) if changed else "", setting.help, changed))
        return found

    def overrides(self) -> list[str]:
        """Return the ``key=value`` arguments that make the run's settings out of its recipe."""
        changed = [row for row in self.rows() if row.changed and row.key not in NOT_REPEATED]
        return [f"{row.key}={row.value}" for row in changed]

    def number(self, key: str) -> int | None:
        """Return a whole number, None where the setting is none."""
        value = _parsed(key, self.values.get(key, ""))
        return value if isinstance(value, int) else None


def read_settings(path: Path) -> RunSettings:
    """Read ``config.yaml``; what cannot be read becomes a ``problem`` and not an error."""
    if not path.exists():
        return RunSettings(path, problem="The run's folder has no config.yaml.")
    try:
        leaves = reading.read(path)
        text = files.read_regular(path, reading.MOST_BYTES).decode("utf-8-sig")
    except InputError as error:
        return RunSettings(path, problem=str(error))
    except (OSError, UnicodeDecodeError) as error:
        return RunSettings(path, problem=f"{path}: cannot be read ({error})")
    return RunSettings(path, {leaf.key: _text(leaf) for leaf in leaves}, text)


def _text(leaf: reading.Leaf) -> str:
    if leaf.text is not None:
        return leaf.text
    return json.dumps(leaf.value)  # a list; JSON is YAML


def plain(value: object) -> str:
    """Write a value as it stands in a recipe."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _parsed(key: str, text: str) -> object:
    """Return the value of a setting, the text itself where it is none."""
    try:
        return config.value_of(config.load(None, [f"{key}={text}"]), key)
    except InputError:
        return text
