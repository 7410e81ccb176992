"""Names that a package imports on first use, so that `musota --help` does not wait for torch."""

from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec


def lazy(package: str, modules: Mapping[str, str]) -> tuple:
    """The home of each name, `__getattr__` and `__dir__` for a package that exports the names which
    `modules` lists for each module, separated by spaces."""
    module_of = {name: module for module, names in modules.items() for name in names.split()}

    def get(name: str):
        if name in module_of:
            return getattr(import_module(module_of[name]), name)
        with suppress(ValueError):  # of a module without a spec
            if name.isidentifier() and name[0] != "_" and find_spec(f"{package}.{name}"):
                return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return module_of, get, lambda: [*module_of]
