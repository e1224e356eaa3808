"""Runs of the quality benchmark on tiny random models: every contestant and the baselines."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import killed_runs
import pytest
import torch
from rich.console import Console
from transformers import set_seed

import softhooks
from benchmarks.quality import models, pool, scoring, tasks
from benchmarks.quality import run as running
from benchmarks.quality.baselines import by_turns, few_shot_context
from benchmarks.quality.contestants import CONTESTANTS
from benchmarks.quality.cpt import context_types_and_ids
from benchmarks.quality.findings import FINDINGS
from benchmarks.quality.findings.framework import Arm
from benchmarks.quality.inputs import DecoderInputs
from benchmarks.quality.pool import execute_all
from benchmarks.quality.records import Run, Store
from benchmarks.quality.scoring import rouge_l, score_decoder
from benchmarks.quality.setup import Setup
from benchmarks.quality.softhooks_methods import cartridge, context_tuning, p_tuning, with_options
from benchmarks.quality.task import Row, Task, Template, split
from softhooks.demo.models import Checkpoint
from softhooks.demo.tiny_models import tiny_decoder, tiny_encoder

COLORS = {"red": ("rose", "cherry", "brick"), "green": ("leaf", "frog", "grass"), "blue": ("sea", "sky", "jeans")}


def _rows(count: int, seed: int) -> tuple[Row, ...]:
    generator = random.Random(seed)
    rows = []
    for index in range(count):
        color = list(COLORS)[index % 3]
        words = [generator.choice(COLORS[color]), *generator.sample(["the", "old", "new", "big", "nice"], 3)]
        generator.shuffle(words)
        rows.append(Row(" ".join(words), color, f"{seed}-{index}"))
    return tuple(rows)


CLASSES = Task(
    name="colors",
    instruction="Name the color: red, green, blue.",
    templates=(Template("", " Color:"),),
    labels=tuple(COLORS),
    train=_rows(60, 0),
    development=_rows(12, 1),
    test=_rows(30, 2),
    max_length=12,
    provenance={"rows": "made up"},
)
TEXTS = Task(
    name="texts",
    instruction="Repeat the color.",
    templates=(Template("", " Color:"),),
    labels=(),
    train=_rows(60, 0),
    development=_rows(12, 1),
    test=_rows(8, 2),
    max_length=12,
    max_new_tokens=3,
)


@pytest.fixture(autouse=True)
def small(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replace the tasks and the models by small ones."""
    texts = [f"{row.text} {CLASSES.instruction}{CLASSES.templates[0].question} {row.answer}" for row in CLASSES.train]
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    checkpoints = {
        models.MINILM: tiny_encoder(texts, folder / "encoder"),
        models.SMOLLM2: tiny_decoder(texts, folder / "decoder"),
    }
    monkeypatch.setattr(models, "CHECKPOINTS", {name: lambda c=c: c for name, c in checkpoints.items()})
    monkeypatch.setattr(running, "TASKS", {"colors": lambda: CLASSES, "texts": lambda: TEXTS})
    running.read_task.cache_clear()
    yield
    running.read_task.cache_clear()


def _decoder() -> Checkpoint:
    return models.checkpoint(models.SMOLLM2)


@pytest.mark.parametrize("name", [name for name, c in CONTESTANTS.items() if c.encoder_rates])
def test_every_contestant_tunes_an_encoder(name: str) -> None:
    record = running.execute(Run("colors", models.MINILM, name, shots=4, steps=2, learning_rate=1e-2))
    assert len(record.scores) == 30
    assert set(record.scores) <= {0.0, 1.0}
    alone = running.execute(Run("colors", models.MINILM, "head", shots=4, steps=1, learning_rate=1e-2)).trained
    assert alone == 3 * 33
    if name == "prompt_tuning":
        assert record.trained == 20 * 32 + alone, "the head is trained too"
    if name not in ("p_tuning", "residual_prompt_tuning") and not name.startswith("peft"):  # networks are folded
        assert record.saved_bytes >= 4 * record.trained
    assert record.versions["rows"] == "made up"
    assert len(record.losses) == 2


