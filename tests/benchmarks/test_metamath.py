"""The parts of the MetaMathQA benchmark: answers, settings, experiments, data and evaluation."""

from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from metamath_stand_in import write_data, write_model
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

pytest.importorskip("datasets")
pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.metamath import answers, contestants, data, evaluate, experiment
from benchmarks.metamath.run import load_tokenizer
from benchmarks.metamath.settings import ExperimentError, Settings, parse_changes

PEFT_DEFAULTS = {
    "model_id": "meta-llama/Llama-3.2-3B", "dtype": "bfloat16", "max_seq_length": 768, "batch_size": 4,
    "batch_size_eval": 50, "max_steps": 5000, "eval_steps": 250, "compile": False, "use_gc": False, "seed": 0,
    "grad_norm_clip": 1.0, "optimizer_type": "AdamW", "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1},
    "lr_scheduler": "cosine", "use_amp": False, "autocast_adapter_dtype": True, "attn_implementation": None,
    "generation_kwargs": {"max_length": 800, "max_new_tokens": 300},
    "query_template": "Question: {query} Think step by step.\nAnswer:", "init_kv_cache_prefix": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = write_model(tmp_path_factory.mktemp("model"))
    return Settings.of({"model_id": str(folder), "batch_size": 3, "batch_size_eval": 4})


@pytest.fixture(scope="module")
def model(settings: Settings) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(settings.model_id)


@pytest.fixture(scope="module")
def tokenizer(settings: Settings) -> PreTrainedTokenizerBase:
    return load_tokenizer(settings)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> data.Data:
    return data.load(write_data(tmp_path_factory.mktemp("data")))


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So it is 7.The answer is: 7", "7"),
        ("48 / 2 = <<48/2=24>>24\n#### 72", "72"),
        ("The answer is: 5.!?", "5"),
        ("The answer is $18.50.", "18.50"),
        ("The answer is: 50%\n\nQuestion: next", "50"),
        ("The answer is: 3. No. The answer is: 4", "4"),
        ("The answer is: 3\nThe answer is 4", "3"),  # an introduction with a colon has priority
        ("The final answer is: 9", "9"),
        ("the answer is: 9", None),
        ("The answer is:", None),
        ("", None),
    ],
)  # fmt: skip
def test_parse_answer(text: str, answer: str | None) -> None:
    assert answers.parse_answer(text) == answer


@pytest.mark.parametrize(
    ("given", "expected", "right"),
    [
        ("7", "7", True), ("7.0", "7", True), ("1/2", "0.5", True), ("20/35", "0.5714285714285714", True),
        ("8", "7", False), ("1,000", "1000", False), ("1,000", "1,000", True), ("1/0", "0", False),
        ("1/2/3", "1", False), ("x + 1", "x + 1", True), ("sNaN", "7", False), ("", "7", False),
        ("1e999999/1e-999999", "7", False),
    ],
)  # fmt: skip
def test_answers_are_compared_as_numbers(given: str, expected: str, right: bool) -> None:
    assert answers.is_right(f"The answer is: {given}", f"#### {expected}") is right


def test_a_text_without_an_answer_is_wrong_and_such_a_solution_is_refused() -> None:
    assert answers.accuracy(["I do not know", "#### 2"], ["#### 1", "#### 2"]) == 0.5
    with pytest.raises(ValueError, match="states no answer: 'nothing'"):
        answers.is_right("#### 1", "nothing")


# --- settings and experiments -----------------------------------------------------------------------------------------


