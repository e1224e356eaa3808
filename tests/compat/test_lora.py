"""A prompt on a PEFT LoRA model: switched, merged and named adapters; trained alone or together; resumed and loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
import training
import zoo
from torch import Tensor
from untouched import remove_all, untouched

import softhooks
from softhooks import (
    AttachError,
    FrozenModifiedError,
    LlamaAdapter,
    PrefixTuning,
    PromptTuning,
    SoftPromptCallback,
    UnsupportedModeError,
    UnsupportedModelError,
)
from softhooks.method import Method

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file"),  # a model from a config has no name
    pytest.mark.filterwarnings("ignore:Unable to fetch remote file"),
]
P = 4
IDS = zoo.text(2, 7)
METHODS: dict[str, Callable[[], Method]] = {
    "prompt": lambda: PromptTuning(P),
    "prefix": lambda: PrefixTuning(P),
    "adapter": lambda: LlamaAdapter(P, gate="raw"),
}
TASKS = {"causal": "CAUSAL_LM", "sequence": "SEQ_CLS", "seq2seq": "SEQ_2_SEQ_LM", "tokens": "TOKEN_CLS"}
TARGETS = {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"], "t5": ["q", "v"]}


def config(arch: str = "llama", head: str = "causal") -> Any:
    return peft.LoraConfig(r=2, task_type=TASKS[head], target_modules=TARGETS[arch], init_lora_weights=False)


def lora(arch: str = "llama", head: str = "causal", names: tuple[str, ...] = ("default",)) -> Any:
    torch.manual_seed(3)
    model = peft.get_peft_model(zoo.build(arch, head), config(arch, head), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config(arch, head))
    return model.eval()


def attached(model: Any, kind: str, **options: Any) -> Any:
    """A prompt with an effect, of any method."""
    prompt = softhooks.attach(model, METHODS[kind](), **options)
    with torch.no_grad():
        for parameter in prompt.encoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)), alpha=0.5)
    return prompt


@torch.no_grad()
def logits(model: Any, **given: Any) -> Tensor:
    return model(input_ids=IDS, **given).logits


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


# --- which adapters are on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", METHODS)
def test_what_was_computed_under_one_adapter_is_not_used_under_another(kind: str) -> None:
    """PEFT switches adapters without changing a tensor, but the prompt's keys and values depend on them."""
    model = lora(names=("default", "other"))
    prompt = attached(model, kind)

    def anew() -> Tensor:
        with softhooks.kept(model):  # of its own, in which nothing has been computed
            return logits(model)

    with softhooks.kept(model):
        _switch_adapters(model, prompt, anew)


def _switch_adapters(model: Any, prompt: softhooks.SoftPrompt, anew: Callable[[], Tensor]) -> None:
    first = anew()
    with model.disable_adapter():
        assert torch.equal(logits(model), anew())
        assert float((logits(model) - first).abs().max()) > 1e-2
    logits(model)
    model.base_model.set_adapter("other", inference_mode=True)
    assert torch.equal(logits(model), anew())
    assert float((logits(model) - first).abs().max()) > 1e-2
    model.base_model.set_adapter("default", inference_mode=True)
    assert torch.equal(logits(model), first)
    before = prompt.computed
    assert torch.equal(logits(model), first)
    assert prompt.computed == before, "nothing was switched: the keys are kept"
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)
    assert torch.equal(logits(model), anew())
    assert float((logits(model) - first).abs().max()) > 1e-2


@pytest.mark.parametrize("kind", METHODS)
def test_each_row_with_an_adapter_of_its_own(kind: str) -> None:
    """PEFT's mixed batches are right if a prompt takes nothing from the base or stands in every row, and refused otherwise."""
    model = lora(names=("default", "other"))
    names = ["default", "other"]

    def alone() -> Tensor:
        found = []
        for row, name in enumerate(names):
            model.base_model.set_adapter(name, inference_mode=True)
            found.append(logits(model)[row])
        return torch.stack(found)

    with attached(model, kind) as prompt:
        if kind == "prefix":
            torch.testing.assert_close(logits(model, adapter_names=names), alone(), rtol=1e-4, atol=1e-5)
            return
        with pytest.raises(UnsupportedModeError, match="adapter_names"):
            logits(model, adapter_names=names)
        with pytest.raises(UnsupportedModeError, match="adapter_names"):
            model.generate(input_ids=IDS, adapter_names=names, max_new_tokens=2)
        assert prompt.is_attached
        alone()  # and the next forward is as it was
    if kind == "prompt":
        with attached(model, kind, injection="slots"):
            torch.testing.assert_close(logits(model, adapter_names=names), alone(), rtol=1e-4, atol=1e-5)


