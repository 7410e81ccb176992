import os
import sysconfig
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test reaches for it

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Within it, `elements` grows to those of the largest tensor any operation has made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            held = out.untyped_storage().nbytes() // out.element_size()
            self.elements = max(self.elements, held)
        return out


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Tests share a cache of their own and never reach for the hub or a local WikiText."""
    os.environ["MUSOTA_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ.pop("MUSOTA_DATA_DIR", None)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> Path:
    """Real English, on every machine: docstrings of the standard library's top-level modules."""
    from musota.data.sources import docstrings

    library = Path(sysconfig.get_paths()["stdlib"])
    documents = [text for path in sorted(library.glob("*.py")) for text in docstrings(path)]
    folder = tmp_path_factory.mktemp("texts") / "docs"
    folder.mkdir()
    cuts = {"train": (0, 0.8), "valid": (0.8, 0.9), "test": (0.9, 1)}
    for split, (low, high) in cuts.items():
        part = documents[int(low * len(documents)) : int(high * len(documents))]
        (folder / f"{split}.txt").write_text("\n\n".join(part) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def corpus(text_folder):
    """A small corpus at the size of the `tiny` profile."""
    from musota.data.corpus import load_corpus
    from musota.plan.profiles import profiles

    return load_corpus(str(text_folder), 512).limited(profiles["tiny"])
