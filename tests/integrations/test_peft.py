"""Converting prompts between live PEFT and softhooks models, both ways, for every PEFT method and kind of model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import examples
import naive
import peers
import pytest
import torch
import training
import zoo
from torch import Tensor
from torch.nn import functional
from untouched import differences, remove_all, same_bits, snapshot, untouched

import softhooks
from softhooks import (
    AttachError,
    Cartridge,
    CheckpointError,
    ContextAwarePromptTuning,
    LlamaAdapter,
    MultitaskPromptTuning,
    NameTakenError,
    OptionError,
    PrefixTuning,
    PromptMismatchError,
    PromptTuning,
    PTuning,
    SoftHooksError,
    UnsupportedMethodError,
)
from softhooks.formats.peft_llama_adapter import KIND
from softhooks.formats.peft_read import KINDS
from softhooks.integrations.peft import from_peft, to_peft

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:Position ids are not supported")
P, K = 4, 3
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
TASK_IDS = torch.tensor([2, 0])
TASKS = {
    "causal": "CAUSAL_LM",
    "sequence": "SEQ_CLS",
    "tokens": "TOKEN_CLS",
    "qa": "QUESTION_ANS",
    "seq2seq": "SEQ_2_SEQ_LM",
}


def _cpt(task: str) -> Any:
    types = [1, 2, 3, 4]
    return peft.CPTConfig(
        task_type=task, num_virtual_tokens=P, cpt_token_ids=[5, 6, 7, 8], cpt_mask=[1] * P, cpt_tokens_type_mask=types,
        opt_projection_epsilon=9.0, opt_projection_format_epsilon=9.0,
    )  # fmt: skip


CONFIGS: dict[str, Callable[[str], Any]] = {
    "prompt": lambda task: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=P),
    "p-tuning lstm": lambda task: peft.PromptEncoderConfig(
        task_type=task, num_virtual_tokens=P, encoder_hidden_size=12, encoder_reparameterization_type="LSTM"
    ),
    "p-tuning mlp": lambda task: peft.PromptEncoderConfig(
        task_type=task, num_virtual_tokens=P, encoder_hidden_size=12, encoder_reparameterization_type="MLP"
    ),
    "prefix": lambda task: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=P),
    "prefix mlp": lambda task: peft.PrefixTuningConfig(
        task_type=task, num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=12
    ),
    "multitask": lambda task: peft.MultitaskPromptTuningConfig(
        task_type=task, num_virtual_tokens=P, num_tasks=K, num_ranks=2, prompt_tuning_init="RANDOM"
    ),
    "cpt": _cpt,
    "cartridge": lambda task: peft.CartridgeConfig(task_type=task, num_virtual_tokens=P, num_frozen_tokens=1),
    "llama-adapter": lambda task: peft.AdaptionPromptConfig(task_type=task, adapter_len=P, adapter_layers=2),
}
METHODS: dict[str, type] = {
    "prompt": PromptTuning, "p-tuning lstm": PTuning, "p-tuning mlp": PTuning, "prefix": PrefixTuning, "prefix mlp": PrefixTuning,
    "multitask": MultitaskPromptTuning, "cpt": ContextAwarePromptTuning, "cartridge": Cartridge, "llama-adapter": LlamaAdapter,
}  # fmt: skip
EVERYWHERE = [kind for kind in CONFIGS if kind not in ("cpt", "llama-adapter")]
ROWS = ["prompt", "p-tuning lstm", "p-tuning mlp", "multitask"]
BOTH_WAYS = [
    *[(arch, "causal", kind) for arch in ("llama", "gpt2", "qwen3") for kind in (*EVERYWHERE, "cpt")],
    *[(arch, "causal", "llama-adapter") for arch in ("llama", "mistral")],
    *[(arch, "sequence", kind) for arch in ("llama", "gpt2") for kind in EVERYWHERE],
    *[(arch, "tokens", kind) for arch in ("bert", "roberta") for kind in (*ROWS, "prefix", "prefix mlp")],
    *[(arch, "sequence", kind) for arch in ("bert", "roberta") for kind in ("prefix", "prefix mlp")],
    *[(arch, "seq2seq", kind) for arch in ("t5", "bart") for kind in ("prompt", "p-tuning lstm", "p-tuning mlp")],
]
"""Cases in which both libraries compute the same, for text without padding."""


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


@contextmanager
def kept(model: Any) -> Iterator[None]:
    """Fail if a model differs afterwards; attention functions are shared, and may be wrapped for a prompt elsewhere."""
    before = snapshot(model)
    yield
    found = differences(before, snapshot(model))
    assert not [name for name in found if name != "attention" and not name.startswith("eager ")]


def stirred(model: Any) -> Any:
    """Set every trained parameter of a PEFT model to random values."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.4)
    return model


