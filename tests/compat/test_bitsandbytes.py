"""Quantized bases: the Trainer refuses them unless a prompt is attached before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import training
import transformers as tf
import zoo
from launch import SCRIPTS
from transformers.trainer_utils import validate_quantization_for_training
from untouched import remove_all, untouched

import softhooks
from softhooks import FrozenModifiedError, PrefixTuning, PromptTuning, SoftPromptCallback, TrainerError
from softhooks.cli import run, run_arguments, run_parser

METHODS = {"prompt": PromptTuning(4), "prefix": PrefixTuning(4)}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    remove_all()
    yield
    remove_all()


def _quantized(trainable: bool = True) -> Any:
    """A model with the attributes of one from `from_pretrained(..., quantization_config=...)`."""
    model = zoo.build("llama")
    model.is_quantized = True
    model.quantization_method = "bitsandbytes"
    model.hf_quantizer = SimpleNamespace(is_trainable=trainable, is_qat_trainable=False)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_a_quantized_model_trains_if_the_callback_has_it_before_the_trainer(tmp_path: Path, method: str) -> None:
    with pytest.raises(ValueError, match="purely quantized"):
        training.prompted(tmp_path, _quantized(), "causal", METHODS[method])
    model = _quantized()
    torch.manual_seed(training.QUIET["seed"])  # as the Trainer does before it calls its callbacks
    callback = SoftPromptCallback(METHODS[method], model=model)
    trainer = training.make(tmp_path, model, "causal", [callback])
    trainer.train()
    other, expected = training.prompted(tmp_path, zoo.build("llama"), "causal", METHODS[method])
    other.train()
    assert training.losses(trainer) == training.losses(other)
    assert training.equal(training.trained(callback), training.trained(expected))
    assert callback.report is not None


def test_the_model_tells_nobody_but_the_trainer_of_an_adapter(tmp_path: Path) -> None:
    model = _quantized()
    with untouched(model):
        callback = SoftPromptCallback(METHODS["prefix"], model=model)
        validate_quantization_for_training(model)
        trainer = training.make(tmp_path, model, "causal", [callback])
        assert not model._hf_peft_config_loaded
        with pytest.raises(ValueError, match="purely quantized"):
            validate_quantization_for_training(model)
        assert callback.soft_prompt is not None
        callback.soft_prompt.remove()
        model.config.use_cache = True  # the Trainer's own doing
    assert trainer.model is model
    unused = SoftPromptCallback(METHODS["prefix"], model=model)
    assert unused.soft_prompt is not None
    unused.soft_prompt.remove()
    assert not model._hf_peft_config_loaded


def test_weights_that_pass_no_gradient_are_refused_by_name() -> None:
    model = _quantized(trainable=False)
    with pytest.raises(TrainerError, match=r"^no gradients pass through") as refused:
        SoftPromptCallback(METHODS["prompt"], model=model)
    assert "bitsandbytes" in str(refused.value)
    assert softhooks.runtime.prompted_model.prompted_model_of(model) is None


def test_softhooks_run_needs_no_line_for_a_quantized_model(tmp_path: Path) -> None:
    script = tmp_path / "quantized.py"
    text = (SCRIPTS / "plain.py").read_text()
    told = "model.is_quantized, model.hf_quantizer = True, SimpleNamespace(is_trainable=True, is_qat_trainable=False)"
    text = text.replace(
        "return tf.LlamaForCausalLM(config)", f"model = tf.LlamaForCausalLM(config)\n    {told}\n    return model"
    )
    script.write_text(text.replace("import torch\n", "import torch\nfrom types import SimpleNamespace\n"))
    arguments = ["--output_dir", str(tmp_path), "--max_steps", "2", "--use_cpu", "--report_to", "none"]
    line = run_parser.read([str(script), *arguments, "--disable_tqdm", "true"])
    run.run(line, *run_arguments.resolve_line(line))
    assert (tmp_path / "saved" / "soft_prompt.safetensors").is_file()


# --- bitsandbytes itself ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model, for bitsandbytes quantizes what it loads."""
    folder = tmp_path_factory.mktemp("base")
    zoo.build("llama", hidden_size=64, head_dim=16, intermediate_size=128).save_pretrained(folder)
    return folder


def _by_bitsandbytes(base: Path, bits: int) -> Any:
    pytest.importorskip("bitsandbytes")
    config = tf.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = tf.AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == f"Linear{bits}bit{'Lt' if bits == 8 else ''}"
    return model.eval()


def _named(model: Any) -> set[str]:
    return {name for name, _ in (*model.named_parameters(), *model.named_buffers())}


@torch.no_grad()
def _answer(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=zoo.text()).logits.clone()


