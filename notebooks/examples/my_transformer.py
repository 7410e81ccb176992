"""A small transformer without a causal mask: each position can attend to later ones."""

import torch
from torch import nn


class Transformer(nn.Module):
    def __init__(self, vocab_size, max_seq_len, width=64):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(max_seq_len, width)
        layer = nn.TransformerEncoderLayer(width, 4, norm_first=True, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.output = nn.Linear(width, vocab_size)

    def forward(self, ids):
        x = self.embedding(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.output(self.layers(x))
