"""P-tuning's network: its outputs, initialization, folding and cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import naive
import oracles
import peers
import pytest
import tokens
import torch
import training
import transformers as tf
import zoo
from safetensors import safe_open
from stored_options import change
from torch import Tensor, nn
from trainings import Keeper

import softhooks
from softhooks import CheckpointError, Layout, OptionError, PromptTuning, PTuning, SoftPromptCallback

P, H = 5, 32
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
ENCODERS = {
    "lama": {"encoder": "lstm", "shape": "lama"},
    "fewshot": {"encoder": "lstm", "shape": "fewshot"},
    "mlp": {"encoder": "mlp"},
    "none": {"encoder": "none"},
}
TEMPLATE = "{soft:2} {a} question: {soft:2, name=t} {b}? {mask} {soft:1} . {soft:2, name=t}"


def with_encoder(name: str, **more: Any) -> PTuning:
    return PTuning(**({} if "layout" in more else {"num_virtual_tokens": P}), **ENCODERS[name], **more)  # type: ignore[arg-type]


# --- what it computes -------------------------------------------------------------------------------------------------


def lstm_by_hand(rows: Tensor, weights: dict[str, Tensor], layers: int) -> Tensor:
    """A bidirectional LSTM over [P, H], cell by cell."""
    for layer in range(layers):
        sides = []
        for suffix in ("", "_reverse"):
            name = f"l{layer}{suffix}"
            hidden = cell = torch.zeros(weights[f"weight_hh_{name}"].shape[1])
            states: list[Tensor] = []
            for row in rows.flip(0) if suffix else rows:
                gates = weights[f"weight_ih_{name}"] @ row + weights[f"bias_ih_{name}"]
                gates = gates + weights[f"weight_hh_{name}"] @ hidden + weights[f"bias_hh_{name}"]
                enter, forget, new, leave = gates.chunk(4)
                cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
                hidden = leave.sigmoid() * cell.tanh()
                states.append(hidden)
            sides.append(torch.stack(states[::-1] if suffix else states))
        rows = torch.cat(sides, -1)
    return rows


@pytest.mark.parametrize(("shape", "each_way"), [("lama", H // 2), ("fewshot", H)])
def test_the_published_shapes(shape: Any, each_way: int) -> None:
    """`MLP(BiLSTM(Z))`: two layers, H/2 or H each way, then Linear(., H)-ReLU-Linear(H, H)."""
    with softhooks.attach(zoo.build("llama"), PTuning(P, shape=shape)) as prompt:
        state = {name: value.detach() for name, value in prompt.encoder.named_parameters()}
        layer = 4 * each_way * 2
        counts = [layer * (H + each_way + 2), layer * (2 * each_way + each_way + 2)]
        assert prompt.num_parameters == P * H + sum(counts) + 2 * each_way * H + H + H * H + H
        inner = lstm_by_hand(
            state["rows"], {k.removeprefix("lstm."): v for k, v in state.items() if k.startswith("lstm.")}, layers=2
        )
        expected = nn.functional.linear(inner, state["down.weight"], state["down.bias"]).relu()
        expected = nn.functional.linear(expected, state["up.weight"], state["up.bias"])
        torch.testing.assert_close(prompt.encoder("embeddings"), expected, rtol=1e-5, atol=1e-6)
        torch.manual_seed(0)
        assert 0.8 < float(state["rows"].std()) < 1.2


def test_the_mlp_has_two_layers() -> None:
    with softhooks.attach(zoo.build("llama"), PTuning(P, encoder="mlp", hidden_size=12)) as prompt:
        state = dict(prompt.encoder.named_parameters())
        assert {name: tuple(value.shape) for name, value in state.items()} == {
            "rows": (P, H), "down.weight": (12, H), "down.bias": (12,), "up.weight": (H, 12), "up.bias": (H,)
        }  # fmt: skip
        expected = (state["rows"] @ state["down.weight"].T + state["down.bias"]).relu() @ state["up.weight"].T
        torch.testing.assert_close(prompt.encoder("embeddings"), expected + state["up.bias"])


@pytest.mark.parametrize("layers", [1, 3])
def test_sizes_of_ones_own(layers: int) -> None:
    with softhooks.attach(zoo.build("llama"), PTuning(P, hidden_size=7, num_layers=layers)) as prompt:
        lstm = prompt.encoder.lstm
        assert (lstm.hidden_size, lstm.num_layers, lstm.bidirectional, lstm.input_size) == (7, layers, True, H)


def test_every_slot_depends_on_every_other_through_the_lstm_only() -> None:
    for name in ENCODERS:
        with softhooks.attach(zoo.build("llama"), with_encoder(name)) as prompt:
            h = prompt.encoder("embeddings")
            rows = prompt.encoder.embeddings if name == "none" else prompt.encoder.rows
            (gradient,) = torch.autograd.grad(h[0].sum(), rows)
            reached = (gradient.abs().sum(-1) > 0).tolist()
            assert reached == ([True] * P if name in ("lama", "fewshot") else [True] + [False] * (P - 1))


def test_permuting_the_text_does_not_change_h() -> None:
    """The network ignores the text: the slots' rows are the same in every row, whatever stands between them."""
    model = zoo.build("bert", "masked")
    anchor = 90
    layout = Layout.insert(start=2, after={anchor: 3})
    text = zoo.text(3, 6) % 80 + 4
    text[:, 2] = anchor
    shuffled = text[:, [4, 0, 2, 5, 1, 3]]
    seen: list[Tensor] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _m, _a, out: seen.append(out))
    with torch.no_grad(), softhooks.attach(model, PTuning(layout=layout)) as prompt:
        handle.remove()
        handle = model.get_input_embeddings().register_forward_hook(lambda _m, _a, out: seen.append(out))
        seen.clear()
        model(text)
        model(shuffled)
        h = prompt.encoder("embeddings")
    handle.remove()
    places = [0, 1, 5, 6, 7]
    for entered in seen:
        assert torch.equal(entered[:, places], h.expand(3, -1, -1))
    assert len(seen) == 2


