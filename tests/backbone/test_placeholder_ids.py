"""The ids of virtual tokens, in models that read token ids in addition to embeddings."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokens
import torch
import transformers as tf
import zoo
from safetensors import safe_open
from safetensors.torch import save_file

import softhooks
from softhooks import (
    Cartridge,
    ContextAwarePromptTuning,
    Layout,
    MultitaskPromptTuning,
    PrefixTuning,
    PromptTuning,
    PTuning,
    ResidualPromptTuning,
)
from softhooks.backbone.probe_inputs import probe_ids
from softhooks.errors import (
    CheckpointError,
    PromptMismatchError,
    UnsupportedMethodError,
    UnsupportedModeError,
    UnsupportedModelError,
)
from softhooks.serving.embeddings import sequence_embeddings

SMALL = {
    "vocab_size": zoo.VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
    "initializer_range": 0.2,
}  # fmt: skip
SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_key_value_heads": 2, "sliding_window": 32}


def gemma4() -> Any:
    config = tf.Gemma4TextConfig(
        **SMALL, **SLIDING, vocab_size_per_layer_input=zoo.VOCABULARY, hidden_size_per_layer_input=8
    )
    return tf.Gemma4ForCausalLM(config)


def gemma3n() -> Any:
    config = tf.Gemma3nTextConfig(
        **SMALL, **SLIDING, vocab_size_per_layer_input=zoo.VOCABULARY, hidden_size_per_layer_input=8,
        num_kv_shared_layers=0, laurel_rank=4, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 4,
    )  # fmt: skip
    return tf.Gemma3nForCausalLM(config)


def deepseek_v4() -> Any:
    config = tf.DeepseekV4Config(
        **{**SMALL, "num_hidden_layers": 2}, num_key_value_heads=1, q_lora_rank=16, o_lora_rank=8, o_groups=2,
        moe_intermediate_size=16, n_routed_experts=8, num_local_experts=8, num_experts_per_tok=2, n_shared_experts=1,
        layer_types=["sliding_attention"] * 2, mlp_layer_types=["hash_moe", "moe"], sliding_window=32, hc_mult=2,
        index_n_heads=2, index_head_dim=8, index_topk=4, qk_rope_head_dim=4, partial_rotary_factor=0.5,
    )  # fmt: skip
    model = tf.DeepseekV4ForCausalLM(config)
    torch.manual_seed(1)
    for module in model.modules():
        if hasattr(module, "tid2eid"):
            table = torch.stack([torch.randperm(8)[:2] for _ in range(zoo.VOCABULARY)])
            module.tid2eid.copy_(table)
    return model


MODELS: dict[str, Callable[[], Any]] = {"gemma4": gemma4, "gemma3n": gemma3n, "deepseek_v4": deepseek_v4}
WAYS: list[tuple[str, Any]] = [
    ("gemma4", "shared"), ("gemma4", "slots"), ("gemma3n", "shared"), ("gemma3n", "slots"), ("deepseek_v4", "slots"),
]  # fmt: skip
WORDS = [11, 12, 13, 14]
TEXT = " ".join(f"word{i}" for i in WORDS)


def build(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("correct_output_scale"):  # at its start, 0, the embeddings of the layers do nothing
                parameter.fill_(1.0)
            elif parameter.dim() > 1 and ("embed" in key or "gate" in key):
                parameter.normal_(std=0.5)
    return model


def with_pad(model: Any, pad: int | None) -> Any:
    model.config.pad_token_id = pad
    return model


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    answer: torch.Tensor = model(ids, attention_mask=torch.ones_like(ids)).logits
    return answer


def words() -> list[int]:
    return [int(i) for i in tokens.tokenizer()(TEXT, add_special_tokens=False)["input_ids"]]


def before(model: Any, first: list[int], ids: torch.Tensor) -> torch.Tensor:
    """The bare model's outputs for a text after words."""
    row = torch.tensor(first).expand(len(ids), -1)
    return logits(model, torch.cat([row, ids], 1))[:, len(first) :]


# --- saved and loaded -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["vocab", "random"])
@pytest.mark.parametrize(("name", "injection"), WAYS)
def test_a_loaded_prompt_answers_alike_whatever_the_padding_id_is_now(
    tmp_path: Path, name: str, init: str, injection: Any
) -> None:
    trained, ids = with_pad(build(name), 7), zoo.text(2, 6)
    with softhooks.attach(trained, PromptTuning(4, init=init), injection=injection) as prompt:
        expected = logits(trained, ids)
        prompt.save_pretrained(tmp_path)
    for pad in (0, 5, 11, None):
        model = with_pad(build(name), pad)
        with softhooks.load(model, tmp_path, injection=injection):
            assert torch.equal(logits(model, ids), expected)
    held = json.loads((tmp_path / "soft_prompt.json").read_text())["conventions"]["placeholder"]
    assert len(held) == 4
    assert init == "vocab" or held == [7] * 4


