"""The parts that a recipe names: networks, losses, metrics, optimisers, learning-rate schedules.

A name is one of

- a name of this package: ``unet``, ``soft_iou``, ``adam``;
- ``sg:NAME``: one that SuperGradients has registered, such as ``sg:pp_lite_t_seg``;
- ``package.module.Name`` or ``package.module:Name``: anything that can be imported;
- ``file.py:Name``: from a file of yours.

Importing executes code, so a name that is not this package's, SuperGradients' or that of a library
named in :data:`LIBRARIES` is imported only where the caller says that it is trusted: because it was
given on the command line, or because the user said so.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from portrait_dist.errors import InputError, kind_and_message, nearest, shorten

Factory = Callable[..., Any]

SUPERGRADIENTS = "sg:"
SUPERGRADIENTS_PARTS = "portrait_dist.training.sg_parts"
"""Module that builds SuperGradients' parts. It is named and not imported: it costs seconds, and it
lies in a room above this one."""
LIBRARIES = ("segmentation_models_pytorch",)
"""Libraries whose classes are taken without a question: they build modules and do nothing else."""
EXTRAS = {"segmentation_models_pytorch": "smp"}
"""Extra of this package that installs a library."""


def is_known(name: str, builtin: Mapping[str, Factory]) -> bool:
    """Whether a name can be resolved without importing code that somebody has to vouch for."""
    library = name.partition(":")[0].partition(".")[0]
    return name in builtin or name.startswith(SUPERGRADIENTS) or library in LIBRARIES


def resolve(
    name: str, setting: str, builtin: Mapping[str, Factory], *, trusted: bool = True
) -> Factory:
    """Return what builds a part.

    Args:
        name: as described above.
        setting: what names it in messages, such as ``model.name``.
        builtin: parts of this package, by name.
        trusted: whether code that is none of a known library may be imported.

    Raises:
        InputError: there is no such part, its code fails on import, or nobody vouches for it.
    """
    if name in builtin:
        return builtin[name]
    if not trusted and not is_known(name, builtin):
        raise InputError(
            f"{setting}={shorten(name)}: code that is not part of this package; "
            "add --trust-code (from Python trust_code=True) where it is yours, which executes it"
        )
    if name.startswith(SUPERGRADIENTS):
        find: Callable[[str, str], Factory] = importlib.import_module(SUPERGRADIENTS_PARTS).find
        return find(setting.partition(".")[0], name.removeprefix(SUPERGRADIENTS))
    where, colon, attribute = name.rpartition(":")
    if not colon:
        where, dot, attribute = name.rpartition(".")
        if not dot:
            raise InputError(
                f"{setting}={shorten(name)}: there is none of this name."
                f"{nearest(name, list(builtin))} There are {', '.join(builtin)}, sg:NAME, "
                "package.module:Name and file.py:Name"
            )
    module = _file(where, setting) if where.endswith(".py") else _module(where, setting, name)
    return _attribute(module, attribute, setting, name, trusted)


def build(factory: Factory, args: Mapping[str, Any], setting: str, name: str) -> Any:
    """Call what builds a part.

    Raises:
        InputError: it rejects its arguments; the message quotes its error.
    """
    try:
        return factory(**args)
    except InputError:
        raise
    except Exception as error:  # anybody's code
        given = ", ".join(f"{key}={value!r}" for key, value in args.items()) or "no arguments"
        section = setting.partition(".")[0]
        raise InputError(
            f"{setting}={shorten(name)}: cannot be built with {shorten(given)} "
            f"({kind_and_message(error)}); arguments are {section}.args.NAME=VALUE"
        ) from error


def _attribute(
    module: ModuleType, attribute: str, setting: str, name: str, trusted: bool
) -> Factory:
    found: Any = getattr(module, attribute, None)
    # Unasked, only a library's own classes: a function, or what it imported, could do anything.
    own = isinstance(found, type) and found.__module__.partition(".")[0] in LIBRARIES
    fits = callable(found) if trusted else own
    if not fits:
        classes = [one for one in vars(module) if isinstance(getattr(module, one, None), type)]
        what = "cannot be called" if found is not None else "is not there"
        raise InputError(
            f"{setting}={shorten(name)}: {attribute} {what}.{nearest(attribute, classes)}"
        )
    factory: Factory = found
    return factory


def _file(path: str, setting: str) -> ModuleType:
    """Import a file under a unique module name, once in a process."""
    file = Path(path)
    if not file.is_file():
        raise InputError(
            f"{setting}={shorten(path)}: there is no such file in {Path.cwd()}; give its path"
        )
    absolute = file.resolve()
    name = f"{absolute.stem}_{sha256(str(absolute).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, absolute)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _find_modules_in(absolute.parent)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, Exception):
            raise _failed(setting, path, error) from error
        raise
    return module


def _module(path: str, setting: str, name: str) -> ModuleType:
    _find_modules_in(Path.cwd())
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        package = path.partition(".")[0]
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise _failed(setting, name, error) from error
        extra = EXTRAS.get(package)
        advice = (
            f"pip install 'portrait-dist[{extra}]'" if extra else "install it, or correct the name"
        )
        raise InputError(
            f"{setting}={shorten(name)}: there is no module {error.name}; {advice}"
        ) from None
    except Exception as error:
        raise _failed(setting, name, error) from error


def _failed(setting: str, name: str, error: Exception) -> InputError:
    return InputError(f"{setting}={shorten(name)}: importing it failed ({kind_and_message(error)})")


def _find_modules_in(folder: Path) -> None:
    """Append a folder to the import path: its modules hide none of the standard library."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
