"""Import SuperGradients without the packages its training never runs, and without its side effects.

``import super_gradients`` pulls in ONNX tooling, plotting, cloud storage and dataset-analysis packages, writes a log into
the home folder and installs an exception hook. While that import runs, the packages in :data:`UNUSED_PACKAGES` are
replaced by empty stand-ins; afterwards the stand-ins leave ``sys.modules``, so anybody else imports the real packages.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import os
import sys
import tempfile
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

# Imported by SuperGradients 3.7.1 at module level, used only by export, plotting, S3 upload and other tasks' datasets.
UNUSED_PACKAGES = (
    "boto3",
    "botocore",
    "data_gradients",
    "deci_platform_client",
    "imagesize",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxsim",
    "pandas",
    "pycocotools",
    "requests",
    "scipy",
)


_STAND_IN = "portrait_dist.not_imported"


class _StandInType(type):
    """Metaclass: every attribute of a stand-in class is a stand-in class, so class bodies and annotations evaluate."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _stand_in_class(name)

    def __call__(cls, *args: object, **kwargs: object) -> object:
        if cls.__module__ != _STAND_IN:
            return super().__call__(*args, **kwargs)
        return args[0] if len(args) == 1 and callable(args[0]) else cls  # as a decorator, or a call that makes one


def _stand_in_class(name: str) -> type:
    return _StandInType(name, (), {"__module__": _STAND_IN})


class _StandInModule(types.ModuleType):
    __path__: list[str] = []
    __version__ = "0"

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _stand_in_class(name)


class _StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] in UNUSED_PACKAGES:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandInModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        return None


@contextmanager
def _without_unused_packages() -> Iterator[None]:
    finder = _StandInFinder()
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in UNUSED_PACKAGES}
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _StandInModule)]:
            del sys.modules[name]
        sys.modules.update(kept)


def import_super_gradients() -> types.ModuleType:
    with _without_unused_packages():
        importlib.import_module("torchmetrics")
        return importlib.import_module("super_gradients")