def test_one_pass_over_the_slots_in_template_order() -> None:
    """Slots of a layout run through the LSTM as they stand in the template; tied ones once, where their name comes first."""
    layout = Layout(TEMPLATE)
    assert layout.form.table_rows == [0, 1, 2, 3, 4, 2, 3]
    with softhooks.attach(zoo.build("bert", "masked"), PTuning(layout=layout)) as prompt:
        passes: list[Any] = []
        prompt.encoder.lstm.register_forward_hook(lambda _m, args, out: passes.append(args[0].shape))
        batch = layout.collator(tokens.masked())([{"a": "hello", "b": "cat"}] * 4)
        prompt.model(**batch)
        assert passes == [(5, H)]


# --- the same as others -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", [zoo.Case("llama", "causal"), zoo.Case("bert", "masked"), zoo.Case("t5", "seq2seq")], ids=str
)
def test_without_a_network_in_front_it_is_prompt_tuning(case: zoo.Case) -> None:
    """The same rows from the same seed, and the same logits, bit for bit."""
    model, ids = zoo.build(case.arch, case.head), zoo.text(2, 7)
    found = []
    for method in (PTuning(P, encoder="none"), PromptTuning(P)):
        torch.manual_seed(4)
        with torch.no_grad(), softhooks.attach(model, method):
            found.append(model(**zoo.inputs(case, ids)).logits)
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("name", ENCODERS)
def test_slots_start_as_words(name: str) -> None:
    """At initialization, logits equal those of the text with the words in it; other slots are unaffected."""
    tokenizer, model = tokens.masked(), zoo.build("bert", "masked")
    layout = Layout('{a} {soft:2} {soft:"it was great", name=w} {mask} {soft:"it was great", name=w}')
    fields = {"a": "hello world"}
    torch.manual_seed(1)
    with torch.no_grad(), softhooks.attach(model, with_encoder(name, layout=layout, tokenizer=tokenizer)) as prompt:
        assert layout.bound(tokenizer).form.table_rows == [0, 1, 2, 3, 4, 2, 3, 4]
        batch = {k: torch.tensor([v]) for k, v in layout.render(tokenizer, fields).items()}
        logits, h = model(**batch).logits, prompt.encoder("embeddings")
        words = model.get_input_embeddings().weight[tokenizer("it was great", add_special_tokens=False)["input_ids"]]
        torch.testing.assert_close(h[2:], words, rtol=1e-3, atol=1e-3)
        hard = tokenizer("hello world it was great [MASK] it was great")["input_ids"]
        with softhooks.disabled(model):
            wide, places = oracles.woven(model.get_input_embeddings()(torch.tensor([hard])), h[:2], [3, 3])
            expected = model(inputs_embeds=wide).logits[:, [places[i] for i in (0, 1, 2, 6, 10)]]
        torch.testing.assert_close(logits, expected, rtol=2e-3, atol=2e-3)
    if name != "none":
        torch.manual_seed(1)
        plain = Layout("{a} {soft:2} {soft:3, name=w} {mask} {soft:3, name=w}")
        with softhooks.attach(model, with_encoder(name, layout=plain)) as other:
            torch.testing.assert_close(other.encoder("embeddings")[:2], h[:2], rtol=1e-3, atol=1e-4)


