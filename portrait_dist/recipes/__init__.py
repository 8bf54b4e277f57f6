"""Recipes: YAML files that override defaults. Those of the package lie beside this module.

:mod:`portrait_dist.recipes.reading` reads them, and :mod:`portrait_dist.recipes.parts` finds the
networks, losses and optimisers that they name. This module loads no YAML parser, so that the help
text of a command can name the default recipe and still answer at once.
"""

from __future__ import annotations

from pathlib import Path

from portrait_dist.errors import InputError, nearest, shorten

FOLDER = Path(__file__).parent
DEFAULT = "aisegment_unet"
"""Recipe of ``train``, ``submit`` and ``show`` without ``--recipe``."""


def names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(recipe: str) -> Path:
    """Return the file of a recipe.

    Args:
        recipe: name of a recipe of the package, or path of a YAML file.

    Raises:
        InputError: there is neither.
    """
    if recipe in names():
        return FOLDER / f"{recipe}.yaml"
    try:
        if Path(recipe).exists():
            return Path(recipe)
    except (OSError, ValueError):  # too long for a path, or a NUL in it
        pass
    raise InputError(
        f"no recipe '{shorten(recipe)}'.{nearest(recipe, names())} There are "
        f"{', '.join(names())}, or give the path of a YAML file"
    )
