"""`softhooks train`: from the rows of a file to a saved prompt with a report, on tiny models made here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tokens
import torch
import transformers as tf
import zoo
from safetensors.torch import load_file
from typer.testing import CliRunner
from untouched import remove_all

import softhooks
from softhooks import OptionError, SoftHooksError
from softhooks.cli import app
from softhooks.cli.method_command import method_names
from softhooks.cli.options import method_options, methods
from softhooks.cli.run_parser import method_options_in
from softhooks.methods import METHODS
from softhooks.recipe.encoded import share_of_right_rows
from softhooks.recipe.language_model import Encoder
from softhooks.recipe.models import load_tokenizer
from softhooks.recipe.options import LEARNING_RATES, TrainOptions, learning_rate_of
from softhooks.recipe.table import Table, read_table

runner = CliRunner(env={"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"})
QUICK = ("--num-virtual-tokens", "4", "--epochs", "2", "--learning-rate", "0.05")
ROWS = [
    {"text": f"the {animal} was {word}", "label": "yes" if word == "great" else "no"}
    for animal in ("cat", "dog")
    for word in ("great", "bad")
] * 5


@pytest.fixture(autouse=True)
def _clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield
    remove_all()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a Llama, a BERT without a head and a T5, each with its tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    merged, masked = tokens.merged(), tokens.masked()
    sizes = {**zoo.SMALL, "initializer_range": 0.2}
    ends = {"eos_token_id": merged.eos_token_id, "pad_token_id": merged.pad_token_id}
    torch.manual_seed(0)
    tf.LlamaForCausalLM(tf.LlamaConfig(**{**sizes, **ends, "vocab_size": len(merged)})).save_pretrained(
        folder / "llama"
    )
    tf.BertModel(tf.BertConfig(**{**sizes, "vocab_size": len(masked)})).save_pretrained(folder / "bert")
    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=len(merged), **t5, **ends)).save_pretrained(folder / "t5")
    for name, tokenizer in (("llama", merged), ("bert", masked), ("t5", merged)):
        tokenizer.save_pretrained(folder / name)
    return folder


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows in the format of the path's suffix."""
    table = datasets.Dataset.from_list([dict(row) for row in rows])
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix in (".csv", ".tsv"):
        separator = "\t" if path.suffix == ".tsv" else ","
        lines = [separator.join(rows[0]), *(separator.join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def run(*arguments: object) -> str:
    """Train, and return what is printed; an expected error is raised."""
    result = runner.invoke(app.app, ["train", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def report(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "report.json").read_text()))


# --- what it trains ---------------------------------------------------------------------------------------------------


def test_a_language_model_learns_the_labels_as_text(models: Path, tmp_path: Path) -> None:
    """The printed metric is what greedy decoding of the validation rows gives with the saved prompt."""
    data, out = write(tmp_path / "train.jsonl", ROWS), tmp_path / "out"
    more = write(tmp_path / "more.jsonl", ROWS[:4])
    given = ("--method", "prefix-tuning", "--epochs", "30", "--num-virtual-tokens", "4", "--learning-rate", "0.1")
    text = run(data, "--model", models / "llama", "--validation", more, "--output", out, *given)
    told = report(out)
    assert told["before"]["exact_match"] == 0.0
    assert told["after"]["loss"] < told["before"]["loss"] / 4
    assert f"{told['after']['exact_match']:.1%} after training (the most frequent answer alone: 50.0%)" in text
    assert told["rows"] == {"train": 20, "validation": 4, "truncated": 0}
    assert told["parameters"]["trained"] == 4 * load_file(out / "soft_prompt.safetensors")["prompt.text"].shape[1]

    model = tf.AutoModelForCausalLM.from_pretrained(models / "llama")
    tokenizer = load_tokenizer(str(models / "llama"))
    softhooks.load(model, out)
    right = 0
    for row in ROWS[:4]:
        ids = tokenizer(row["text"], return_tensors="pt")
        written = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
        right += tokenizer.decode(written) == f" {row['label']}<|end|>"
    assert right / 4 == told["after"]["exact_match"] == 1.0


def test_an_encoder_gets_a_new_head_and_nothing_of_the_base_is_saved(models: Path, tmp_path: Path) -> None:
    data, out = write(tmp_path / "train.csv", ROWS), tmp_path / "out"
    run(data, "--model", models / "bert", "--task", "classification", "--output", out, *QUICK)
    told = report(out)
    assert told["metric"] == "accuracy"
    saved = load_file(out / "soft_prompt.safetensors")
    assert told["parameters"]["trained"] == sum(tensor.numel() for tensor in saved.values()) == 4 * 32 + 2 * 32 + 2
    written = {file.name for file in out.rglob("*") if file.suffix in (".safetensors", ".bin", ".pt", ".pth")}
    assert written == {
        "soft_prompt.safetensors", "soft_prompt.live.safetensors", "training_args.bin", "optimizer.pt", "scheduler.pt",
        "rng_state.pth",
    }  # fmt: skip

    model = tf.AutoModelForSequenceClassification.from_pretrained(models / "bert", num_labels=2)
    softhooks.load(model, out)
    assert model.config.id2label == {0: "no", 1: "yes"}
    initial = load_file(out / "initial" / "soft_prompt.safetensors")
    assert not torch.equal(initial["prompt.embeddings"], saved["prompt.embeddings"])


def test_an_encoder_decoder_writes_answers(models: Path, tmp_path: Path) -> None:
    data, out = write(tmp_path / "train.parquet", ROWS), tmp_path / "out"
    run(data, "--model", models / "t5", "--output", out, *QUICK, "--max-steps", "2", "--validation", "0.2")
    told = report(out)
    assert (told["steps"], told["rows"]["validation"]) == (2, 4)
    assert "exact_match" in told["after"]
    model = tf.AutoModelForSeq2SeqLM.from_pretrained(models / "t5")
    softhooks.load(model, out)


def test_without_validation_rows_the_last_step_is_kept(models: Path, tmp_path: Path) -> None:
    data, out = write(tmp_path / "train.tsv", ROWS), tmp_path / "out"
    text = run(data, "--model", models / "llama", "--output", out, *QUICK, "--validation", "0")
    told = report(out)
    assert told["before"] == told["after"] == {}
    assert told["best_step"] == told["steps"] == 6
    assert "exact match" not in text


def test_an_interrupted_run_resumes_and_ends_as_if_it_had_not_been(models: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "train.jsonl", ROWS)
    same = (data, "--model", models / "llama", *QUICK)
    run(*same, "--output", tmp_path / "whole")
    run(*same, "--output", tmp_path / "cut")
    last = sorted((tmp_path / "cut" / "checkpoints").iterdir())[-1]
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    (tmp_path / "cut" / "soft_prompt.safetensors").unlink()
    run(*same, "--output", tmp_path / "cut", "--resume")
    one, other = (load_file(tmp_path / name / "soft_prompt.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_starts_only_in_a_free_directory_and_resumes_only_with_its_settings(models: Path, tmp_path: Path) -> None:
    data, out = write(tmp_path / "train.jsonl", ROWS), tmp_path / "out"
    same = (data, "--model", models / "llama", "--output", out)
    with pytest.raises(OptionError, match="no run was started there"):
        run(*same, *QUICK, "--resume")
    run(*same, *QUICK, "--max-steps", "1", "--validation", "0")
    with pytest.raises(OptionError, match="Continue the run with --resume"):
        run(*same, *QUICK, "--max-steps", "1")
    write(data, ROWS[:-1])
    with pytest.raises(OptionError) as refused:
        run(*same, *QUICK, "--seed", "3", "--resume")
    said = str(refused.value)
    assert "data, validation, max_steps, seed: not the same" in said
    assert "0 in the run, now 3" in said


# --- rows -------------------------------------------------------------------------------------------------------------


def encoder(models: Path, table: Table, max_length: int = 64) -> Encoder:
    options = TrainOptions(Path(), str(models / "llama"), Path(), max_length=max_length)
    return Encoder(table, load_tokenizer(options.model), options, is_encoder_decoder=False)


def table_of(rows: Sequence[Mapping[str, Any]], text: str | None = "{text}", label: str | None = "label") -> Table:
    return Table(datasets.Dataset.from_list([dict(row) for row in rows]), None, text, label)


def test_the_loss_is_on_the_answer_and_the_end(models: Path) -> None:
    table = table_of([{"text": "the cat", "label": "yes"}], "Question: {text}?")
    made = encoder(models, table)
    [row] = made.encode(table.train)
    learned = [label for label in row["labels"] if label != -100]
    assert row["input_ids"][-len(learned) :] == learned
    assert made.tokenizer.decode(row["input_ids"]) == "Question: the cat? yes<|end|>"
    assert made.tokenizer.decode(learned) == " yes<|end|>"


def test_no_space_is_added_after_white_space(models: Path) -> None:
    table = table_of([{"text": "the cat", "label": "yes"}], "{text}\n")
    made = encoder(models, table)
    [row] = made.encode(table.train)
    assert made.tokenizer.decode(row["input_ids"]) == "the cat\nyes<|end|>"


def test_every_answer_of_a_chat_is_learned_after_the_prompt_for_generation(models: Path) -> None:
    chat = [("user", "hello"), ("assistant", "yes"), ("user", "the cat?"), ("assistant", "no")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in chat]}]
    table = table_of(rows, None, None)
    made = encoder(models, table)
    first, second = made.encode(table.train)
    assert made.tokenizer.decode(first["input_ids"]) == "<|user|>\nhello<|end|>\n<|assistant|>\nyes<|end|>"
    prompt = made.tokenizer.apply_chat_template(rows[0]["messages"][:3], add_generation_prompt=True, tokenize=False)
    assert made.tokenizer.decode(second["input_ids"]) == f"{prompt}no<|end|>"
    for row, answer in ((first, "yes<|end|>"), (second, "no<|end|>")):
        assert made.tokenizer.decode([label for label in row["labels"] if label != -100]) == answer


def test_a_long_text_loses_its_beginning_and_never_its_answer(models: Path) -> None:
    table = table_of([{"text": "the dog " * 20 + "was great", "label": "yes"}])
    made = encoder(models, table, max_length=8)
    [row] = made.encode(table.train)
    assert (len(row["input_ids"]), made.truncated) == (8, 1)
    assert made.tokenizer.decode(row["input_ids"]).endswith("was great yes<|end|>")
    with pytest.raises(OptionError, match="leaves no room"):
        encoder(models, table, max_length=2).encode(table.train)


def test_chats_need_a_template_and_an_answer(models: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "hello"}]}]
    table = table_of(rows, None, None)
    with pytest.raises(OptionError, match="row 0 has no message of the role 'assistant'"):
        encoder(models, table).encode(table.train)
    made = load_tokenizer(str(models / "llama"))
    made.chat_template = None
    options = TrainOptions(Path(), str(models / "llama"), Path())
    with pytest.raises(OptionError, match="no chat template"):
        Encoder(table, made, options, is_encoder_decoder=False)


