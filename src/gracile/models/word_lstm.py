"""A language model on words: embedding, LSTM layers, a linear layer over the vocabulary.

Zaremba et al. 2014, arXiv:1409.2329; with one table for embedding and output after Press and Wolf
2016, arXiv:1608.05859. Parameter names are those of Distiller's word language model. Batches come
first here, (batch, steps); there, steps do.
"""

from torch import Tensor, nn

from gracile import registry

INIT = 0.1  # embedding and output weights are drawn from U(-0.1, 0.1)


class WordLSTM(nn.Module):
    """Next-word logits for every word of a text; see `word_lstm` for the arguments.

    Raises:
        ValueError: tied with an embedding that is not as wide as the hidden state.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        embedding: int,
        hidden: int,
        layers: int,
        dropout: float,
        tied: bool,
    ):
        super().__init__()
        if tied and embedding != hidden:
            raise ValueError(
                f"tied needs embedding = hidden, got {embedding} and {hidden}; or write tied=false."
            )
        self.encoder = nn.Embedding(num_classes, embedding)
        self.drop_in = nn.Dropout(dropout)
        between = dropout if layers > 1 else 0.0  # torch warns where there is no second layer
        self.rnn = nn.LSTM(embedding, hidden, layers, dropout=between, batch_first=True)
        self.drop_out = nn.Dropout(dropout)
        self.decoder = nn.Linear(hidden, num_classes)
        nn.init.uniform_(self.encoder.weight, -INIT, INIT)
        nn.init.zeros_(self.decoder.bias)
        if tied:
            self.decoder.weight = self.encoder.weight
        else:
            nn.init.uniform_(self.decoder.weight, -INIT, INIT)

    def forward(self, tokens: Tensor) -> Tensor:
        """Word numbers (batch, steps), int64 -> logits (batch, steps, num_classes).

        The logits at a step are of the word that follows it. The state starts at zero in each call.
        """
        out, _ = self.rnn(self.drop_in(self.encoder(tokens)))
        logits: Tensor = self.decoder(self.drop_out(out))
        return logits


@registry.register(
    "model",
    "word_lstm",
    source="Zaremba et al. 2014, arXiv:1409.2329; Press and Wolf 2016, arXiv:1608.05859; "
    "parameter names as in Distiller's word language model",
)
def word_lstm(
    *,
    num_classes: int = 33278,
    embedding: int = 1500,
    hidden: int = 1500,
    layers: int = 2,
    dropout: float = 0.65,
    tied: bool = True,
) -> WordLSTM:
    """Word language model, two LSTM layers: 86.0 M parameters with WikiText-2's 33,278 words.

    The defaults are Distiller's "large". "medium" is 650 wide with dropout 0.5, "small" 200 with
    0.2: `word_lstm?embedding=200&hidden=200&dropout=0.2`.

    Args:
        num_classes: words of the vocabulary, among which the next one is.
        embedding: width of the embedding.
        hidden: units of each LSTM layer.
        layers: LSTM layers.
        dropout: probability behind the embedding, between layers and before the output.
        tied: the output's weight is the embedding's; `encoder.weight` is then the only name in
            `named_parameters()`.
    """
    return WordLSTM(
        num_classes=num_classes,
        embedding=embedding,
        hidden=hidden,
        layers=layers,
        dropout=dropout,
        tied=tied,
    )