def prompted(arch: str, head: str, kind: str, names: tuple[str, ...] = ("default",), **changes: Any) -> Any:
    """A PEFT model with adapters of one kind; the first is active."""
    torch.manual_seed(2)
    with peers.quiet():
        model = peft.get_peft_model(zoo.build(arch, head, **changes), CONFIGS[kind](TASKS[head]), adapter_name=names[0])
        stirred(model)
        for name in names[1:]:
            model.add_adapter(name, CONFIGS[kind](TASKS[head]))
            model.set_adapter(name)
            stirred(model)
        model.set_adapter(names[0])
    return model.eval()


@torch.no_grad()
def answer(model: Any, arch: str, head: str, kind: str, seed: int = 0) -> Tensor:
    """A model's outputs for text without padding, without the virtual tokens' positions, which PEFT returns."""
    ids = zoo.text(2, 7, seed=seed)
    extra = {"task_ids": TASK_IDS} if kind == "multitask" else {}
    with peers.quiet():
        found = zoo.main_output(model(**zoo.inputs(zoo.Case(arch, head), ids), **extra))
    return found[:, -ids.shape[1] :] if head in ("causal", "tokens") else found


def bare(arch: str, head: str, kind: str) -> Tensor:
    return answer(zoo.build(arch, head), arch, head, "none")


# --- both ways --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "head", "kind"), BOTH_WAYS)
def test_a_live_prompt_answers_the_same_both_ways(arch: str, head: str, kind: str) -> None:
    theirs = prompted(arch, head, kind)
    expected = answer(theirs, arch, head, kind)
    assert float((expected - bare(arch, head, kind)).abs().max()) > 0.05
    model = zoo.build(arch, head)
    with kept(theirs):
        [prompt] = from_peft(theirs, model).values()
    assert (type(prompt.method), prompt.name) == (METHODS[kind], "default")
    assert bool(prompt.heads) == (head in ("sequence", "tokens"))
    ours = answer(model, arch, head, kind)
    torch.testing.assert_close(ours, expected, **CLOSE)
    back = to_peft(prompt, zoo.build(arch, head))
    torch.testing.assert_close(answer(back, arch, head, kind), ours, **CLOSE)
    assert not any(parameter.requires_grad for parameter in back.parameters())
    assert same_bits(answer(model, arch, head, kind), ours), "the prompt is where it was"


@pytest.mark.parametrize("kind", ["prompt", "prefix", "llama-adapter"])
def test_softhooks_lets_a_model_go_to_peft_and_takes_it_back(kind: str) -> None:
    """On one model, without a copy of the base: the prompts are removed, PEFT wraps it, and its base takes them again."""
    theirs = prompted("llama", "causal", kind)
    model = zoo.build("llama")
    prompts = from_peft(theirs, model)
    expected = answer(model, "llama", "causal", kind)
    back = to_peft(prompts.values(), model)
    assert not hasattr(model, "soft_prompt")
    assert not prompts["default"].is_attached
    torch.testing.assert_close(answer(back, "llama", "causal", kind), expected, **CLOSE)
    if kind == "llama-adapter":
        with untouched(back), pytest.raises(OptionError, match=r"PEFT's LLaMA-Adapter, in model\.layers\.0\.self_attn"):
            from_peft(back, back.get_base_model())
        return
    from_peft(back, back.get_base_model())
    assert same_bits(answer(model, "llama", "causal", kind), expected)


def test_a_head_in_pefts_wrapper_is_found_in_its_own_base() -> None:
    theirs = prompted("llama", "sequence", "prompt")
    expected = answer(theirs, "llama", "sequence", "prompt")
    from_peft(theirs, theirs.get_base_model())
    torch.testing.assert_close(answer(theirs.get_base_model(), "llama", "sequence", "prompt"), expected, **CLOSE)


