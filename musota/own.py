"""Loads an object or a model from a Python file, named `folder/my_model.py:build`.

Each load makes a package of its own from the files in the folder: two files may each import their
own `layers.py`, also when a model is called.
"""

import builtins
import importlib
import inspect
import sys
import types
from functools import partial
from importlib.machinery import PathFinder
from importlib.util import module_from_spec, resolve_name, spec_from_file_location
from pathlib import Path

from musota.errors import MusotaError, blaming
from musota.files import as_path


class _Source:
    """A Python file as `module`, in a package that its folder's files alone import from."""

    def __init__(self, path: Path):
        self.folder, self.package = path.parent, f"musota_file_{id(self)}"
        self.builtins = {**vars(builtins), "__import__": self.import_beside}
        self.importlib = types.ModuleType("importlib")
        self.importlib.import_module = self.import_module
        self.importlib.__getattr__ = partial(getattr, importlib)
        sys.modules[self.package] = types.ModuleType(self.package)
        sys.modules[self.package].__path__ = [str(self.folder)]
        sys.meta_path.insert(0, self)
        importlib.invalidate_caches()
        spec = spec_from_file_location(f"{self.package}.{path.stem}", path)
        self.module = sys.modules[spec.name] = module_from_spec(spec)
        self.execute(self.module)

    def execute(self, module: types.ModuleType) -> None:
        """Runs a module as the file is now: cached bytecode may be of an earlier one."""
        module.__builtins__ = self.builtins
        source = Path(module.__file__).read_bytes()
        exec(compile(source, module.__file__, "exec"), vars(module))

    def find_spec(self, name, path=None, target=None):
        """As a finder of sys.meta_path: finds the modules of the package."""
        if not name.startswith(f"{self.package}."):
            return None
        spec = PathFinder.find_spec(name, path)
        if spec and str(spec.origin).endswith(".py"):
            spec.loader.exec_module = self.execute
        return spec

    def import_beside(self, name, globals=None, locals=None, fromlist=(), level=0):
        """The `__import__` of these files: as Python does for a script, the folder comes first."""
        top = name.partition(".")[0]
        if level or not self.holds(top):
            found = builtins.__import__(name, globals, locals, fromlist, level)
            return self.importlib if found is importlib else found
        found = builtins.__import__(f"{self.package}.{name}", globals, locals, fromlist)
        return found if fromlist else sys.modules[f"{self.package}.{top}"]

    def import_module(self, name: str, package: str | None = None) -> types.ModuleType:
        """The `importlib.import_module` of these files."""
        return self.import_beside(resolve_name(name, package), fromlist=["__name__"])

    def holds(self, name: str) -> bool:
        """Whether Python would find a module in the folder, with the folder first on sys.path."""
        spec = PathFinder.find_spec(name, [str(self.folder), *sys.path])
        found = spec and next(iter(spec.submodule_search_locations or [spec.origin]))
        return name != "musota" and bool(found) and Path(found).parent == self.folder


def find_source(source: str) -> tuple[Path, str]:
    """FILE.py and NAME of `FILE.py:NAME`. Raises MusotaError if there is no such file."""
    place, _, name = str(source).rpartition(":")
    if not place.endswith(".py") or not name.isidentifier():
        raise MusotaError(f"Name it as FILE.py:NAME, like my_model.py:build, not {source!r}.")
    path = as_path(place).absolute()
    if not path.is_file():
        raise MusotaError(f"There is no file {path}.")
    return path, name


def load_objects(source: str, *others: str) -> list:
    """The object NAME of FILE.py, and `others` of that file by name. Each call loads the file anew.
    Raises MusotaError if one is not there, or FILE.py raises."""
    path, name = find_source(source)
    with blaming(path.name):
        module = _Source(path).module
    for one in (name, *others):
        if not hasattr(module, one):
            raise MusotaError(f"{path} defines no {one!r}.")
    return [getattr(module, one) for one in (name, *others)]


def load_module(source: str, vocab_size: int, max_seq_len: int, make=None):
    """The torch module that NAME of FILE.py (or `make`, loaded from it) returns when it is called:
    with `vocab_size` and `max_seq_len`, if it takes them. Raises MusotaError if that fails."""
    make = load_objects(source)[0] if make is None else make
    from torch import nn  # after the file is found: a wrong name is reported at once

    if isinstance(make, nn.Module) or not callable(make):
        kind = type(make).__name__
        raise MusotaError(f"{source} is {kind}: name the function or class that makes the model.")
    sizes = {"vocab_size": vocab_size, "max_seq_len": max_seq_len}
    with blaming(source):
        takes = inspect.signature(make).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
            sizes = {name: size for name, size in sizes.items() if name in takes}
        module = make(**sizes)
    if isinstance(module, nn.Module):
        vars(module)["musota_file"] = str(find_source(source)[0])  # part of its identity
    else:
        raise MusotaError(f"{source} made {type(module).__name__}, not a torch.nn.Module.")
    return module
