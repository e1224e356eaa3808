"""How a prompt enters a model: the injections, which `prompt.injection` names.

    attention     keys and values at the attention function
    written_out   keys and values in models that compute attention inline in their own code (MegatronBERT, DeBERTa, ...)
    cache         keys and values through a read-only cache, for models that do not use the attention interface
    shared        a prompt before the text of a causal decoder, computed once at batch size 1; all rows share its keys and values
    slots         virtual tokens in the sequence; their states are removed from the output
    branch        a second attention, over the prompt only; its output times a gate is added to the output of attention

The first four put a key-value prefix before the text (`prefix/`). `softhooks.runtime.dispatch` chooses the
`softhooks.backbone.forward_pass.Pass` for each forward.
"""