@pytest.mark.filterwarnings(
    "ignore:MatMul8bitLt"
)  # some versions warn that they compute in half precision, others log it
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", METHODS)
def test_a_base_of_bitsandbytes_trains_resumes_and_is_given_back(
    base: Path, tmp_path: Path, method: str, bits: int
) -> None:
    def start() -> tuple[tf.Trainer, SoftPromptCallback]:
        model = _by_bitsandbytes(base, bits)
        torch.manual_seed(training.QUIET["seed"])
        callback = SoftPromptCallback(METHODS[method], model=model)
        saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
        return training.make(tmp_path, model, "causal", [callback], **saving), callback

    bare = _by_bitsandbytes(base, bits)
    before = training.base_of(bare)
    trainer, callback = start()
    prompt, begun = callback.soft_prompt, training.trained(callback)
    assert prompt is not None
    trainer.train()
    after = training.trained(callback)
    assert all(not torch.equal(after[name], begun[name]) for name in begun)
    assert training.equal(training.base_of(prompt.model), before)
    assert callback.report is not None
    assert callback.report.tensors == prompt.verify_frozen().tensors == len(bare.state_dict().keys() | _named(bare))

    resumed, other = start()
    training.spoil(other)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert training.equal(training.trained(other), after)
    assert training.losses(resumed) == training.losses(trainer)

    expected = _answer(prompt.model)
    fresh = _by_bitsandbytes(base, bits)
    softhooks.load(fresh, tmp_path / "checkpoint-4")
    assert torch.equal(_answer(fresh), expected)
    model = prompt.model
    prompt.remove()
    assert torch.equal(_answer(model), _answer(bare))
    assert not torch.equal(_answer(model), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_one_bit_of_a_quantized_weight_is_noticed(base: Path, bits: int) -> None:
    model = _by_bitsandbytes(base, bits)
    with softhooks.attach(model, METHODS["prefix"]) as prompt:
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] ^= 1
        with pytest.raises(FrozenModifiedError, match=r"layers\.1\.mlp\.up_proj\.weight"):
            prompt.verify_frozen()


@pytest.mark.parametrize("runs", [False, True], ids=["as loaded", "after a forward"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_scale_that_moves_is_noticed(base: Path, bits: int, runs: bool) -> None:
    model = _by_bitsandbytes(base, bits)
    layer = model.model.layers[1].mlp.up_proj
    with softhooks.attach(model, METHODS["prefix"]) as prompt:
        prompt.verify_frozen()
        if runs:
            _answer(model)
        scales = [layer.weight.quant_state.absmax] if bits == 4 else [layer.weight.SCB, layer.state.SCB]
        next(scale for scale in scales if scale is not None)[0] *= 1.5
        with pytest.raises(FrozenModifiedError, match=r"layers\.1\.mlp\.up_proj\.(weight\.absmax|SCB)"):
            prompt.verify_frozen()


# --- stand-ins for what this machine's CPU may not do -----------------------------------------------------------------


class Packing(torch.nn.Linear):
    """A layer that behaves as bitsandbytes' 4-bit one does on a CPU with AVX-512 BF16."""

    def __init__(self, like: torch.nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features, bias=False)
        self.weight = like.weight
        self.support_avx512bf16_for_cpu = True
        self.is_packed = False

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if self.support_avx512bf16_for_cpu and not self.training and not states.requires_grad and not self.is_packed:
            self.is_packed, self.weight.data = True, self.weight.data.T.contiguous()
        if self.is_packed:
            return (states.detach() @ self.weight.detach()).detach()
        return super().forward(states)

    def _save_to_state_dict(self, *args: Any) -> None:
        if self.is_packed:
            self.is_packed, self.weight.data = False, self.weight.data.T.contiguous()
        super()._save_to_state_dict(*args)


@pytest.mark.parametrize("evaluated", [False, True], ids=["fresh", "evaluated before"])
def test_4_bit_layers_on_a_cpu_pass_gradients_while_a_prompt_is_on(evaluated: bool) -> None:
    model = zoo.build("llama")
    for layer in model.model.layers:
        layer.self_attn.o_proj = Packing(layer.self_attn.o_proj)
        layer.mlp.down_proj = Packing(layer.mlp.down_proj)
    model.eval()
    ids = zoo.text()
    packing = [module for module in model.modules() if isinstance(module, Packing)]
    with torch.no_grad():
        before = model(input_ids=ids).logits if evaluated else None
    assert all(layer.is_packed == evaluated for layer in packing)
    with softhooks.attach(model, METHODS["prompt"]) as prompt:
        with torch.no_grad():
            model(input_ids=ids)
        assert not any(layer.is_packed for layer in packing)
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in prompt.parameters())
        prompt.verify_frozen()
    assert all(layer.support_avx512bf16_for_cpu for layer in packing)
    with torch.no_grad():
        after = model.eval()(input_ids=ids).logits
    assert all(layer.is_packed for layer in packing)
    assert before is None or torch.equal(before, after)


class Cut(tf.Trainer):
    """A Trainer whose loss does not depend on the model's output."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss = model(**inputs).loss.detach().requires_grad_(True)
        return (loss, None) if return_outputs else loss


def test_a_loss_that_does_not_reach_the_prompt_is_an_error(tmp_path: Path) -> None:
    trainer, _ = training.prompted(tmp_path, zoo.build("llama"), "causal", METHODS["prompt"], cls=Cut)
    with pytest.raises(TrainerError, match="no gradient reached the prompt") as refused:
        trainer.train()
    assert "PromptTuning" in str(refused.value)
