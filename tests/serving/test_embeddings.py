"""A text with its prompt as embeddings: given them, the bare model generates what it generates with the prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import table
import tokens
import torch
import transformers as tf
import untouched
import zoo
from safetensors.torch import load_file
from typer.testing import CliRunner

import softhooks
from softhooks import Layout, LlamaAdapter, MultitaskPromptTuning, PrefixTuning, PromptTuning, PTuning, PTuningV2
from softhooks.cli import app
from softhooks.errors import (
    NotAttachedError,
    OptionError,
    PromptTooLongError,
    UnsupportedMethodError,
    UnsupportedModelError,
)
from softhooks.integrations import sglang, vllm
from softhooks.serving.embeddings import sequence_embeddings

TEXT = [5, 6, 7, 30, 8]


def wake(prompt: Any) -> None:
    with torch.no_grad():
        for parameter in prompt.encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)


def generated(model: Any, ids: list[int]) -> list[int]:
    row = torch.tensor([ids])
    out = model.generate(
        row,
        attention_mask=torch.ones_like(row),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=zoo.PAD,
    )
    return list(out[0, len(ids) :].tolist())


def continued(model: Any, rows: torch.Tensor) -> list[int]:
    """The bare model's output for given embedding rows."""
    with softhooks.disabled(model):
        out = model.generate(
            inputs_embeds=rows[None], attention_mask=torch.ones(1, rows.shape[0], dtype=torch.long), max_new_tokens=8,
            do_sample=False, eos_token_id=None, pad_token_id=zoo.PAD,
        )  # fmt: skip
    return list(out[0].tolist())


