"""A byte-level BPE tokenizer, trained on the train split alone."""

import json
import os
import sys
from array import array
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from musota.errors import MusotaError

UNKNOWN, LINE_END = "<unk>", "<|endoftext|>"
SMALLEST_VOCABULARY = 256 + 2  # every byte, and the two special tokens
LONGEST_WORD = 256  # bytes; what is longer (no spaces, no punctuation) is cut: BPE stays linear


class TextTokenizer:
    """Byte-level BPE over lines; `decode(encode(text)) == text`. A line end is one token, and so is
    `<unk>`."""

    def __init__(self, backend: Tokenizer):
        self.backend = backend
        # Only line ends become special tokens: the same characters in a text are ordinary text.
        backend.encode_special_tokens = True
        self.line_end = backend.token_to_id(LINE_END)
        self.unknown = backend.token_to_id(UNKNOWN)

    @classmethod
    def train(cls, text: str, vocab_size: int) -> "TextTokenizer":
        """A tokenizer trained on a text, for a vocabulary of at least SMALLEST_VOCABULARY."""
        backend = Tokenizer(models.BPE())
        steps = [pre_tokenizers.ByteLevel(False), pre_tokenizers.FixedLength(LONGEST_WORD)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
        backend.decoder = decoders.ByteLevel()
        # A text has at most as many tokens as bytes; memory would be reserved for more.
        most = SMALLEST_VOCABULARY + len(text.encode(errors="replace"))
        trainer = trainers.BpeTrainer(
            vocab_size=min(vocab_size, most),
            special_tokens=[UNKNOWN, LINE_END],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        lines = progress(text.split("\n"), "learning a tokenizer from train")
        backend.train_from_iterator(lines, trainer)
        # The trainer makes both tokens special; `<unk>` must be found in texts, LINE_END not.
        described = json.loads(backend.to_str())
        for token in described["added_tokens"]:
            token["special"] = token["content"] == LINE_END
        return cls(Tokenizer.from_str(json.dumps(described)))

    @property
    def size(self) -> int:
        """The number of tokens; on little text it is less than `vocab_size`."""
        return self.backend.get_vocab_size()

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, int32. Raises MusotaError for text that UTF-8 cannot encode."""
        lines, ids = text.split("\n"), array("i")
        try:
            for start in progress(range(0, len(lines), 10_000), "tokenizing"):
                for line in self.backend.encode_batch_fast(lines[start : start + 10_000]):
                    ids.extend([*line.ids, self.line_end])
        except TypeError:
            repair = 'text.encode(errors="replace").decode()'
            raise MusotaError(f"The text has a lone surrogate: repair it with {repair}.") from None
        return np.array(ids, dtype=np.int32)[:-1]

    def decode(self, ids) -> str:
        """The text of token ids (any 1-D sequence of whole numbers)."""
        given = np.asarray(ids.cpu() if hasattr(ids, "cpu") else ids)
        whole = given.ndim == 1 and (given.dtype.kind in "iu" or not given.size)
        if not whole or (given.size and not 0 <= given.min() <= given.max() < 2**31):
            raise MusotaError(f"decode needs the token ids of one text, not {ids!r:.80}.")
        ids = given.astype(np.int64)
        lines = np.split(ids, np.flatnonzero(ids == self.line_end))
        pieces = [lines[0].tolist(), *(line[1:].tolist() for line in lines[1:])]
        return "\n".join(self.backend.decode_batch(pieces, skip_special_tokens=False))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "TextTokenizer":
        """The tokenizer that `save` wrote."""
        return cls(Tokenizer.from_file(str(path)))

    def save(self, path: str | os.PathLike) -> None:
        Path(path).write_bytes(self.backend.to_str(pretty=True).encode())


def progress(steps, what: str) -> tqdm:
    """Steps with a bar after two seconds, on stdout: notebooks show stderr in red."""
    return tqdm(steps, what, delay=2, mininterval=1, file=sys.stdout)