def test_default_settings_are_those_of_peft() -> None:
    assert vars(Settings.of()) == PEFT_DEFAULTS
    assert data.question_of(Settings.of(), "How many?") == "Question: How many? Think step by step.\nAnswer:"
    limits = (data.LONGEST_TEXT, data.VALIDATION_ROWS, data.WIKIPEDIA_ROWS, data.BATCHES_IN_BUCKET)
    assert (*limits, evaluate.WIKIPEDIA_TOKENS) == (1300, 50, 100, 20, 768)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 3}, "steps is not a training setting"),
        ({"max_steps": "3"}, "max_steps is '3'; it must be of type int"),
        ({"max_steps": True}, "it must be of type int"),
        ({"max_steps": 100}, "eval_steps is 250; it must be at most max_steps, 100"),
        ({"use_amp": True}, "supports only False"),
        ({"dtype": "int4"}, "dtype is 'int4'; it must be one of"),
        ({"query_template": "Question:"}, "must contain {query}"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        Settings.of(change)


def test_every_experiment_is_valid_and_names_the_published_accuracy() -> None:
    read = [experiment.read_experiment(experiment.EXPERIMENTS / f"{name}.json") for name in experiment.names()]
    assert {each.method for each in read} == set(contestants.TYPES)
    published = {each.method: round(each.published["test_accuracy"], 3) for each in read if each.published}
    accuracies = {"LoRA": 0.478, "PrefixTuning": 0.416, "LlamaAdapter": 0.384, "PTuning": 0.35, "PromptTuning": 0.343}
    assert published == accuracies


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"method": "PromptTuning", "lr": 1}', "lr is not a key of an experiment"),
        ('{"method": "PromptTuning", "options": {"tokens": 3}}', "tokens is not an option of PromptTuning"),
        ('{"method": "PromptTuning", "training": {"lr": 3}}', "lr is not a training setting"),
        ('{"method": "BitFit"}', "method is 'BitFit'; it must be one of"),
        ('{"method": "PTuning", "training": {"init_kv_cache_prefix": "a"}}', "only PrefixTuning accepts it"),
        ('{"options": {}}', "method is missing"),
        ('{"method": "LoRA", "options": 3}', "options is 3; it must be of type dict"),
        ("[]", "it must contain an object"),
        ("{", "is not JSON"),
    ],
)  # fmt: skip
def test_wrong_experiments_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "wrong.json").write_text(content)
    with pytest.raises(ExperimentError, match=message):
        experiment.read_experiment(tmp_path / "wrong.json")


def test_a_folder_chooses_its_experiments() -> None:
    assert experiment.choose(["lora", "lora/llama-3.2-3B-rank32"], every=False) == ["lora/llama-3.2-3B-rank32"]
    assert experiment.choose([], every=True) == experiment.names()
    with pytest.raises(ExperimentError, match="there is no experiment 'bitfit'; choose from"):
        experiment.choose(["bitfit"], every=False)
    with pytest.raises(ExperimentError, match="no experiment is chosen"):
        experiment.choose([], every=False)


def test_changes_are_json_or_text() -> None:
    changes = parse_changes(["max_steps=4", 'optimizer_kwargs={"lr": 1}', "dtype=float32", "lr_scheduler=null"])
    assert changes == {"max_steps": 4, "optimizer_kwargs": {"lr": 1}, "dtype": "float32", "lr_scheduler": None}
    with pytest.raises(ExperimentError, match="write name=value"):
        parse_changes(["max_steps"])


# --- data -------------------------------------------------------------------------------------------------------------


