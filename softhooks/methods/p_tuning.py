"""P-tuning: virtual tokens anywhere among the text, reparameterized by an LSTM or an MLP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from softhooks.backbone.word_embeddings import embed_ids
from softhooks.encoder import EMBEDDINGS, PromptEncoder, TableEncoder
from softhooks.errors import OptionError, PromptMismatchError
from softhooks.layout.layout import Layout
from softhooks.method import Method, choice
from softhooks.methods import initializers

if TYPE_CHECKING:
    from softhooks.backbone.stack import ModelStructure

_CLOSE = 1e-3
"""How near a slot must start to its word, as a part of the largest number in the words' rows."""


class ReparameterizedRows(PromptEncoder):
    """Rows of embeddings that a network makes of learned ones: `h = MLP(BiLSTM(Z))`, or `h = MLP(Z)`.

    Args:
        count: P.
        width: H.
        lstm: whether the rows see each other through an LSTM.
        hidden_size: of the LSTM, each way; without one, of the MLP.
        num_layers: of the LSTM.
    """

    groups = (EMBEDDINGS,)

    def __init__(self, count: int, width: int, lstm: bool, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(count, width))
        self.lstm = nn.LSTM(width, hidden_size, num_layers, bidirectional=True) if lstm else None
        self.down = nn.Linear(2 * hidden_size, width) if lstm else nn.Linear(width, hidden_size)
        self.up = nn.Linear(width if lstm else hidden_size, width)

    @property
    def unmoved(self) -> frozenset[str]:
        """Name the LSTM's recurrent weights where it makes one step, from a state of zeros."""
        if self.rows.shape[0] > 1:
            return frozenset()
        return frozenset(name for name, _ in self.named_parameters() if name.startswith("lstm.weight_hh"))

    def forward(self, group: str, variant: int = 0) -> Tensor:
        """Compute the rows in one pass over all of them, in the order of the layout, [P, H]."""
        result: Tensor = self.up(self._hidden())
        return result

    def _hidden(self) -> Tensor:
        rows: Tensor = self.rows
        if self.lstm is not None:
            with nullcontext() if self.training else _one_kernel():
                rows, _ = self.lstm(rows)
        return torch.relu(self.down(rows))

    @torch.no_grad()
    def start_at(self, words: dict[int, Tensor]) -> None:
        """Let some rows start as given ones: the smallest change of the last layer that does it and leaves the others.

        Raises:
            OptionError: there are more rows than the last layer can place at will.
        """
        if not words:
            return
        hidden = self._hidden()
        target = self.up(hidden)
        for row, value in words.items():
            target[row] = value.to(target)
        difference = (target - self.up(hidden)).double()
        self.up.weight += torch.linalg.lstsq(hidden.double(), difference, driver="gelsd").solution.T.to(self.up.weight)
        off = float((self.up(hidden) - target).abs().max() / target.abs().max())
        if off > _CLOSE:
            raise OptionError(
                "slots that start as words need a network wide enough to make every row at will.",
                "Use a larger hidden_size, fewer slots, or encoder='none'.",
                slots=self.rows.shape[0],
                hidden=hidden.shape[1],
                off_by=f"{off:.1e} of the largest number",
            )


@contextmanager
def _one_kernel() -> Iterator[None]:
    """Keep an LSTM to one kernel: torch's fast ones differ with and without gradients, and then folding is not exact.

    Training takes the fast ones, for what is folded is what evaluation computes.
    """
    onednn, cudnn = torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = onednn
        torch.backends.cudnn.enabled = cudnn


