"""A prompt is computed once per forward, once per `generate` call, and once inside `softhooks.kept`."""

from __future__ import annotations

import contextvars
import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import naive
import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn.utils import parametrize
from untouched import remove_all

import softhooks
from softhooks import LlamaAdapter, PrefixTuning, PromptTuning, PTuning, SoftPrompt
from softhooks.method import Method

IDS = zoo.text(2, 6)


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


METHODS: dict[str, Callable[[], Method]] = {
    "shared": lambda: PromptTuning(4),
    "shared, made by an MLP": lambda: PTuning(4, encoder="mlp"),
    "prefix": lambda: PrefixTuning(4),
    "prefix, made by an MLP": lambda: PrefixTuning(4, projection=True),
    "adapter": lambda: LlamaAdapter(4),
}


def attached(model: Any, kind: str) -> SoftPrompt:
    """A prompt with the same values in every model."""
    prompt = softhooks.attach(model, METHODS[kind]())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in prompt.encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return prompt


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(IDS).logits
    return found


# --- what may change between two forwards -----------------------------------------------------------------------------


def _value_weight(model: Any) -> nn.Parameter:
    projection = model.model.layers[0].self_attn.v_proj
    weight: nn.Parameter = getattr(projection, "base_layer", projection).weight
    return weight


def _through_data(model: Any) -> None:
    _value_weight(model).data.mul_(1.5)


def _a_hook_added(model: Any) -> None:
    model.model.layers[0].register_forward_hook(
        lambda _m, _a, out: (out[0] + 0.5, *out[1:]) if isinstance(out, tuple) else out + 0.5
    )


def _a_hook_before(model: Any) -> None:
    model.model.layers[0].self_attn.v_proj.register_forward_pre_hook(lambda _m, args: (args[0] * 2,))


def _epsilon(model: Any) -> None:
    model.model.layers[0].input_layernorm.variance_epsilon = 1.0


def _scaling(model: Any) -> None:
    model.model.layers[0].self_attn.scaling *= 2


def _a_swapped_projection(model: Any) -> None:
    torch.manual_seed(5)
    own = model.model.layers[0].self_attn
    own.v_proj = nn.Linear(own.v_proj.in_features, own.v_proj.out_features, bias=False)


def _a_swapped_norm(model: Any) -> None:
    model.model.layers[0].input_layernorm = nn.Identity()


def _a_replaced_forward(model: Any) -> None:
    projection = model.model.layers[0].self_attn.v_proj
    own = projection.forward
    projection.forward = lambda x: own(x) + 0.5


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def _a_parametrization(model: Any) -> None:
    parametrize.register_parametrization(model.model.layers[0].self_attn.k_proj, "weight", _Doubled())


def _an_attribute_of_the_rotary_embedding(model: Any) -> None:
    model.model.rotary_emb.attention_scaling = 1.7


def _frequencies_of_the_rotary_embedding(model: Any) -> None:
    model.model.rotary_emb.inv_freq.data.mul_(0.3)


def _the_order_of_the_layers(model: Any) -> None:
    model.model.layers[0].mlp, model.model.layers[1].mlp = model.model.layers[1].mlp, model.model.layers[0].mlp


