"""Names that the example of PEFT expects: a PEFT model with two prompts, its bare base, a batch with padding."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))


def names() -> dict[str, Any]:
    """A tiny Llama twice, bare and prompted by PEFT, as "en" and "de"."""
    import peft
    import torch
    import zoo

    import softhooks

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft_model = peft.get_peft_model(zoo.build("llama"), config, adapter_name="en")
    peft_model.add_adapter("de", config)
    torch.manual_seed(0)
    with torch.no_grad():
        for encoder in peft_model.prompt_encoder.values():
            encoder.embedding.weight.normal_(std=0.5)
    ids = zoo.text(2, 7)
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = zoo.PAD, 0
    batch = {"input_ids": ids, "attention_mask": mask}
    return {"softhooks": softhooks, "peft_model": peft_model.eval(), "model": zoo.build("llama"), "batch": batch}