def test_a_network_too_narrow_to_start_as_words() -> None:
    layout = Layout('{soft:"it was great bad yes no"} {a} {soft:3} .', tokenizer=tokens.masked())
    with pytest.raises(
        OptionError, match=r"too small to output(.|\n)*virtual tokens: +9\nhidden size: +2(.|\n)*encoder='none'"
    ):
        softhooks.attach(zoo.build("bert", "masked"), PTuning(layout=layout, encoder="mlp", hidden_size=2))


# --- folding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("size", [1, 3, 17])
def test_fold_is_exact_with_gradients_and_without(name: str, size: int) -> None:
    """torch's kernels for an LSTM differ in the last bit with and without gradients; here they must not."""
    method = PTuning(size, **ENCODERS[name])  # type: ignore[arg-type]
    with softhooks.attach(zoo.build("llama"), method) as prompt:
        encoder = prompt.encoder.eval()
        folded = encoder.folded()["embeddings"]
        assert torch.equal(encoder("embeddings"), folded)
        with torch.no_grad():
            assert torch.equal(encoder("embeddings"), folded)
        with torch.inference_mode():
            assert torch.equal(encoder("embeddings"), folded)
        encoder.requires_grad_(False)
        assert torch.equal(encoder("embeddings"), folded)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(prompt.embeddings(), folded)
        prompt.fold()
        assert not list(prompt.parameters()) or prompt.encoder("embeddings").requires_grad
        assert torch.equal(prompt.embeddings(), folded)
        assert list(prompt.encoder.state_dict()) == ["embeddings"]


def test_the_lstm_steps_through_the_rows_as_torch_does() -> None:
    """In evaluation mode it runs cell by cell, because switching torch's kernels off would affect other threads."""
    with softhooks.attach(zoo.build("llama"), PTuning(7)) as prompt:
        encoder = prompt.encoder.eval()
        stepped = encoder("embeddings")
        torch.testing.assert_close(stepped, encoder.train()("embeddings"))


# --- files ------------------------------------------------------------------------------------------------------------


def template_batch() -> dict[str, Tensor]:
    return Layout(TEMPLATE).collator(tokens.masked())([{"a": "hello", "b": "red cat"}, {"a": "a b c d", "b": ""}])


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize(
    "layout",
    [None, Layout(TEMPLATE), Layout('{a} {soft:"it was"} {b} .', tokenizer=tokens.masked()),
     Layout.insert(start=1, after={"[CLS]": 1}, before={2: 2}, end=1, tokenizer=tokens.masked())],
    ids=["front", "template", "words", "insert"],
)  # fmt: skip
def test_what_is_kept_is_h_and_the_layout(tmp_path: Path, name: str, layout: Layout | None) -> None:
    """Loaded without a tokenizer, outputs are the same; the file holds P rows, whatever the network was."""
    model = zoo.build("bert", "masked")
    collator = (layout if layout is not None and layout.batch_columns else Layout(TEMPLATE)).collator(tokens.masked())
    batch = collator([{"a": "hello", "b": "red cat"}, {"a": "a b c d", "b": "yes"}])
    if layout is None or not layout.batch_columns:
        batch.pop("soft_slots")
    method = PTuning(layout=layout, **ENCODERS[name]) if layout else with_encoder(name)  # type: ignore[arg-type]
    with torch.no_grad(), softhooks.attach(model, method) as prompt:
        prompt.encoder.eval()
        expected = model(**batch).logits
        prompt.save_pretrained(tmp_path)
        count = prompt.method.num_virtual_tokens
    with safe_open(tmp_path / "soft_prompt.safetensors", "pt") as file:
        assert [(key, file.get_slice(key).get_shape()) for key in file.keys()] == [("prompt.embeddings", [count, H])]  # noqa: SIM118
    again = zoo.build("bert", "masked")
    loaded = softhooks.load(again, tmp_path)
    assert loaded.method == method
    assert loaded.layout == prompt.layout
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, expected)
    loaded.remove()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layout", "{soft:1}"),
        ("layout", {"template": "{soft:99}", "words": []}),
        ("layout", {"template": "{a}", "words": []}),
        ("layout", {"insert": [{"at": "start", "count": 4}], "which": "first", "missing": "error"}),
        ("layout", None),
        ("layout", [1]),
        ("num_virtual_tokens", 4),
        ("encoder", "gru"),
        ("shape", 3),
        ("hidden_size", "8"),
        ("hidden_size", 0),
        ("num_layers", -1),
        ("placement", "front"),
    ],
    ids=str,
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    model = zoo.build("bert", "masked")
    with softhooks.attach(model, PTuning(layout=Layout(TEMPLATE))) as prompt:
        prompt.save_pretrained(tmp_path)
    change(tmp_path, key, value)
    with pytest.raises(CheckpointError):
        softhooks.load(model, tmp_path)
    assert not hasattr(model, "soft_prompt")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_virtual_tokens": 0},
        {"num_virtual_tokens": 3, "layout": Layout("{soft:2} .")},
        {"layout": "{soft:2} ."},
        {"num_virtual_tokens": 2, "encoder": "gru"},
        {"num_virtual_tokens": 2, "shape": "wide"},
        {"num_virtual_tokens": 2, "hidden_size": 0},
        {"num_virtual_tokens": 2, "hidden_size": 1.5},
        {"num_virtual_tokens": 2, "num_layers": 0},
        {"num_virtual_tokens": 2, "num_layers": None},
    ],
    ids=str,
)
def test_options_that_cannot_be(options: Any) -> None:
    with pytest.raises(OptionError):
        PTuning(**options)


