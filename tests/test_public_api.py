"""The public API: a name, an argument or a default that changes here changes for users."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

import softhooks
import softhooks.integrations
from softhooks.method import Method

MEMBERS = {
    "FrozenReport": ["bytes", "gigabytes_per_second", "seconds", "tensors", "unread"],
    "Layout": ["batch_columns", "collator", "insert", "mapper", "num_virtual_tokens", "render"],
    "PromptEnsemble": ["generate"],
    "PromptStore": ["add", "add_collection", "load", "names", "path", "remove", "tag", "tags", "untag"],
    "SoftPrompt": [
        "embeddings",
        "encoder",
        "fold",
        "key_values",
        "named_parameters",
        "num_parameters",
        "parameters",
        "plot",
        "push_to_hub",
        "remove",
        "save_pretrained",
        "summary",
        "verify_frozen",
    ],
    "Verbalizer": ["classes", "labels", "scores", "scores_at_labels", "token"],
}
"""The public members of these classes."""

API = """\
[softhooks]
AttachError(found, /, *remedy, **values)
Cartridge(num_virtual_tokens, *, document=None, tokenizer=None, frozen_slots=1, distill=True, top_k=20)
CheckpointError(found, /, *remedy, **values)
ContextAwarePromptTuning(*, num_virtual_tokens=0, examples=None, template=None, tokenizer=None, separator='\\n\\n',
        inner_separator='\\n', context_ids=None, token_types=None, epsilon_input=0.2, epsilon_format=0.1, decay=0.95,
        context_loss=True, leave_one_out=False)
ContextTuning(num_virtual_tokens=0, *, demonstrations=(), instruction=None, tokenizer=None, leave_one_out=True,
        token_dropout=0.05, lengths=None)
EnsembleOutput(predictions, scores, members)
EnsembleTexts(texts, members)
FrozenModifiedError(found, /, *remedy, **values)
FrozenReport(tensors, bytes, seconds, unread=())
  .bytes
  .gigabytes_per_second
  .seconds
  .tensors
  .unread
Layout(template, *, tokenizer=None)
  .batch_columns
  .collator(self, tokenizer, **options)
  .insert(cls, *, start=0, after=None, before=None, end=0, which='first', missing='error', tokenizer=None)
  .mapper(self, tokenizer, *, max_length=None, target=None, verbalizer=None, label='label', **chat)
  .num_virtual_tokens
  .render(self, tokenizer, fields, *, max_length=None, **chat)
LlamaAdapter(num_virtual_tokens=10, *, num_layers=None, gate='tanh', gate_per='head', context_size=None,
        early_fusion=0, scale_and_bias=False, init_std=1.0)
MultitaskPromptTuning(num_virtual_tokens, *, tasks, rank=1, teachers=None, teacher_steps=None, distillation=0.9,
        source=None, task_rate=1.3333333333333335, sampling='size', init='vocab', init_text=None, init_labels=None,
        init_tensor=None, tokenizer=None, whole_vocabulary=False)
NameTakenError(found, /, *remedy, **values)
NotAttachedError(found, /, *remedy, **values)
OptionError(found, /, *remedy, **values)
PTuning(num_virtual_tokens=0, *, layout=None, encoder='lstm', shape='lama', hidden_size=None, num_layers=2,
        tokenizer=None)
PTuningV2(num_virtual_tokens, *, projection=False, hidden_size=512, dropout=0.1, shift_positions=None, windowed=False,
        layers=None)
PrefixTuning(num_virtual_tokens, *, projection=False, hidden_size=512, dropout=0.0, shift_positions=None,
        windowed=True, init='text', init_text=None, init_ids=None, tokenizer=None, scaled=False)
PromptEnsemble(model, names, combine='vote')
  .generate(self, tokenizer, **inputs)
PromptMismatchError(found, /, *remedy, **values)
PromptNotReachedError(found, /, *remedy, **values)
PromptStore(folder)
  .add(self, prompt, name, *, tags=(), replace=False, revision=None, token=None)
  .add_collection(self, slug, *, tags=(), replace=False, token=None)
  .load(self, model, name, *, as_name=None, trainable=False, strict=True)
  .names(self, tag=None)
  .path(self, name)
  .remove(self, name)
  .tag(self, name, *tags)
  .tags(self, name)
  .untag(self, name, *tags)
PromptTooLongError(found, /, *remedy, **values)
PromptTuning(num_virtual_tokens, *, init='vocab', init_text=None, init_labels=None, init_tensor=None, init_from=None,
        tokenizer=None, whole_vocabulary=False, placement='front')
