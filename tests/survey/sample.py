"""The fixed sample: architectures that differ in what prompts depend on, and the known refusals."""

from __future__ import annotations

from benchmarks.survey.case import Case

_ARCHITECTURES = {
    "causal": (
        "afmoe arcee bamba bart bert big_bird biogpt bloom codegen cohere2 ctrl deepseek_v3 deepseek_v32 deepseek_v4 diffllama "
        "exaone4 falcon gemma2 gemma3_text gemma3n_text gemma4_text glm4 gpt2 gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj "
        "granitemoehybrid hrm_text inkling_text jamba lfm2 llama llama4_text mamba2 mistral mixtral modernbert-decoder mpt olmo2 "
        "openai-gpt opt persimmon phi3 phimoe qwen3 qwen3_next smollm3 stablelm trocr xglm xlnet zaya qwen4_exp_text"
    ),
    "masked": (
        "albert bert big_bird camembert convbert deberta-v2 distilbert electra esm flaubert fnet ibert layoutlm luke mobilebert "
        "modernbert mpnet nystromformer rembert roberta roformer squeezebert tapas xlm yoso"
    ),
    "qa": "lilt layoutlmv3 markuplm splinter",
    "sequence": "funnel gpt2 llama roberta t5",
    "seq2seq": "bart bigbird_pegasus fsmt m2m_100 marian mvp pegasus prophetnet t5 t5gemma2",
    "image_text": "exaone4_5 fuyu gemma3 gemma4 kosmos-2.5 llava mllama paligemma qwen2_vl",
}

_CROSS = (("add_cross_attention", True),)

SAMPLE = [
    *[Case(task, arch) for task, names in _ARCHITECTURES.items() for arch in names.split()],
    Case("causal", "gpt2", _CROSS, ("encoder_hidden_states",)),
    Case("causal", "bert", _CROSS, ("encoder_hidden_states",)),
    Case("causal", "trocr", (), ("encoder_hidden_states",)),
    Case("causal", "gpt2", (), ("token_type_ids",)),
]
"""Every case that the tests run."""

_REASONS: list[tuple[str, str, str]] = [
    (
        "does not use transformers' attention interface; a gated branch needs it",
        "adapter",
        ("mamba2-causal fnet-masked nystromformer-masked yoso-masked prophetnet-seq2seq"),
    ),
    (
        "the keys and values of a layer with a gated branch must depend only on the layer's input",
        "adapter",
        "lilt-qa zaya-causal",
    ),
    (
        "a key-value prefix needs masks that do not depend on the text",
        "prefix",
        "deepseek_v32-causal qwen4_exp_text-causal",
    ),
    (
        "no gradient reaches",
        "prefix adapter",
        "hrm_text-causal",
    ),
    (
        "has no attention that a key-value prefix can enter",
        "prefix",
        "mamba2-causal fnet-masked nystromformer-masked yoso-masked prophetnet-seq2seq",
    ),
    (
        "no nn.Embedding that receives the text's ids unchanged",
        "prompt prefix adapter",
        "xlnet-causal ibert-masked",
    ),
    (
        "only the embeddings return one state for each of the text's ids",
        "prompt prefix adapter",
        "funnel-sequence",
    ),
    (
        "failed in a forward pass that `attach` runs as a check",
        "prompt prefix adapter",
        "fsmt-seq2seq",
    ),
    (
        "but its value for virtual tokens is not known",
        "slots",
        "gemma4-image_text",
    ),
]
"""Words of the sentence with which attach refuses, the kinds of prompt, and the cases."""

REFUSED = {
    f"{case}: {kind}": words for words, kinds, cases in _REASONS for kind in kinds.split() for case in cases.split()
}
"""What attach refuses, by case and kind, and words of its sentence."""