def test_a_class_label_is_replaced_by_its_name() -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"text": ["a"], "label": [1]}, features=features)
    assert Table(rows, None, "{text}", "label").answer(rows, 1) == "yes"


def test_a_row_is_right_if_every_token_of_its_answer_is() -> None:
    labels = np.array([[-100, 5, 6, -100], [-100, 5, 7, -100], [-100, -100, 5, 6]])
    before = np.array([[5, 6, 0, 0], [5, 6, 0, 0], [0, 5, 6, 0]])  # each prediction is of the next token
    assert share_of_right_rows(before, labels, 1) == pytest.approx(2 / 3)
    at = np.array([[0, 5, 6, 9], [0, 5, 7, 9], [0, 0, 5, 7]])
    assert share_of_right_rows(at, labels, 0) == pytest.approx(2 / 3)


# --- what is refused --------------------------------------------------------------------------------------------------


def read(tmp_path: Path, rows: Sequence[Mapping[str, Any]], name: str = "data.jsonl", **options: Any) -> Table:
    return read_table(TrainOptions(write(tmp_path / name, rows), "", tmp_path, **options))


def test_the_split_holds_every_row_once(tmp_path: Path) -> None:
    rows = [{"text": f"row {number}", "label": "a"} for number in range(20)]
    table = read(tmp_path, rows, validation=0.25)
    parts = [part["text"] for part in table.parts()]
    assert [len(part) for part in parts] == [15, 5]
    assert sorted([*parts[0], *parts[1]]) == sorted(row["text"] for row in rows)


