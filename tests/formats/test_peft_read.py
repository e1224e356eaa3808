"""Checkpoints written by PEFT give PEFT's own unpadded logits."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from untouched import remove_all, untouched

import softhooks
from softhooks import Cartridge, CheckpointError, PrefixTuning, PromptMismatchError, PromptTuning, PTuning

peft = pytest.importorskip("peft")
P = 5
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


CONFIGS: dict[str, Callable[[str], Any]] = {
    "prompt": lambda task: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=P),
    "p-tuning": lambda task: peft.PromptEncoderConfig(
        task_type=task, num_virtual_tokens=P, encoder_hidden_size=12, encoder_reparameterization_type="LSTM"
    ),
    "p-tuning-mlp": lambda task: peft.PromptEncoderConfig(task_type=task, num_virtual_tokens=P, encoder_hidden_size=12),
    "prefix": lambda task: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=P),
    "prefix-mlp": lambda task: peft.PrefixTuningConfig(
        task_type=task, num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=12
    ),
}
if hasattr(peft, "CartridgeConfig"):
    CONFIGS["cartridge"] = lambda task: peft.CartridgeConfig(task_type=task, num_virtual_tokens=P, num_frozen_tokens=2)
KINDS = {"prompt": PromptTuning, "p-tuning": PTuning, "prefix": PrefixTuning, "cartridge": Cartridge}
TASKS = {
    "causal": "CAUSAL_LM", "sequence": "SEQ_CLS", "tokens": "TOKEN_CLS", "qa": "QUESTION_ANS", "masked": "FEATURE_EXTRACTION",
    "seq2seq": "SEQ_2_SEQ_LM",
}  # fmt: skip


def written(folder: Path, arch: str, head: str, kind: str, **changes: Any) -> Any:
    """Make and save an adapter with PEFT, with random values; return its model."""
    torch.manual_seed(2)
    model = peft.get_peft_model(zoo.build(arch, head, **changes), CONFIGS[kind](TASKS[head]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return model.eval()


@torch.no_grad()
def answer(model: Any, case: zoo.Case) -> torch.Tensor:
    """A model's outputs for unpadded rows, without the virtual tokens' positions, which PEFT returns."""
    ids = zoo.text(3, 7)
    found = zoo.main_output(model(**zoo.inputs(case, ids)))
    has_rows = case.head in ("causal", "tokens", "qa", "masked")
    return found[:, -ids.shape[1] :] if has_rows else found


SAME = [
    *[(arch, "causal", kind) for arch in ("llama", "gpt2", "qwen3", "gemma3", "gptj") for kind in CONFIGS],
    ("opt", "causal", "prefix"),
    ("opt", "causal", "prefix-mlp"),
    *[(arch, "sequence", kind) for arch in ("llama", "gpt2") for kind in CONFIGS],
    ("bert", "sequence", "prefix"),
    ("roberta", "sequence", "prefix-mlp"),
    *[("bert", head, kind) for head in ("tokens", "qa", "masked") for kind in ("prompt", "prefix")],
    ("t5", "seq2seq", "prompt"),
    ("bart", "seq2seq", "prompt"),
]


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize(("arch", "head", "kind"), SAME)
def test_pefts_prompts_answer_as_in_peft(tmp_path: Path, arch: str, head: str, kind: str) -> None:
    case = zoo.Case(arch, head)
    expected = answer(written(tmp_path, arch, head, kind), case)
    model = zoo.build(arch, head)
    bare = answer(model, case)
    prompt = softhooks.load(model, tmp_path)
    assert type(prompt.method) is KINDS[kind.removesuffix("-mlp")]
    assert prompt.method.num_virtual_tokens == P
    torch.testing.assert_close(answer(model, case), expected, rtol=1e-4, atol=1e-5)
    assert (bare - expected).abs().max() > 0.05
    assert (len(prompt.heads) == 1) == (head in ("sequence", "tokens", "qa"))
    # and from then on it is a prompt like any other
    prompt.save_pretrained(tmp_path / "ours")
    again = zoo.build(arch, head)
    softhooks.load(again, tmp_path / "ours")
    assert torch.equal(answer(again, case), answer(model, case))


def test_opt_with_equal_widths_takes_pefts_prompt(tmp_path: Path) -> None:
    case = zoo.Case("opt", "causal")  # PEFT cannot prompt an OPT whose embeddings are narrower than its states
    expected = answer(written(tmp_path, "opt", "causal", "prompt", word_embed_proj_dim=32), case)
    model = zoo.build("opt", word_embed_proj_dim=32)
    softhooks.load(model, tmp_path)
    torch.testing.assert_close(answer(model, case), expected, rtol=1e-4, atol=1e-5)


def test_a_named_adapter_is_read_from_its_folder(tmp_path: Path) -> None:
    case = zoo.Case("llama", "causal")
    both = written(tmp_path, "llama", "causal", "prompt")
    both.add_adapter("other", CONFIGS["prompt"]("CAUSAL_LM"))
    both.set_adapter("other")
    expected = answer(both.eval(), case)
    both.save_pretrained(tmp_path)
    model = zoo.build("llama")
    softhooks.load(model, tmp_path / "other", name="other")
    torch.testing.assert_close(answer(model, case), expected, rtol=1e-4, atol=1e-5)


def test_pefts_prompt_trains_on(tmp_path: Path) -> None:
    written(tmp_path, "llama", "sequence", "prefix")
    model = zoo.build("llama", "sequence")
    prompt = softhooks.load(model, tmp_path, trainable=True)
    model(zoo.text(), labels=torch.tensor([0, 1])).loss.backward()
    assert all(parameter.grad is not None for parameter in prompt.parameters())
    prompt.verify_frozen()


# --- what has no equal here -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["bert", "roberta"])
def test_a_prompt_that_peft_pools_itself_is_refused(tmp_path: Path, arch: str) -> None:
    written(tmp_path, arch, "sequence", "prompt")
    model = zoo.build(arch, "sequence")
    with untouched(model), pytest.raises(PromptMismatchError, match="first virtual token"):
        softhooks.load(model, tmp_path)


@pytest.mark.parametrize("arch", ["t5", "bart"])
@pytest.mark.parametrize("kind", ["prefix", "prefix-mlp"])
def test_a_prefix_of_an_encoder_decoder_is_refused(tmp_path: Path, arch: str, kind: str) -> None:
    written(tmp_path, arch, "seq2seq", kind)
    model = zoo.build(arch, "seq2seq")
    with untouched(model), pytest.raises(CheckpointError, match="adds only to the decoder"):
        softhooks.load(model, tmp_path)


OTHERS: dict[str, Callable[[], Any]] = {
    "LORA": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_adapters_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    peft.get_peft_model(zoo.build("llama"), OTHERS[kind]()).save_pretrained(tmp_path)
    model = zoo.build("llama")
    with untouched(model), pytest.raises(CheckpointError, match=kind):
        softhooks.load(model, tmp_path)


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("a pickle was read",))

    written(tmp_path, "llama", "causal", "prompt")
    (tmp_path / TENSORS).unlink()
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    model = zoo.build("llama")
    with untouched(model), pytest.raises(CheckpointError, match="pickle"):
        softhooks.load(model, tmp_path)


@pytest.mark.parametrize(
    ("kind", "source", "goal"),
    [
        ("prompt", ("llama", "causal"), ("t5", "seq2seq")),
        ("prompt", ("t5", "seq2seq"), ("llama", "causal")),
        ("prompt", ("llama", "causal"), ("bert", "masked")),
        ("prefix", ("llama", "causal"), ("gpt2", "causal")),
        ("prefix", ("llama", "causal"), ("t5", "seq2seq")),
        ("prefix", ("llama", "sequence"), ("llama", "causal")),
    ],
)
def test_pefts_prompts_for_other_models_are_refused(
    tmp_path: Path, kind: str, source: tuple[str, str], goal: tuple[str, str]
) -> None:
    written(tmp_path, *source, kind)
    model = zoo.build(*goal)
    with untouched(model), pytest.raises(PromptMismatchError):
        softhooks.load(model, tmp_path)


# --- nothing is trusted -----------------------------------------------------------------------------------------------

FALSE_CONFIGS: dict[str, Callable[[dict[str, Any]], None]] = {
    "no kind": lambda config: config.__delitem__("peft_type"),
    "a kind that is a list": lambda config: config.update(peft_type=["PREFIX_TUNING"]),
    "no length": lambda config: config.__delitem__("num_virtual_tokens"),
    "another length": lambda config: config.update(num_virtual_tokens=P + 1),
    "a length that divides": lambda config: config.update(num_virtual_tokens=1),
    "a length that is a word": lambda config: config.update(num_virtual_tokens="5"),
    "a length that is true": lambda config: config.update(num_virtual_tokens=True),
    "a negative length": lambda config: config.update(num_virtual_tokens=-5),
    "no length at all": lambda config: config.update(num_virtual_tokens=0),
    "a huge length": lambda config: config.update(num_virtual_tokens=10**40),
    "no layers": lambda config: config.__delitem__("num_layers"),
    "other layers": lambda config: config.update(num_layers=4),
    "layers that are a word": lambda config: config.update(num_layers="two"),
    "no heads": lambda config: config.update(num_attention_heads=0),
    "heads that do not divide": lambda config: config.update(num_attention_heads=3),
    "other heads": lambda config: config.update(num_attention_heads=1),
    "another kind of task": lambda config: config.update(task_type="SEQ_2_SEQ_LM"),
    "another kind of adapter": lambda config: config.update(peft_type="PROMPT_TUNING"),
}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft")
    written(folder, "llama", "sequence", "prefix")
    return folder


@pytest.fixture(scope="module")
def target() -> Any:
    return zoo.build("llama", "sequence")


@pytest.mark.parametrize("name", FALSE_CONFIGS)
def test_a_false_config_is_refused(prefix: Path, target: Any, tmp_path: Path, name: str) -> None:
    config = json.loads((prefix / CONFIG).read_text())
    FALSE_CONFIGS[name](config)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    (tmp_path / TENSORS).write_bytes((prefix / TENSORS).read_bytes())
    with untouched(target), pytest.raises((CheckpointError, PromptMismatchError)):
        softhooks.load(target, tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'"PREFIX_TUNING"', b"\xff\xfe\x00", b"[" * 100_000, b"{}"]
)
def test_a_config_that_is_none_is_refused(prefix: Path, target: Any, tmp_path: Path, content: bytes) -> None:
    (tmp_path / CONFIG).write_bytes(content)
    (tmp_path / TENSORS).write_bytes((prefix / TENSORS).read_bytes())
    with untouched(target), pytest.raises(CheckpointError, match=CONFIG):
        softhooks.load(target, tmp_path)


FALSE_TENSORS: dict[str, Callable[[dict[str, torch.Tensor]], None]] = {
    "no prompt": lambda held: held.__delitem__("prompt_embeddings"),
    "a row too few": lambda held: held.update(prompt_embeddings=held["prompt_embeddings"][1:].clone()),
    "a column too few": lambda held: held.update(prompt_embeddings=held["prompt_embeddings"][:, 1:].clone()),
    "three dimensions": lambda held: held.update(prompt_embeddings=held["prompt_embeddings"][None].clone()),
    "integers": lambda held: held.update(prompt_embeddings=held["prompt_embeddings"].long()),
    "not a number": lambda held: held["prompt_embeddings"].fill_(float("nan")),
    "head not a number": lambda held: held["base_model.score.weight"].fill_(float("nan")),
    "a foreign tensor": lambda held: held.update({"lora_A.weight": torch.zeros(2)}),
    "a name without a part": lambda held: held.update({"base_model.score": torch.zeros(2)}),
    "a path out": lambda held: held.update({"base_model.../../x.weight": torch.zeros(2)}),
    "a head more": lambda held: held.update({"base_model.classifier.weight": torch.zeros(2)}),
    "a head of other labels": lambda held: held.update({"base_model.score.weight": torch.zeros(4, 32)}),
}


@pytest.mark.parametrize("name", FALSE_TENSORS)
def test_false_tensors_are_refused(prefix: Path, target: Any, tmp_path: Path, name: str) -> None:
    held = load_file(prefix / TENSORS)
    FALSE_TENSORS[name](held)
    save_file(held, tmp_path / TENSORS)
    (tmp_path / CONFIG).write_bytes((prefix / CONFIG).read_bytes())
    with untouched(target), pytest.raises((CheckpointError, PromptMismatchError), match=TENSORS):
        softhooks.load(target, tmp_path)


def test_an_adapter_without_tensors_is_refused(prefix: Path, target: Any, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_bytes((prefix / CONFIG).read_bytes())
    with untouched(target), pytest.raises(CheckpointError, match=TENSORS):
        softhooks.load(target, tmp_path)
    (tmp_path / TENSORS).write_bytes((prefix / TENSORS).read_bytes()[:-7])
    with untouched(target), pytest.raises(CheckpointError, match=TENSORS):
        softhooks.load(target, tmp_path)


@pytest.mark.parametrize("types", [["4"] * P, [[4]] * P, [True] * P, [4.0] * P, [None] * P, "4" * P, None], ids=str)
def test_false_types_of_a_context_are_refused(target: Any, tmp_path: Path, types: Any) -> None:
    config = {"peft_type": "CPT", "num_virtual_tokens": P, "cpt_token_ids": [5] * P, "cpt_tokens_type_mask": types}
    (tmp_path / CONFIG).write_text(json.dumps(config | {"task_type": "SEQ_CLS"}))
    save_file({"prompt_embeddings": torch.zeros(P, 32)}, tmp_path / TENSORS)
    with untouched(target), pytest.raises(CheckpointError, match=TENSORS):
        softhooks.load(target, tmp_path)