ResidualPromptTuning(num_virtual_tokens, *, init='vocab', init_text=None, init_labels=None, init_tensor=None,
        init_from=None, tokenizer=None, whole_vocabulary=False, placement='front', hidden_size=400, layer_norm=True,
        dropout=0.0)
SoftHooksError(found, /, *remedy, **values)
SoftPrompt(prompted, name, method, module, conventions)
  .embeddings(self, variant=0)
  .encoder
  .fold(self)
  .key_values(self, stack, variants=(0,))
  .named_parameters(self)
  .num_parameters
  .parameters(self)
  .plot(self)
  .push_to_hub(self, repo_id, *, private=None, token=None, revision=None, commit_message=None, **kwargs)
  .remove(self)
  .save_pretrained(self, save_directory, *, as_peft=False)
  .summary(self)
  .verify_frozen(self)
SoftPromptCallback(method, *, name='default', train_head=True, trainable=(), freeze_dropout=False, injection=None,
        check_frozen='save', model=None, train_added_tokens=False, example=None)
TaskSampler(tasks, batch_size, *, weights='size', seed=0)
TrainerError(found, /, *remedy, **values)
UnsupportedMethodError(found, /, *remedy, **values)
UnsupportedModeError(found, /, *remedy, **values)
UnsupportedModelError(found, /, *remedy, **values)
Verbalizer(words, tokenizer=None, *, causal=False)
  .classes(self, labels)
  .labels(self, input_ids, classes)
  .scores(self, logits, input_ids, attention_mask=None)
  .scores_at_labels(self, logits, labels)
  .token(self, label)
activate(model, name)
attach(model, method, name='default', *, train_head=True, trainable=(), freeze_dropout=False, injection=None,
        train_added_tokens=False, example=None)
disabled(model)
kept(model)
load(model, path, name='default', *, trainable=False, freeze_dropout=False, injection=None, revision=None, token=None,
        strict=True, example=None)
load_model(path, *, base=None, name='default', revision=None, token=None, strict=True, example=None,
        **options)
most_similar(prompts, to)
nearest_words(prompt, tokenizer, count=5)
rows(model, names)
tune(method, *, save_to=None, name='default', model=None, train_head=True, trainable=(), freeze_dropout=False,
        train_added_tokens=False, example=None)
[softhooks.integrations.accelerate]
track(accelerator, prompt, *, check_frozen=True)
[softhooks.integrations.axolotl]
SoftPromptPlugin
callback_for(cfg, model)
[softhooks.integrations.composer]
SoftPromptAlgorithm
[softhooks.integrations.ignite]
track(engine, prompt, optimizer, *, check_frozen=True)
[softhooks.integrations.lightning]
SoftPromptCallback
attach(module, method, name='default', *, attribute=None, train_head=True, trainable=(), freeze_dropout=False)
[softhooks.integrations.llama_cpp]
complete(path, text, *, url='http://127.0.0.1:8080', slot=0, **options)
export(model, folder, name, *, url='http://127.0.0.1:8080', slot=0)
request(path, text, *, slot=0, **options)
[softhooks.integrations.llamafactory]
callback_for(args, method, **options)
run_exp(args, method, **options)
[softhooks.integrations.lm_eval]
SoftPromptLM
main()
register()
[softhooks.integrations.mlflow]
PromptArtifact(tokenizer=None, *, words=5)
[softhooks.integrations.optuna]
METHOD
Candidate(make, *, num_virtual_tokens, learning_rate, **options)
Chosen(method, learning_rate)
PromptSpace(**candidates)
checkpoint_of(best, args)
[softhooks.integrations.peft]
from_peft(peft_model, model, names=None, *, trainable=False)
to_peft(prompts, model, *, trainable=False)
[softhooks.integrations.ray]
ReportCallback()
last_checkpoint(start=None)
[softhooks.integrations.sentence_transformers]
SentencePromptCallback(method, *, name='default', train_head=True, trainable=(), freeze_dropout=False, injection=None,
        check_frozen='save', model=None, train_added_tokens=False, example=None)
attach(model, method, name='default', **options)
load(folder, **options)
load_prompt(model, path, name='default', **options)
[softhooks.integrations.setfit]
SetFitPromptCallback(method, *, name='default', train_head=True, trainable=(), freeze_dropout=False, injection=None,
        check_frozen='save', model=None, train_added_tokens=False, example=None)