@pytest.mark.parametrize(
    ("rows", "options", "phrases"),
    [
        ([{"a": "x", "b": "y"}], {}, ["no column for the text", "columns:", "a, b"]),
        ([{"text": "x", "b": "y"}], {}, ["no column for the label", "--label"]),
        ([{"text": "x", "label": "y"}] * 2, {"text": "{body}"}, ["no column 'body'"]),
        ([{"text": "x", "label": "y"}] * 2, {"text": "{text"}, ["which is not a format"]),
        ([{"text": "x", "label": "y"}] * 2, {"text": "{}: {text}"}, ["the name of a column"]),
        ([{"text": "x", "label": "y"}, {"text": None, "label": "y"}], {}, ["row 1", "has no 'text'"]),
        ([{"text": "x", "label": "y"}], {}, ["one row", "--validation 0"]),
    ],
)
def test_wrong_columns_are_refused(
    tmp_path: Path, rows: Sequence[Mapping[str, Any]], options: dict[str, Any], phrases: Sequence[str]
) -> None:
    with pytest.raises(OptionError) as refused:
        read(tmp_path, rows, **options)
    for phrase in phrases:
        assert phrase in str(refused.value)


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "x", "label": 1}\nno json\n')
    with pytest.raises(OptionError, match="cannot be read as a table"):
        read_table(TrainOptions(tmp_path / "data.jsonl", "", tmp_path))
    (tmp_path / "data.txt").write_text("x")
    with pytest.raises(OptionError, match=r"its suffix is '\.txt'"):
        read_table(TrainOptions(tmp_path / "data.txt", "", tmp_path))


