"""A saved prompt as plain data: the kind of its method, options and tensors, and what is known of its base model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.stack import ModelStructure
from softhooks.base_model.info import BaseModelInfo
from softhooks.base_model.same_base import OVERRIDE, require_base
from softhooks.errors import CheckpointError
from softhooks.formats.labels import Labels

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class StoredPrompt:
    """A prompt as a file holds it. `softhooks.methods.stored_options` finds its method and checks the options.

    Attributes:
        kind: the kind of its method, such as `prompt_tuning`.
        options: the method's options, as JSON holds them; not checked here.
        tables: the folded prompt by group, [P, numbers].
        heads: state dicts of its heads, by path.
        conventions: placement, shifted positions, ...: how a forward treats the prompt; not checked here.
        source: the file, or another name for errors.
        stacks: what is known of the base's stacks, as `outline` describes those of a model.
        base: what is known of the base model.
        also_trained: names of base parameters that were trained with the prompt and are not in the file.
        adapter_layers: the layers of a LLaMA-Adapter that PEFT wrote.
        labels: the names of its heads' labels, where they are known.
        added: the prompt's own rows of the vocabulary, by name.
        added_ids: the ids of these rows.
    """

    kind: str
    options: dict[str, Any]
    tables: dict[str, Tensor]
    heads: dict[str, dict[str, Tensor]]
    conventions: dict[str, Any]
    source: str
    stacks: dict[str, dict[str, Any]]
    base: BaseModelInfo = field(default_factory=BaseModelInfo)
    also_trained: list[str] = field(default_factory=list)
    adapter_layers: tuple[int, ...] = ()
    labels: Labels | None = None
    added: dict[str, Tensor] = field(default_factory=dict)
    added_ids: tuple[int, ...] = ()

    def require_finite(self) -> None:
        """Check the tensors of a file.

        Raises:
            CheckpointError: a tensor has infinite numbers or NaN, or is not floating-point.
        """
        heads = {f"{path}:{name}": tensor for path, head in self.heads.items() for name, tensor in head.items()}
        for name, tensor in {**self.tables, **self.added, **heads}.items():
            is_float = tensor.dtype in _FLOATS
            if not is_float or not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(
                    f"the tensor {name!r} holds {'infinite numbers or NaN' if is_float else tensor.dtype}, not finite floats.",
                    "Use a checkpoint from before the training diverged.",
                    file=self.source,
                )

    def require_base(self, model: nn.Module, structure: ModelStructure, override: str = OVERRIDE) -> None:
        """Check that a model is the base model that the prompt was trained with, as far as that is known.

        Args:
            override: what else the user can do, for the error.

        Raises:
            PromptMismatchError: it is another one.
        """
        has_adapters = any("lora_" in name for name in self.also_trained)
        require_base(self.base, model, structure, self.source, has_adapters=has_adapters, override=override)