# --- several ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "head", "kind"),
    [
        *[("llama", "causal", kind) for kind in CONFIGS],
        ("llama", "sequence", "prompt"), ("gpt2", "sequence", "prefix"), ("bert", "tokens", "prompt"),
        ("bert", "sequence", "prefix"), ("t5", "seq2seq", "prompt"),
    ],
)  # fmt: skip
def test_several_adapters_become_several_prompts_by_name_and_come_back(arch: str, head: str, kind: str) -> None:
    names = ("en", "de", "fr_2")
    theirs = prompted(arch, head, kind, names)
    expected = {}
    for name in names:
        theirs.set_adapter(name)
        expected[name] = answer(theirs, arch, head, kind)
    theirs.set_adapter("de")
    assert float((expected["en"] - expected["de"]).abs().max()) > 0.05
    model = zoo.build(arch, head)
    prompts = from_peft(theirs, model)
    assert tuple(prompts) == names
    assert prompts["en"].prompted_model.active == "de", "what was active there is on here"
    assert theirs.active_adapter == "de"
    for name in names:
        softhooks.activate(model, name)
        torch.testing.assert_close(answer(model, arch, head, kind), expected[name], **CLOSE)
    back = to_peft(prompts.values(), model)
    assert list(back.peft_config) == list(names)
    assert back.active_adapter == "fr_2"
    for name in names:
        back.set_adapter(name)
        torch.testing.assert_close(answer(back, arch, head, kind), expected[name], **CLOSE)


def test_some_adapters_under_other_names_beside_a_prompt_that_is_there() -> None:
    theirs, model = prompted("llama", "causal", "prompt", ("a", "b")), zoo.build("llama")
    own = softhooks.attach(model, PrefixTuning(2), "own")
    with pytest.raises(NameTakenError, match="own"):
        from_peft(theirs, model, {"a": "own"})
    assert list(from_peft(theirs, model, {"b": "second"})) == ["second"]
    assert list(from_peft(theirs, model, ["a"])) == ["a"]
    assert list(own.prompted_model.prompts) == ["own", "second", "a"]
    theirs.set_adapter("b")
    softhooks.activate(model, "second")
    torch.testing.assert_close(
        answer(model, "llama", "causal", "prompt"), answer(theirs, "llama", "causal", "prompt"), **CLOSE
    )


@pytest.mark.parametrize("kind", ["prompt", "p-tuning lstm", "prefix mlp", "multitask", "cpt", "llama-adapter"])
def test_what_comes_from_peft_trains_on_and_goes_back_trainable(kind: str) -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 7)
    [prompt] = from_peft(prompted("llama", "causal", kind), model, trainable=True).values()
    extra = {"task_ids": TASK_IDS} if kind == "multitask" else {}
    optimizer = torch.optim.SGD(prompt.parameters(), lr=0.5)
    before = answer(model, "llama", "causal", kind)
    model.train()(ids, labels=ids, **extra).loss.backward()
    model.eval()
    optimizer.step()
    prompt.verify_frozen()
    expected = answer(model, "llama", "causal", kind)
    assert not torch.allclose(expected, before, atol=1e-4)
    back = to_peft(prompt, model, trainable=True)
    torch.testing.assert_close(answer(back, "llama", "causal", kind), expected, **CLOSE)
    assert any(parameter.requires_grad for parameter in back.parameters())
    if kind not in ("cpt",):  # PEFT's own loss there looks for what a Trainer would bring
        with peers.quiet():
            back(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, **extra).loss.backward()
        moved = {name for name, parameter in back.named_parameters() if parameter.grad is not None}
        assert moved
        assert not [name for name in moved if "prompt_encoder" not in name and "adaption_" not in name]


# --- where PEFT is wrong, the prompt that it trained is right here ------------------------------------------------------