@pytest.mark.parametrize("name", [name for name, c in CONTESTANTS.items() if c.decoder_rates])
def test_every_contestant_tunes_a_decoder(name: str) -> None:
    record = running.execute(Run("colors", models.SMOLLM2, name, shots=4, steps=2, learning_rate=1e-2))
    assert len(record.scores) == 30
    assert record.trained > 0
    assert record.saved_bytes > 0
    assert record.peak_bytes > 1_000_000


@pytest.mark.parametrize(
    ("model", "name", "rate", "drop"),
    [
        (models.MINILM, "full", 3e-3, 0.6),
        (models.SMOLLM2, "lora", 3e-2, 0.3),
        (models.SMOLLM2, "prefix_tuning", 1e-1, 0.2),
    ],
)
def test_training_learns_the_task(model: str, name: str, rate: float, drop: float) -> None:
    before = running.execute(Run("colors", model, name, shots=20, steps=1, learning_rate=0.0))
    after = running.execute(Run("colors", model, name, shots=20, steps=80, learning_rate=rate))
    assert after.losses[-1] < before.losses[0] - drop


def test_the_same_run_gives_the_same_result() -> None:
    run = Run("colors", models.SMOLLM2, "prompt_tuning", shots=4, steps=3, learning_rate=1e-2, seed=5)
    first, second = running.execute(run), running.execute(run)
    assert (first.scores, first.losses) == (second.scores, second.losses)


def test_generated_answers_are_scored_by_rouge() -> None:
    record = running.execute(Run("texts", models.SMOLLM2, "prompt_tuning", shots=2, steps=1, learning_rate=1e-2))
    assert len(record.scores) == 8
    assert all(0 <= score <= 1 for score in record.scores)
    assert rouge_l("a small red house", "a small house") == pytest.approx(2 * 0.75 / 1.75)


@pytest.mark.parametrize("shots", [0, 4])
def test_batches_are_scored_like_single_rows(shots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        Row(" ".join(row.text.split()[: 1 + index % 4]), row.answer, row.source)
        for index, row in enumerate(CLASSES.test)
    ]
    tokenizer, model = _decoder().tokenizer(), _decoder().language_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(50)  # so that no two logits are close
    inputs = DecoderInputs(CLASSES, tokenizer)
    context = few_shot_context(inputs, list(CLASSES.train[:shots])) if shots else []
    seen: list[list[float]] = []
    right = scoring._right
    monkeypatch.setattr(
        scoring,
        "_right",
        lambda logits, *rest: seen.extend(logits[:, inputs.first_label_ids()].tolist()) or right(logits, *rest),
    )
    scores = score_decoder(model, inputs, rows, context)
    order = [
        index for indices in scoring.by_length([len(inputs.question_ids(row)) for row in rows]) for index in indices
    ]
    for index, logits in zip(order, seen, strict=True):
        with torch.no_grad():
            alone = model(torch.tensor([context + inputs.question_ids(rows[index])])).logits[
                0, -1, inputs.first_label_ids()
            ]
        torch.testing.assert_close(torch.tensor(logits), alone, rtol=1e-4, atol=1e-4)
        assert scores[index] == float(CLASSES.labels[int(alone.argmax())] == rows[index].answer)


@pytest.mark.parametrize("shots", [0, 4])
def test_batches_generate_like_single_rows(shots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        Row(" ".join(row.text.split()[: 1 + index % 4]), row.answer, row.source) for index, row in enumerate(TEXTS.test)
    ]
    inputs, model = DecoderInputs(TEXTS, _decoder().tokenizer()), _decoder().language_model()
    with torch.no_grad():
        for parameter in model.parameters():  # sharp attention, so that the texts differ
            parameter.mul_(8 if parameter.dim() == 2 else 1)
    context = few_shot_context(inputs, list(TEXTS.train[:shots])) if shots else []
    texts: dict[str, str] = {}
    monkeypatch.setattr(
        scoring, "rouge_l", lambda text, reference: (texts.setdefault(f"{len(texts)}", text) and 0.0) or 0.0
    )
    score_decoder(model, inputs, rows, context)
    order = [
        index for indices in scoring.by_length([len(inputs.question_ids(row)) for row in rows]) for index in indices
    ]
    for index, text in zip(order, texts.values(), strict=True):
        ids = torch.tensor([context + inputs.question_ids(rows[index])])
        output = model.generate(ids, max_new_tokens=TEXTS.max_new_tokens, do_sample=False, pad_token_id=0)
        [alone] = inputs.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        assert text == alone.strip().split("\n")[0]
    assert len(set(texts.values())) > 1


