"""Import a large package without the packages that it needs for other tasks than ours.

SuperGradients imports plotting, export and dataset libraries at module level. Here its modules, and
nobody else's, get stand-ins for them: classes that let class bodies, annotations and decorators
evaluate. A stand-in that is *used* after the import becomes the real thing where the package is
installed, and otherwise an error that names the missing package.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.abc
import importlib.machinery
import os
import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

STAND_IN_MODULE = "portrait_dist.not_imported"
_importing = 0
"""Nesting depth of :func:`lean_import`; above 0, stand-ins are placeholders and never resolve."""


def real_object(path: str) -> Any:
    """Import what a stand-in stands for.

    Args:
        path: dotted name, such as ``matplotlib.pyplot.figure``.

    Raises:
        ModuleNotFoundError: the package is not installed; the message says what to install.
        AttributeError: the installed package has no such name.
    """
    package, *names = path.split(".")
    try:
        found: Any = importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ModuleNotFoundError(
            f"SuperGradients needs the package '{package}' for {path}, and it is not installed: "
            f"pip install {package.replace('_', '-')}",
            name=package,
        ) from None
    prefix = package
    for name in names:
        prefix = f"{prefix}.{name}"
        if not hasattr(found, name):
            try:
                importlib.import_module(prefix)
            except ModuleNotFoundError:
                raise AttributeError(f"there is no {prefix} in this version") from None
        found = getattr(found, name)
    return found


class _StandInType(type):
    """Metaclass of stand-in classes; while the import runs, their attributes are stand-ins too."""

    path: str

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        path = f"{cls.path}.{name}"
        return stand_in(path) if _importing else real_object(path)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls.__module__ == STAND_IN_MODULE:
            if not _importing:
                return real_object(cls.path)(*args, **kwargs)
            # A decorator, or a call that makes one.
            return args[0] if len(args) == 1 and callable(args[0]) else cls
        if not _importing:
            real_object(cls.path)  # a class derived from a missing one: name what is missing
        return super().__call__(*args, **kwargs)

    def __instancecheck__(cls, instance: object) -> bool:
        if cls.__module__ != STAND_IN_MODULE:
            return super().__instancecheck__(instance)
        if cls.path.partition(".")[0] not in sys.modules:  # nobody can have made an instance
            return False
        real = real_object(cls.path)
        return isinstance(real, type) and isinstance(instance, real)


def stand_in(path: str) -> type:
    """Make the stand-in of a dotted name."""
    name = path.rpartition(".")[2]
    return _StandInType(name, (), {"__module__": STAND_IN_MODULE, "path": path})


class _StandInModule(types.ModuleType):
    """Stands for a package, in the importing modules' namespaces, never in ``sys.modules``."""

    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        # Python itself asks for such names (__path__, __wrapped__); they must be missing.
        if name.startswith("__"):
            raise AttributeError(name)
        path = f"{self.__name__}.{name}"
        return stand_in(path) if _importing else real_object(path)


class _ReplacedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finder of modules that have side effects only; each becomes a module with the given names."""

    def __init__(self, replaced: Mapping[str, Mapping[str, Any]]) -> None:
        self.replaced = replaced

    def find_spec(
        self, fullname: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.replaced:
            return None
        spec = importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        # Its other submodules stay importable.
        folders = [os.path.join(one, fullname.rpartition(".")[2]) for one in path or ()]
        spec.submodule_search_locations = [one for one in folders if os.path.isdir(one)]
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        vars(module).update(self.replaced[module.__name__])


@contextmanager
def _stand_ins_for(package: str, unused: frozenset[str]) -> Iterator[None]:
    """Give the modules of ``package``, and no other importer, stand-ins for ``unused``."""
    import_ = builtins.__import__

    def lean(
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Any = (),
        level: int = 0,
    ) -> Any:
        top = name.partition(".")[0]
        importer = str((globals or {}).get("__name__", ""))
        if level or top not in unused or importer.partition(".")[0] != package:
            return import_(name, globals, locals, fromlist, level)
        # As the real one: 'import a.b' gives a, 'from a.b import c' gives a.b.
        return _StandInModule(name if fromlist else top)

    builtins.__import__ = lean
    try:
        yield
    finally:
        builtins.__import__ = import_


def lean_import(
    package: str,
    unused: tuple[str, ...] = (),
    replaced: Mapping[str, Mapping[str, Any]] | None = None,
) -> types.ModuleType:
    """Import a package with stand-ins for what it never runs here, and without its side effects.

    ``sys.argv`` and ``sys.excepthook`` are as before afterwards. What a failed import of the
    package has left in ``sys.modules`` is removed first. A package that is imported already is
    returned as it is, with the names of ``replaced`` exchanged in all its modules.

    Args:
        package: top-level package.
        unused: top-level packages that it imports and that training never uses.
        replaced: module of the package → the names that stand in for it.
    """
    global _importing
    replaced = replaced or {}
    if package in sys.modules:
        _replace_names(package, replaced)
        return sys.modules[package]
    for name in [name for name in sys.modules if name.startswith(package + ".")]:
        del sys.modules[name]
    finder = _ReplacedModules(replaced)
    hook, arguments = sys.excepthook, sys.argv
    sys.argv = arguments[:1]  # it would answer the program's --help and take its --local_rank away
    sys.meta_path.insert(0, finder)
    _importing += 1
    try:
        with _stand_ins_for(package, frozenset(unused)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(package)
    finally:
        _importing -= 1
        sys.meta_path.remove(finder)
        sys.excepthook, sys.argv = hook, arguments


def _replace_names(package: str, replaced: Mapping[str, Mapping[str, Any]]) -> None:
    """Exchange objects in every loaded module of the package that has them."""
    new_by_old: dict[int, Any] = {}
    for name, members in replaced.items():
        module = sys.modules.get(name)
        for member, new in members.items():
            old = getattr(module, member, new)
            if old is not new:
                # By identity: equal objects of other modules are not meant.
                new_by_old[id(old)] = new
    # A copy: looking at a module's names may import others.
    for name, module in list(sys.modules.items()):
        if name == package or name.startswith(package + "."):
            for member, value in list(vars(module).items()):
                if id(value) in new_by_old:
                    setattr(module, member, new_by_old[id(value)])