@pytest.mark.parametrize("name", MODELS)
def test_the_default_is_what_transformers_gives_to_tokens_without_an_id(name: str) -> None:
    for pad, expected in ((7, 7), (None, 0)):
        with softhooks.attach(with_pad(build(name), pad), PromptTuning(3, init="random")) as prompt:
            assert prompt.placeholder_ids.tolist() == [expected] * 3


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "roberta", "mpnet", "esm", "mixtral"])
def test_files_of_models_that_look_at_embeddings_alone_are_what_they_were(tmp_path: Path, arch: str) -> None:
    model = zoo.build(arch, "causal" if arch in zoo.CAUSAL else "masked")
    with softhooks.attach(model, PromptTuning(3)) as prompt:
        prompt.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "soft_prompt.json").read_text())["conventions"] == {"placement": "front"}


# --- real words -----------------------------------------------------------------------------------------------------------

AS_WORDS: dict[str, Callable[[], Any]] = {
    "text": lambda: PromptTuning(4, init="text", init_text=TEXT, tokenizer=tokens.tokenizer()),
    "labels": lambda: PromptTuning(4, init="class_labels", init_labels=TEXT.split(), tokenizer=tokens.tokenizer()),
    "residual": lambda: ResidualPromptTuning(4, init="text", init_text=TEXT, tokenizer=tokens.tokenizer()),
}


@pytest.mark.parametrize("method", ["text", "labels", "residual"])
@pytest.mark.parametrize(("name", "injection"), WAYS)
def test_a_prompt_of_words_is_these_words(tmp_path: Path, name: str, method: str, injection: Any) -> None:
    model, ids = build(name), zoo.text(2, 6)
    expected = before(model, words(), ids)
    with softhooks.attach(model, AS_WORDS[method](), injection=injection) as prompt:
        assert prompt.placeholder_ids.tolist() == words()
        torch.testing.assert_close(logits(model, ids), expected, atol=1e-4, rtol=1e-4)
        prompt.save_pretrained(tmp_path)
    with softhooks.load(model, tmp_path, injection=injection, trainable=True) as prompt:
        torch.testing.assert_close(logits(model, ids), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "injection"), WAYS)
def test_rows_that_are_words_number_by_number_have_their_ids(name: str, injection: Any) -> None:
    model, ids = build(name), zoo.text(2, 6)
    expected = before(model, WORDS, ids)
    rows = model.get_input_embeddings()(torch.tensor(WORDS)).detach()
    with softhooks.attach(model, PromptTuning(4, init="tensor", init_tensor=rows), injection=injection) as prompt:
        assert prompt.placeholder_ids.tolist() == WORDS
        torch.testing.assert_close(logits(model, ids), expected, atol=1e-4, rtol=1e-4)
    rows[1, -1] += 1e-3
    with softhooks.attach(model, PromptTuning(4, init="tensor", init_tensor=rows), injection=injection) as prompt:
        assert prompt.placeholder_ids.tolist() == [11, 0, 13, 14]


