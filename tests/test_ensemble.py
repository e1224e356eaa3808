"""Prompt ensembles: one forward equals separate runs, and votes and means equal those computed by hand."""

from __future__ import annotations

from collections import Counter
from typing import Any

import naive
import pytest
import tokens
import torch
import toy
import zoo
from torch import Tensor

import softhooks
from softhooks import NotAttachedError, OptionError, PrefixTuning, PromptEnsemble, PromptTuning, UnsupportedModeError

CLOSE = {"rtol": 1e-4, "atol": 5e-5}
NAMES = ["a", "b", "c"]
TOKENIZER = tokens.tokenizer()


def prepared(arch: str, head: str, methods: Any = None) -> Any:
    """A model with three prompts that differ, heads too."""
    model = zoo.build(arch, head)
    for number, (name, method) in enumerate((methods or dict.fromkeys(NAMES, PrefixTuning(3))).items()):
        torch.manual_seed(number)
        prompt = softhooks.attach(model, method, name)
        with torch.no_grad():
            for parameter in prompt.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.5)
    return model


def separate(model: Any, **call: Any) -> Tensor:
    """Each prompt alone, one after the other."""
    found = []
    with torch.no_grad():
        for name in NAMES:
            softhooks.activate(model, name)
            found.append(model(**call).logits)
    return torch.stack(found)


MIXED = {"a": PromptTuning(5), "b": PrefixTuning(2), "c": PromptTuning(1)}


@pytest.mark.parametrize("combine", ["vote", "logits", "probabilities"])
@pytest.mark.parametrize(
    ("arch", "head", "methods"),
    [
        ("llama", "sequence", MIXED),
        ("llama", "causal", MIXED),
        ("bert", "sequence", None),
        ("bert", "tokens", dict.fromkeys(NAMES, PromptTuning(3, placement="after_first"))),
        ("t5", "seq2seq", None),
    ],
    ids=["llama-sequence", "llama-causal", "bert-sequence", "bert-tokens", "t5-seq2seq"],
)
def test_one_forward_equals_separate_runs(arch: str, head: str, methods: Any, combine: Any) -> None:
    model, ids = prepared(arch, head, methods), zoo.text(4, 7)
    mask = torch.ones_like(ids)
    mask[2, 5:] = 0
    ids[2, 5:] = zoo.pad_id(model)
    call = zoo.inputs(zoo.Case(arch, head), ids, mask)
    expected = separate(model, **call)
    forwards: list[int] = []
    handle = model.register_forward_hook(lambda *_: forwards.append(1))
    output = PromptEnsemble(model, NAMES, combine)(**call)
    handle.remove()
    assert len(forwards) == 1
    torch.testing.assert_close(output.members, expected, **CLOSE)
    members = output.members
    if combine == "vote":
        assert torch.equal(output.scores.sum(-1).round(decimals=4), torch.ones(expected.shape[1:-1]))
        for place in torch.cartesian_prod(*[torch.arange(n) for n in output.predictions.shape]).reshape(
            -1, output.predictions.dim()
        ):
            votes = Counter(int(members[(e, *place)].argmax()) for e in range(3))
            chosen = int(output.predictions[tuple(place)])
            assert votes[chosen] == max(votes.values())
            assert output.scores[(*place, chosen)] == pytest.approx(votes[chosen] / 3)
    else:
        mean = (members if combine == "logits" else members.softmax(-1)).mean(0)
        torch.testing.assert_close(output.scores, mean)
        assert torch.equal(output.predictions, mean.argmax(-1))


def test_an_even_vote_goes_to_the_likelier_of_those_that_lead() -> None:
    model = prepared("llama", "sequence")
    ensemble = PromptEnsemble(model, NAMES)
    members = torch.tensor([[[5.0, 0.0, 4.9]], [[0.0, 5.0, 4.9]], [[0.0, 1.0, 9.0]]])
    assert ensemble._combined(members).predictions.tolist() == [2]
    even = torch.tensor([[[2.0, 0.0, 1.9]], [[0.0, 9.0, 1.9]]])
    output = ensemble._combined(even)
    assert output.predictions.tolist() == [1]
    # The third class has the highest mean logit, and no vote: it must not win a tie of the others.
    split = torch.tensor([[[3.0, 0.0, 2.9]], [[0.0, 3.0, 2.9]]])
    assert PromptEnsemble(model, NAMES, "probabilities")._combined(split).predictions.tolist() == [2]
    assert ensemble._combined(split).predictions.tolist() in ([0], [1])


