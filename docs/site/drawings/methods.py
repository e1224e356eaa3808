"""What each method trains: orange is trained, gray is frozen, blue is text."""

from __future__ import annotations

from drawings.svg import CELL, GAP, Drawing

P = ("p₁", "p₂", "p₃")
STEP = CELL + GAP


def prompt_tuning() -> Drawing:
    """Trained embeddings before the text."""
    d = Drawing(500, 190, "Prompt tuning: trained embeddings before the embeddings of the text")
    end = d.cells(20, 140, P, "prompt")
    d.cells(end, 140, ("A", "fine", "film", "."), "text", width=46)
    d.box(20, 70, 330, "frozen model", height=36)
    d.box(230, 14, 120, "positive", "result")
    d.arrow((185, 138), (185, 109))
    d.arrow((290, 68), (290, 47))
    d.label(365, 160, "only P is trained", start=True)
    return d


def prefix_tuning() -> Drawing:
    """Trained keys and values in every layer."""
    d = Drawing(500, 210, "Prefix tuning: trained keys and values in every layer")
    for i, y in enumerate((120, 70, 20)):
        d.box(20, y, 110, f"K, V of layer {i + 1}", "prompt", height=34)
        d.box(180, y, 170, f"layer {i + 1}", height=34)
        d.arrow((133, y + 17), (177, y + 17))
        d.arrow((265, y + 48), (265, y + 37))
    d.cells(180, 170, ("A", "fine", "film", "."), "text", width=39.5)
    d.label(365, 42, "P keys and values", start=True)
    d.label(365, 62, "in each layer", start=True)
    return d


def p_tuning() -> Drawing:
    """Virtual tokens anywhere in a template, computed by a network."""
    d = Drawing(500, 200, "P-tuning: an LSTM and an MLP compute virtual tokens, which may be anywhere in the text")
    d.cells(20, 160, ("z₁", "z₂", "z₃"), "prompt")
    d.box(190, 155, 150, "LSTM, then MLP", "prompt", height=40)
    d.arrow((146, 175), (187, 175))
    end = d.cells(20, 90, ("A", "fine", "film", "It", "was"), "text", width=46)
    end = d.cells(end, 90, ("h₁", "h₂", "h₃"), "prompt")
    d.cells(end, 90, ("[MASK]",), "text", width=66)
    d.arrow((265, 153), (265, 138), (330, 138), (330, 123))
    d.box(20, 20, 442, "frozen model", height=36)
    d.arrow((241, 88), (241, 59))
    return d


def p_tuning_v2() -> Drawing:
    """A prefix in chosen layers, and a trained head."""
    d = Drawing(500, 260, "P-tuning v2: trained keys and values in chosen layers, and a trained head")
    for i, y in enumerate((170, 120, 70)):
        d.box(180, y, 170, f"layer {i + 1}", height=34)
        d.arrow((265, y + 48), (265, y + 37))
        if i:
            d.box(20, y, 110, "K, V", "prompt", height=34)
            d.arrow((133, y + 17), (177, y + 17))
    d.cells(180, 220, ("John", "lives", "here"), "text", width=54)
    d.box(180, 20, 170, "head", "prompt", height=34)
    d.arrow((265, 68), (265, 57))
    d.label(365, 42, "new head, trained", start=True)
    d.label(20, 192, "no prefix here", start=True)
    return d


def multitask_prompt_tuning() -> Drawing:
    """One shared prompt, times a low-rank matrix of each task."""
    d = Drawing(500, 190, "Multitask prompt tuning: one shared prompt, multiplied by a low-rank matrix for each task")
    d.box(20, 70, 120, "P* (shared)", "prompt", height=50)
    for y, task in ((20, "nli"), (130, "qa")):
        d.box(210, y, 110, f"u v for {task}", "prompt", height=40)
        d.box(390, y, 90, f"P of {task}", "result", height=40)
        d.arrow((143, 95), (175, 95), (175, y + 20), (207, y + 20))
        d.arrow((323, y + 20), (387, y + 20))
    d.label(355, 32, "∘")
    d.label(355, 142, "∘")
    d.label(340, 100, "each task multiplies P* element by element")
    return d


def context_aware_prompt_tuning() -> Drawing:
    """Embeddings of examples that move within bounds."""
    d = Drawing(
        500, 190, "Context-aware prompt tuning: embeddings of examples that may move a little; labels stay fixed"
    )
    end = d.cells(20, 130, ("Text:", "fine", "film"), "fixed", width=50)
    end = d.cells(end, 130, ("good",), "text", width=54)
    end = d.cells(end, 130, ("Text:", "great"), "text", width=54)
    d.cells(end + 2, 130, ("?",), "text")
    d.box(20, 60, 380, "frozen causal language model", height=36)
    d.arrow((210, 128), (210, 99))
    d.label(99, 182, "move at most ε")
    d.label(210, 182, "label: fixed")
    d.label(330, 182, "the row")
    d.arrow((380, 58), (380, 40))
    d.label(300, 30, "loss on row and context")
    return d


