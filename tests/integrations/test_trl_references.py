"""TRL's trainers with a reference model, and those that sample from the policy: where the prompt is on and where off."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import examples
import torch
import training
import trl
import zoo
from trl_runs import DATA, PAIRS, SMALL, TOKENIZER, build, make, metrics, prompted
from untouched import remove_all, untouched

import softhooks
from softhooks import ContextAwarePromptTuning, PrefixTuning, PromptTuning, SoftPromptCallback, TrainerError
from softhooks.integrations.trl import reference
from softhooks.runtime.prompted_model import prompted_model_of

METHODS = [PromptTuning(4), PrefixTuning(4)]
NAMES = ["prompt", "prefix"]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the model, from which TRL loads its copies."""
    folder = str(tmp_path_factory.mktemp("model"))
    zoo.build("llama").save_pretrained(folder)
    return folder


def run(kind: str, folder: Path, model: Any, method: Any, **more: Any) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Train; return the logs and the trained parameters."""
    trainer, callback = prompted(kind, folder, model, method, **more)
    trainer.train()
    found = metrics(trainer), training.trained(callback)
    assert callback.soft_prompt is not None
    callback.soft_prompt.remove()
    return found


# --- a reference that is the policy itself ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize("kind", ["DPO", "KTO"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_the_policy_is_its_own_reference(tmp_path: Path, stored: str, kind: str, method: Any, bf16: bool) -> None:
    def trained(model: Any, **given: Any) -> Any:
        more = {**given, "eval_dataset": DATA[kind].select(range(4))}
        return run(kind, tmp_path, model, method, given=more, bf16=bf16, eval_strategy="steps", eval_steps=1)

    model = build(kind)
    own = trained(model, ref_model=reference(model))
    assert training.equal(own, trained(build(kind), ref_model=build(kind)))
    assert len(own[0]) == 6, "a log of each step, and of each evaluation"
    assert all(abs(entry[key]) > 1e-3 for entry in own[0] for key in entry if key.endswith("rewards/chosen"))
    if not bf16:
        named = build(kind)
        named.config.name_or_path = stored
        assert training.equal(own, trained(named)), "TRL's own copy"


def test_dropout_of_the_policy_is_none_of_the_reference(tmp_path: Path) -> None:
    def dropping() -> Any:
        return zoo.build("llama", attention_dropout=0.3)

    model, options = dropping(), {"disable_dropout": False, "gradient_checkpointing": False}
    own = run("DPO", tmp_path, model, PrefixTuning(4), given={"ref_model": reference(model)}, **options)
    copied = run("DPO", tmp_path, dropping(), PrefixTuning(4), given={"ref_model": dropping()}, **options)
    assert training.equal(own, copied)
    bare = build("DPO")
    still = run("DPO", tmp_path, bare, PrefixTuning(4), given={"ref_model": reference(bare)}, **options)
    assert not training.equal(own, still), "the policy drops"


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_precomputed_references_are_those_of_the_bare_model(tmp_path: Path, kind: str, method: Any) -> None:
    options: dict[str, Any] = {"precompute_ref_log_probs": True, "per_device_train_batch_size": 8}
    found = []
    for given in ({}, {"ref_model": build(kind)}):
        trainer, callback = prompted(kind, tmp_path, build(kind), method, given=given, **options)
        columns = [name for name in trainer.train_dataset.column_names if name.startswith("ref_")]
        assert columns
        ahead = [trainer.train_dataset[name] for name in columns]
        trainer.train()
        found.append((ahead, metrics(trainer), training.trained(callback)))
    assert training.equal(*[[torch.tensor(list(column)) for column in run[0]] for run in found])
    assert training.equal(found[0][1:], found[1][1:])
    assert any(abs(entry["rewards/chosen"]) > 1e-3 for entry in found[0][1]), "policy and reference differ"


def test_a_prompt_that_was_trained_before_is_the_reference(tmp_path: Path) -> None:
    with softhooks.attach(build("DPO"), PrefixTuning(3)) as before:
        before.save_pretrained(tmp_path / "before")
    model, other = build("DPO"), build("DPO")
    softhooks.load(model, tmp_path / "before", name="before")
    softhooks.load(other, tmp_path / "before")
    own = run("DPO", tmp_path, model, PrefixTuning(4), given={"ref_model": reference(model, prompt="before")})
    copied = run("DPO", tmp_path, build("DPO"), PrefixTuning(4), given={"ref_model": other})
    bare = run("DPO", tmp_path, build("DPO"), PrefixTuning(4), given={"ref_model": build("DPO")})
    assert training.equal(own, copied)
    assert not training.equal(own, bare)


@pytest.mark.parametrize(("options", "given", "said"), [
    ({}, {"prompt": "default"}, "soft_prompt.default"),
    ({"trainable": "lm_head*"}, {}, "lm_head"),
])  # fmt: skip
def test_a_reference_that_would_move_is_refused(tmp_path: Path, options: Any, given: Any, said: str) -> None:
    model = build("DPO")
    callback = SoftPromptCallback(PromptTuning(4), **options)
    trainer = make("DPO", tmp_path, model, [callback], given={"ref_model": reference(model, **given)})
    base = training.base_of(model)
    with pytest.raises(TrainerError, match=rf"{said}.* of the reference model is being trained(.|\n)*another model as"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert training.equal(training.base_of(model), base)


def test_without_a_prompt_a_reference_is_no_reference(tmp_path: Path) -> None:
    model = build("DPO")
    trainer = make("DPO", tmp_path, model, [], given={"ref_model": reference(model)})
    with pytest.raises(TrainerError, match=r"model\.embed_tokens\.weight of the reference model is being trained"):
        trainer.train()


@pytest.mark.parametrize("ahead", [False, True], ids=["in-training", "precomputed"])
@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_a_deep_copy_of_a_policy_is_no_reference(tmp_path: Path, kind: str, ahead: bool) -> None:
    model = build(kind)
    softhooks.attach(model, PromptTuning(4))
    contaminated = copy.deepcopy(model)
    base = training.base_of(model)
    given, start = {"ref_model": contaminated}, prompted if ahead else run  # ahead: before anything is computed
    with pytest.raises(
        TrainerError,
        match=r"the `ref_model` has a trainable copy of the prompt 'default'(.|\n)*reference\(model, prompt=name\)",
    ):
        start(kind, tmp_path, model, PromptTuning(4), given=given, precompute_ref_log_probs=ahead)
    assert training.equal(training.base_of(model), base)
    remove_all()
    run(
        kind,
        tmp_path,
        model,
        PromptTuning(4),
        given={"ref_model": copy.deepcopy(model)},
        precompute_ref_log_probs=ahead,
    )


def test_the_trainers_class_is_itself_again_when_the_last_prompt_is_gone(tmp_path: Path) -> None:
    before = {cls: (cls.compute_loss, cls.compute_ref_log_probs) for cls in (trl.DPOTrainer, trl.KTOTrainer)}
    model, other = build("DPO"), build("KTO")
    _, one = prompted("DPO", tmp_path, model, PromptTuning(4), given={"ref_model": reference(model)})
    _, two = prompted("KTO", tmp_path, other, PromptTuning(4), given={"ref_model": reference(other)})
    assert trl.DPOTrainer.compute_loss is not before[trl.DPOTrainer][0]
    bare = make("DPO", tmp_path, build("DPO"), [], given={"ref_model": build("DPO")})
    bare.train()
    assert one.soft_prompt is not None
    assert two.soft_prompt is not None
    one.soft_prompt.remove()
    assert trl.KTOTrainer.compute_loss is not before[trl.KTOTrainer][0]
    two.soft_prompt.remove()
    assert {cls: (cls.compute_loss, cls.compute_ref_log_probs) for cls in before} == before


# --- trainers that sample ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_completions_are_the_prompts_and_the_reference_is_bare(
    tmp_path: Path, stored: str, kind: str, method: Any
) -> None:
    told: list[tuple[list[int], list[int]]] = []

    def keep(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        told.extend((TOKENIZER(text)["input_ids"], ids) for text, ids in zip(prompts, completion_ids, strict=True))
        return [float(len(set(ids))) + number for number, ids in enumerate(completion_ids)]

    model = build(kind)
    model.config.name_or_path = stored
    base = training.base_of(model)
    trainer, callback = prompted(
        kind, tmp_path, model, method, given={"reward_funcs": keep}, beta=0.1, top_k=1, max_steps=1, learning_rate=0.5
    )
    references: list[torch.Tensor] = []
    score = trainer._get_per_token_logps_and_entropies

    def noting(scoring: Any, ids: Any, mask: Any, kept: int, *args: Any, **kwargs: Any) -> Any:
        result = score(scoring, ids, mask, kept, *args, **kwargs)
        if scoring is trainer.ref_model:
            logits = build(kind)(input_ids=ids, attention_mask=mask).logits[:, :-1] / trainer.temperature
            wanted = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[:, -kept:, 0]
            real = mask[:, -kept:].bool()
            torch.testing.assert_close(result[0][real], wanted[real], rtol=1e-4, atol=1e-4)
            references.append(result[0])
        return result

    trainer._get_per_token_logps_and_entropies = noting
    with torch.no_grad():
        assert callback.soft_prompt is not None
        for parameter in callback.soft_prompt.parameters():  # far enough away that it matters to the likeliest token
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=2.0)
    expected = {}
    for text in PAIRS["prompt"]:
        ids = torch.tensor([TOKENIZER(text)["input_ids"]])
        with softhooks.disabled(model):
            bare = model.generate(ids, do_sample=False, max_new_tokens=5)[0, ids.shape[1] :].tolist()
        own = model.generate(ids, do_sample=False, max_new_tokens=5)[0, ids.shape[1] :].tolist()
        expected[tuple(ids[0].tolist())] = own, bare
    trainer.train()
    assert references
    assert told
    for ids, completion in told:
        assert completion == expected[tuple(ids)][0]
    assert any(own != bare for own, bare in expected.values())
    callback.soft_prompt.verify_frozen()
    assert training.equal(training.base_of(model), base)


# --- what is refused --------------------------------------------------------------------------------------------------

SHOT = ContextAwarePromptTuning(context_ids=[5, 6, 7, 8], token_types=[1, 2, 2, 4])


@pytest.mark.parametrize(("kind", "method", "options", "said"), [
    ("GRPO", PromptTuning(4), {"use_vllm": True}, "vLLM(.|\n)*use_vllm=False"),
    ("RLOO", PromptTuning(4), {"use_vllm": True}, "vLLM(.|\n)*use_vllm=False"),
    ("GRPO", PromptTuning(4), {"use_transformers_continuous_batching": True}, "paged attention"),
    ("DPO", PromptTuning(4), {"sync_ref_model": True}, "sync_ref_model=False"),
    ("KTO", PromptTuning(4), {"sync_ref_model": True}, "sync_ref_model=False"),
    ("SFT", SHOT, {}, "ContextAwarePromptTuning(.|\n)*has its own objective"),
    ("Reward", SHOT, {}, "ContextAwarePromptTuning(.|\n)*has its own objective"),
])  # fmt: skip
def test_what_would_be_wrong_is_refused_before_anything_is_attached(
    tmp_path: Path, kind: str, method: Any, options: dict[str, Any], said: str
) -> None:
    model = build(kind)
    given = {"ref_model": build(kind)} if kind in ("DPO", "KTO") else {}
    with untouched(model), pytest.raises(TrainerError, match=said):
        prompted(kind, tmp_path, model, method, given=given, **options)
    assert prompted_model_of(model) is None


def test_kernels_put_in_later_are_refused(tmp_path: Path) -> None:
    model = build("SFT")
    callback = SoftPromptCallback(PromptTuning(4))
    arguments = trl.SFTConfig(str(tmp_path), **SMALL)
    arguments.use_liger_kernel = True
    with untouched(model), pytest.raises(TrainerError, match="use_liger_kernel=False"):
        callback.on_init_end(arguments, None, None, model=model)  # type: ignore[arg-type]


def test_a_head_that_would_be_converted_is_refused(tmp_path: Path) -> None:
    model = build("GRPO").to(torch.bfloat16)
    with untouched(model), pytest.raises(TrainerError, match=r"torch.bfloat16(.|\n)*model.lm_head.float\(\)"):
        prompted("GRPO", tmp_path, model, PromptTuning(4), cast_lm_head_to_fp32=True)
    run("GRPO", tmp_path, build("GRPO"), PromptTuning(4), cast_lm_head_to_fp32=True)


def test_a_callback_that_comes_late_refuses_too(tmp_path: Path) -> None:
    model = build("SFT")
    trainer = make("SFT", tmp_path, model, [])
    with pytest.raises(TrainerError, match="has its own objective"):
        trainer.add_callback(SoftPromptCallback(SHOT))
    assert prompted_model_of(model) is None


def test_arguments_derived_from_trls_are_known_and_its_other_trainers_refused(tmp_path: Path) -> None:
    from softhooks.integrations.trl import check

    @dataclasses.dataclass
    class Mine(trl.GRPOConfig):
        pass

    model, method = build("GRPO"), PromptTuning(4)
    check(trl.SFTConfig(str(tmp_path), **SMALL), model, method, ())
    with pytest.raises(TrainerError, match="use_vllm"):
        check(Mine(str(tmp_path), **SMALL, use_vllm=True, num_generations=4), model, method, ())
    with pytest.raises(TrainerError, match=r"DistillationConfig(.|\n)*softhooks.attach"):
        check(trl.DistillationConfig(str(tmp_path), **SMALL), model, method, ())


# --- PEFT adapters ----------------------------------------------------------------------------------------------------


def lora() -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)


def test_an_adapter_trains_with_the_prompt_or_is_refused(tmp_path: Path) -> None:
    model = build("SFT")
    base = training.base_of(model)
    with pytest.raises(TrainerError, match=r"would freeze the adapter(.|\n)*q_proj.lora_A(.|\n)*trainable='\*lora_\*'"):
        prompted("SFT", tmp_path, model, PromptTuning(4), given={"peft_config": lora()})
    model = build("SFT")
    callback = SoftPromptCallback(PromptTuning(4), trainable="*lora_*")
    trainer = make("SFT", tmp_path, model, [callback], given={"peft_config": lora()})
    start = training.trained(callback)
    assert any("lora_A" in name for name in start)
    assert any("soft_prompt" in name for name in start)
    trainer.train()
    assert not [name for name, value in training.trained(callback).items() if torch.equal(value, start[name])]
    assert callback.soft_prompt is not None
    callback.soft_prompt.verify_frozen()
    callback.soft_prompt.remove()
    bare = trainer.model.unload()
    assert training.equal({name: value for name, value in bare.state_dict().items() if name in base}, base)


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_an_adapters_reference_has_the_prompt_off_or_is_refused(tmp_path: Path, kind: str) -> None:
    def made(given: dict[str, Any], **options: Any) -> Any:
        callback = SoftPromptCallback(PromptTuning(4), trainable="*lora_*")
        return make(kind, tmp_path, build(kind), [callback], given={"peft_config": lora(), **given}, **options)

    trainer = made({})
    with pytest.raises(
        TrainerError, match=r"without its PEFT adapter but with the prompt(.|\n)*precompute_ref_log_probs=True"
    ):
        trainer.train()
    assert trainer.state.global_step == 0
    remove_all()
    options: dict[str, Any] = {"precompute_ref_log_probs": True, "per_device_train_batch_size": 8, "max_steps": 2}
    ahead, apart = made({}, **options), made({"ref_model": build(kind)}, **options)
    ahead.train()
    apart.train()
    assert metrics(ahead) == metrics(apart)


def test_the_bare_model_of_an_adapter_that_rests_has_the_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def made() -> Any:
        torch.manual_seed(0)
        return peft.get_peft_model(build("DPO"), lora()).requires_grad_(False)

    model = made()
    own = run("DPO", tmp_path, model, PrefixTuning(4), given={"ref_model": reference(model)})
    inside = made().get_base_model()  # TRL takes no PeftModel for a reference
    assert training.equal(own, run("DPO", tmp_path, made(), PrefixTuning(4), given={"ref_model": inside}))
    assert not training.equal(own, run("DPO", tmp_path, made(), PrefixTuning(4), given={"ref_model": build("DPO")}))


def test_samplers_with_an_adapter_and_a_reference_are_refused(tmp_path: Path) -> None:
    callback = SoftPromptCallback(PromptTuning(4), trainable="*lora_*")
    with pytest.raises(TrainerError, match=r"beta=0.1 and a PEFT adapter(.|\n)*beta=0.0"):
        make("GRPO", tmp_path, build("GRPO"), [callback], given={"peft_config": lora()}, beta=0.1)


# --- the example ------------------------------------------------------------------------------------------------------


def test_the_example_runs() -> None:
    left = examples.run("trl")
    prompt = prompted_model_of(left["model"]).prompts["default"]  # type: ignore[union-attr]
    prompt.verify_frozen()
    margins = [entry["rewards/margins"] for entry in training.logs(left["trainer"])]
    assert len(margins) == 4
    assert margins[-1] > margins[0]
