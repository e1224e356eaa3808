"""The training run of `softhooks train`: a plain Trainer with a callback. It is also a template for your own script."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from softhooks.errors import OptionError
from softhooks.formats.files import write_json
from softhooks.method import Method
from softhooks.prompt import SoftPrompt
from softhooks.recipe import classification, language_model
from softhooks.recipe.encoded import Encoded
from softhooks.recipe.models import load_classifier, load_language_model, load_tokenizer
from softhooks.recipe.options import TrainOptions, learning_rate_of
from softhooks.recipe.progress import Progress
from softhooks.recipe.report import Report, make_report
from softhooks.recipe.run_directory import SETTINGS, check, settings_of
from softhooks.recipe.table import Table, read_table
from softhooks.trainer.callback import SoftPromptCallback


def train(options: TrainOptions, method: Method, callback_options: Mapping[str, Any]) -> Report:
    """Train a prompt on the rows of a file, and save it with a report.

    Args:
        method: the method with its options.
        callback_options: arguments of `SoftPromptCallback`.

    Raises:
        OptionError: the rows, the model and the options do not fit together.
        AttachError: the prompt cannot be attached to the model.
    """
    table = read_table(options)
    settings = settings_of(options, method, callback_options)
    check(options, settings)
    tokenizer = load_tokenizer(options.model)
    set_seed(options.seed)
    model, encoded = _model_and_rows(options, table, tokenizer)
    callback = SoftPromptCallback(method, **callback_options)
    trainer = Trainer(
        model=model,
        args=training_arguments(options, method, encoded),
        train_dataset=encoded.train,
        eval_dataset=encoded.validation,
        data_collator=encoded.collate,
        compute_metrics=encoded.compute_metrics,
        preprocess_logits_for_metrics=encoded.keep,
        callbacks=[callback],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress())
    prompt = callback.soft_prompt
    assert prompt is not None  # attached by the callback
    _require_causal(options, prompt)
    last = get_last_checkpoint(str(options.checkpoints)) if options.resume else None
    if last is None:
        write_json(options.output / SETTINGS, settings)
        prompt.save_pretrained(options.initial)
    before = _evaluate(trainer, encoded) if last is None else {}
    result = trainer.train(resume_from_checkpoint=last)
    after = _evaluate(trainer, encoded)
    prompt.save_pretrained(options.output)
    report = make_report(options, table, encoded, prompt, trainer.state, result.metrics["train_runtime"], before, after)
    report.write(options.output)
    return report


def _model_and_rows(
    options: TrainOptions, table: Table, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, Encoded]:
    if options.task == "classification":
        encoded = classification.encode(table, tokenizer, options)
        return load_classifier(options.model, options.precision, encoded.labels, tokenizer), encoded
    model = load_language_model(options.model, options.precision)
    is_encoder_decoder = bool(model.config.is_encoder_decoder)
    return model, language_model.encode(table, tokenizer, options, is_encoder_decoder=is_encoder_decoder)


def training_arguments(options: TrainOptions, method: Method, encoded: Encoded) -> TrainingArguments:
    """Return the arguments of the Trainer: AdamW, a linear schedule with 6% warm-up, and a checkpoint after each epoch."""
    has_validation = encoded.validation is not None
    return TrainingArguments(
        output_dir=str(options.checkpoints),
        num_train_epochs=options.epochs,
        max_steps=-1 if options.max_steps is None else options.max_steps,
        learning_rate=learning_rate_of(options, method),
        lr_scheduler_type="linear",
        warmup_steps=0.06,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        logging_steps=0.05,  # twenty times
        eval_strategy="epoch" if has_validation else "no",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=has_validation,
        metric_for_best_model="eval_loss" if has_validation else None,
        disable_tqdm=False,
        report_to="none",
        dataloader_pin_memory=False,
        seed=options.seed,
    )


def _evaluate(trainer: Trainer, encoded: Encoded) -> dict[str, float]:
    """Return the loss and the metric on the validation rows."""
    if encoded.validation is None:
        return {}
    found = trainer.evaluate()
    return {name: float(found[f"eval_{name}"]) for name in ("loss", encoded.metric)}


def _require_causal(options: TrainOptions, prompt: SoftPrompt) -> None:
    structure = prompt.prompted_model.structure
    if options.task == "language-model" and not structure.is_encoder_decoder and not structure.entry.causal:
        raise OptionError(
            f"{options.model!r} is an encoder: its tokens attend to later tokens, so it cannot be trained to write answers.",
            "Train a classifier with a new head: `--task classification`.",
            model=type(prompt.model).__name__,
        )