# --- the wrapper ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["merge_and_unload", "unload"])
def test_a_model_is_not_taken_out_of_the_wrapper_that_carries_the_prompt(name: str) -> None:
    model = lora(head="sequence")
    with attached(model, "prompt"):
        with untouched(model):
            for holder in (model, model.base_model):
                with pytest.raises(AttachError, match=rf"{name}(.|\n)*merge_adapter"):
                    getattr(holder, name)()
        expected = logits(model)
        model.merge_adapter()
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
    assert type(getattr(model, name)()).__name__ == "LlamaForSequenceClassification"


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize(
    ("arch", "head"), [("llama", "causal"), ("llama", "sequence"), ("bert", "tokens"), ("t5", "seq2seq")]
)
def test_a_prompt_over_lora_moves_to_the_merged_model_and_back(tmp_path: Path, arch: str, head: str, kind: str) -> None:
    """A prompt saved over LoRA loads onto LoRA bit for bit and onto the merged model up to rounding, and vice versa."""
    call = zoo.inputs(zoo.Case(arch, head), IDS)

    @torch.no_grad()
    def answer(model: Any) -> Tensor:
        return zoo.main_output(model(**call))

    model = lora(arch, head)
    bare = answer(model)
    with attached(model, kind) as prompt:
        with torch.no_grad():
            for parameter in prompt.heads.parameters():
                parameter.add_(torch.randn_like(parameter))
        expected = answer(model)
        prompt.save_pretrained(tmp_path / "prompt")
    assert torch.equal(answer(model), bare)
    model.save_pretrained(tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(zoo.build(arch, head), str(tmp_path / "lora")).eval()
    softhooks.load(again, tmp_path / "prompt")
    assert torch.equal(answer(again), expected)
    assert float((expected - bare).abs().max()) > 1e-2
    merged = model.merge_and_unload()
    with softhooks.load(merged, tmp_path / "prompt") as prompt:
        torch.testing.assert_close(answer(merged), expected, rtol=1e-3, atol=1e-4)
        prompt.save_pretrained(tmp_path / "merged")
    softhooks.activate(again, "default").remove()
    softhooks.load(again, tmp_path / "merged")
    assert torch.equal(answer(again), expected)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_prompt_over_lora_is_written_for_peft_on_the_merged_model(tmp_path: Path, kind: str) -> None:
    """PEFT has no prompts on LoRA; the head keeps its path."""
    model = lora(head="sequence")
    with attached(model, kind) as prompt, torch.no_grad():
        prompt.heads["base_model/model/score"].weight.add_(0.5)
        expected = logits(model)
        prompt.save_pretrained(tmp_path, as_peft=True)
    with peers.quiet(), torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(model.merge_and_unload(), str(tmp_path)).eval()
        found = theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


CONFIGS: dict[str, Callable[[], Any]] = {
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P),
    "ADAPTION_PROMPT": lambda: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=P, adapter_layers=1),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_that_peft_prompts_is_refused(kind: str) -> None:
    model = peft.get_peft_model(zoo.build("llama"), CONFIGS[kind]()).eval()
    with untouched(model), pytest.raises(UnsupportedModelError, match=rf"'default' \({kind}\)"):
        softhooks.attach(model, PromptTuning(P))


# --- under a Trainer --------------------------------------------------------------------------------------------------

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
ADAPTERS = {"default": ("default",), "named": ("style",), "two": ("default", "style"), "two named": ("tone", "style")}


def trainer(folder: Path, model: Any, kind: str, share: str, **options: Any) -> tuple[Any, SoftPromptCallback]:
    callback = SoftPromptCallback(METHODS[kind](), trainable="*lora_*" if share == "both" else ())
    return training.make(folder, model, "causal", [callback], **{**SAVING, **options}), callback


