"""Networks with recurrent layers, in a module of their own, so that files can name their classes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Tagger(nn.Module):
    """An embedding, an LSTM over it, a linear layer for each position."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5)
        self.rnn = nn.LSTM(5, 6, batch_first=True, **options)
        self.head = nn.Linear(6 * (1 + self.rnn.bidirectional), 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(words))[0])


class Crnn(nn.Module):
    """Convolutions with BatchNorms, one more in front of a bidirectional LSTM, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d((2, 1)),
            nn.Conv2d(4, 5, 3, padding=1),
            nn.BatchNorm2d(5),
            nn.ReLU(),
        )
        self.bn = nn.BatchNorm1d(5 * 4)
        self.rnn = nn.LSTM(5 * 4, 6, bidirectional=True, batch_first=True)
        self.head = nn.Linear(12, 3)
        for module in self.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.running_mean.normal_()  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)

    def forward(self, image: Tensor) -> Tensor:
        columns = self.bn(self.features(image).flatten(1, 2))
        return self.head(self.rnn(columns.transpose(1, 2))[0])