@pytest.mark.parametrize("kind", ["prompt", "p-tuning lstm", "multitask", "cpt"])
def test_case_1_a_prompt_that_peft_trained_is_right_on_padded_rows(kind: str) -> None:
    theirs, model = prompted("llama", "causal", kind), zoo.build("llama")
    from_peft(theirs, model)
    rows = [zoo.text(1, length, seed=length)[0] for length in (7, 3)]
    extra = {"task_ids": TASK_IDS} if kind == "multitask" else {}
    with torch.no_grad(), peers.quiet():
        alone = []
        for number, row in enumerate(rows):
            one = {"task_ids": TASK_IDS[number : number + 1]} if extra else {}
            alone.append(theirs(input_ids=row[None], attention_mask=torch.ones(1, len(row)), **one).logits[0, -1])
        batch = naive.left_padded(rows)
        found, wrong = model(**batch, **extra).logits[:, -1], theirs(**batch, **extra).logits[:, -1]
    torch.testing.assert_close(found, torch.stack(alone), rtol=1e-4, atol=5e-5)
    assert float((wrong[1] - alone[1]).abs().max()) > 0.1


def test_case_2_a_classifier_that_peft_trained_is_right_on_padded_rows() -> None:
    theirs, model = prompted("llama", "sequence", "prompt"), zoo.build("llama", "sequence")
    from_peft(theirs, model)
    long, short = zoo.text(1, 7)[0], zoo.text(1, 3, seed=3)[0]
    batch = {
        "input_ids": torch.stack([long, torch.cat([short, torch.full((4,), zoo.PAD)])]),
        "attention_mask": torch.tensor([[1] * 7, [1] * 3 + [0] * 4]),
    }
    with torch.no_grad(), peers.quiet():
        alone = theirs(input_ids=short[None], attention_mask=torch.ones(1, 3)).logits[0]
        torch.testing.assert_close(model(**batch).logits[1], alone, rtol=1e-4, atol=5e-5)
        assert float((theirs(**batch).logits[1] - alone).abs().max()) > 0.1


def test_case_3_spans_that_peft_trained_are_those_of_the_text() -> None:
    theirs, model = prompted("bert", "qa", "prompt"), zoo.build("bert", "qa")
    from_peft(theirs, model)
    ids, starts, ends = zoo.text(2, 7), torch.tensor([1, 3]), torch.tensor([2, 6])
    with torch.no_grad(), peers.quiet():
        ours, wide = model(ids, start_positions=starts, end_positions=ends), theirs(input_ids=ids)
        assert theirs(input_ids=ids, start_positions=starts, end_positions=ends).loss != ours.loss
    torch.testing.assert_close(ours.start_logits, wide.start_logits[:, P:], **CLOSE)
    torch.testing.assert_close(ours.end_logits, wide.end_logits[:, P:], **CLOSE)
    start, end = ours.start_logits, ours.end_logits
    loss = (functional.cross_entropy(start, starts) + functional.cross_entropy(end, ends)) / 2
    torch.testing.assert_close(ours.loss, loss, **CLOSE)


@pytest.mark.parametrize("kind", ["p-tuning lstm", "p-tuning mlp", "cpt", "prefix mlp"])
def test_cases_4_and_5_a_checkpoint_of_pefts_trainer_is_what_was_trained(tmp_path: Path, kind: str) -> None:
    """PEFT itself loads the folded output as its network's input, or embedding and delta as embedding."""
    theirs = prompted("llama", "causal", kind)
    trainer = training.make(
        tmp_path, theirs, "causal", [], max_steps=2, save_strategy="steps", save_steps=2, remove_unused_columns=False
    )
    with peers.quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "cpt":  # its type mask would have to be a column
            trainer.save_model(str(tmp_path / "checkpoint-2"))
        else:
            trainer.train()
    expected = answer(theirs.eval(), "llama", "causal", kind)
    model = zoo.build("llama")
    softhooks.load(model, tmp_path / "checkpoint-2")
    torch.testing.assert_close(answer(model, "llama", "causal", kind), expected, **CLOSE)
    if kind != "cpt":
        resumed = prompted("llama", "causal", kind)
        with peers.quiet():
            try:
                resumed.load_adapter(str(tmp_path / "checkpoint-2"), "default", is_trainable=True)
            except (RuntimeError, ValueError):
                return  # it fails by itself
        assert float((answer(resumed.eval(), "llama", "causal", kind) - expected).abs().max()) > 1e-2