def test_tied_slots_count_as_often_as_they_stand_among_the_positions() -> None:
    layout = Layout(" ".join(["{soft:20, name=t} ."] * 5))
    assert (layout.num_virtual_tokens, layout.num_slots) == (20, 100)
    with pytest.raises(softhooks.PromptTooLongError, match=r"virtual tokens: +100"):
        softhooks.attach(zoo.build("bert", "masked"), PTuning(layout=layout))


# --- the cases of the strongest peer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lama", "mlp"])
@pytest.mark.parametrize("arch", [*zoo.CAUSAL, *zoo.CACHED])
def test_case_1_left_padding(arch: str, name: str) -> None:
    rows = [zoo.text(1, length, seed=length)[0] for length in (7, 4, 3)]
    model, bare, batch = naive.endless(zoo.build(arch)), zoo.build(arch), naive.left_padded(rows)
    with torch.no_grad(), softhooks.attach(model, with_encoder(name)) as prompt:
        assert prompt.injection == "shared"
        h = prompt.encoder.eval()("embeddings")
        step = naive.prompt_step(bare, h)
        expected = torch.stack([step(row) for row in rows])
        torch.testing.assert_close(model(**batch).logits[:, -1], expected, rtol=1e-4, atol=5e-5)
        found = model.generate(**batch, max_new_tokens=6, do_sample=False)
        for ours, row in zip(found, rows, strict=True):
            assert torch.equal(ours[-len(row) - 6 :], naive.greedy(step, row, 6))
        if peers.HAS_PEFT and arch not in ("opt", "bloom"):
            with peers.quiet():
                theirs = peers.prompted(bare, h)(**batch).logits[:, -1]
            assert float((theirs[0] - expected[0]).abs().max()) < 1e-4
            assert float((theirs - expected).abs().max()) > 0.1


def runs(folder: Path, model: Any, name: str, *more: Any, **options: Any) -> tuple[tf.Trainer, SoftPromptCallback]:
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "weight_decay": 0.1, "warmup_steps": 2}
    return training.prompted(folder, model, "causal", with_encoder(name), *more, **{**saving, **options})


@pytest.mark.parametrize("name", ["lama", "fewshot", "mlp"])
def test_case_4_a_resumed_run_is_the_run_that_was_never_interrupted(tmp_path: Path, name: str) -> None:
    """PEFT loads the folded rows as the network's input; here the network itself is in the checkpoint, bit for bit."""
    keeper = Keeper()
    whole, _ = runs(tmp_path, zoo.build("llama"), name, keeper)
    whole.train()
    resumed, callback = runs(tmp_path, zoo.build("llama"), name)
    training.spoil(callback)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert training.losses(resumed) == training.losses(whole)
    prompt = callback.soft_prompt
    assert prompt is not None
    ends = {f"soft_prompt.default.encoder.{k}": v.detach() for k, v in prompt.encoder.named_parameters()}
    assert training.equal(ends, keeper.kept[6][0])
    assert any(".lstm." in key for key in ends) == (name != "mlp")


def test_case_4_the_best_model_is_the_one_that_was_measured(tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3, "learning_rate": 1.0}
    trainer, callback = runs(tmp_path, zoo.build("llama"), "lama", **best)
    trainer.train()
    measured = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert measured[3] != measured[6]
    assert trainer.evaluate()["eval_loss"] == min(measured.values())
    assert callback.soft_prompt is not None
    assert callback.soft_prompt.encoder.lstm is not None