def test_the_bare_model_may_be_a_member() -> None:
    model, ids = prepared("llama", "sequence"), zoo.text(2, 6)
    output = PromptEnsemble(model, ["a", None])(input_ids=ids)
    with softhooks.disabled(model), torch.no_grad():
        torch.testing.assert_close(output.members[1], model(ids).logits, **CLOSE)


# --- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "head"), [("llama", "causal"), ("gptj", "causal"), ("t5", "seq2seq")])
def test_the_text_that_most_prompts_write(arch: str, head: str) -> None:
    model = naive.endless(prepared(arch, head))
    batch = naive.left_padded([zoo.text(1, n, seed=n)[0] for n in (6, 3, 5)])
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    alone = []
    for name in NAMES:
        softhooks.activate(model, name)
        found = model.generate(**batch, **options)
        found = found if head == "seq2seq" else found[:, batch["input_ids"].shape[1] :]
        alone.append([text.strip() for text in TOKENIZER.batch_decode(found, skip_special_tokens=True)])
    output = PromptEnsemble(model, NAMES).generate(TOKENIZER, **batch, **options)
    assert output.members == alone
    beams = PromptEnsemble(model, NAMES).generate(TOKENIZER, **batch, **options, num_beams=2)
    assert len(beams.texts) == 3
    for row, text in enumerate(output.texts):
        written = [texts[row] for texts in alone]
        assert written.count(text) == max(map(written.count, written))
    # twice the second: it outvotes the others
    assert PromptEnsemble(model, ["a", "b", "b"]).generate(TOKENIZER, **batch, **options).texts == alone[1]
    assert PromptEnsemble(model, ["c", "a"]).generate(TOKENIZER, **batch, **options).texts == alone[2]


# --- errors -----------------------------------------------------------------------------------------------------------


def test_what_an_ensemble_refuses() -> None:
    model, ids = prepared("llama", "causal"), zoo.text(2, 6)
    for wrong in ([], "a"):
        with pytest.raises(OptionError, match="it must be a list of one or more prompt names"):
            PromptEnsemble(model, wrong)
    with pytest.raises(OptionError, match="combine"):
        PromptEnsemble(model, NAMES, "mean")  # type: ignore[arg-type]
    with pytest.raises(NotAttachedError, match="'d'"):
        PromptEnsemble(model, ["a", "d"])
    ensemble = PromptEnsemble(model, NAMES)
    with pytest.raises(OptionError, match="no loss"):
        ensemble(input_ids=ids, labels=ids)
    with pytest.raises(OptionError, match="input_ids"):
        ensemble(attention_mask=ids)
    for more in ({"num_return_sequences": 2}, {"return_dict_in_generate": True}):
        with pytest.raises(OptionError, match="one text per row"):
            ensemble.generate(TOKENIZER, input_ids=ids, **more)
    with pytest.raises(UnsupportedModeError, match=r"(?s)`logits`.*start_logits"):
        PromptEnsemble(prepared("bert", "qa"), NAMES)(input_ids=ids)
    regression = zoo.build("llama", "sequence", num_labels=1)
    softhooks.attach(regression, PromptTuning(3), "a")
    with pytest.raises(OptionError, match="use 'logits'"):
        PromptEnsemble(regression, ["a"])(input_ids=ids)
    assert PromptEnsemble(regression, ["a"], "logits")(input_ids=ids).scores.shape == (2, 1)


# --- together they are no worse -----------------------------------------------------------------------------------------


def test_an_ensemble_of_tuned_prompts_is_at_least_as_good_as_their_mean() -> None:
    """Five short tunings on a few words each: each makes errors, at different places."""
    model, function = toy.model(), 3
    shares = []
    for number in range(5):
        torch.manual_seed(number)
        with torch.no_grad():
            words = torch.randperm(toy.WORDS)[:4].tolist()
        softhooks.attach(model, PromptTuning(2, init="random"), f"p{number}")
        toy.tune(model, softhooks.activate(model, f"p{number}"), function, words, lr=3e-2, steps=25)
        shares.append(toy.share_right(model, function, range(toy.WORDS)))
    rows = toy.pairs(function, range(toy.WORDS))
    found = {}
    for combine in ("vote", "logits", "probabilities"):
        output = PromptEnsemble(model, [f"p{n}" for n in range(5)], combine)(input_ids=rows[:, :1])
        found[combine] = float((output.predictions[:, -1] == rows[:, 1]).float().mean())
    mean = sum(shares) / len(shares)
    assert 0.3 < mean < 0.99, "the members must have something to disagree on"
    assert min(found.values()) >= mean