def adapters_of(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("share", ["prompt", "both"])
@pytest.mark.parametrize("adapters", ADAPTERS)
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_prompt_trains_over_lora_and_resumes(tmp_path: Path, kind: str, adapters: str, share: str) -> None:
    """If only the prompt trains, LoRA keeps its bits; if both train, both are in the checkpoint. The last adapter is active."""
    names = ADAPTERS[adapters]

    def made() -> Any:
        model = lora(names=names)
        model.set_adapter(names[-1])
        return model

    model = made()
    start = adapters_of(model)
    whole, callback = trainer(tmp_path / "run", model, kind, share)
    whole.train()
    trained = training.trained(callback)
    assert any("lora_" in name for name in trained) == (share == "both")
    moved = {name for name, value in adapters_of(model).items() if not torch.equal(value, start[name])}
    assert moved == ({name for name in start if f".{names[-1]}." in name} if share == "both" else set())
    assert callback.report is not None

    resumed, other = trainer(tmp_path / "run", made(), kind, share)
    training.spoil(other)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert training.losses(resumed) == training.losses(whole)
    assert training.equal(training.trained(other), trained)
    assert training.equal(adapters_of(resumed.model), adapters_of(model))

    # saved by both libraries, loaded by both: bit for bit
    expected = logits(model.eval())
    whole.save_model(str(tmp_path / "saved"))
    folders = {name: tmp_path / "saved" / ("" if name == "default" else name) for name in names}
    again = peft.PeftModel.from_pretrained(zoo.build("llama"), str(folders[names[-1]]), adapter_name=names[-1]).eval()
    with peers.quiet():  # what was trained beside the prompt is not in its file
        softhooks.load(again, tmp_path / "saved")
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("share", ["prompt", "both"])
@pytest.mark.parametrize("adapters", ADAPTERS)
def test_the_best_step_over_lora_is_loaded(tmp_path: Path, adapters: str, share: str) -> None:
    """The Trainer would load the root's adapter into the active one, whatever its name."""
    names, kept = ADAPTERS[adapters], []
    model = lora(names=names)
    model.set_adapter(names[-1])
    start = adapters_of(model)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "eval_strategy": "steps", "eval_steps": 1}
    run, callback = trainer(tmp_path, model, "prompt", share, **best)
    scores = iter([1.0, 5.0, 2.0, 3.0])

    def score(_prediction: Any) -> dict[str, float]:
        kept.append(training.trained(callback))
        return {"score": next(scores)}

    run.compute_metrics = score
    run.train()
    assert training.equal(training.trained(callback), kept[1])
    others = {name: value for name, value in start.items() if share == "prompt" or f".{names[-1]}." not in name}
    assert training.equal({name: adapters_of(model)[name] for name in others}, others)
    assert callback.report is not None


def test_lora_that_moves_beside_a_prompt_that_trains_alone_is_named(tmp_path: Path) -> None:
    model = lora()
    run, callback = trainer(tmp_path, model, "prompt", "prompt", save_strategy="no")
    with torch.no_grad():
        next(value for name, value in model.named_parameters() if "lora_B" in name).add_(1)
    with pytest.raises(FrozenModifiedError, match="lora_B"):
        run.train()
    assert callback.soft_prompt is not None


@pytest.mark.parametrize("share", ["prompt", "both"])
def test_adapters_that_transformers_itself_holds(tmp_path: Path, share: str) -> None:
    """`model.add_adapter`, without PEFT's wrapper: the adapter is saved beside the prompt, and both come back."""

    def made() -> Any:
        torch.manual_seed(3)
        model = zoo.build("llama")
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        return model

    whole, callback = trainer(tmp_path / "run", made(), "prompt", share)
    start = adapters_of(whole.model)
    whole.train()
    assert training.equal(adapters_of(whole.model), start) == (share == "prompt")
    resumed, other = trainer(tmp_path / "run", made(), "prompt", share)
    training.spoil(other)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert training.losses(resumed) == training.losses(whole)
    assert training.equal(training.trained(other), training.trained(callback))
    whole.save_model(str(tmp_path / "saved"))
    for folder in ("saved", "run/checkpoint-4"):
        again = zoo.build("llama")
        again.load_adapter(str(tmp_path / folder))
        with peers.quiet():
            softhooks.load(again, tmp_path / folder)
        assert torch.equal(logits(again.eval()), logits(whole.model.eval()))
        assert not list((tmp_path / folder).glob("config.json"))
    with torch.no_grad():
        on = logits(whole.model)
        whole.model.disable_adapters()
        off = logits(whole.model)
        assert float((on - off).abs().max()) > 1e-2
        whole.model.enable_adapters()
        assert torch.equal(logits(whole.model), on)
