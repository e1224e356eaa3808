"""A cache and an encoder's output serve only the prompts that made them, in the same state, model and task."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import naive
import pytest
import torch
import xxhash
import zoo
from torch import Tensor
from transformers import DynamicCache, StaticCache
from untouched import remove_all

import softhooks
from softhooks import (
    LlamaAdapter,
    MultitaskPromptTuning,
    PrefixTuning,
    PromptNotReachedError,
    PromptTuning,
    PTuning,
    SoftPrompt,
    UnsupportedModeError,
)
from softhooks.base_model.frozen_record import digest
from softhooks.inject import provenance

IDS, MORE = zoo.text(2, 6), zoo.text(2, 1, seed=3)
KINDS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "shared": lambda: (PromptTuning(4), {}),
    "shared, made by an MLP": lambda: (PTuning(4, encoder="mlp"), {}),
    "slots": lambda: (PromptTuning(4), {"injection": "slots"}),
    "prefix": lambda: (PrefixTuning(4), {}),
    "prefix, made by an MLP": lambda: (PrefixTuning(4, projection=True), {}),
    "adapter": lambda: (LlamaAdapter(4), {}),
}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


def attached(model: Any, kind: str, name: str = "default") -> SoftPrompt:
    method, options = KINDS[kind]()
    prompt = softhooks.attach(model, method, name, **options)
    with torch.no_grad():
        for parameter in prompt.encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.5)
    return prompt


@torch.no_grad()
def filled(model: Any, cache: Any = None) -> Any:
    return model(IDS, past_key_values=DynamicCache() if cache is None else cache, use_cache=True).past_key_values


@torch.no_grad()
def continued(model: Any, cache: Any) -> Tensor:
    seen = torch.ones(2, IDS.shape[1] + 1, dtype=torch.long)
    found: Tensor = model(MORE, past_key_values=cache, attention_mask=seen).logits
    return found


def _a_step(model: Any, prompt: SoftPrompt, folder: Path) -> None:
    model(IDS, labels=IDS).loss.backward()
    torch.optim.AdamW(prompt.parameters(), lr=0.1, fused=True).step()


def _through_data(model: Any, prompt: SoftPrompt, folder: Path) -> None:
    next(prompt.encoder.parameters()).data.mul_(1.5)


def _a_hook(model: Any, prompt: SoftPrompt, folder: Path) -> None:
    prompt.encoder.register_forward_hook(lambda _m, _a, out: out * 1.5)


def _an_attribute(model: Any, prompt: SoftPrompt, folder: Path) -> None:
    prompt.encoder.some_factor = 2.0


def _another_under_the_same_name(model: Any, prompt: SoftPrompt, folder: Path) -> None:
    with torch.no_grad():
        next(prompt.encoder.parameters()).mul_(1.5)
    prompt.save_pretrained(folder)
    prompt.remove()
    softhooks.load(model, folder)


def _attached_again(model: Any, prompt: SoftPrompt, folder: Path) -> None:
    method, injection = prompt.method, prompt.injection
    prompt.remove()
    torch.manual_seed(9)
    softhooks.attach(model, method, injection=injection)


CHANGES = [_a_step, _through_data, _a_hook, _an_attribute, _another_under_the_same_name, _attached_again]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_from_before_the_prompt_changed_is_refused(kind: str, change: Any, tmp_path: Path) -> None:
    if kind == "adapter" and change is _attached_again:
        return  # it starts as nothing, whatever the seed
    model = zoo.build("llama").eval()
    prompt = attached(model, kind)
    cache = filled(model)
    copied = copy.deepcopy(cache)
    change(model, prompt, tmp_path)
    for one in (cache, copied):
        with pytest.raises(
            UnsupportedModeError,
            match=r"(?s)cache can only be used with.*(changed since|in 'default')",
        ):
            continued(model, one)
    continued(model, filled(model))


def test_a_cache_from_before_a_fold_is_refused() -> None:
    model = zoo.build("llama").eval()
    prompt = attached(model, "prefix, made by an MLP")
    cache = filled(model)
    prompt.fold()
    with pytest.raises(UnsupportedModeError, match="changed since"):
        continued(model, cache)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_is_taken_while_nothing_changes(kind: str, tmp_path: Path) -> None:
    """Copied, after another prompt was on, after training mode, and with the same prompt loaded again."""
    model = zoo.build("llama").eval()
    prompt = attached(model, kind)
    cache = filled(model)
    expected = continued(model, copy.deepcopy(cache))
    softhooks.attach(model, KINDS[kind]()[0], "other")
    with pytest.raises(UnsupportedModeError, match="with 'default'"):
        continued(model, copy.deepcopy(cache))
    softhooks.activate(model, "default")
    model.train()
    model(IDS)
    model.eval()
    with softhooks.disabled(model):
        model(IDS)
    assert torch.equal(continued(model, copy.deepcopy(cache)), expected)
    assert torch.equal(continued(copy.deepcopy(model), copy.deepcopy(cache)), expected)
    if kind in ("shared", "prefix"):
        again = pickle.loads(pickle.dumps(cache))
        assert torch.equal(continued(model, again), expected)
    if kind == "shared":
        prompt.save_pretrained(tmp_path)
        for name in ("other", "default"):
            model.soft_prompt.prompted_model.prompts[name].remove()
        softhooks.load(model, tmp_path)
        assert torch.equal(continued(model, copy.deepcopy(cache)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_of_another_model_with_the_same_prompt_is_refused(kind: str) -> None:
    model, other = zoo.build("llama").eval(), zoo.build("llama").eval()
    with torch.no_grad():
        other.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    attached(model, kind)
    attached(other, kind)
    cache = filled(model)
    with pytest.raises(UnsupportedModeError, match="of another model"):
        continued(other, cache)
    continued(model, cache)


def test_a_static_cache_that_was_reset_serves_the_prompt_as_it_is() -> None:
    model = zoo.build("llama").eval()
    prompt = attached(model, "shared")
    cache = filled(model, StaticCache(config=model.config, max_cache_len=16))
    with torch.no_grad():
        next(prompt.encoder.parameters()).mul_(1.5)
    with pytest.raises(UnsupportedModeError, match="changed since"):
        continued(model, cache)
    cache.reset()
    with torch.no_grad():
        found = model(IDS, past_key_values=cache).logits
        torch.testing.assert_close(found, model(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["shared", "prefix"])
def test_a_returned_cache_goes_on_in_generate_until_the_prompt_changes(kind: str) -> None:
    model = naive.endless(zoo.build("llama"))
    prompt = attached(model, kind)
    first = model.generate(IDS, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    whole = model.generate(IDS, max_new_tokens=6, do_sample=False)
    cache = copy.deepcopy(first.past_key_values)
    assert torch.equal(model.generate(first.sequences, past_key_values=cache, max_new_tokens=3, do_sample=False), whole)
    prompt.encoder.get_parameter(next(iter(prompt.encoder.state_dict()))).data.mul_(1.5)
    with pytest.raises(UnsupportedModeError, match="changed since"):
        model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=3)


def test_a_cache_of_other_tasks_is_refused() -> None:
    model = zoo.build("llama").eval()
    softhooks.attach(model, MultitaskPromptTuning(4, tasks=["a", "b"]))
    call: dict[str, Any] = {"attention_mask": torch.ones(2, 7, dtype=torch.long)}
    with torch.no_grad():
        cache = model(IDS, task_ids=torch.tensor([0, 1]), use_cache=True).past_key_values
        model(MORE, past_key_values=copy.deepcopy(cache), task_ids=torch.tensor([0, 1]), **call)
        for tasks in ([1, 0], [0, 0], [1, 1]):
            with pytest.raises(UnsupportedModeError, match="other variants"):
                model(MORE, past_key_values=copy.deepcopy(cache), task_ids=torch.tensor(tasks), **call)


@pytest.mark.parametrize("change", [_a_step, _through_data, _a_hook])
@pytest.mark.parametrize("kind", ["slots", "prefix", "prefix, made by an MLP"])
@pytest.mark.parametrize("arch", ["t5", "bart"])
def test_states_of_an_encoder_from_before_the_prompt_changed_are_refused(
    arch: str, kind: str, change: Any, tmp_path: Path
) -> None:
    model = zoo.build(arch, "seq2seq").eval()
    method = KINDS[kind]()[0]
    prompt = softhooks.attach(model, method)
    with torch.no_grad():
        encoded = model.get_encoder()(input_ids=IDS)
        expected = model(input_ids=IDS, decoder_input_ids=IDS).logits
        found = model(encoder_outputs=encoded, decoder_input_ids=IDS).logits
        torch.testing.assert_close(found, expected)
    if change is _a_step:
        model(input_ids=IDS, labels=IDS).loss.backward()
        torch.optim.AdamW(prompt.parameters(), lr=0.1).step()
    else:
        change(model, prompt, tmp_path)
    with torch.no_grad(), pytest.raises(PromptNotReachedError, match=r"(?s)same prompts.*changed since"):
        model(encoder_outputs=encoded, decoder_input_ids=IDS)


def test_states_of_another_model_s_encoder_are_refused() -> None:
    model, other = zoo.build("t5", "seq2seq").eval(), zoo.build("t5", "seq2seq").eval()
    for one in (model, other):
        attached(one, "prefix")
    with torch.no_grad():
        encoded = model.get_encoder()(input_ids=IDS)
        with pytest.raises(PromptNotReachedError, match="of another model"):
            other(encoder_outputs=encoded, decoder_input_ids=IDS)


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    hashed: list[Tensor] = []
    monkeypatch.setattr(provenance, "digest", lambda tensor: (hashed.append(tensor), digest(tensor))[1])
    return hashed


def test_a_training_forward_without_a_cache_takes_no_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("llama")
    prompt = attached(model, "prefix, made by an MLP")
    hashed = _counted(monkeypatch)
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    assert not hashed
    model(IDS, labels=IDS).loss.backward()
    assert len(hashed) == len(list(prompt.encoder.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_snapshot_holds_no_copy_of_the_prompt(kind: str) -> None:
    model = zoo.build("llama").eval()
    prompt = attached(model, kind)
    cache = filled(model)
    smallest = min(parameter.numel() for parameter in prompt.encoder.parameters() if parameter.ndim > 1)
    (_, held), *_others = prompt.prompted_model.provenance().prompts
    assert all(not isinstance(checksum, Tensor) or checksum.numel() < smallest for checksum in held.checksums)
    assert continued(model, cache).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.bool])
def test_the_checksum_on_a_device_depends_on_every_bit_and_place(dtype: torch.dtype) -> None:
    values = torch.randn(7, 13, generator=torch.Generator().manual_seed(0)).mul(50).to(dtype)
    known = provenance.device_checksum(values)
    assert torch.equal(provenance.device_checksum(values.clone()), known)
    bits = values.clone().view(torch.uint8).reshape(-1)
    for place in range(len(bits)):
        bits[place] ^= 1
        assert not torch.equal(provenance.device_checksum(bits), known), place
        bits[place] ^= 1
    rows = values.clone()
    rows[[0, 1]] = rows[[1, 0]]
    assert torch.equal(rows, values) or not torch.equal(provenance.device_checksum(rows), known)


def test_the_checksum_on_a_device_does_not_depend_on_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(100, generator=torch.Generator().manual_seed(0))
    whole = provenance.device_checksum(values)
    monkeypatch.setattr(provenance, "_WORDS", 7)
    assert torch.equal(provenance.device_checksum(values), whole)


def test_a_cache_is_refused_after_a_change_where_tensors_are_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPU, with the checksum that a GPU would compute."""
    monkeypatch.setattr(provenance, "digest", provenance.device_checksum)
    model = zoo.build("llama").eval()
    prompt = attached(model, "prefix")
    cache = filled(model)
    continued(model, copy.deepcopy(cache))
    next(prompt.encoder.parameters()).data[0, 0] += 1
    with pytest.raises(UnsupportedModeError, match="changed since"):
        continued(model, cache)


def test_a_gradient_transform_may_return_a_cache() -> None:
    model = zoo.build("llama").eval()
    prompt = attached(model, "prefix")
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        found: Tensor = torch.func.functional_call(model, parameters, (IDS,), {"labels": IDS, "use_cache": True}).loss
        return found

    gradients = torch.func.grad(loss)(parameters)
    loss(parameters).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(gradients[name], parameter.grad)
    assert len(gradients) == len(list(prompt.parameters()))


def test_a_hashed_tensor_can_still_be_freed_and_resized() -> None:
    """FSDP2 resizes the storage of gathered parameters; an export through numpy would forbid it."""
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    known = digest(values)
    assert known.bits == xxhash.xxh3_128_hexdigest(values.clone().numpy().tobytes())
    assert digest(values.T).bits == xxhash.xxh3_128_hexdigest(values.clone().numpy().T.tobytes())
    values.untyped_storage().resize_(0)
    values.untyped_storage().resize_(values.numel() * values.element_size())