def residual_prompt_tuning() -> Drawing:
    """The prompt plus the output of a shared MLP."""
    d = Drawing(500, 140, "Residual prompt tuning: the prompt plus the output of an MLP that all virtual tokens share")
    d.cells(20, 55, P, "prompt")
    d.box(200, 95, 110, "MLP", "prompt", height=34)
    d.arrow((146, 70), (172, 70), (172, 112), (197, 112))
    d.arrow((146, 70), (372, 70))
    d.arrow((313, 112), (352, 112), (352, 75))
    d.label(362, 58, "+")
    d.cells(376, 55, ("p'₁", "p'₂", "p'₃"), "result", width=36)
    d.label(250, 35, "only P' is saved")
    return d


def context_tuning() -> Drawing:
    """Demonstrations become keys and values, which are trained."""
    d = Drawing(
        500, 170, "Context tuning: the keys and values of demonstrations are the prefix from which training starts"
    )
    d.box(20, 20, 140, "demonstrations", "text", height=40)
    d.box(200, 20, 110, "model, once", height=40)
    d.box(350, 20, 130, "K, V", "prompt", height=40)
    d.arrow((163, 40), (197, 40))
    d.arrow((313, 40), (347, 40))
    d.box(20, 110, 140, "row", "text", height=40)
    d.box(350, 110, 130, "frozen model", height=40)
    d.arrow((163, 130), (347, 130))
    d.arrow((415, 63), (415, 107))
    d.label(345, 90, "then trained", start=False)
    return d


def cartridge() -> Drawing:
    """A long document and a cartridge answer alike."""
    d = Drawing(
        500, 220, "Cartridge: the model with the cartridge learns to predict what the model with the document predicts"
    )
    d.box(20, 20, 250, "a long document", "text", height=40)
    d.box(20, 140, 90, "cartridge", "prompt", height=40)
    d.box(300, 20, 90, "frozen\nmodel", height=40)
    d.box(300, 140, 90, "frozen\nmodel", height=40)
    d.box(140, 80, 130, "question, answer", "text", height=40)
    d.arrow((273, 40), (297, 40))
    d.arrow((113, 160), (297, 160))
    d.arrow((273, 93), (320, 93), (320, 63))
    d.arrow((273, 107), (320, 107), (320, 137))
    d.arrow((393, 40), (440, 40), (440, 82))
    d.arrow((393, 160), (440, 160), (440, 118))
    d.label(440, 105, "KL")
    d.label(20, 202, "trained keys and values", start=True)
    return d


def llama_adapter() -> Drawing:
    """A gated branch beside attention."""
    d = Drawing(500, 200, "LLaMA-Adapter: each layer adds a gated second attention over trained vectors")
    d.box(20, 90, 180, "attention over the text", height=36)
    d.box(250, 90, 160, "attention over P", height=36)
    d.cells(268, 155, P, "prompt")
    d.cells(60, 155, ("text",), "text", width=100)
    d.arrow((110, 153), (110, 129))
    d.arrow((330, 153), (330, 129))
    d.box(290, 25, 80, "tanh g", "prompt", height=36)
    d.arrow((330, 88), (330, 64))
    d.arrow((287, 43), (160, 43))
    d.arrow((110, 88), (110, 60))
    d.label(128, 48, "sum")
    d.label(385, 47, "starts at 0", start=True)
    return d


def spot() -> Drawing:
    """A prompt of a source task starts the training on a target task."""
    d = Drawing(500, 120, "SPoT: a prompt that was trained on a source task initializes the prompt of a target task")
    d.cells(20, 45, P, "prompt")
    d.cells(356, 45, P, "prompt")
    d.arrow((148, 60), (352, 60))
    d.label(250, 50, "initializes")
    d.label(82, 100, "source task")
    d.label(418, 100, "target task")
    return d


def prompt_ensemble() -> Drawing:
    """One text with several prompts, in one forward."""
    d = Drawing(500, 190, "Prompt ensemble: each prompt predicts, and the predictions are combined")
    for y, name in ((20, "a"), (80, "b"), (140, "c")):
        d.box(20, y, 80, f"prompt {name}", "prompt", height=36)
        d.box(104, y, 60, "text", "text", height=36)
        d.arrow((167, y + 18), (207, y + 18))
        d.arrow((323, y + 18), (350, y + 18), (350, 98), (377, 98))
    d.box(210, 20, 110, "frozen model,\none forward", height=156)
    d.box(380, 80, 100, "vote", "result", height=36)
    return d


ALL = {
    "prompt-tuning": prompt_tuning,
    "prefix-tuning": prefix_tuning,
    "p-tuning": p_tuning,
    "p-tuning-v2": p_tuning_v2,
    "multitask-prompt-tuning": multitask_prompt_tuning,
    "context-aware-prompt-tuning": context_aware_prompt_tuning,
    "llama-adapter": llama_adapter,
    "residual-prompt-tuning": residual_prompt_tuning,
    "context-tuning": context_tuning,
    "cartridges": cartridge,
    "spot": spot,
    "prompt-ensembles": prompt_ensemble,
}
