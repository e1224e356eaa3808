"""TensorBoard: event files, projector files and texts, read back by TensorBoard's own readers."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tensorboard")

import curves
import examples
import tokens
import torch
import training
import transformers as tf
import zoo
from curves import METHODS
from untouched import differences, remove_all, snapshot

from softhooks import OptionError, PrefixTuning, PromptTuning, SoftHooksError, SoftPromptCallback, TrainerError
from softhooks.integrations import tensorboard as integration
from softhooks.integrations.tensorboard import PromptBoard


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


def read(folder: Path) -> Any:
    """The contents of a folder's event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    events = read(folder)
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def text(folder: Path, tag: str) -> str:
    [event] = read(folder).Tensors(f"{tag}/text_summary")
    return str(event.tensor_proto.string_val[0].decode())


def projected(folder: Path) -> tuple[torch.Tensor, list[list[str]]]:
    """The rows and labels of the projector's configuration."""
    from google.protobuf import text_format
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    config = text_format.Parse((folder / "projector_config.pbtxt").read_text(), ProjectorConfig())
    [info] = config.embeddings
    assert info.tensor_name == "soft_prompt:00004"
    rows = [[float(cell) for cell in line.split("\t")] for line in (folder / info.tensor_path).read_text().splitlines()]
    with (folder / info.metadata_path).open(newline="") as file:
        labels = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return torch.tensor(rows), labels


@pytest.mark.parametrize("name", METHODS)
def test_the_curves_reach_the_event_file_by_themselves(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    method, names = METHODS[name]
    trainer, _ = curves.train(tmp_path / "out", method, report_to=["tensorboard"])
    curves.require_equal(scalars(tmp_path / "events"), curves.expected(trainer, names, "train/"))


def test_the_board_writes_curves_rows_and_words(tmp_path: Path) -> None:
    model = zoo.build("llama")
    base = training.base_of(model)
    board = PromptBoard(tokens.tokenizer(), log_dir=tmp_path / "events", words=3)
    trainer, callback = curves.train(tmp_path / "out", PromptTuning(4), board, model=model)
    curves.require_equal(scalars(tmp_path / "events"), curves.expected(trainer, curves.BASIC, "train/"))
    assert training.equal(training.base_of(model), base)
    assert '"method": "prompt_tuning"' in text(tmp_path / "events", "soft_prompt")
    assert '"num_virtual_tokens": 4' in text(tmp_path / "events", "soft_prompt")

    rows, labels = projected(tmp_path / "events")
    assert callback.soft_prompt is not None
    learned, table = callback.soft_prompt.embeddings().detach(), model.get_input_embeddings().weight.detach()
    cosines = torch.nn.functional.normalize(learned) @ torch.nn.functional.normalize(table).T
    near = cosines.argsort(descending=True)[:, :3]
    assert torch.equal(rows[:4], learned)
    assert labels[0] == ["token", "kind"]
    assert labels[1:5] == [[f"{n}: {tokens.words([near[n, 0]])}", "virtual token"] for n in range(4)]
    others = [label for label, kind in labels[5:] if kind == "word"]
    ids = [tokens.tokenizer().convert_tokens_to_ids(label) for label in others]
    assert sorted(ids) == near.unique().tolist()
    assert torch.equal(rows[4:], table[ids])
    lines = text(tmp_path / "events", "soft_prompt/words").splitlines()
    assert lines[0] == "| virtual token | rank | word | cosine |"
    assert len(lines) == 2 + 4 * 3
    assert lines[2] == f"| 0 | 0 | {tokens.words([near[0, 0]])} | {round(float(cosines[0].max()), 4)} |"


def test_the_best_model_is_what_is_kept(tmp_path: Path) -> None:
    scores = iter([1.0, 5.0, 2.0, 3.0])
    board = PromptBoard(tokens.tokenizer(), log_dir=tmp_path / "events")
    seen: dict[int, torch.Tensor] = {}

    class Look(tf.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen[state.global_step] = kwargs["model"].soft_prompt["default"]["encoder"].embeddings.detach().clone()

    curves.train(
        tmp_path / "out", PromptTuning(4), board, Look(), load_best_model_at_end=True, metric_for_best_model="score",
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        given={"compute_metrics": lambda prediction: {"score": next(scores)}},
    )  # fmt: skip
    assert torch.equal(projected(tmp_path / "events")[0][:4], seen[2])
    assert not torch.equal(seen[2], seen[4])


def test_keys_and_values_are_told_without_rows(tmp_path: Path) -> None:
    board = PromptBoard(log_dir=tmp_path / "events")
    trainer, _ = curves.train(tmp_path / "out", PrefixTuning(4), board)
    curves.require_equal(scalars(tmp_path / "events"), curves.expected(trainer, curves.BASIC, "train/"))
    assert '"method": "prefix_tuning"' in text(tmp_path / "events", "soft_prompt")
    assert not (tmp_path / "events" / "projector_config.pbtxt").exists()


def test_a_label_stays_in_its_cell() -> None:
    plain = integration._plain
    assert [plain(word) for word in ("cat", "a\tb", "\n", " ", "")] == ["cat", r"a\tb", r"\n", "' '", "''"]
    assert plain("a|b", "|") == r"a\|b"


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainerError, match=r"would both write the metrics(.|\n)*report_to='none'"):
        training.make(tmp_path, zoo.build("llama"), "causal", [PromptBoard()], report_to=["tensorboard"])
    trainer = training.make(tmp_path, zoo.build("llama"), "causal", [PromptBoard(log_dir=tmp_path / "none")])
    with pytest.raises(TrainerError, match="found no prompt on"):
        trainer.train()
    assert not (tmp_path / "none").exists()
    model = zoo.build("llama")
    callbacks = [SoftPromptCallback(PrefixTuning(4)), PromptBoard(tokens.tokenizer(), log_dir=tmp_path / "none")]
    trainer = training.make(tmp_path, model, "causal", callbacks)
    before = snapshot(model)
    with pytest.raises(OptionError, match="instead of embeddings, so it cannot be compared with words"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not [name for name in differences(before, snapshot(model)) if name.startswith("tensor")]
    assert not (tmp_path / "none").exists()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SoftHooksError, match=r'pip install "softhooks\[tensorboard\]"'):
        PromptBoard()


def test_the_example_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left: list[list[str]] = []
    clean_up = examples.tempfile.TemporaryDirectory.cleanup

    def look(folder: Any) -> None:
        found = sorted(str(path.relative_to(folder.name)) for path in Path(folder.name).rglob("*") if path.is_file())
        left.append([name for name in found if name.startswith("runs/prompt")])
        clean_up(folder)

    monkeypatch.setattr(examples.tempfile.TemporaryDirectory, "cleanup", look)
    names = examples.run("tensorboard")
    assert len(training.losses(names["trainer"])) == 4
    assert any("runs/prompt/00004/soft_prompt/tensors.tsv" in found for found in left)