@torch.no_grad()
def last_logits(model: Any, **text: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(**text).logits[0, -1]
    return logits


def scaled(kind: str) -> Any:
    """A model with a factor on its embeddings."""
    few = {**zoo.SMALL, "num_key_value_heads": 2}
    configs = {
        "gemma": lambda: tf.GemmaConfig(**few, head_dim=8),
        "gemma2": lambda: tf.Gemma2Config(**few, head_dim=8, sliding_window=6, query_pre_attn_scalar=8),
        "gemma3_text": lambda: tf.Gemma3TextConfig(**few, head_dim=8, sliding_window=6, query_pre_attn_scalar=8),
        "granite": lambda: tf.GraniteConfig(**few, embedding_multiplier=3.0),
    }
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(configs[kind]()).eval()


METHODS = {
    "prompt": PromptTuning(5),
    "after-first": PromptTuning(3, placement="after_first"),
    "p-tuning": PTuning(4),
    "anchors": PTuning(layout=Layout.insert(start=2, after={(7,): 1}, before={(8,): 2}), encoder="none"),
    "one-task": MultitaskPromptTuning(4, tasks=["a"]),
}
CASES = [("llama", name) for name in METHODS] + [("llama", name) for name in ("cpt", "residual")]
CASES += [(arch, "prompt") for arch in ("gpt2", "qwen3", "gemma3", "mistral", "opt", "bloom")]


@pytest.mark.parametrize(("arch", "name"), CASES)
def test_the_bare_model_continues_the_rows_as_the_prompted_model_the_text(arch: str, name: str) -> None:
    model = zoo.build(arch)
    bare = last_logits(model, input_ids=torch.tensor([TEXT]))
    method = METHODS.get(name)
    prompt = table.BY_NAME[name].attach(model, 5) if method is None else softhooks.attach(model, method)
    wake(prompt)
    rows = sequence_embeddings(model, TEXT)
    assert rows.shape[0] == len(TEXT) + prompt.layout.num_slots
    assert continued(model, rows) == generated(model, TEXT)
    expected = last_logits(model, input_ids=torch.tensor([TEXT]))
    with softhooks.disabled(model):
        torch.testing.assert_close(last_logits(model, inputs_embeds=rows[None]), expected, atol=2e-5, rtol=2e-5)
    assert (expected - bare).abs().max() > 1e-3


SCALED = ["gemma", "gemma2", "gemma3_text", "granite"]


def inside_vllm(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """vLLM scales the embeddings of ids, and takes given rows as they are."""
    return rows


def inside_sglang(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """SGLang scales given rows too in Gemma and Gemma 2."""
    return rows * model.config.hidden_size**0.5 if model.config.model_type in ("gemma", "gemma2") else rows


@pytest.mark.parametrize("kind", SCALED)
@pytest.mark.parametrize(("server", "inside"), [("vllm", inside_vllm), ("sglang", inside_sglang)])
def test_each_server_is_given_the_rows_that_it_makes_the_models_of(server: Any, inside: Any, kind: str) -> None:
    model = scaled(kind)
    softhooks.attach(model, PromptTuning(5))
    own, served = sequence_embeddings(model, TEXT), sequence_embeddings(model, TEXT, server=server)
    assert continued(model, own) == generated(model, TEXT)
    torch.testing.assert_close(inside(model, served), own)
    assert continued(model, inside(model, served)) == generated(model, TEXT)
    module = {"vllm": vllm, "sglang": sglang}[server]
    assert torch.equal(module.embeddings(model, TEXT), served)


@pytest.mark.parametrize("server", ["vllm", "sglang"])
@pytest.mark.parametrize(("kind", "where"), [("gemma", "inside"), ("granite", "after")])
def test_a_factor_that_nobody_has_read_about_is_refused(server: Any, kind: str, where: str) -> None:
    model = scaled(kind)
    softhooks.attach(model, PromptTuning(5))
    model.config.model_type = f"{kind}-of-tomorrow"
    with pytest.raises(UnsupportedModelError, match=f"{where} the embedding"):
        sequence_embeddings(model, TEXT, server=server)
    assert continued(model, sequence_embeddings(model, TEXT)) == generated(model, TEXT)


def test_a_factor_is_measured_whatever_its_name_in_a_config() -> None:
    model = zoo.build("llama")
    softhooks.attach(model, PromptTuning(5))
    handle = model.model.register_forward_pre_hook(
        lambda _module, args, kwargs: (args, {**kwargs, "inputs_embeds": 3 * kwargs["inputs_embeds"]}), with_kwargs=True
    )
    with pytest.raises(UnsupportedModelError, match=r"after the embedding.: 3\.0"):
        sequence_embeddings(model, TEXT, server="vllm")
    handle.remove()
    assert sequence_embeddings(model, TEXT, server="vllm").shape[0] == 10


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3", "mistral", "bloom"])
@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_models_without_a_factor_are_served_their_own_rows(arch: str, server: Any) -> None:
    for precision in (torch.float32, torch.bfloat16):
        model = zoo.build(arch).to(precision)
        softhooks.attach(model, PromptTuning(5))
        assert torch.equal(sequence_embeddings(model, TEXT, server=server), sequence_embeddings(model, TEXT))


def test_an_unknown_server_is_refused() -> None:
    model = zoo.build("llama")
    softhooks.attach(model, PromptTuning(5))
    with pytest.raises(OptionError, match="'vllm', 'sglang'"):
        sequence_embeddings(model, TEXT, server="elsewhere")  # type: ignore[arg-type]


def test_rows_of_another_width_are_refused() -> None:
    model = zoo.build("opt")  # 16 wide, projected to 32
    softhooks.attach(model, PromptTuning(3))
    with pytest.raises(UnsupportedModelError, match="embeddings have width 16, but the hidden states have width 32;"):
        sequence_embeddings(model, TEXT, server="vllm")


def test_precision_is_the_model_s() -> None:
    model = zoo.build("llama").to(torch.bfloat16)
    softhooks.attach(model, PromptTuning(3))
    assert sequence_embeddings(model, TEXT).dtype == torch.bfloat16


# --- refusals -----------------------------------------------------------------------------------------------------------

REFUSED = [
    (PrefixTuning(3), "prefix_tuning"), (PTuningV2(3), "p_tuning_v2"), (LlamaAdapter(3), "llama_adapter"),
    (MultitaskPromptTuning(3, tasks=["a", "b"]), "task_ids"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "named"), REFUSED, ids=lambda value: getattr(value, "kind", value))
def test_what_is_more_than_rows_is_refused_by_name(method: Any, named: str) -> None:
    model = zoo.build("llama")
    softhooks.attach(model, method)
    with untouched.untouched(model), pytest.raises(UnsupportedMethodError, match=named):
        sequence_embeddings(model, TEXT)


def test_heads_and_encoders_are_refused() -> None:
    for arch, head in (("llama", "sequence"), ("t5", "seq2seq"), ("bert", "masked")):
        model = zoo.build(arch, head)
        softhooks.attach(model, PromptTuning(3))
        with pytest.raises(UnsupportedMethodError, match="heads: "):
            sequence_embeddings(model, TEXT)


def test_what_is_asked_for_wrongly() -> None:
    model = zoo.build("gpt2")
    with pytest.raises(NotAttachedError):
        sequence_embeddings(model, TEXT)
    softhooks.attach(model, PromptTuning(6))
    with pytest.raises(OptionError, match="tokenizer"):
        sequence_embeddings(model, "word5")
    with pytest.raises(OptionError, match="at least one token"):
        sequence_embeddings(model, [])
    with pytest.raises(PromptTooLongError):
        sequence_embeddings(model, [5] * 91)
    with softhooks.disabled(model), pytest.raises(OptionError, match="disabled"):
        sequence_embeddings(model, TEXT)
    with softhooks.rows(model, ["default"]), pytest.raises(OptionError, match="exactly one prompt"):
        sequence_embeddings(model, TEXT)


# --- the command --------------------------------------------------------------------------------------------------------

runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("exported")
    model, tokenizer = zoo.build("llama"), tokens.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}word9 {{ m['content'] }} {% endfor %}"
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with softhooks.attach(model, PromptTuning(5)) as prompt:
        prompt.save_pretrained(folder / "prompt")
    with softhooks.attach(model, PrefixTuning(5)) as prompt:
        prompt.save_pretrained(folder / "prefix")
    return folder


def run(saved: Path, output: Path, *more: str, prompt: str = "prompt", to: str = "vllm") -> Any:
    command = ["export", str(saved / prompt), "--to", to, "--model", str(saved / "model"), "--output", str(output)]
    return runner.invoke(app.app, [*command, *more])


@pytest.mark.parametrize("to", ["vllm", "sglang"])
def test_export_writes_the_rows_and_a_request(saved: Path, tmp_path: Path, to: str) -> None:
    done = run(saved, tmp_path / "out", "--text", "word5 word6", "--max-tokens", "7", to=to)
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["prompt_embeds.safetensors", "request.json"]
    rows = load_file(tmp_path / "out" / "prompt_embeds.safetensors")["prompt_embeds"]
    body = json.loads((tmp_path / "out" / "request.json").read_text())
    model = tf.AutoModelForCausalLM.from_pretrained(saved / "model")
    softhooks.load(model, saved / "prompt")
    assert torch.equal(rows, sequence_embeddings(model, "word5 word6", tokens.tokenizer(), server="vllm"))
    if to == "sglang":
        assert torch.equal(torch.tensor(body["input_embeds"]), rows)
        assert body["sampling_params"] == {"max_new_tokens": 7, "temperature": 0.0}
    else:
        assert (body["model"], body["max_tokens"], body["temperature"]) == (str(saved / "model"), 7, 0.0)


def test_export_of_a_chat_and_of_a_file(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "said.txt").write_text("word5 word6")
    assert (
        run(saved, tmp_path, "--text-file", str(tmp_path / "said.txt"), "--chat", "--served-name", "mine").exit_code
        == 0
    )
    assert json.loads((tmp_path / "request.json").read_text())["model"] == "mine"
    rows = load_file(tmp_path / "prompt_embeds.safetensors")["prompt_embeds"]
    model = tf.AutoModelForCausalLM.from_pretrained(saved / "model")
    assert torch.equal(rows[5], model.get_input_embeddings().weight[9])
    assert rows.shape[0] == 8


def test_export_refuses_and_writes_nothing(saved: Path, tmp_path: Path) -> None:
    refused = run(saved, tmp_path / "out", "--text", "word5", prompt="prefix")
    assert isinstance(refused.exception, UnsupportedMethodError)
    both = ("--text", "word5", "--text-file", str(saved / "model" / "config.json"))
    assert isinstance(run(saved, tmp_path / "out", *both).exception, OptionError)
    assert not (tmp_path / "out").exists()