@pytest.mark.parametrize("arch", ["t5", "bart"])
def test_case_10_of_pefts_two_tables_the_one_that_trains_comes_over(arch: str) -> None:
    theirs, model = prompted(arch, "seq2seq", "prompt"), zoo.build(arch, "seq2seq")
    [prompt] = from_peft(theirs, model, trainable=True).values()
    assert theirs.prompt_encoder["default"].embedding.weight.shape[0] == 2 * P
    assert prompt.num_parameters == P * 32
    model(zoo.text(2, 7), labels=zoo.text(2, 5)).loss.backward()
    assert all(bool((parameter.grad.abs().sum(-1) > 0).all()) for parameter in prompt.parameters())


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_case_12_documents_packed_behind_a_prompt_of_peft_do_not_see_each_other(kind: str) -> None:
    theirs, model = prompted("llama", "causal", kind), zoo.build("llama")
    from_peft(theirs, model)
    rows = [zoo.text(1, length, seed=length)[0] for length in (7, 4)]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    with torch.no_grad(), peers.quiet():
        packed = model(torch.cat(rows)[None], position_ids=positions, use_cache=False).logits[0]
        for row, end in zip(rows, (6, 10), strict=True):
            alone = theirs(input_ids=row[None], attention_mask=torch.ones(1, len(row))).logits[0, -1]
            torch.testing.assert_close(packed[end], alone, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("kind", ["prompt", "prefix", "llama-adapter"])
def test_case_15_each_row_has_the_adapter_of_its_name(kind: str) -> None:
    """PEFT accepts the names but gives every row the active prompt."""
    theirs, model = prompted("llama", "causal", kind, ("en", "de")), zoo.build("llama")
    from_peft(theirs, model)
    expected = []
    for row, name in enumerate(("de", "en")):
        theirs.set_adapter(name)
        expected.append(answer(theirs, "llama", "causal", kind)[row])
    with softhooks.rows(model, ["de", "en"]):
        torch.testing.assert_close(answer(model, "llama", "causal", kind), torch.stack(expected), **CLOSE)


# --- the fate of every method -----------------------------------------------------------------------------------------


def test_every_prompt_method_of_peft_is_read() -> None:
    """From PEFT's own registry: its prompt learning methods, and LLaMA-Adapter."""
    prompts = {
        str(kind.value)
        for kind, cls in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()
        if issubclass(cls, peft.PromptLearningConfig)
    }
    assert prompts | {KIND} == set(KINDS)
    made = {str(make("CAUSAL_LM").peft_type.value) for make in CONFIGS.values()}
    assert made == set(KINDS), "and is tested here"


OTHERS: dict[str, Callable[[], Any]] = {
    "LORA": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]),
    "TRAINABLE_TOKENS": lambda: peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[5, 6]),
    "IA3": lambda: peft.IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[]),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_adapters_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    theirs, model = peft.get_peft_model(zoo.build("llama"), OTHERS[kind]()), zoo.build("llama")
    with (
        untouched(model),
        untouched(theirs),
        pytest.raises(CheckpointError, match=rf"peft_type '{kind}'(.|\n)*'default'"),
    ):
        from_peft(theirs, model)


