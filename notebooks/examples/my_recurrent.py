"""A small recurrent language model, which is causal."""

from torch import nn


class Recurrent(nn.Module):
    def __init__(self, vocab_size, width=96):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.memory = nn.GRU(width, width, batch_first=True)
        self.output = nn.Linear(width, vocab_size)

    def forward(self, ids):
        return self.output(self.memory(self.embedding(ids))[0])