def test_batches_have_rows_of_one_length() -> None:
    batches = list(scoring.by_length([3, 1, 3, 2, 3], batch=2))
    assert batches == [[1], [3], [0, 2], [4]]


def test_a_few_shot_context_takes_classes_in_turn_and_stops_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = DecoderInputs(CLASSES, _decoder().tokenizer())
    monkeypatch.setattr("benchmarks.quality.baselines.CONTEXT_LIMIT", 60)
    context = few_shot_context(inputs, sorted(CLASSES.train, key=lambda row: row.answer))
    counts = [context.count(label) for label in inputs.first_label_ids()]
    assert len(context) <= 60
    assert max(counts) - min(counts) <= 1
    assert min(counts) >= 2, "the instruction names each class once"


def test_the_order_of_the_classes_changes_between_rounds() -> None:
    ordered = [row.answer for row in by_turns(CLASSES, CLASSES.train)]
    rounds = {tuple(ordered[start : start + 3]) for start in range(0, len(ordered), 3)}
    assert all(set(answers) == set(COLORS) for answers in rounds)
    assert len(rounds) > 3


def test_classes_that_begin_alike_are_refused() -> None:
    task = Task("t", "", "", ("same thing", "same place"), (), (), (), 8)
    with pytest.raises(ValueError, match="begin with the same token"):
        DecoderInputs(task, tiny_decoder_tokenizer()).first_label_ids()


def tiny_decoder_tokenizer() -> object:
    return _decoder().tokenizer()


