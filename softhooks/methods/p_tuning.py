"""P-tuning: virtual tokens anywhere in the text, computed by an LSTM or an MLP."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from softhooks.backbone.stack import ModelStructure
from softhooks.backbone.word_embeddings import embed_ids
from softhooks.errors import MAX_WIDTH, OptionError, PromptMismatchError, check_choice, check_int
from softhooks.layout.layout import Layout
from softhooks.layout.template import COLUMN
from softhooks.method import Method
from softhooks.methods import initializers
from softhooks.prompt_encoder import EMBEDDINGS, PromptEncoder, TableEncoder

EncoderKind = Literal["lstm", "mlp", "none"]
Shape = Literal["lama", "fewshot"]
_TOLERANCE = 1e-3
"""The largest allowed error of an initial embedding, relative to the largest number in the words' embeddings."""


class _LSTM(nn.LSTM):
    """A bidirectional LSTM whose results in evaluation mode are the same with and without gradients.

    A folded prompt would otherwise not be exact, because torch chooses between its own kernel and those of oneDNN or cuDNN.
    """

    def forward(self, rows: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Run the LSTM, [P, H] -> [P, 2 * hidden size]; the second output is not used."""
        if self.training:
            return super().forward(rows)[0], None
        for layer in range(self.num_layers):
            rows = torch.cat([self._run(rows, f"_l{layer}"), self._run(rows.flip(0), f"_l{layer}_reverse").flip(0)], -1)
        return rows, None

    def _run(self, rows: Tensor, suffix: str) -> Tensor:
        """Run one direction of one layer step by step, [P, H] -> [P, hidden size]."""
        weights = [getattr(self, name + suffix) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        hidden = cell = rows.new_zeros(1, self.hidden_size)
        steps = []
        for row in rows.split(1):
            hidden, cell = torch.lstm_cell(row, (hidden, cell), *weights)
            steps.append(hidden)
        return torch.cat(steps)


class ReparameterizedEncoder(PromptEncoder):
    """Computes the prompt from learned vectors Z [P, H]: `h = MLP(BiLSTM(Z))`, or `h = MLP(Z)`. See `PTuning`."""

    groups = (EMBEDDINGS,)

    def __init__(self, count: int, width: int, lstm: bool, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(count, width))
        self.lstm = _LSTM(width, hidden_size, num_layers, bidirectional=True) if lstm else None
        self.down = nn.Linear(2 * hidden_size, width) if lstm else nn.Linear(width, hidden_size)
        self.up = nn.Linear(width if lstm else hidden_size, width)

    @property
    def zero_gradient_parameters(self) -> frozenset[str]:
        """The LSTM's recurrent weights if P is 1; they get no gradient, because the only step starts from a zero state."""
        if self.rows.shape[0] > 1:
            return frozenset()
        return frozenset(name for name, _ in self.named_parameters() if name.startswith("lstm.weight_hh"))

    def forward(self, group: str, variant: int = 0) -> Tensor:
        """Compute the prompt, [P, H]."""
        result: Tensor = self.up(self._hidden())
        return result

    def _hidden(self) -> Tensor:
        rows: Tensor = self.rows
        if self.lstm is not None:
            rows, _ = self.lstm(rows)
        return torch.relu(self.down(rows))

    @torch.no_grad()
    def initialize_rows(self, words: dict[int, Tensor]) -> None:
        """Set the embeddings of some virtual tokens and keep the others, with the smallest possible change to the last layer."""
        if not words:
            return
        hidden = self._hidden()
        target = self.up(hidden)
        for row, value in words.items():
            target[row] = value.to(target)
        difference = (target - self.up(hidden)).double()
        # least squares: of all changes that lead to `target`, the one with the smallest norm
        self.up.weight += torch.linalg.lstsq(hidden.double(), difference, driver="gelsd").solution.T.to(self.up.weight)
        off = float((self.up(hidden) - target).abs().max() / target.abs().max())
        if off > _TOLERANCE:
            raise OptionError(
                "the prompt encoder is too small to output the embeddings of the initial words.",
                "Use a larger hidden_size, fewer virtual tokens, or encoder='none'.",
                virtual_tokens=self.rows.shape[0],
                hidden_size=hidden.shape[1],
                largest_error=f"{off:.1e} of the largest number in the embeddings",
            )


@dataclass(frozen=True)
class PTuning(Method):
    """P-tuning: `h = MLP(BiLSTM(Z))`, where Z [P, H] and the networks are trained; the rows of h can be anywhere in the text.

    The LSTM reads the virtual tokens in the order of the layout, without the text. Only h is saved. Slots of the layout
    (places for virtual tokens) with the same name share their virtual tokens.

    Start with AdamW and a learning rate of 1e-2, or 3e-2 with `encoder="none"`.

    Source: Liu et al. 2021, arXiv:2103.10385. Differences: virtual tokens can be initialized from words, by solving for the
    last layer's weights; with `encoder="none"` the embeddings are initialized from the vocabulary, as in prompt tuning.

    Args:
        num_virtual_tokens: P, if there is no layout; all virtual tokens then come before the text.
        layout: where the virtual tokens are placed.
        encoder: `lstm` (a bidirectional LSTM, then Linear-ReLU-Linear), `mlp` (Linear-ReLU-Linear), or `none` (train h).
        shape: the LSTM's width in each direction: H/2 with `lama`, H with `fewshot`.
        hidden_size: the LSTM's width in each direction, which overrides `shape`; with `mlp`, the MLP's width, by default H.
        num_layers: the number of layers of the LSTM.
        tokenizer: the model's tokenizer or its name; required for words in the layout.

    Raises:
        OptionError: an option is wrong, or the layout has words and no tokenizer is given.
    """

    kind: ClassVar[str] = "p_tuning"
    optional_columns: ClassVar[dict[str, str]] = {COLUMN: "with a template as its layout"}

    num_virtual_tokens: int = 0
    layout: Layout | None = field(default=None, kw_only=True)
    encoder: EncoderKind = field(default="lstm", kw_only=True)
    shape: Shape = field(default="lama", kw_only=True)
    hidden_size: int | None = field(default=None, kw_only=True)
    num_layers: int = field(default=2, kw_only=True)
    tokenizer: Any = field(default=None, kw_only=True, compare=False, repr=False)

    def __post_init__(self) -> None:
        layout = Layout.from_json(self.layout) if isinstance(self.layout, dict) else self.layout
        if layout is not None:
            if not isinstance(layout, Layout):
                raise OptionError(f"layout must be a Layout, such as Layout('{{soft:3}} {{text}}'); it is {layout!r}.")
            layout = layout.bound(self.tokenizer)
            if self.num_virtual_tokens not in (0, layout.num_virtual_tokens):
                raise OptionError(
                    f"num_virtual_tokens is {self.num_virtual_tokens!r}, but the layout has {layout.num_virtual_tokens} virtual "
                    "tokens; leave num_virtual_tokens out."
                )
            object.__setattr__(self, "layout", layout)
            object.__setattr__(self, "num_virtual_tokens", layout.num_virtual_tokens)
        elif self.num_virtual_tokens == 0:
            raise OptionError("PTuning has no virtual tokens; pass their number, such as PTuning(20), or a `layout`.")
        super().__post_init__()
        check_choice("encoder", self.encoder, get_args(EncoderKind))
        check_choice("shape", self.shape, get_args(Shape))
        check_int("num_layers", self.num_layers)
        if self.hidden_size is not None:
            check_int("hidden_size", self.hidden_size, maximum=MAX_WIDTH)

    @property
    def batch_columns(self) -> tuple[str, ...]:
        """The batch column that the layout needs if it is a template."""
        return () if self.layout is None else self.layout.batch_columns

    @property
    def token_layout(self) -> Layout:
        """Where the virtual tokens are placed in the text."""
        return super().token_layout if self.layout is None else self.layout

    def build(self, structure: ModelStructure) -> PromptEncoder:
        """Make the encoder: an initialized network, or initial embeddings with `encoder="none"`."""
        count, width = self.num_virtual_tokens, structure.entry.width
        beyond = [token for token in self.token_layout.form.ids if token >= structure.vocabulary]
        if beyond:
            raise PromptMismatchError(
                f"the layout has ids that are not in the model's vocabulary: {beyond}.",
                "Give the layout the model's own tokenizer.",
                ids=beyond,
                vocabulary=f"0 to {structure.vocabulary - 1}",
            )
        starts = self.token_layout.form.starts
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
        default = width // 2 if lstm and self.shape == "lama" else width
        built = ReparameterizedEncoder(count, width, lstm, self.hidden_size or default, self.num_layers)
        built.initialize_rows(words)
        built.start_ids = [starts.get(row) for row in range(count)]
        return built
