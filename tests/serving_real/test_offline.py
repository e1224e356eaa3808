"""vLLM in this process: tokens and log-probabilities equal those of transformers with softhooks."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from prompted import CONFIGS, NEW, Prompted, prepare, tiny
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.exceptions import VLLMValidationError

from softhooks.integration_support.serving import PromptFolder
from softhooks.integrations.vllm import kv_transfer_config

SMOLLM2 = Path.home() / ".cache" / "softhooks" / "SmolLM2-135M-Instruct-0.1.2"
MAX_LENGTH = 256


@contextmanager
def serving(made: Prompted, **options: Any) -> Iterator[LLM]:
    """vLLM with the connector, as `vllm serve` configures it; few blocks, so that requests are preempted."""
    settings: dict[str, Any] = {
        "dtype": "float32",
        "block_size": 32,
        "max_model_len": MAX_LENGTH,
        "max_num_batched_tokens": 64,
        "num_gpu_blocks_override": 14,
        "enable_prefix_caching": True,
        "enable_prompt_embeds": True,
        "kv_transfer_config": kv_transfer_config(made.prompts),
    }
    llm = LLM(
        made.model,
        skip_tokenizer_init=True,
        enforce_eager=True,
        distributed_executor_backend="uni",
        disable_log_stats=False,
        **{**settings, **options},
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def params(name: str | None, **options: Any) -> SamplingParams:
    extra = None if name is None else {"kv_transfer_params": {"soft_prompt": name}}
    settings = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True, "logprobs": 1, "detokenize": False}
    return SamplingParams(**{**settings, **options}, extra_args=extra)


def compare(llm: LLM, made: Prompted) -> tuple[int, int, float]:
    """Run all requests in one batch; return the equal tokens, all tokens, and the largest difference of a log-probability."""
    asked = list(made.answers)
    worst: dict[str | None, float] = {}
    outputs = llm.generate(
        [{"prompt_token_ids": list(text)} for _, text in asked], [params(name) for name, _ in asked], use_tqdm=False
    )
    equal = 0
    for key, output in zip(asked, outputs, strict=True):
        expected, [found] = made.answers[key], output.outputs
        assert output.prompt_token_ids == list(key[1])  # the placeholders stay inside the engine
        for token, wanted, logprob, entry in zip(
            found.token_ids, expected.tokens, expected.logprobs, found.logprobs, strict=True
        ):
            if token != wanted:
                break
            equal, worst[key[0]] = equal + 1, max(worst.get(key[0], 0.0), abs(entry[token].logprob - logprob))
    print("\n", {name: f"{difference:.1e}" for name, difference in worst.items()})
    return equal, NEW * len(asked), max(worst.values())


def preemptions(llm: LLM) -> int:
    [found] = [int(metric.value) for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"]
    return found


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_one_batch_of_all_prompts_and_bare_requests(kind: str, tmp_path: Path) -> None:
    made = prepare(tiny(kind), tmp_path)
    blocks = 30 if "gemma" in kind else 14  # the layers with a sliding window have blocks of their own
    with serving(made, num_gpu_blocks_override=blocks) as llm:
        for _ in range(2):  # the second time, blocks are found in the cache
            equal, total, largest = compare(llm, made)
            print(f"\n{kind}: {equal} of {total} tokens, {largest:.1e}, {preemptions(llm)} preemptions")
            assert equal == total
            assert largest < 1e-4
        assert preemptions(llm) > 0
        for key, rows in made.rows.items():  # the other way, without the connector's help
            [output] = llm.generate({"prompt_embeds": rows}, params(None), use_tqdm=False)
            assert list(output.outputs[0].token_ids) == made.answers[key].tokens
        placeholders = llm.generate({"prompt_token_ids": [7] * 120}, params(None), use_tqdm=False)
        assert placeholders[0].num_cached_tokens == 0  # a text of placeholders does not find a prompt's blocks


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="`softhooks demo` has not converted SmolLM2 here")
def test_smollm2(tmp_path: Path) -> None:
    made = prepare(tf.AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32), tmp_path, (7, 60), 0.1)
    with serving(made, block_size=128, max_num_batched_tokens=512, num_gpu_blocks_override=None) as llm:
        equal, total, largest = compare(llm, made)
    print(f"\nSmolLM2: {equal} of {total} tokens, {largest:.1e}")
    assert equal == total
    assert largest < 1e-4


def test_names_that_come_and_go_and_requests_that_are_refused(tmp_path: Path) -> None:
    made = prepare(tiny("llama"), tmp_path, (7,))
    [text] = {text for _, text in made.answers}
    request = {"prompt_token_ids": list(text)}

    def tokens(llm: LLM, name: str | None) -> list[int]:
        return list(llm.generate(request, params(name), use_tqdm=False)[0].outputs[0].token_ids)

    def refusal(llm: LLM, name: str, ids: list[int] | None = None, **options: Any) -> str:
        with pytest.raises(VLLMValidationError) as caught:
            llm.generate({"prompt_token_ids": ids or list(text)}, params(name, **options), use_tqdm=False)
        return str(caught.value)

    file, other = made.prompts / "late.safetensors", made.prompts / "soft.safetensors"
    with serving(made) as llm:
        assert "there is no prompt 'late'; the server has 'cartridge', 'context'" in refusal(llm, "late")
        file.write_bytes((made.prompts / "mlp.safetensors").read_bytes())
        assert tokens(llm, "late") == made.answers["mlp", text].tokens
        other.replace(file)  # another prompt under the same name
        assert tokens(llm, "late") == made.answers["soft", text].tokens
        assert "there is no prompt 'soft'" in refusal(llm, "soft")
        file.unlink()
        assert "there is no prompt 'late'" in refusal(llm, "late")
        assert "`prompt_logprobs`" in refusal(llm, "mlp", prompt_logprobs=1)
        assert "40 + 216 tokens" in refusal(llm, "mlp", [5] * 216)
        file.write_bytes(b"")
        assert "not a safetensors file" in refusal(llm, "late")
        file.unlink()
        long = llm.generate({"prompt_token_ids": [5] * 210}, params("mlp", max_tokens=46), use_tqdm=False)
        assert len(long[0].outputs[0].token_ids) == 6  # 40 + 210 + 6 is the limit
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler.connector.scheduler
        folder, scheduler.folder = (
            scheduler.folder,
            PromptFolder(tmp_path),
        )  # the file is deleted after the request was accepted
        [failed] = llm.generate(request, params("mlp"), use_tqdm=False)
        assert failed.outputs[0].finish_reason == "error"
        scheduler.folder = folder
        assert tokens(llm, None) == made.answers[None, text].tokens
        assert tokens(llm, "mlp") == made.answers["mlp", text].tokens
