"""A saved prompt recognizes its base model after conversions, and refuses one with other weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import zoo
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import softhooks
from softhooks import Cartridge, PrefixTuning, PromptTuning
from softhooks.backbone.examine import examine
from softhooks.base_model.compare import compare
from softhooks.base_model.fingerprint import Fingerprint
from softhooks.base_model.take_fingerprint import take_fingerprint
from softhooks.errors import CheckpointError, PromptMismatchError
from softhooks.runtime.prompted_model import PromptedModel

ARCHS = ["llama", "gpt2", "bert", "t5", "roberta", "mixtral", "gemma3", "deberta"]
METHODS = {"prompt": PromptTuning(3), "prefix": PrefixTuning(3), "slots": PromptTuning(3, placement="after_first")}
PRECISIONS = [torch.bfloat16, torch.float16, torch.float64]


def saved(model: Any, folder: Path, method: Any = None, **options: Any) -> Path:
    with softhooks.attach(model, method or PromptTuning(3), **options) as prompt:
        prompt.save_pretrained(folder)
    return folder


def built(arch: str) -> Any:
    return zoo.build(arch, {"t5": "seq2seq", "deberta": "masked"}.get(arch, "causal"))


def reseeded(arch: str) -> Any:
    """The same model with other random weights."""
    model = built(arch)
    torch.manual_seed(17)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * parameter.std().nan_to_num(0.0) + parameter.mean()
    return model


def moved(model: Any, by: float, which: Callable[[str], bool] = lambda name: True) -> Any:
    """A model after some training: each weight has changed by a fraction of its size."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if which(name):
            parameter.data += by * parameter.abs().mean() * torch.randn_like(parameter)
    return model


def is_projection(name: str) -> bool:
    return any(part in name for part in ("q_proj", "v_proj"))


# --- the same base ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_the_same_base_is_known_again(tmp_path: Path, arch: str) -> None:
    folder = saved(built(arch), tmp_path)
    softhooks.load(built(arch), folder).remove()


@pytest.mark.parametrize("after", PRECISIONS)
@pytest.mark.parametrize("before", [torch.float32, *PRECISIONS])
def test_a_conversion_of_precision_is_no_other_base(tmp_path: Path, before: torch.dtype, after: torch.dtype) -> None:
    """Both are conversions of one fp32 checkpoint, so neither is a conversion of the other."""
    folder = saved(zoo.build("llama").to(before), tmp_path)
    softhooks.load(zoo.build("llama").to(after), folder).remove()
    softhooks.load(zoo.build("llama").to(before).to(after), folder).remove()


def test_a_head_and_a_pooler_of_its_own_are_no_other_base(tmp_path: Path) -> None:
    """Both are initialized at random if a checkpoint lacks them."""
    base = zoo.build("bert", "sequence")
    folder = saved(base, tmp_path)
    other = copy.deepcopy(base)
    with torch.no_grad():
        for module in (other.bert.pooler, other.classifier):
            for parameter in module.parameters():
                parameter.normal_()
    softhooks.load(other, folder).remove()


def _with_lora(seed: int, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    model = zoo.build("llama")
    torch.manual_seed(seed)
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], **options)).eval()


@pytest.mark.parametrize(
    ("trained_on", "loaded_onto"), [("lora", "bare"), ("bare", "lora"), ("lora", "other"), ("lora", "off")]
)
def test_adapters_that_are_on_are_part_of_the_base(tmp_path: Path, trained_on: str, loaded_onto: str) -> None:
    def make(which: str) -> Any:
        if which == "bare":
            return zoo.build("llama")
        model = _with_lora(1 if which == "other" else 0, init_lora_weights=False)
        if which == "off":
            model.base_model.disable_adapter_layers()
        return model

    folder = saved(make(trained_on), tmp_path)
    softhooks.load(make(trained_on), folder).remove()
    with pytest.raises(PromptMismatchError, match=r"different active adapters \(LoRA\) or without any"):
        softhooks.load(make(loaded_onto), folder)
    softhooks.load(make(loaded_onto), folder, strict=False).remove()