[softhooks.integrations.sglang]
command(model, prompts)
embeddings(model, text, tokenizer=None)
export(model, folder, name)
request(rows, *, sampling_params=None, **options)
[softhooks.integrations.skorch]
FrozenCheck
PromptedModule(model, method, name='default', train_head=True, freeze_dropout=False)
[softhooks.integrations.tensorboard]
PromptBoard(tokenizer=None, *, log_dir=None, words=5)
[softhooks.integrations.transformers_serve]
main(arguments=None)
prompted(prompt=None, *, store=None, tag=None, strict=True)
serve(prompt, model, *, store=None, tag=None, strict=True, **options)
[softhooks.integrations.trl]
reference(model, prompt=None)
[softhooks.integrations.vllm]
embeddings(model, text, tokenizer=None)
encode(rows)
export(model, folder, name)
kv_transfer_config(prompts)
request(model, rows, **options)
[softhooks.integrations.wandb]
PromptArtifact(tokenizer=None, *, name=None, words=5)
"""


CHOICES = {
    "LlamaAdapter.gate": ("tanh", "raw"),
    "LlamaAdapter.gate_per": ("head", "layer"),
    "MultitaskPromptTuning.init": ("vocab", "random", "text", "class_labels", "tensor", "prompt"),
    "MultitaskPromptTuning.sampling": ("size", "log", "capped", "equal"),
    "PTuning.encoder": ("lstm", "mlp", "none"),
    "PTuning.shape": ("lama", "fewshot"),
    "PrefixTuning.init": ("text", "zero", "random"),
    "PromptTuning.init": ("vocab", "random", "text", "class_labels", "tensor", "prompt"),
    "PromptTuning.placement": ("front", "after_first", "end"),
    "ResidualPromptTuning.init": ("vocab", "random", "text", "class_labels", "tensor", "prompt"),
    "ResidualPromptTuning.placement": ("front", "after_first", "end"),
}
"""The options of methods that take one of several strings; an editor completes them, because their types list the strings."""


def _signature(function: Any) -> str:
    """Names, kinds and defaults of the arguments, without annotations."""
    signature = inspect.signature(function)
    plain = [item.replace(annotation=inspect.Parameter.empty) for item in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def _listed(module: ModuleType, name: str) -> list[str]:
    """A name with its signature, and the members of its class."""
    value = getattr(module, name)
    members = MEMBERS.get(name, []) if module is softhooks else []
    lines = [name + (_signature(value) if callable(value) else "")]
    for member in members:
        static = inspect.getattr_static(value, member, None)
        function = getattr(static, "__func__", static)
        assert member in {*dir(value), *value.__annotations__}
        lines.append(f"  .{member}" + (_signature(function) if inspect.isfunction(function) else ""))
    return lines


def _api(module: ModuleType) -> list[str]:
    """Everything in `__all__`; of a class that is made from a framework's when it is asked for, only the name."""
    declared = [node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.AnnAssign)]
    made_later = {ast.unparse(node.target) for node in declared if node.value is None}
    return [line for name in module.__all__ for line in ([name] if name in made_later else _listed(module, name))]


def _expected() -> dict[str, list[str]]:
    modules: dict[str, list[str]] = {}
    for line in re.sub(r"\n {8}", " ", API).splitlines():
        if line.startswith("["):
            modules[line.strip("[]")] = []
        else:
            modules[[*modules][-1]].append(line)
    return modules


@pytest.mark.parametrize("name", _expected())
def test_the_api_is_what_is_written_here(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{error.name} is not installed")
    assert _api(module) == _expected()[name]


def test_the_types_of_options_list_their_choices() -> None:
    found = {}
    for name in softhooks.__all__:
        method = getattr(softhooks, name)
        if isinstance(method, type) and issubclass(method, Method):
            hints = get_type_hints(method)
            for item in dataclasses.fields(method):
                parts = [hints[item.name], *get_args(hints[item.name])]
                literal = next((part for part in parts if get_origin(part) is Literal), None)
                if literal is not None:
                    found[f"{name}.{item.name}"] = get_args(literal)
    assert found == CHOICES


@pytest.mark.parametrize("option", CHOICES)
def test_a_choice_that_no_type_lists_is_refused(option: str) -> None:
    name, _, argument = option.partition(".")
    method = getattr(softhooks, name)
    needed = {"tasks": 2} if name == "MultitaskPromptTuning" else {}
    listed = ", ".join(map(repr, CHOICES[option]))
    with pytest.raises(softhooks.OptionError, match=re.escape(f"must be one of {listed}")):
        method(num_virtual_tokens=4, **needed, **{argument: "other"})


def test_every_integration_is_listed() -> None:
    found = {module.name for module in pkgutil.iter_modules(softhooks.integrations.__path__)}
    names = {f"softhooks.integrations.{name}" for name in found if not name.startswith("_")}
    assert {"softhooks", *names} == set(_expected())