REFUSED: dict[str, tuple[str, str, str, dict[str, Any], str]] = {
    **{
        f"{kind} of {arch}": (arch, "seq2seq", kind, {}, "adds only to the decoder")
        for arch in ("t5", "bart")
        for kind in ("prefix", "prefix mlp")
    },
    **{
        f"{kind} that {arch} pools": (arch, "sequence", kind, {}, "first virtual token")
        for arch in ("bert", "roberta")
        for kind in ROWS
    },
    "adapter of GPT-2": ("gpt2", "causal", "llama-adapter", {}, r"the gate of a Llama or Mistral layer"),
    "adapter behind a bias": ("llama", "causal", "llama-adapter", {"attention_bias": True}, "with a bias"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_equal_here_is_refused(name: str) -> None:
    arch, head, kind, changes, words = REFUSED[name]
    theirs, model = prompted(arch, head, kind, **changes), zoo.build(arch, head, **changes)
    with untouched(model), untouched(theirs), pytest.raises((CheckpointError, PromptMismatchError), match=words):
        from_peft(theirs, model)


def test_case_9_several_tasks_of_an_encoder_decoder_come_over_and_do_not_go_back() -> None:
    """PEFT prompts the decoder too in training, but not in generation; here the decoder is never prompted."""
    model = zoo.build("t5", "seq2seq")
    [prompt] = from_peft(prompted("t5", "seq2seq", "multitask"), model).values()
    with (
        untouched(zoo_base := zoo.build("t5", "seq2seq")),
        pytest.raises(UnsupportedMethodError, match="several tasks"),
    ):
        to_peft(prompt, zoo_base)


# --- refused, and nothing is left half done -----------------------------------------------------------------------------


def test_nothing_stays_attached_if_one_of_several_does_not_fit() -> None:
    theirs = prompted("llama", "causal", "prompt", ("good", "bad name"))
    model = zoo.build("llama")
    with untouched(model), pytest.raises(AttachError, match=r"bad name"):
        from_peft(theirs, model)
    own = softhooks.attach(model, PrefixTuning(2), "own")
    with untouched(model), pytest.raises(AttachError, match=r"bad name"):
        from_peft(theirs, model)
    assert own.prompted_model.active == "own"
    assert list(from_peft(theirs, model, {"good": "good", "bad name": "better"})) == ["good", "better"]


@pytest.mark.parametrize(
    ("names", "words"),
    [(["other"], "other"), ([], "names"), ({"a": "x", "b": "x"}, "give each prompt a different name"), ("c", "'c'")],
)
def test_false_names_are_refused(names: Any, words: str) -> None:
    theirs, model = prompted("llama", "causal", "prompt", ("a", "b")), zoo.build("llama")
    with untouched(model), pytest.raises(OptionError, match=words):
        from_peft(theirs, model, names)


def test_only_a_peft_model_is_read() -> None:
    with pytest.raises(OptionError, match="LlamaForCausalLM"):
        from_peft(zoo.build("llama"), zoo.build("llama"))


@pytest.mark.parametrize(
    ("goal", "words"),
    [(("gpt2", "causal", {}), "GPT2LMHeadModel"), (("llama", "causal", {}), "LlamaForCausalLM"),
     (("llama", "sequence", {"num_hidden_layers": 3}), "3, 2, 8, 8"), (("llama", "sequence", {"num_labels": 5}), "default")],
)  # fmt: skip
def test_a_base_of_another_kind_is_refused_and_not_wrapped(goal: tuple[str, str, dict[str, Any]], words: str) -> None:
    [prompt] = from_peft(prompted("llama", "sequence", "prompt"), zoo.build("llama", "sequence")).values()
    target = zoo.build(goal[0], goal[1], **goal[2])
    with kept(target), pytest.raises(PromptMismatchError, match=words):
        to_peft(prompt, target)
    assert prompt.is_attached


def test_what_peft_has_no_equal_for_does_not_leave_its_model() -> None:
    model = zoo.build("llama")
    prompts = [
        softhooks.attach(model, PromptTuning(P), "one"),
        softhooks.attach(model, PromptTuning(P, placement="after_first"), "two"),
    ]
    with untouched(model):
        with pytest.raises(UnsupportedMethodError, match="after_first"):
            to_peft(prompts, model)
        with pytest.raises(OptionError, match="two"):
            to_peft(prompts[:1], model)
    prompts[1].remove()
    other = softhooks.attach(model, PrefixTuning(P), "other")
    with untouched(model), pytest.raises(OptionError, match="PREFIX_TUNING"):
        to_peft([prompts[0], other], model)
    with pytest.raises(OptionError, match="one model"):
        to_peft([], model)
    with pytest.raises(OptionError, match="two"):
        to_peft(prompts, model)
    with peers.quiet():
        loaded = peft.get_peft_model(zoo.build("llama"), OTHERS["LORA"]())
    with untouched(loaded), pytest.raises(OptionError, match="PEFT adapters"):
        to_peft(prompts[0], loaded)


def test_peft_that_is_not_installed_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    model = prompted("llama", "causal", "prompt")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SoftHooksError, match=r'pip install "softhooks\[peft\]"'):
        from_peft(model, zoo.build("llama"))


def test_the_example_runs() -> None:
    names = examples.run("peft")
    assert sorted(names["back"].peft_config) == ["de", "en"]
    assert not hasattr(names["model"], "soft_prompt")
    ids = zoo.text(2, 7)
    with torch.no_grad(), peers.quiet():
        ours = names["back"](input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        theirs = names["peft_model"](input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(ours, theirs, **CLOSE)