def test_adapters_that_change_nothing_or_train_with_the_prompt_are_no_other_base(tmp_path: Path) -> None:
    folder = saved(zoo.build("llama"), tmp_path / "bare")
    softhooks.load(_with_lora(0), folder).remove()  # fresh LoRA adds nothing
    folder = saved(_with_lora(0, init_lora_weights=False), tmp_path / "over", trainable="*lora_*")
    with pytest.warns(UserWarning, match="parameters of the base model were trained with"):
        softhooks.load(zoo.build("llama"), folder).remove()


def test_what_is_trained_beside_the_prompt_is_not_compared(tmp_path: Path) -> None:
    model = zoo.build("llama")
    with softhooks.attach(model, PromptTuning(3), trainable="*layers.1.*") as prompt:
        moved(model, 0.1, lambda name: "layers.1." in name)
        prompt.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="trained with"):
        softhooks.load(zoo.build("llama"), tmp_path).remove()
    with pytest.warns(UserWarning, match="trained with"), pytest.raises(PromptMismatchError):
        softhooks.load(moved(zoo.build("llama"), 0.1, lambda name: "layers.0." in name), tmp_path)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_is_known_again_with_a_word(tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    zoo.build("llama").save_pretrained(tmp_path / "base")
    folder = saved(zoo.build("llama"), tmp_path / "prompt")
    config = tf.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    load: Any = lambda: tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config).eval()  # noqa: E731
    said = rf"with a different quantization \(none in training, now bitsandbytes load_in_{bits}bit\)"
    with pytest.warns(UserWarning, match=said):
        softhooks.load(load(), folder).remove()
    again = saved(load(), tmp_path / "again")
    softhooks.load(load(), again).remove()
    moved(zoo.build("llama"), 1.0, lambda name: "embed" in name).save_pretrained(tmp_path / "base")
    with pytest.raises(PromptMismatchError):
        softhooks.load(load(), folder)


def test_an_offloaded_base_is_read_where_that_is_cheap(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    folder = saved(zoo.build("llama"), tmp_path)
    softhooks.load(accelerate.cpu_offload(zoo.build("llama")), folder).remove()
    with pytest.raises(PromptMismatchError):
        softhooks.load(accelerate.cpu_offload(reseeded("llama")), folder)


# --- another base -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("arch", ARCHS)
def test_a_base_with_other_weights_is_refused(tmp_path: Path, arch: str, name: str) -> None:
    model = built(arch)
    saved(model, tmp_path, METHODS[name])
    other = reseeded(arch)
    before = {key: value.requires_grad for key, value in other.named_parameters()}
    with pytest.raises(PromptMismatchError, match="its weights are different") as raised:
        softhooks.load(other, tmp_path)
    kind = type(model).__name__
    assert str(raised.value).count(kind) == 2
    assert "strict=False" in str(raised.value)
    assert {key: value.requires_grad for key, value in other.named_parameters()} == before
    softhooks.load(other, tmp_path, strict=False).remove()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_fine_tuned_variant_is_refused_by_name(tmp_path: Path, precision: torch.dtype) -> None:
    folder = saved(zoo.build("llama").to(precision), tmp_path)
    with pytest.raises(PromptMismatchError, match="fine-tuned variant"):
        softhooks.load(moved(zoo.build("llama"), 1e-2).to(precision), folder)
    with pytest.raises(PromptMismatchError, match="fine-tuned variant"):
        softhooks.load(moved(zoo.build("llama"), 1e-2).to(torch.bfloat16), folder)


@pytest.mark.parametrize("arch", ["llama", "bert", "t5"])
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_a_base_that_was_converted_and_back_is_warned_of(tmp_path: Path, precision: torch.dtype, arch: str) -> None:
    folder = saved(built(arch), tmp_path)
    name = str(precision).removeprefix("torch.")
    with pytest.warns(UserWarning, match=f"converted to {name} and back"):
        softhooks.load(built(arch).to(precision).float(), folder).remove()
    with pytest.raises(PromptMismatchError, match="fine-tuned variant"):
        softhooks.load(moved(built(arch), 3e-2).to(precision).float(), folder)


def test_a_small_step_from_a_base_of_low_precision_is_refused(tmp_path: Path) -> None:
    """The base has only bf16 values, and each change is smaller than the precision of bf16."""
    folder = saved(zoo.build("llama").bfloat16().float(), tmp_path)
    with pytest.raises(PromptMismatchError, match="fine-tuned variant"):
        softhooks.load(moved(zoo.build("llama").bfloat16().float(), 1e-5), folder)


@pytest.mark.parametrize("rank_scale", [1e-2, 1.0])
def test_merged_adapters_are_refused_by_name(tmp_path: Path, rank_scale: float) -> None:
    peft = pytest.importorskip("peft")
    folder = saved(zoo.build("llama"), tmp_path / "bare")
    config = peft.LoraConfig(target_modules=["q_proj"], layers_to_transform=[1], init_lora_weights=False)
    lora = peft.get_peft_model(zoo.build("llama"), config)
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            parameter.data *= rank_scale
    with pytest.raises(PromptMismatchError, match="merged adapters"):
        softhooks.load(lora.merge_and_unload().eval(), folder)
    other = saved(moved(zoo.build("llama"), 1e-2, is_projection), tmp_path / "merged")
    with pytest.raises(PromptMismatchError, match="merged adapters"):
        softhooks.load(zoo.build("llama"), other)


def adapted(arch: str = "llama", *, scale: float = 0.3, seed: int = 5, **options: Any) -> Any:
    """A model under LoRA whose matrices are random, small next to the weights if `scale` is."""
    peft = pytest.importorskip("peft")
    target = {"gpt2": ["c_attn", "c_proj"], "llama": ["q_proj", "down_proj"]}[arch]
    config = peft.LoraConfig(target_modules=target, r=4, fan_in_fan_out=arch == "gpt2", **options)
    model = peft.get_peft_model(zoo.build(arch), config).eval()
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter) * scale
    return model