def _the_activation(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = nn.Tanh()


CHANGES = [
    _through_data,
    _a_hook_added,
    _a_hook_before,
    _epsilon,
    _scaling,
    _a_swapped_projection,
    _a_swapped_norm,
    _a_replaced_forward,
    _a_parametrization,
    _an_attribute_of_the_rotary_embedding,
    _frequencies_of_the_rotary_embedding,
    _the_order_of_the_layers,
    _the_activation,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", METHODS)
def test_a_forward_after_a_change_of_the_base_is_that_of_a_base_changed_before(kind: str, change: Any) -> None:
    model = zoo.build("llama").eval()
    attached(model, kind)
    before = logits(model)
    change(model)
    found = logits(model)
    other = zoo.build("llama").eval()
    change(other)
    attached(other, kind)
    assert torch.equal(found, logits(other))
    assert not torch.allclose(found, before, atol=1e-3)


@pytest.mark.parametrize("kind", METHODS)
def test_a_forward_after_a_hook_is_removed_is_that_without_it(kind: str) -> None:
    model = zoo.build("llama").eval()
    attached(model, kind)
    bare = logits(model)
    everywhere = nn.modules.module.register_module_forward_hook(
        lambda module, _a, out: out * 2 if type(module).__name__ == "LlamaRMSNorm" else None
    )
    hooked = logits(model)
    everywhere.remove()
    assert torch.equal(logits(model), bare)
    own = model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda _m, _a, out: out * 2)
    assert not torch.allclose(logits(model), hooked, atol=1e-3)
    own.remove()
    assert torch.equal(logits(model), bare)


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("name", ["data of the prompt", "hook on the encoder", "attribute"])
def test_a_forward_after_a_change_of_the_prompt_is_that_of_the_changed_prompt(kind: str, name: str) -> None:
    """Changes through `.data` of each tensor, an MLP's included, and by a hook on the encoder."""
    model = zoo.build("llama").eval()
    prompt = attached(model, kind)
    before = logits(model)
    if name == "data of the prompt":
        for tensor in (*prompt.encoder.parameters(), *prompt.encoder.buffers()):
            if tensor.is_floating_point():
                tensor.data.mul_(1.5)
    elif name == "hook on the encoder":
        prompt.encoder.register_forward_hook(lambda _m, _a, out: out * 1.5)
    else:
        own = prompt.encoder.forward
        prompt.encoder.forward = lambda *args, **kwargs: own(*args, **kwargs) * 1.5  # type: ignore[method-assign]
    found = logits(model)
    other = copy.deepcopy(model)  # which has nothing of what the first one computed
    if name != "attribute":
        assert torch.equal(found, logits(other))
    if kind != "adapter" or name == "data of the prompt":
        assert not torch.allclose(found, before, atol=1e-3)


@pytest.mark.parametrize("kind", METHODS)
def test_a_forward_after_a_lora_matrix_changes_in_place_sees_the_change(kind: str) -> None:
    peft = pytest.importorskip("peft")

    def build() -> Any:
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        torch.manual_seed(3)
        return peft.get_peft_model(zoo.build("llama"), config).eval()

    def change(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.mul_(3)

    model, other = build(), build()
    attached(model, kind)
    before = logits(model)
    change(model)
    change(other)
    attached(other, kind)
    assert torch.equal(logits(model), logits(other))
    assert not torch.allclose(logits(model), before, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("change", [_through_data, _a_hook_added, _scaling])
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_decoding_by_hand_meets_the_base_as_it_is_at_each_token(arch: str, change: Any) -> None:
    """A text's cache belongs to the caller; the prompt's part of attention follows the base."""
    model = zoo.build(arch).eval()
    attached(model, "shared")
    first = model(IDS, use_cache=True)
    change(model)
    found = model(IDS[:, :1], past_key_values=copy.deepcopy(first.past_key_values)).logits
    with torch.enable_grad():
        expected = model(IDS[:, :1], past_key_values=copy.deepcopy(first.past_key_values)).logits
    assert torch.equal(found, expected)


# --- generate ---------------------------------------------------------------------------------------------------------


def _generated(model: Any, **more: Any) -> Tensor:
    found: Tensor = model.generate(IDS, max_new_tokens=6, **{"do_sample": False, **more})
    return found


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 2},
    "sampling": {"do_sample": True, "top_k": 5},
    "several answers": {"do_sample": True, "num_return_sequences": 2},
    "without a cache": {"use_cache": False},
    "a static cache": {"cache_implementation": "static", "disable_compile": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "chunked prefill": {"prefill_chunk_size": 3},
}


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("way", WAYS)
def test_one_generate_computes_the_prompt_once_and_two_twice(way: str, kind: str) -> None:
    model = naive.endless(zoo.build("llama"))
    ids = IDS[:1] if way == "prompt lookup" else IDS
    prompt = attached(model, kind)
    before = prompt.computed
    model.generate(ids, max_new_tokens=6, **{"do_sample": False, **WAYS[way]})
    assert prompt.computed == before + 1
    model.generate(ids, max_new_tokens=6, **{"do_sample": False, **WAYS[way]})
    assert prompt.computed == before + 2


@pytest.mark.parametrize("arch", ["t5", "bart"])
def test_one_generate_of_an_encoder_decoder_computes_each_stack_s_prefix_once(arch: str) -> None:
    model = naive.endless(zoo.build(arch, "seq2seq"))
    prompt = attached(model, "prefix, made by an MLP")
    before = prompt.computed
    _generated(model)
    once = prompt.computed - before
    assert once == 2
    _generated(model, num_beams=2)
    assert prompt.computed == before + 2 * once


@pytest.mark.parametrize("change", [_through_data, _a_hook_added, _scaling])
@pytest.mark.parametrize("kind", METHODS)
def test_two_generates_share_nothing(kind: str, change: Any) -> None:
    model, other = naive.endless(zoo.build("llama")), naive.endless(zoo.build("llama"))
    attached(model, kind)
    _generated(model)
    change(model)
    change(other)
    attached(other, kind)
    assert torch.equal(_generated(model), _generated(other))


def test_a_generate_inside_another_shares_nothing_with_it() -> None:
    model, other = naive.endless(zoo.build("llama")), naive.endless(zoo.build("llama"))
    attached(model, "shared")
    found: list[Tensor] = []

    def between(input_ids: Tensor, scores: Tensor) -> Tensor:
        if not found:
            _through_data(model)
            found.append(_generated(model))
        return scores

    _generated(model, logits_processor=[between])
    _through_data(other)
    attached(other, "shared")
    assert torch.equal(found[0], _generated(other))


def test_an_assistant_with_a_prompt_of_its_own() -> None:
    model, assistant = naive.endless(zoo.build("llama")), naive.endless(zoo.build("llama"))
    prompt, own = attached(model, "shared"), attached(assistant, "shared")
    alone = model.generate(IDS[:1], max_new_tokens=6, do_sample=False)
    before, drafts = prompt.computed, own.computed
    assert torch.equal(model.generate(IDS[:1], max_new_tokens=6, do_sample=False, assistant_model=assistant), alone)
    assert prompt.computed == before + 1
    assert own.computed > drafts


def test_a_generate_that_raises_leaves_nothing_behind() -> None:
    model = naive.endless(zoo.build("llama"))
    prompt = attached(model, "shared")

    def fail(input_ids: Tensor, scores: Tensor) -> Tensor:
        raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        _generated(model, logits_processor=[fail])
    before = prompt.computed
    logits(model)
    logits(model)
    assert prompt.computed == before + 2


def test_generate_keeps_its_signature_and_remove_gives_it_back() -> None:
    import inspect

    model = zoo.build("llama")
    bare = inspect.signature(model.generate)
    prompt = attached(model, "shared")
    assert inspect.signature(model.generate) == bare
    prompt.remove()
    assert "generate" not in model.__dict__


# --- kept -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", METHODS)
def test_kept_computes_once_and_ends_after_an_exception(kind: str) -> None:
    model = zoo.build("llama").eval()
    prompt = attached(model, kind)
    expected, before = logits(model), prompt.computed

    def fail() -> None:
        with softhooks.kept(model):
            for _ in range(3):
                assert torch.equal(logits(model), expected)
            assert prompt.computed == before + 1
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    logits(model)
    logits(model)
    assert prompt.computed == before + 3


@pytest.mark.parametrize("kind", METHODS)
def test_kept_sees_a_step_of_training_and_a_base_changed_in_place(kind: str) -> None:
    model = zoo.build("llama").eval()
    prompt = attached(model, kind)
    with softhooks.kept(model):
        before = logits(model)
        with torch.enable_grad():
            model(IDS, labels=IDS).loss.backward()
        torch.optim.AdamW(prompt.parameters(), lr=0.1, fused=True).step()
        trained = logits(model)
        assert not torch.allclose(trained, before, atol=1e-3)
        with torch.no_grad():
            _value_weight(model).mul_(1.5)
        changed = logits(model)
    assert torch.equal(logits(model), changed)


def test_decoding_by_hand_inside_kept_computes_the_prompt_once() -> None:
    model = zoo.build("llama").eval()
    prompt = attached(model, "shared")

    def decoded() -> Tensor:
        output = model(IDS, use_cache=True)
        found = [output.logits[:, -1]]
        for _ in range(4):
            output = model(found[-1].argmax(-1, keepdim=True), past_key_values=output.past_key_values)
            found.append(output.logits[:, -1])
        return torch.stack(found)

    with torch.no_grad():
        before = prompt.computed
        expected = decoded()
        assert prompt.computed == before + 5
        with softhooks.kept(model):
            assert torch.equal(decoded(), expected)
        assert prompt.computed == before + 6


def test_kept_holds_in_its_own_thread_only() -> None:
    model = zoo.build("llama").eval()
    prompt = attached(model, "shared")
    with softhooks.kept(model):
        logits(model)
        before = prompt.computed
        other = threading.Thread(target=logits, args=(model,))
        other.start()
        other.join()
        assert prompt.computed == before + 1
        inherited = contextvars.copy_context()
        inherited.run(logits, model)
        assert prompt.computed == before + 1
    inherited.run(logits, model)
    assert prompt.computed == before + 2, "it has ended for those who have inherited it too"


def test_kept_is_of_one_model() -> None:
    model, other = zoo.build("llama").eval(), zoo.build("llama").eval()
    attached(model, "shared")
    prompt = attached(other, "shared")
    with softhooks.kept(model):
        before = prompt.computed
        logits(other)
        logits(other)
        assert prompt.computed == before + 2
    bare = zoo.build("llama")
    with pytest.raises(softhooks.NotAttachedError), softhooks.kept(bare):
        pass


# --- modules that a prompt enters at ----------------------------------------------------------------------------------


def _another_attention(model: Any) -> None:
    model.model.layers[0].self_attn = zoo.build("llama").model.layers[0].self_attn


def _another_layer(model: Any) -> None:
    model.model.layers[1] = zoo.build("llama").model.layers[1]


def _other_layers(model: Any) -> None:
    model.model.layers = nn.ModuleList(zoo.build("llama").model.layers)


def _another_embedding(model: Any) -> None:
    model.set_input_embeddings(zoo.build("llama").get_input_embeddings())


@pytest.mark.parametrize("swap", [_another_attention, _another_layer, _other_layers, _another_embedding])
@pytest.mark.parametrize("kind", METHODS)
def test_a_module_in_the_place_of_one_that_the_prompt_enters_at_is_refused(kind: str, swap: Any) -> None:
    """The new module has no hook, so its layer would run without the prompt."""
    model = zoo.build("llama").eval()
    prompt = attached(model, kind)
    swap(model)
    with pytest.raises(softhooks.SoftHooksError, match="since the prompt was attached"):
        model(IDS)
    with softhooks.disabled(model):
        model(IDS)
    prompt.remove()
    attached(model, kind)
    model(IDS)


class _Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("kind", METHODS)
def test_a_wrapper_around_a_module_and_a_move_change_nothing(kind: str) -> None:
    model = zoo.build("llama").eval()
    attached(model, kind)
    before = logits(model)
    model.model.layers[0].self_attn = _Wrapper(model.model.layers[0].self_attn)
    model.model.layers = nn.ModuleList(list(model.model.layers))
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(copy.deepcopy(model)), before)


def _another_score(model: Any) -> None:
    model.score = nn.Linear(model.config.hidden_size, 2, bias=False)


def _another_classifier(model: Any) -> None:
    model.classifier = nn.Linear(model.config.hidden_size, 2)


def _another_pooler(model: Any) -> None:
    model.bert.pooler = zoo.build("bert", "sequence").bert.pooler


@pytest.mark.parametrize(
    ("arch", "swap"), [("llama", _another_score), ("bert", _another_classifier), ("bert", _another_pooler)]
)
def test_a_head_or_a_pooler_in_the_place_of_the_one_at_attach_is_refused(arch: str, swap: Any) -> None:
    """The new module has no hook: the prompt's head would not be used, and a pooler would read virtual slots."""
    model = zoo.build(arch, "sequence").eval()
    prompt = softhooks.attach(model, softhooks.PromptTuning(3))
    swap(model)
    with pytest.raises(softhooks.SoftHooksError, match="since the prompt was attached"):
        model(IDS)
    with softhooks.disabled(model):
        model(IDS)
    prompt.remove()
    softhooks.attach(model, softhooks.PromptTuning(3))
    model(IDS)


def test_a_linear_layer_in_the_place_of_one_that_an_adapter_scales_is_refused() -> None:
    model = zoo.build("llama").eval()
    softhooks.attach(model, softhooks.LlamaAdapter(3, scale_and_bias=True))
    layer = model.model.layers[0].mlp
    layer.up_proj = zoo.build("llama").model.layers[0].mlp.up_proj
    with pytest.raises(softhooks.SoftHooksError, match="since the prompt was attached"):
        model(IDS)


def test_output_embeddings_in_the_place_of_those_that_added_tokens_answer_for_are_refused() -> None:
    model = zoo.build("llama").eval()
    softhooks.attach(model, softhooks.PromptTuning(3), train_added_tokens=[zoo.VOCABULARY - 1])
    model.lm_head = zoo.build("llama").lm_head
    with pytest.raises(softhooks.SoftHooksError, match="since the prompt was attached"):
        model(IDS)
