"""The ways in which a prompt enters a model, by the value of `prompt.injection`.

    attention     keys and values, added in each call to the attention function
    written_out   the same, in models that compute attention inline (DeBERTa); softhooks replaces this code with such a call
    cache         keys and values, through a read-only cache, in other models that do not use the attention interface
    shared        a prompt before the text of a causal decoder, computed once at batch size 1; all rows share its keys and values
    slots         virtual tokens inserted into the sequence; their states are removed from the output
    branch        a second attention, over the prompt only; its gated output is added to the output of the model's attention

The first four put a key-value prefix before the text (`prefix/`). `softhooks.runtime.dispatch` chooses the
`softhooks.backbone.forward_pass.Pass` for each forward.
"""
