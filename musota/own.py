"""Loads an object or a model from a Python file, named `folder/my_model.py:build`.

Modules beside the file are imported afresh for each load and belong to it alone: two files may
each import their own `layers.py`, also when a model is called.
"""

import builtins
import importlib
import inspect
import itertools
import sys
import types
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path

from musota.errors import MusotaError, blaming
from musota.files import as_path

_numbers = itertools.count(1)


class _Source:
    """The `object` NAME of FILE.py, and the modules that FILE imports from its folder."""

    def __init__(self, source: str):
        place, _, name = str(source).rpartition(":")
        if not place.endswith(".py") or not name.isidentifier():
            raise MusotaError(f"Name it as FILE.py:NAME, like my_model.py:build, not {source!r}.")
        path = as_path(place).absolute()
        if not path.is_file():
            raise MusotaError(f"There is no file {path}.")
        self.folder, self.siblings, self.active = path.parent, {}, False
        title = f"musota_file_{next(_numbers)}_{path.stem}"
        module = sys.modules[title] = types.ModuleType(title)  # dataclasses look for it there
        module.__file__ = str(path)
        self.builtins = {**vars(builtins), "__import__": self.imports}
        module.__builtins__ = self.builtins
        with blaming(path.name), self.importable():
            exec(compile(path.read_bytes(), path, "exec"), module.__dict__)
        if not hasattr(module, name):
            raise MusotaError(f"{path} defines no {name!r}.")
        self.object = getattr(module, name)

    def imports(self, *arguments, **named):
        """The file's `__import__`."""
        with self.importable():
            return builtins.__import__(*arguments, **named)

    def find_spec(self, name, path=None, target=None):
        """As a finder of sys.meta_path: modules in the folder import as the file does, also later,
        when one of their functions is called."""
        spec = PathFinder.find_spec(name, path, target)
        inside = spec and spec.origin and self.folder in Path(spec.origin).parents
        if inside and "-packages" not in spec.origin and name.partition(".")[0] != "musota":
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: execute(self._own(module))
        return spec

    def _own(self, module: types.ModuleType) -> types.ModuleType:
        module.__builtins__ = self.builtins
        return module

    @contextmanager
    def importable(self):
        """A context in which imports find the modules in the folder first, as this file's own."""
        if self.active:
            yield
            return
        others = self._take_out()
        sys.modules.update(self.siblings)
        sys.path.insert(0, str(self.folder))
        sys.meta_path.insert(0, self)
        importlib.invalidate_caches()
        self.active = True
        try:
            yield
        finally:
            self.active = False
            sys.path.remove(str(self.folder))
            sys.meta_path.remove(self)
            self.siblings = self._take_out()
            sys.modules.update(others)

    def _take_out(self) -> dict:
        """The modules named like files of the folder, removed from sys.modules; installed ones and
        the standard library stay."""
        names = {path.stem for path in self.folder.iterdir()} - {*sys.stdlib_module_names, "musota"}
        found = [name for name in sys.modules if name.partition(".")[0] in names]
        files = {name: getattr(sys.modules[name], "__file__", None) or "" for name in found}
        return {name: sys.modules.pop(name) for name in found if "-packages" not in files[name]}


def load_object(source: str) -> object:
    """The object NAME of FILE.py. Raises MusotaError if there is none, or FILE.py raises."""
    return _Source(source).object


def load_module(source: str, vocab_size: int, max_seq_len: int):
    """The torch module that NAME returns when called, with `vocab_size` and `max_seq_len` if it
    takes them. Raises MusotaError as `load_object` does, and if NAME raises."""
    loaded = _Source(source)
    from torch import nn  # after the file is found: a wrong name is reported at once

    if isinstance(loaded.object, nn.Module) or not callable(loaded.object):
        kind = type(loaded.object).__name__
        raise MusotaError(f"{source} is {kind}: name the function or class that makes the model.")
    sizes = {"vocab_size": vocab_size, "max_seq_len": max_seq_len}
    with blaming(source), loaded.importable():
        takes = inspect.signature(loaded.object).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
            sizes = {name: size for name, size in sizes.items() if name in takes}
        module = loaded.object(**sizes)
    if not isinstance(module, nn.Module):
        raise MusotaError(f"{source} made {type(module).__name__}, not a torch.nn.Module.")
    return module