@pytest.mark.parametrize(
    ("arch", "options", "precision"),
    [
        ("llama", {}, torch.float32),
        ("llama", {}, torch.bfloat16),
        ("llama", {}, torch.float16),
        ("gpt2", {"use_rslora": True, "lora_alpha": 3}, torch.float32),
        ("gpt2", {"use_rslora": True, "lora_alpha": 3}, torch.bfloat16),
    ],
)
def test_the_same_lora_may_be_merged_or_not(
    tmp_path: Path, arch: str, options: dict[str, Any], precision: torch.dtype
) -> None:
    over = saved(adapted(arch, **options).to(precision), tmp_path / "over")
    merged = adapted(arch, **options).to(precision).merge_and_unload()
    softhooks.load(merged, over).remove()
    softhooks.load(adapted(arch, **options).merge_and_unload().to(precision), over).remove()
    into = saved(merged, tmp_path / "into")
    softhooks.load(adapted(arch, **options).to(precision), into).remove()
    softhooks.load(adapted(arch, **options), into).remove()


def test_lora_may_be_merged_in_place_and_unmerged(tmp_path: Path) -> None:
    model = adapted()
    folder = saved(model, tmp_path / "before")
    model.merge_adapter()
    softhooks.load(model, folder).remove()
    within = saved(model, tmp_path / "within")
    model.unmerge_adapter()
    softhooks.load(model, folder).remove()
    softhooks.load(model, within).remove()
    softhooks.load(adapted(), within).remove()


