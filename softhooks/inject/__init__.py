"""The injections: the ways in which a prompt enters a model.

    attention     keys and values at the attention function
    written_out   the same, for models that compute attention inline in their own code (MegatronBERT, DeBERTa, ...)
    cache         keys and values through a read-only cache, for models that do not use the attention interface
    shared        a front prompt of a causal decoder, computed once at batch size 1; all rows share its keys and values
    slots         virtual tokens in the sequence; their states are removed from the output
    branch        rows that each query attends to with a separate softmax; the result times a gate is added to attention

`prompt.injection` is one of these names. The first four are one mechanism, a prefix (`prefix/`). Each forward of a stack is one
`softhooks.backbone.forward_pass.Pass`; `softhooks.runtime.dispatch` chooses its class.
"""