@pytest.mark.parametrize(("name", "injection"), WAYS)
def test_rows_of_the_embedding_s_weight_are_their_words(name: str, injection: Any) -> None:
    model, ids = build(name), zoo.text(2, 6)
    expected = before(model, WORDS, ids)
    rows = model.get_input_embeddings().weight[WORDS].detach()
    with softhooks.attach(model, PromptTuning(4, init="tensor", init_tensor=rows), injection=injection) as prompt:
        assert prompt.placeholder_ids.tolist() == WORDS
        torch.testing.assert_close(logits(model, ids), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_sampled_words_are_these_words(name: str) -> None:
    model, ids = build(name), zoo.text(2, 6)
    with softhooks.attach(model, PromptTuning(4)) as prompt:
        found = logits(model, ids)
        chosen = prompt.placeholder_ids.tolist()
    torch.testing.assert_close(found, before(model, chosen, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gemma4", "gemma3n"])
def test_a_context_is_its_words(name: str) -> None:
    model, ids = build(name), zoo.text(2, 6)
    method = ContextAwarePromptTuning(context_ids=WORDS, token_types=[1, 2, 3, 4])
    expected = before(model, WORDS, ids)
    with softhooks.attach(model, method) as prompt:
        assert prompt.placeholder_ids.tolist() == WORDS
        torch.testing.assert_close(logits(model, ids), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gemma4", "gemma3n"])
def test_a_prefix_and_a_cartridge_of_words_are_these_words(name: str) -> None:
    model, ids = build(name), zoo.text(2, 6)
    expected = before(model, words(), ids)
    methods: list[Any] = [
        PrefixTuning(4, init_text=TEXT, tokenizer=tokens.tokenizer()),
        Cartridge(4, document=words(), distill=False),
    ]
    for method in methods:
        with softhooks.attach(model, method):
            torch.testing.assert_close(logits(model, ids), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_words_in_a_layout_keep_their_ids(name: str) -> None:
    model = build(name)
    layout = Layout('{soft:"word11 word12"}{soft:2}{text}')
    with softhooks.attach(model, PTuning(layout=layout, encoder="mlp", tokenizer=tokens.tokenizer())) as prompt:
        first = [int(i) for i in tokens.tokenizer()("word11 word12", add_special_tokens=False)["input_ids"]]
        held = prompt.placeholder_ids.tolist()
    assert held[: len(first)] == first
    assert held[len(first) :] == [0, 0]


def test_a_prompt_that_starts_from_another_has_its_ids(tmp_path: Path) -> None:
    model, ids = build("gemma4"), zoo.text(2, 6)
    with softhooks.attach(with_pad(model, 9), PromptTuning(4, init="random")) as prompt:
        expected = logits(model, ids)
        prompt.save_pretrained(tmp_path)
        second = softhooks.attach(with_pad(model, 0), PromptTuning(4, init="prompt", init_from=prompt), "second")
        assert torch.equal(logits(model, ids), expected)
        second.remove()
    with softhooks.attach(model, PromptTuning(4, init="prompt", init_from=tmp_path)):
        assert torch.equal(logits(model, ids), expected)
    with softhooks.attach(model, MultitaskPromptTuning(4, tasks=["a"], source=tmp_path)) as prompt:
        assert prompt.placeholder_ids.tolist() == [9] * 4


def test_words_before_a_text_that_may_have_images_are_these_words() -> None:
    """The model around the stack makes the layers' embeddings from the text's ids and passes them in."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    outside = {f"{name}_token_id": 90 + n for n, name in enumerate(("image", "video", "audio", "boi", "eoi"))}
    config = tf.Gemma4Config(text_config=gemma4().config.to_dict(), vision_config=vision, **outside)
    torch.manual_seed(0)
    model, ids = tf.Gemma4ForConditionalGeneration(config).eval(), zoo.text(2, 6).clamp(max=80)
    expected = before(model, words(), ids)
    with softhooks.attach(model, AS_WORDS["text"]()):
        torch.testing.assert_close(logits(model, ids), expected, atol=1e-4, rtol=1e-4)


# --- several prompts, ways of calling -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "injection"), WAYS)
def test_each_row_has_its_own_prompt_s_ids(name: str, injection: Any) -> None:
    model, ids = build(name), zoo.text(3, 6)
    methods = {"a": AS_WORDS["text"](), "b": PromptTuning(2, init="random")}
    alone = {}
    for key, method in methods.items():
        softhooks.attach(model, method, key, injection=injection)
        alone[key] = logits(model, ids)
    with softhooks.disabled(model):
        bare = logits(model, ids)
    with softhooks.rows(model, ["a", "b", None]):
        found = logits(model, ids)
    for row, expected in enumerate((alone["a"], alone["b"], bare)):
        torch.testing.assert_close(found[row], expected[row], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_copy_and_a_folded_prompt_have_the_same_ids(name: str) -> None:
    model, ids = build(name), zoo.text(2, 6)
    prompt = softhooks.attach(model, AS_WORDS["residual"]())
    expected = logits(model, ids)
    twin = copy.deepcopy(model)
    prompt.fold()
    torch.testing.assert_close(logits(model, ids), expected)
    torch.testing.assert_close(logits(twin, ids), expected)


def test_a_run_that_is_resumed_has_the_ids_that_it_began_with(tmp_path: Path) -> None:
    """They are sampled with the words, so a second initialization has other ids."""
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 4

    def trainer(steps: int, seed: int) -> tuple[tf.Trainer, softhooks.SoftPromptCallback]:
        torch.manual_seed(seed)
        model, callback = build("gemma4"), softhooks.SoftPromptCallback(PromptTuning(4))
        torch.manual_seed(seed)
        args = tf.TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
            per_device_train_batch_size=2, seed=seed,
        )  # fmt: skip
        return tf.Trainer(model=model, args=args, train_dataset=rows, callbacks=[callback]), callback

    first, callback = trainer(1, 1)
    first.train()
    ids = callback.soft_prompt.placeholder_ids.tolist()
    second, again = trainer(2, 2)
    assert again.soft_prompt.placeholder_ids.tolist() != ids
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.soft_prompt.placeholder_ids.tolist() == ids


@pytest.mark.parametrize("name", MODELS)
def test_slots_beside_embeddings_without_ids_are_refused(name: str) -> None:
    model = build(name)
    softhooks.attach(model, PromptTuning(3), injection="slots")
    with pytest.raises(UnsupportedModeError, match="also reads the ids, so slots need them"):
        model(inputs_embeds=model.get_input_embeddings()(zoo.text(2, 6)))


# --- files ----------------------------------------------------------------------------------------------------------------


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "soft_prompt.safetensors"
    with safe_open(str(path), framework="pt") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        told = json.loads(file.metadata()["softhooks"])
    change(told)
    save_file(held, str(path), {"format": "pt", "softhooks": json.dumps(told)})


def test_an_older_file_loads_by_the_rule_of_its_time_with_a_warning(tmp_path: Path) -> None:
    model = build("gemma4")
    with softhooks.attach(model, PromptTuning(3)) as prompt:
        prompt.save_pretrained(tmp_path)
    rewritten(tmp_path, lambda told: told["conventions"].pop("placeholder"))
    rule = int(probe_ids(model, zoo.VOCABULARY, columns=2)[0, 0])
    with (
        pytest.warns(UserWarning, match=rf"without the token ids of its virtual tokens(.|\n)*The id {rule} is used,"),
        softhooks.load(model, tmp_path) as prompt,
    ):
        assert prompt.placeholder_ids.tolist() == [rule] * 3 == [3] * 3


@pytest.mark.parametrize("ids", [[1, 2], 5, [1, 2, "3"], [1, 2, -3], [True, 1, 2], [1, 2, 2**40]], ids=str)
def test_foreign_ids_are_refused(tmp_path: Path, ids: Any) -> None:
    model = build("gemma4")
    with softhooks.attach(model, PromptTuning(3)) as prompt:
        prompt.save_pretrained(tmp_path)
    rewritten(tmp_path, lambda told: told["conventions"].update(placeholder=ids))
    with pytest.raises(CheckpointError, match=r"has ids that do not match its virtual tokens"):
        softhooks.load(model, tmp_path)


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    model = build("gemma4")
    with softhooks.attach(model, PromptTuning(3)) as prompt:
        prompt.save_pretrained(tmp_path)
    rewritten(tmp_path, lambda told: told["conventions"].update(placeholder=[1, 2, zoo.VOCABULARY]))
    with pytest.raises(PromptMismatchError, match="ids that are not in the model's vocabulary"):
        softhooks.load(model, tmp_path, strict=False)


def test_a_prefix_with_ids_is_refused(tmp_path: Path) -> None:
    model = zoo.build("llama")
    with softhooks.attach(model, PrefixTuning(3)) as prompt:
        prompt.save_pretrained(tmp_path)
    rewritten(tmp_path, lambda told: told["conventions"].update(placeholder=[1, 2, 3]))
    with pytest.raises(CheckpointError, match=r"has ids that do not match its virtual tokens"):
        softhooks.load(model, tmp_path)


# --- what has no ids ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_rows_for_servers_and_for_peft_are_refused(tmp_path: Path, name: str) -> None:
    model = build(name)
    with softhooks.attach(model, PromptTuning(3)) as prompt:
        with pytest.raises(UnsupportedModelError, match="needs token ids in addition to embeddings"):
            sequence_embeddings(model, [5, 6, 7])
        with pytest.raises(
            UnsupportedMethodError, match="PEFT's format has no equivalent of token ids of virtual tokens"
        ):
            prompt.save_pretrained(tmp_path, as_peft=True)


def test_a_prompt_of_peft_is_refused_where_its_text_had_no_ids(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(build("gemma3n"), config).save_pretrained(tmp_path)
    with pytest.raises(PromptMismatchError, match="but a PEFT prompt has no ids"):
        softhooks.load(build("gemma3n"), tmp_path)