def test_an_encoder_is_no_language_model(models: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(OptionError, match="--task classification"):
        run(data, "--model", models / "bert", "--output", tmp_path / "out", *QUICK)
    # The run that did not start has not taken the directory.
    with pytest.raises(OptionError, match="--task classification"):
        run(data, "--model", models / "bert", "--output", tmp_path / "out", *QUICK)


def test_a_label_that_only_validation_rows_have_is_refused(models: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "train.jsonl", ROWS)
    more = write(tmp_path / "more.jsonl", [{"text": "a", "label": "maybe"}])
    with pytest.raises(OptionError, match="maybe"):
        run(
            data,
            "--model",
            models / "bert",
            "--task",
            "classification",
            "--validation",
            more,
            "--output",
            tmp_path / "o",
        )


@pytest.mark.parametrize(
    ("given", "phrase"),
    [
        (("--validation", "much"), "neither a number nor a file"),
        (("--validation", "1.5"), "below 1"),
        (("--method", "prefix-tunning"), "Did you mean prefix-tuning"),
        (("--init", "zero"), "must be one of 'vocab'"),
        (("--projection",), "projection is not an option of prompt_tuning"),
        (("--num-virtual-tokens", "many"), "a whole number"),
    ],
)
def test_a_wrong_option_is_refused(models: Path, tmp_path: Path, given: tuple[str, ...], phrase: str) -> None:
    data = write(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(SoftHooksError) as refused:
        run(data, "--model", models / "llama", "--output", tmp_path / "out", *given)
    assert phrase in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_an_unknown_option_is_a_usage_error(tmp_path: Path) -> None:
    data = write(tmp_path / "train.jsonl", ROWS)
    result = runner.invoke(app.app, ["train", str(data), "--model", "m", "--epoch", "3"])
    assert result.exit_code == 2
    assert "--epoch" in result.output


# --- defaults and help ------------------------------------------------------------------------------------------------


def test_the_learning_rates_are_those_of_the_documentation() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert set(LEARNING_RATES) == set(METHODS)
    for kind, method in METHODS.items():
        [rates] = [
            line.split("|")[3]
            for line in readme.splitlines()
            if line.startswith("|") and f"`{method.__name__}(" in line
        ]
        low, _, high = rates.split(";")[0].partition(" to ")
        assert float(low) <= LEARNING_RATES[kind] <= float(high or low)
    options = TrainOptions(Path(), "", Path())
    assert learning_rate_of(options, softhooks.PrefixTuning(4)) == 3e-2
    assert learning_rate_of(options, softhooks.PrefixTuning(4, projection=True)) == 5e-4
    assert learning_rate_of(options, softhooks.PTuning(4, encoder="none")) == 3e-2


def test_options_of_methods_may_stand_anywhere() -> None:
    words = ["--init", "text", "data.csv", "--init-text=a b", "--model", "m", "--projection", "--epochs", "3"]
    given, rest = method_options_in(words)
    assert given == {"init": ["text"], "init_text": ["a b"], "projection": True}
    assert rest == ["data.csv", "--model", "m", "--epochs", "3"]


def test_no_option_of_the_command_is_one_of_a_method() -> None:
    [command] = [
        one for one in app.app.registered_commands if one.callback is not None and one.callback.__name__ == "train"
    ]
    assert command.callback is not None
    own = {name for name in command.callback.__annotations__ if name not in ("context", "return")}
    assert not own & {name for kind in methods() for name in method_options(kind)}
    assert "prefix-tuning" in method_names()


def test_help_teaches_the_defaults() -> None:
    text = " ".join(runner.invoke(app.app, ["train", "--help"]).output.replace("│", " ").split())
    for phrase in ("greedy decoding", "messages", "[default: 0.1]", "prompt-tuning", "--resume", "20 virtual tokens"):
        assert phrase in text