def test_a_context_of_cpt_has_the_types_of_its_parts() -> None:
    inputs = DecoderInputs(CLASSES, _decoder().tokenizer())
    rows = list(CLASSES.train[:3])
    types, ids = context_types_and_ids(inputs, rows)
    labels = [token for kind, token in zip(types, ids, strict=True) if kind and kind % 4 == 0]
    assert labels == [token for row in by_turns(CLASSES, rows) for token in inputs.answer_ids(row)]
    assert sorted({(kind - 1) // 4 for kind in types if kind}) == [0, 1, 2]


def test_the_baselines_score_what_they_say() -> None:
    majority = running.execute(Run("colors", running.NO_MODEL, "majority", shots=5))
    assert majority.score == pytest.approx(1 / 3)
    tfidf = running.execute(Run("colors", running.NO_MODEL, "tfidf", shots=20))
    assert tfidf.score > 0.9
    zero = running.execute(Run("colors", models.SMOLLM2, running.ZERO_SHOT))
    few = running.execute(Run("colors", models.SMOLLM2, running.FEW_SHOT, shots=4))
    assert 0 < zero.context_tokens < few.context_tokens


def test_rows_of_a_source_stay_together_and_samples_are_balanced() -> None:
    rows = [Row(f"text {i}", "ab"[i % 2], f"source {i // 3}") for i in range(90)]
    parts = split(rows, 0.2, 0.3, seed=1)
    sources = [{row.source for row in part} for part in parts]
    assert not sources[0] & sources[1]
    assert not sources[1] & sources[2]
    assert not sources[0] & sources[2]
    assert sum(map(len, parts)) == 90
    assert [len(source) for source in sources] == [15, 6, 9]
    sample = CLASSES.sample(7, seed=3)
    assert [sum(row.answer == color for row in sample) for color in COLORS] == [7, 7, 7]
    assert sample == CLASSES.sample(7, seed=3)
    assert sample != CLASSES.sample(7, seed=4)


ARMS = [arm for finding in FINDINGS for arm in finding.arms]


@pytest.mark.parametrize("arm", ARMS, ids=[arm.label for arm in ARMS])
def test_every_setting_of_a_finding_runs(arm: Arm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        tasks, "TASKS", {"colors": lambda: CLASSES, "sections": lambda: CLASSES, "docstrings": lambda: CLASSES}
    )
    run = arm.runs[0]
    options = dict(run.options)
    if "source_tasks" in options:
        options |= {"source_shots": 4, "source_steps": 3}
        options |= {"teacher_steps": 2} if "teacher_steps" in options else {}
    if options.get("init") == "chat":
        options["init"] = "text"  # the tiny tokenizer has no chat template
    if "layers" in options:
        options["layers"] = tuple(layer for layer in options["layers"] if layer < 2) or (0,)
    if run.task == "manual":
        texts = replace(CLASSES, document="rose leaf " * 80, templates=CLASSES.templates * 2)
        monkeypatch.setattr(running, "TASKS", {"colors": lambda: texts})
        running.read_task.cache_clear()
    small = replace(
        run, task="colors", shots=min(run.shots, 4), steps=min(run.steps, 2), options=tuple(options.items())
    )
    record = running.execute(small)
    assert len(record.scores) == 30
    assert (record.trained > 0) == (run.steps > 0)
    assert (record.context_tokens > 0) == bool(options.get("in_context"))


def test_the_document_in_the_context_is_the_one_of_the_cartridge(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = replace(
        CLASSES, document="rose leaf sea cherry frog sky", templates=(*CLASSES.templates, Template("the ", " Color:"))
    )
    monkeypatch.setattr(running, "TASKS", {"colors": lambda: texts})
    running.read_task.cache_clear()
    bare = running.execute(Run("colors", models.SMOLLM2, "cartridge", 4, options=(("in_context", True),)))
    assert bare.context_tokens == len(DecoderInputs(texts, _decoder().tokenizer()).document()) > 5
    without = running.execute(Run("colors", models.SMOLLM2, "cartridge", 4, options=(("in_context", False),)))
    assert without.context_tokens == 0
    whole = (("num_virtual_tokens", bare.context_tokens),)
    untrained = running.execute(Run("colors", models.SMOLLM2, "cartridge", 4, options=whole))
    assert untrained.scores == bare.scores, "a cartridge as long as its document starts as the document"


def test_a_cartridge_is_trained_on_other_questions_than_those_of_the_test() -> None:
    texts = replace(CLASSES, document="rose leaf sea", templates=(*CLASSES.templates, Template("the ", " Color:")))
    tokenizer = _decoder().tokenizer()
    setup = Setup(texts, DecoderInputs(texts, tokenizer), list(CLASSES.train[:3]), {"num_virtual_tokens": 2})
    prepared = cartridge(_decoder().language_model(), setup)
    assert prepared.dataset is not None
    trained = [tokenizer.decode(row["input_ids"]) for row in prepared.dataset.rows]
    assert len(trained) == 3
    assert all(text.startswith("the ") for text in trained)


def test_the_demonstrations_of_context_tuning_are_training_rows_that_do_not_see_themselves() -> None:
    inputs = DecoderInputs(CLASSES, _decoder().tokenizer())
    prepared = context_tuning(_decoder().language_model(), Setup(CLASSES, inputs, list(CLASSES.train[:9])))
    assert prepared.dataset is not None
    own = [row["example_ids"] for row in prepared.dataset.rows]
    assert sorted(own) == [-1] * 6 + [0, 1, 2]
    shown = by_turns(CLASSES, CLASSES.train[:9])[:3]
    assert [CLASSES.train[own.index(number)] for number in range(3)] == shown
    assert {row.answer for row in shown} == set(COLORS)


@pytest.mark.parametrize("name", ["superposed_prompt_tuning", "normalized_prompt_tuning", "scaled_prefix_tuning"])
def test_variants_start_as_the_methods_that_they_vary(name: str) -> None:
    varied = "prefix_tuning" if name == "scaled_prefix_tuning" else "prompt_tuning"
    prompts = []
    for contestant in (name, varied):
        set_seed(0)
        setup = Setup(CLASSES, DecoderInputs(CLASSES, _decoder().tokenizer()), list(CLASSES.train))
        method = CONTESTANTS[contestant].prepare(_decoder().language_model(), setup).callbacks[0].method
        encoder = softhooks.attach(_decoder().language_model(), method).encoder
        prompts.append(encoder(encoder.groups[0]))
    torch.testing.assert_close(*prompts)
    assert prompts[0].requires_grad


@pytest.mark.parametrize(("option", "value"), [("schedule", "constant"), ("bfloat16", True)])
def test_options_of_the_training_have_an_effect(option: str, value: object) -> None:
    losses = []
    for options in ((), ((option, value),)):
        run = Run("colors", models.SMOLLM2, "prompt_tuning", 4, 10, 3e-2, options=options)
        losses.append(running.execute(run).losses[-1])
    assert losses[0] != losses[1]


def test_a_start_from_the_chat_has_the_template() -> None:
    tokenizer = _decoder().tokenizer()
    tokenizer.chat_template = "{% for message in messages %}sky {{ message['content'] }} leaf{% endfor %}"
    setup = Setup(CLASSES, DecoderInputs(CLASSES, tokenizer), [], {"init": "chat"})
    options = with_options(setup, {"tokenizer": tokenizer})
    assert (options["init"], options["init_text"]) == ("text", f"sky {CLASSES.instruction} leaf")


@pytest.mark.parametrize(("start", "before"), [(12, 0), (6, 6), (0, 12)])
def test_virtual_tokens_are_inserted_before_the_question(start: int, before: int) -> None:
    inputs = DecoderInputs(CLASSES, _decoder().tokenizer())
    setup = Setup(CLASSES, inputs, [], {"start": start, "before_question": before})
    callback = p_tuning(_decoder().language_model(), setup).callbacks[0]
    layout = callback.method.layout
    assert (layout.form.groups[-1].anchor is not None) == (before > 0)
    assert [group.count for group in layout.form.groups] == [count for count in (start, before) if count]


def test_gates_start_where_the_option_says() -> None:
    scores = {}
    for gates in ("zero", "one", "random"):
        run = Run("colors", models.SMOLLM2, "llama_adapter", 4, 1, 1e-9, options=(("gates", gates),))
        scores[gates] = running.execute(run).losses[0]
    assert len(set(scores.values())) == 3


def test_a_prompt_of_source_tasks_is_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "TASKS", {"colors": lambda: CLASSES})
    options = {"source_tasks": ("colors",), "source_shots": 20, "source_steps": 40, "init": "prompt"}
    losses = []
    for extra in ({}, options):
        run = Run("colors", models.SMOLLM2, "prompt_tuning", 4, 1, 3e-2, options=tuple(extra.items()))
        losses.append(running.execute(run).losses[0])
    assert losses[1] < losses[0] - 0.1


class TestPool:
    def test_results_are_written_by_processes_and_a_failure_does_not_stop_the_others(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        good, bad = Run("docstrings", running.NO_MODEL, "majority", 8), Run("docstrings", running.NO_MODEL, "nobody", 8)
        console = Console(record=True, width=200)
        failed = execute_all("runs", [bad, good], store, console, workers=1, threads=1, deadline=float("inf"))
        assert failed == [bad]
        assert store.missing([good, bad]) == [bad]
        assert "nobody" in console.export_text()

    def test_a_run_whose_process_is_killed_is_tried_once_more(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pool, "_execute", killed_runs.execute)
        store = Store(tmp_path / "results")
        runs = [Run("docstrings", running.NO_MODEL, f"kills{kills}", kills) for kills in (0, 1, 2)]
        failed = execute_all("runs", runs, store, Console(quiet=True), 1, 1, deadline=float("inf"))
        assert failed == [runs[2]]
        assert store.missing(runs) == [runs[2]]

    def test_no_run_is_started_after_the_deadline(self, tmp_path: Path) -> None:
        run = Run("docstrings", running.NO_MODEL, "majority", 8)
        assert execute_all("runs", [run], Store(tmp_path), Console(quiet=True), 1, 1, deadline=0.0) == []
        assert Store(tmp_path).missing([run]) == [run]