def test_the_lstm_runs_once_however_many_rows_there_are() -> None:
    """Its cost does not grow with the batch; PEFT's does."""
    model, shapes = zoo.build("llama"), []
    with softhooks.attach(model, PTuning(P)) as prompt:
        prompt.encoder.lstm.register_forward_hook(lambda _m, args, _out: shapes.append(tuple(args[0].shape)))
        for batch in (1, 8, 32):
            model.train()
            model(zoo.text(batch, 6), labels=zoo.text(batch, 6)).loss.backward()
    assert shapes == [(P, H)] * 3


# --- training ---------------------------------------------------------------------------------------------------------


def few_shot() -> list[dict[str, Any]]:
    return [
        {"a": a, "b": b, "label": i % 2} for i, (a, b) in enumerate([("hello", "cat"), ("red", "dog"), ("a b", "c")])
    ]


@pytest.mark.parametrize("name", ENCODERS)
def test_a_trainer_on_a_template(tmp_path: Path, name: str) -> None:
    """The callback, an unmodified Trainer, the layout's collator on raw rows, and the loss of the words at the mask."""
    tokenizer, layout = tokens.masked(), Layout(TEMPLATE)
    words = softhooks.Verbalizer(["yes", "no"], tokenizer)
    model = naive.without_dropout(zoo.build("bert", "masked"))
    base = training.base_of(model)
    arguments = {**training.QUIET, "max_steps": 6, "learning_rate": 1e-2, "remove_unused_columns": False}
    trainer = tf.Trainer(
        model,
        tf.TrainingArguments(str(tmp_path), **arguments),
        train_dataset=few_shot(),
        data_collator=layout.collator(tokenizer, verbalizer=words, max_length=30),
        compute_loss_func=words,
        callbacks=[SoftPromptCallback(with_encoder(name, layout=layout))],
    )
    trainer.remove_callback(tf.PrinterCallback)
    trainer.train()
    losses = training.losses(trainer)
    assert sum(losses[3:]) < sum(losses[:3])
    assert training.equal(training.base_of(model), base)


def test_a_trainer_keeps_the_column_of_mapped_rows(tmp_path: Path) -> None:
    """By the signature of the model's forward, as it keeps every column that the model takes."""
    tokenizer, layout = tokens.masked(), Layout(TEMPLATE)
    mapper = layout.mapper(tokenizer, max_length=30)
    rows = [{**mapper(row), "labels": row["label"], "text": row["a"]} for row in few_shot()]
    model = zoo.build("bert", "sequence")
    trainer = tf.Trainer(
        model,
        tf.TrainingArguments(str(tmp_path), **{**training.QUIET, "max_steps": 2}),
        train_dataset=rows,
        data_collator=tf.DataCollatorWithPadding(tokenizer),
        callbacks=[SoftPromptCallback(PTuning(layout=layout))],
    )
    trainer.remove_callback(tf.PrinterCallback)
    trainer.train()
    assert len(training.losses(trainer)) == 2


def test_the_decorator_on_a_template(tmp_path: Path) -> None:
    layout, batch, model = Layout(TEMPLATE), template_batch(), zoo.build("bert", "masked")

    @softhooks.tune(PTuning(layout=layout), save_to=tmp_path)
    def train(model: Any, soft_prompt: Any) -> float:
        optimizer = torch.optim.AdamW(soft_prompt.parameters(), lr=1e-2)
        for _ in range(3):
            loss = model(**batch, labels=batch["input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach())

    train(model)
    assert not hasattr(model, "soft_prompt")
    assert softhooks.load(model, tmp_path).method == PTuning(layout=layout)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_gradient_checkpointing_changes_no_gradient(arch: str, reentrant: bool) -> None:
    head = "masked" if arch == "bert" else "causal"
    model, batch = naive.without_dropout(zoo.build(arch, head)).train(), template_batch()
    if arch == "llama":
        batch.pop("token_type_ids")
    with softhooks.attach(model, PTuning(layout=Layout(TEMPLATE + " {c}" if arch == "llama" else TEMPLATE))) as prompt:
        found = []
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.zero_grad()
            model(**batch, labels=batch["input_ids"]).loss.backward()
            found.append([parameter.grad.clone() for parameter in prompt.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_deep_copy_has_slots_of_its_own() -> None:
    import copy

    model, batch = zoo.build("bert", "masked"), template_batch()
    with torch.no_grad(), softhooks.attach(model, PTuning(layout=Layout(TEMPLATE))) as prompt:
        twin = copy.deepcopy(model)
        expected = model(**batch).logits
        prompt.encoder.rows.zero_()
        assert not torch.equal(model(**batch).logits, expected)
        assert torch.equal(twin(**batch).logits, expected)