def test_two_adapters_are_merged_together(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    folder = saved(model, tmp_path)
    softhooks.load(copy.deepcopy(model).merge_and_unload(), folder).remove()
    model.set_adapter("default")
    with pytest.raises(PromptMismatchError, match="merged adapters"):
        softhooks.load(model.merge_and_unload(), folder)


@pytest.mark.parametrize("difference", ["trained on", "another", "scaled", "off", "of another kind"])
def test_another_lora_merged_is_refused(tmp_path: Path, difference: str) -> None:
    folder = saved(adapted(use_dora=difference == "of another kind"), tmp_path)
    other = adapted(
        seed=6 if difference == "another" else 5,
        lora_alpha=9 if difference == "scaled" else 8,
        use_dora=difference == "of another kind",
    )
    if difference == "trained on":
        moved(other, 1e-2, lambda name: "lora_B" in name)
    merged = other.merge_and_unload()
    if difference == "off":
        model = adapted()
        with model.disable_adapter():
            folder = saved(model, tmp_path / "off")
    with pytest.raises(PromptMismatchError, match="merged adapters"):
        softhooks.load(merged, folder)


@pytest.mark.filterwarnings("ignore:.* embedding rows")  # that the rows are drawn anew in each process
@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("change", [-5, 7])
def test_resized_embeddings_are_refused_by_name(tmp_path: Path, arch: str, change: int) -> None:
    folder = saved(zoo.build(arch), tmp_path)
    model = zoo.build(arch)
    model.resize_token_embeddings(zoo.VOCABULARY + change, mean_resizing=False)
    more, less = "resized embeddings.*96 rows.*103 rows", "96 tokens.*91 tokens.*resize_token_embeddings"
    with pytest.raises(PromptMismatchError, match=f"(?s){more if change > 0 else less}"):
        softhooks.load(model, folder)
    softhooks.load(model, folder, strict=False).remove()
    softhooks.load(model, saved(model, tmp_path / "resized")).remove()


def test_the_error_names_both_with_their_revisions(tmp_path: Path) -> None:
    model = zoo.build("llama")
    model.config._name_or_path, model.config._commit_hash = "maker/model", "a" * 40
    folder = saved(model, tmp_path)
    other = reseeded("llama")
    other.config._name_or_path, other.config._commit_hash = "maker/other", "b" * 40
    with pytest.raises(PromptMismatchError) as raised:
        softhooks.load(other, folder)
    for word in ("maker/model", "a" * 40, "maker/other", "b" * 40, "digest"):
        assert word in str(raised.value)
    digests = [take_fingerprint(each, examine(each)).digest for each in (model, other)]
    assert all(digest in str(raised.value) for digest in digests)
    model.config._commit_hash = "c" * 40  # another revision with the same weights
    softhooks.load(model, folder).remove()


def test_a_prompt_on_a_model_that_carries_others_is_checked_too(tmp_path: Path) -> None:
    folder = saved(zoo.build("llama"), tmp_path)
    other = reseeded("llama")
    with softhooks.attach(other, PromptTuning(3)), pytest.raises(PromptMismatchError):
        softhooks.load(other, folder, "second")


def test_one_cartridge_of_another_base_is_refused(tmp_path: Path) -> None:
    def cartridge(model: Any, folder: Path) -> Path:
        return saved(model, folder, Cartridge(3, document=[5, 6, 7, 8], distill=False))

    first, second = cartridge(zoo.build("llama"), tmp_path / "1"), cartridge(reseeded("llama"), tmp_path / "2")
    for sources in ([first, second], [second, first]):
        with pytest.raises(PromptMismatchError, match=r"base model (of the prompt|that the prompt was trained with)"):
            Cartridge.concatenate(zoo.build("llama"), sources)
    there = softhooks.attach(reseeded("llama"), Cartridge(3, document=[5, 6, 7, 8], distill=False))
    with pytest.raises(PromptMismatchError, match=r"base model (of the prompt|that the prompt was trained with)"):
        Cartridge.concatenate(zoo.build("llama"), [first, there])


def test_a_prompt_that_starts_from_one_of_another_base_is_refused(tmp_path: Path) -> None:
    folder = saved(zoo.build("llama"), tmp_path)
    method = PromptTuning(3, init="prompt", init_from=folder)
    softhooks.attach(zoo.build("llama"), method).remove()
    with pytest.raises(PromptMismatchError, match=r"base model (of the prompt|that the prompt was trained with)"):
        softhooks.attach(reseeded("llama"), method)


# --- files --------------------------------------------------------------------------------------------------------------


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "soft_prompt.safetensors"
    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        told = json.loads(file.metadata()["softhooks"])
    change(told)
    save_file(tensors, str(path), {"format": "pt", "softhooks": json.dumps(told)})


def test_a_file_without_a_fingerprint_loads_as_it_did(tmp_path: Path) -> None:
    folder = saved(zoo.build("llama"), tmp_path)
    rewritten(folder, lambda told: told["base"].pop("fingerprint"))
    softhooks.load(reseeded("llama"), folder).remove()


@pytest.mark.parametrize(
    "told",
    [
        [],
        {"vocabulary": "96"},
        {"vocabulary": 96, "matrices": ["a"]},
        {"vocabulary": 96, "matrices": {"a": 3}},
        {"vocabulary": 96, "matrices": {"a": "f???"}},
        {"vocabulary": 96, "matrices": {"a": "xAACAPw=="}},
        {"vocabulary": 96, "matrices": {"a": "fAACA"}},
        {"vocabulary": 96},
        {"vocabulary": 96, "embeddings": {}, "vectors": {}, "matrices": {}},
        {"vocabulary": 96, "embeddings": {"a": "fAACAPwAAgD8="}},  # two numbers of an embedding
        {"vocabulary": 96, "vectors": {"a": "f"}},
        {"vocabulary": 96, "matrices": {"a": "q" + "A" * 100_000}},
        {"vocabulary": 96, "matrices": {"a": "qAACAPwAAgD8="}},  # codes of a quantizer are never read
    ],
    ids=lambda told: str(told)[:60],
)
def test_a_foreign_fingerprint_is_refused(tmp_path: Path, told: Any) -> None:
    folder = saved(zoo.build("llama"), tmp_path)
    rewritten(folder, lambda description: description["base"].update(fingerprint=told))
    with pytest.raises(CheckpointError, match="malformed fingerprint of its base"):
        softhooks.load(zoo.build("llama"), folder)


def test_a_fingerprint_is_small_and_survives_json() -> None:
    model = zoo.build("bert")
    known = take_fingerprint(model, examine(model))
    told = json.dumps(known.to_json())
    assert len(told) < 8000
    again = Fingerprint.from_json(json.loads(told))
    assert compare(known, again) == "same"
    assert again.digest == known.digest


class Counting(TorchDispatchMode):
    """Counts the numbers that operations return, views aside."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and "detach" not in str(func):
            self.total += result.numel()
        return result


def test_only_a_few_numbers_are_read() -> None:
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**{**zoo.SMALL, "hidden_size": 512, "intermediate_size": 2048}))
    structure = examine(model)
    with Counting() as counting:
        take_fingerprint(model, structure)
    assert counting.total < 0.01 * sum(parameter.numel() for parameter in model.parameters())


def test_a_prompt_of_peft_is_held_to_its_revision(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, revision="a" * 40)
    model = zoo.build("llama")
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    told |= {"base_model_name_or_path": "maker/model", "revision": "a" * 40}
    (tmp_path / "adapter_config.json").write_text(json.dumps(told))
    base = zoo.build("llama")
    base.config._name_or_path, base.config._commit_hash = "maker/model", "b" * 40
    with pytest.raises(PromptMismatchError, match=r"(?s)revision.*" + "a" * 40 + ".*" + "b" * 40):
        softhooks.load(base, tmp_path)
    softhooks.load(base, tmp_path, strict=False).remove()
    base.config._commit_hash = "a" * 40
    softhooks.load(base, tmp_path).remove()
    base.config._commit_hash = None
    softhooks.load(base, tmp_path).remove()


def test_a_prompt_written_for_peft_names_its_revision(tmp_path: Path) -> None:
    model = zoo.build("llama")
    model.config._commit_hash = "a" * 40
    with softhooks.attach(model, PromptTuning(3)) as prompt:
        prompt.save_pretrained(tmp_path, as_peft=True)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["revision"] == "a" * 40


def test_a_sharded_base_has_the_fingerprint_of_when_it_was_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.build("llama")
    with softhooks.attach(model, PrefixTuning(3)) as prompt:
        monkeypatch.setattr("softhooks.prompt.is_sharded_model", lambda _model: True)
        prompted: PromptedModel = prompt.prompted_model
        kept = prompted.fingerprint
        assert kept is not None
        moved(model, 1.0)
        prompt.save_pretrained(tmp_path)
    softhooks.load(zoo.build("llama"), tmp_path).remove()