@dataclass(frozen=True)
class PTuning(Method):
    """P-tuning: `h = MLP(BiLSTM(Z))`, rows of embeddings that stand anywhere among the text.

    One pass of the LSTM goes over all virtual tokens in the order of the layout, ignores the text, and has no batch dimension;
    only h is kept after training. Tied slots are one virtual token, at the place where their name comes first.

    Start from a learning rate of 1e-3 with AdamW, and of 1e-2 without a network.

    Source: Liu et al. 2021, arXiv:2103.10385. Differs: the start as words, which the last layer is solved for; without a network
    the rows start as words of the vocabulary, as in prompt tuning.

    Args:
        num_virtual_tokens: P, in front of the text. With a layout, leave it out.
        layout: where the virtual tokens stand.
        encoder: `lstm`, `mlp` (Linear-ReLU-Linear), or `none`.
        shape: of the LSTM: `lama` has hidden size H/2 each way, `fewshot` H; then Linear-ReLU-Linear.
        hidden_size: another size of the LSTM each way, or of the MLP, whose own is H.
        num_layers: of the LSTM.
        tokenizer: the model's tokenizer or its name, for words in the layout.

    Shape:
        the encoder returns [P, H].

    Raises:
        OptionError: an option is wrong, or the layout has words and no tokenizer is given.
    """

    kind: ClassVar[str] = "p_tuning"

    num_virtual_tokens: int = 0
    layout: Layout | None = field(default=None, kw_only=True)
    encoder: Literal["lstm", "mlp", "none"] = field(default="lstm", kw_only=True)
    shape: Literal["lama", "fewshot"] = field(default="lama", kw_only=True)
    hidden_size: int | None = field(default=None, kw_only=True)
    num_layers: int = field(default=2, kw_only=True)
    tokenizer: Any = field(default=None, kw_only=True, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Check the options against each other."""
        layout = Layout.from_json(self.layout) if isinstance(self.layout, dict) else self.layout
        if layout is not None:
            if not isinstance(layout, Layout):
                raise OptionError(f"layout must be a Layout, such as Layout('{{soft:3}} {{text}}'); it is {layout!r}.")
            layout = layout.bound(self.tokenizer)
            if self.num_virtual_tokens not in (0, layout.num_virtual_tokens):
                raise OptionError(
                    f"the layout says how many virtual tokens there are: {layout.num_virtual_tokens}; num_virtual_tokens is "
                    f"{self.num_virtual_tokens!r}."
                )
            object.__setattr__(self, "layout", layout)
            object.__setattr__(self, "num_virtual_tokens", layout.num_virtual_tokens)
        elif self.num_virtual_tokens == 0:
            raise OptionError(
                "PTuning needs to know its virtual tokens; pass `num_virtual_tokens`, such as PTuning(20), or a `layout`."
            )
        super().__post_init__()
        choice("encoder", self.encoder, ("lstm", "mlp", "none"))
        choice("shape", self.shape, ("lama", "fewshot"))
        for name, size in (("hidden_size", self.hidden_size), ("num_layers", self.num_layers)):
            is_size = isinstance(size, int) and not isinstance(size, bool) and size >= 1
            if not is_size and not (name == "hidden_size" and size is None):
                raise OptionError(f"{name} must be a whole number of 1 or more; it is {size!r}.")

    @property
    def columns(self) -> tuple[str, ...]:  # type: ignore[override]
        """The batch column that a template needs."""
        return () if self.layout is None else self.layout.batch_columns

    @property
    def where(self) -> Layout:
        """Where the virtual tokens stand."""
        return super().where if self.layout is None else self.layout

    def build(self, structure: ModelStructure) -> PromptEncoder:
        """Make the network and its rows, initialized."""
        count, width = self.num_virtual_tokens, structure.entry.width
        self._check_ids(structure)
        starts = self.where.starts
        words = dict(zip(starts, embed_ids(structure, list(starts.values())), strict=True))
        if self.encoder == "none":
            ids = initializers.vocabulary_ids(structure, count).tolist()
            rows = embed_ids(structure, ids)
            for row, value in words.items():
                rows[row], ids[row] = value, starts[row]
            table = TableEncoder({EMBEDDINGS: rows})
            table.start_ids = ids
            return table
        lstm = self.encoder == "lstm"
        published = width // 2 if lstm and self.shape == "lama" else width
        built = ReparameterizedRows(count, width, lstm, self.hidden_size or published, self.num_layers)
        built.start_at(words)
        built.start_ids = [starts.get(row) for row in range(count)]
        return built

    def _check_ids(self, structure: ModelStructure) -> None:
        beyond = [token for token in self.where.ids if token >= structure.vocabulary]
        if beyond:
            raise PromptMismatchError(
                "the ids of a layout must be in the model's vocabulary.",
                "Give the layout the tokenizer that belongs to the model.",
                ids=beyond,
                vocabulary=f"0 to {structure.vocabulary - 1}",
            )