def test_rows_of_20_batches_are_sorted_by_length(
    rows: data.Data, tokenizer: PreTrainedTokenizerBase, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [data.question_of(settings, row["query"]) + row["response"] for row in rows.train]
    lengths = [len(text) for text in texts]  # a token for each character
    batches = list(data.training_batches(rows.train, tokenizer, settings))
    assert [len(ids) for ids in chain(*batches)] == sorted(lengths, reverse=True)
    assert [len(batch) for batch in batches] == [3] * 6 + [2]
    monkeypatch.setattr(data, "BATCHES_IN_BUCKET", 2)
    buckets = [sorted(lengths[first : first + 6], reverse=True) for first in range(0, 20, 6)]
    batches = list(data.training_batches(rows.train, tokenizer, settings))
    assert [len(ids) for ids in chain(*batches)] == list(chain(*buckets))
    assert tokenizer.decode(batches[0][0]) in texts


def test_texts_are_cut_off_at_the_maximum_length(
    rows: data.Data, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> None:
    short = Settings.of(vars(settings), {"max_seq_length": 30})
    batch = next(iter(data.training_batches(rows.train, tokenizer, short)))
    cut = {data.question_of(settings, row["query"])[:30] for row in rows.train}
    assert {tokenizer.decode(ids) for ids in batch} <= cut


def test_labels_are_all_tokens_and_one_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    batch = data.training_batch(tokenizer, [[5, 6, 7, 8, 9], [5, 6]])
    eos = tokenizer.eos_token_id
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [5, 6, eos, eos, eos]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7, 8, 9], [5, 6, eos, -100, -100]]
    assert batch["num_items_in_batch"] == 7


def test_long_rows_are_left_out_and_validation_rows_are_drawn_with_seed_0() -> None:
    import datasets

    fits, long = {"query": "q" * 299, "response": "r" * 1000}, {"query": "q" * 300, "response": "r" * 1000}
    train = [{"question": f"{number}", "answer": f"#### {number}"} for number in range(90)]
    found = data._data(datasets.Dataset.from_list([long, fits]), train, train[:3], [])
    assert found.train.to_list() == [fits]
    np.random.seed(0)
    order = np.arange(90)
    np.random.shuffle(order)
    assert [row.query for row in found.validation] == [str(number) for number in order[:50]]


def test_missing_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"metamath\.jsonl does not exist"):
        data.load(tmp_path)


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "longest"), [(100, 400), (500, 800), (600, 800)])
def test_the_stricter_limit_of_the_length_applies(tokens: int, longest: int) -> None:
    config = evaluate.generation_config(Settings.of(), tokens, pad_token_id=3)
    assert (config.max_length, config.max_new_tokens, config.pad_token_id) == (longest, None, 3)


def test_accuracy_is_that_of_the_generated_texts(
    rows: data.Data, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> None:
    """A model that adds the two numbers of the question, and is wrong about sums above 100."""

    def generate(input_ids: torch.Tensor, attention_mask: torch.Tensor, generation_config: Any) -> torch.Tensor:
        assert (input_ids[attention_mask == 0] == tokenizer.eos_token_id).all()
        questions = tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        assert all(question.endswith("Think step by step.\nAnswer:") for question in questions)
        sums = [
            sum(int(word.strip(".")) for word in question.split() if word.strip(".").isdigit())
            for question in questions
        ]
        texts = [f" The answer is: {min(value, 100)}" for value in sums]
        ids = data.pad(tokenizer, data.encode(tokenizer, texts, 100), "right")["input_ids"]
        return torch.cat([input_ids, ids], dim=1)

    fake = SimpleNamespace(generate=generate, device="cpu")
    right = [int(problem.response.rpartition(" ")[2]) <= 100 for problem in rows.test]
    assert 0 < sum(right) < len(right) == 6
    assert evaluate.solved(fake, tokenizer, rows.test, settings) == sum(right) / len(right)


@torch.no_grad()
def test_loss_per_token_ignores_padding(
    rows: data.Data, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    total, count = 0.0, 0
    for text in rows.wikipedia:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        tokens = ids.shape[1] - 1
        total, count = total + float(model(ids, labels=ids).loss) * tokens, count + tokens
    for batch_size in (1, 3):
        loss = evaluate.loss_per_token(model, tokenizer, rows.wikipedia, batch_size)
        assert loss == pytest.approx(total / count, rel=1e-5)


def test_the_text_of_a_prefix_is_tokenized_as_a_system_message(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tokenizer.decode(contestants._ids_of_system_prompt("Solve it.", tokenizer)) == "Solve it."
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].role }}: {{ messages[0].content }}")
    assert tokenizer.decode(contestants._ids_of_system_prompt("Solve it.", tokenizer)) == "system: Solve it."
