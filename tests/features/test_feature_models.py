"""Prefixes and gated branches on models that take images, videos or sound: right against formulas, exact, and undone."""

from __future__ import annotations

from typing import Any

import adapters
import features
import oracles
import pytest
import torch
import transformers as tf
import zoo
from torch import Tensor, nn
from untouched import untouched

import softhooks
from softhooks import LlamaAdapter, PrefixTuning, PTuningV2, SoftPrompt

P, LAYERS, HEADS = 3, 2, 4
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
METHODS = [PrefixTuning(P), PTuningV2(P), LlamaAdapter(P), LlamaAdapter(P, scale_and_bias=True)]
CHECKPOINTED = [name for name in features.MODELS if name not in ("videomae",)]


def answer(model: Any, call: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(**call).logits
    return logits


@torch.no_grad()
def louder(prompt: SoftPrompt) -> SoftPrompt:
    """Make the prompt's effect as large as that of the features."""
    for parameter in prompt.encoder.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return prompt


# --- right ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", features.MODELS)
def test_a_prefix_equals_keys_and_values_added_by_hand(name: str) -> None:
    """Also its gradients; every layer of the bare model gets the rows of the table by hand."""
    model, call = features.build(name), features.batch(name)
    prompt = louder(softhooks.attach(model, PrefixTuning(P)))
    table = next(iter(prompt.encoder.parameters()))
    found = answer(model, call)
    found.square().sum().backward()
    gradient = table.grad
    assert gradient is not None
    own = table.detach().clone().requires_grad_()
    parts = own.reshape(P, LAYERS, 2, HEADS, 8)
    pairs = [[parts[:, layer, part].transpose(0, 1)[None] for part in (0, 1)] for layer in range(LAYERS)]
    with softhooks.disabled(model), oracles.patched_attention([(keys, values) for keys, values in pairs]):
        expected = answer(model, call)
    expected.square().sum().backward()
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(gradient, own.grad, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
    with softhooks.disabled(model):
        assert (answer(model, call) - found).abs().max() > 1e-3


def attentions(model: Any) -> list[nn.Module]:
    names = [("k_proj", "v_proj"), ("key", "value")]
    return [
        part for part in model.modules() if any(hasattr(part, key) and hasattr(part, value) for key, value in names)
    ]


@pytest.mark.parametrize("name", features.MODELS)
def test_a_gated_branch_equals_the_formula(name: str) -> None:
    """The projections of the virtual tokens are called by name; SigLIP's text tower has attention too, and is left out."""
    model, call = features.build(name), features.batch(name)
    prompt = louder(softhooks.attach(model, LlamaAdapter(P)))
    found = answer(model, call)
    tables = dict(prompt.encoder.named_parameters())
    rows, gates = tables["text_prompts"].view(LAYERS, P, -1), tables["text_gates"].view(LAYERS, HEADS).tanh()
    branches: list[Any] = []
    for module, own, gate in zip(attentions(prompt.structure.entry.module), rows, gates, strict=True):
        keys, values = adapters.project(module, own)
        branches.append((keys[None], values[None], gate))
    with softhooks.disabled(model), adapters.patched(branches):
        expected = answer(model, call)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("name", ["vit", "dinov2", "wav2vec2"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_eager_attention_computes_the_same(name: str, method: softhooks.Method) -> None:
    answers = []
    for attention in ("sdpa", "eager"):
        model = features.build(name)
        model.set_attn_implementation(attention)
        torch.manual_seed(3)
        louder(softhooks.attach(model, method))
        answers.append(answer(model, features.batch(name)))
    torch.testing.assert_close(*answers, **CLOSE)


def test_padded_sound_equals_sound_alone() -> None:
    """The mask of the samples becomes one of the frames, to which the prefix is added."""
    model = features.build("wav2vec2")
    louder(softhooks.attach(model, PrefixTuning(P)))
    sound = features.batch("wav2vec2", 1)["input_values"][:, :300]
    wide = torch.nn.functional.pad(sound, (0, 100))
    mask = torch.nn.functional.pad(torch.ones_like(sound, dtype=torch.long), (0, 100))
    alone = answer(model, {"input_values": sound})
    padded = answer(model, {"input_values": wide, "attention_mask": mask})
    torch.testing.assert_close(padded[:, : alone.shape[1] - 1], alone[:, :-1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_each_row_can_have_its_own_prompt(method: softhooks.Method) -> None:
    model, call = features.build("vit"), features.batch("vit", 3)
    for name in ("a", "b"):
        prompt = softhooks.attach(model, method, name)
        with torch.no_grad():
            for parameter in prompt.encoder.parameters():
                parameter.copy_(torch.randn_like(parameter))
    with softhooks.rows(model, ["a", "b", None]):
        together = answer(model, call)
    for row, name in enumerate(("a", "b", None)):
        own = {key: value[row : row + 1] for key, value in call.items()}
        with softhooks.rows(model, [name]):
            torch.testing.assert_close(together[row : row + 1], answer(model, own), **CLOSE)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["vit", "deit", "ast", "wav2vec2", "whisper"])
@pytest.mark.parametrize("method", METHODS[:3], ids=str)
def test_checkpointed_layers_give_the_same_gradients(name: str, method: softhooks.Method, reentrant: bool) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = features.build(name)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)
        prompt = louder(softhooks.attach(model, method, train_head=False))
        model.train()
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        prompt.encoder.eval()
        torch.manual_seed(4)
        answer(model, features.batch(name)).square().sum().backward()
        gradients.append([parameter.grad for parameter in prompt.encoder.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other)


# --- exact and undone -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", features.MODELS)
def test_a_closed_gate_changes_no_bit(name: str) -> None:
    """Without gradients: torch chooses another kernel for BEiT's trainable position biases."""
    model, call = features.build(name), features.batch(name)
    before = answer(model, call)
    with softhooks.attach(model, LlamaAdapter(P)):
        assert torch.equal(answer(model, call), before)


@pytest.mark.parametrize("name", features.MODELS)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_nothing_of_the_model_changes(name: str, method: softhooks.Method) -> None:
    """Training steps change only the prompt and its copy of the head; afterwards the model is as before, bit for bit."""
    model, call = features.build(name), features.batch(name)
    before = answer(model, call)
    with untouched(model), softhooks.attach(model, method) as prompt:
        optimizer = torch.optim.SGD(prompt.parameters(), lr=0.1)
        for _ in range(2):
            answer(model, call).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        prompt.verify_frozen()
        assert not torch.equal(answer(model, call), before)
    assert torch.equal(answer(model, call), before)


def test_layers_may_be_dropped_at_random() -> None:
    """Also all of those that the prompt enters."""
    model = features.build("wav2vec2")
    model.config.layerdrop = 0.7
    softhooks.attach(model, LlamaAdapter(P, num_layers=1))
    model.train()
    for _ in range(20):
        answer(model, features.batch("wav2vec2")).sum().backward()


# --- refused ----------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Any, str]] = {
    "windows": (
        lambda: tf.SwinForImageClassification(
            tf.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
        ),
        "windows of an image",
    ),
    "convolutions": (
        lambda: tf.ConvNextForImageClassification(tf.ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4)),
        "calls no attention function",
    ),
    "reduced keys": (
        lambda: tf.SegformerForSemanticSegmentation(
            tf.SegformerConfig(
                hidden_sizes=[16, 16, 32, 32], num_attention_heads=[1, 1, 2, 2], depths=[1] * 4, decoder_hidden_size=16
            )
        ),
        "others; in models without token ids",
    ),
    "own attention": (lambda: tf.WavLMForCTC(tf.WavLMConfig(**features.SOUND)), "calls no attention function"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_no_prompt_can_enter_are_refused(kind: str) -> None:
    build, found = REFUSED[kind]
    model = build().eval()
    with pytest.raises(softhooks.UnsupportedModelError, match=found):
        softhooks.attach(model, PrefixTuning(P))  # transformers registers hooks of its own in the first forward
    with untouched(model), pytest.raises(softhooks.UnsupportedModelError, match=found):
        softhooks.attach(model, LlamaAdapter(P))


@pytest.mark.parametrize(
    ("method", "found"),
    [
        (softhooks.PromptTuning(P), "instead of token ids.*such as PrefixTuning or LlamaAdapter"),
        (softhooks.PTuning(P), "instead of token ids"),
        (PrefixTuning(P, init_ids=[1, 2]), "init_ids is given"),
        (PrefixTuning(P, scaled=True), "scaled is given"),
        (softhooks.ContextTuning(demonstrations=[[1, 2, 3]]), "cannot start from a text"),
    ],
    ids=str,
)
def test_methods_that_need_words_are_refused(method: softhooks.Method, found: str) -> None:
    model = features.build("vit")
    with untouched(model), pytest.raises(softhooks.SoftHooksError, match=f"(?s){found}"):
        softhooks.attach(model, method)


@pytest.mark.parametrize(
    ("example", "found"),
    [
        (3, "has the type int"),
        ({}, "no arguments; ViTFor.*`pixel_values`"),
        ({"labels": torch.zeros(2)}, "has labels;"),
    ],
)
def test_an_example_without_features_is_refused(example: Any, found: str) -> None:
    model = features.build("vit")
    with untouched(model), pytest.raises(softhooks.OptionError, match=found):
        softhooks.attach(model, PrefixTuning(P), example=example)


def test_patches_that_a_linear_layer_embeds_are_no_tokens() -> None:
    """SigLIP 2 takes patches, their mask and the shapes of the images."""
    config = tf.Siglip2Config(
        vision_config={**features.SIZE, "num_patches": 16, "patch_size": 4},
        text_config={**features.SIZE, "vocab_size": 64}, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.Siglip2ForImageClassification(config).eval()
    call = {
        "pixel_values": torch.randn(2, 16, 48),
        "pixel_attention_mask": torch.tensor([[1] * 16, [1] * 12 + [0] * 4]),
        "spatial_shapes": torch.tensor([[4, 4], [3, 4]]),
    }
    before = answer(model, call)
    with softhooks.attach(model, PrefixTuning(P), example=call) as prompt:
        louder(prompt)
        assert not torch.equal(answer(model, call), before)


# --- an unknown class -------------------------------------------------------------------------------------------------


class Frames(tf.PreTrainedModel):
    """Frames of numbers through an encoder that softhooks does not know; it sees each frame and its neighbours' mean."""

    config_class = tf.BertConfig
    main_input_name = "frames"

    def __init__(self, config: tf.BertConfig) -> None:
        super().__init__(config)
        self.project = nn.Linear(5, config.hidden_size)
        self.layers = tf.models.vit.modeling_vit.ViTModel(tf.ViTConfig(**features.SIZE, **features.IMAGE)).layers
        self.classifier = nn.Linear(config.hidden_size, 2)

    def forward(self, frames: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        states = self.project(frames)
        for layer in self.layers:
            states = layer(states)
        return {"logits": self.classifier(states.mean(1))}


def test_an_unknown_class_works_with_an_example() -> None:
    torch.manual_seed(0)
    model = Frames(tf.BertConfig(hidden_size=32, num_attention_heads=4)).eval()
    frames = torch.randn(2, 9, 5)
    with pytest.raises(softhooks.UnsupportedModelError, match="example=batch"):
        softhooks.attach(model, PrefixTuning(P))
    for method in METHODS:
        before = model(frames=frames)["logits"]
        with softhooks.attach(model, method, example={"frames": frames}) as prompt:
            louder(prompt)
            assert not torch.equal(model(frames=frames)["logits"], before)
            assert torch.equal(model(frames)["logits"], model(frames=frames)["logits"])
        assert torch.equal(model(frames=frames)["logits"], before)


class Picky(Frames):
    """Each frame sees only frames whose first number is above the mean."""

    def forward(self, frames: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        states = self.project(frames)
        seen = (states[..., 0] > states[..., 0].mean(1, keepdim=True))[:, None, None].expand(
            -1, -1, states.shape[1], -1
        )
        for layer in self.layers:
            states = layer(states, seen)
        return {"logits": self.classifier(states.mean(1))}


def test_masks_that_depend_on_the_features_are_refused() -> None:
    torch.manual_seed(0)
    model = Picky(tf.BertConfig(hidden_size=32, num_attention_heads=4)).eval()
    with pytest.raises(softhooks.UnsupportedMethodError, match="masks"):
        softhooks.attach(model, PrefixTuning(P), example={"frames": torch.randn(2, 9, 5)})


def test_zoo_models_still_take_ids() -> None:
    with softhooks.attach(zoo.build("bert", "sequence"), PrefixTuning(P)) as prompt:
        assert prompt.structure.embeds_tokens
