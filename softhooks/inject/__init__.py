"""How prompts enter a model.

    attention     keys and values at the attention function
    written_out   the same in models whose attention is written out in their own code (MegatronBERT, DeBERTa, ...)
    cache         keys and values through a read-only cache, in models that do not use the attention interface
    shared        a front prompt of a causal decoder, computed once at batch 1, whose keys and values all rows share
    slots         virtual tokens in the sequence, whose states are removed from the output
    branch        rows that each query attends to in a softmax of their own, times a gate, next to its attention to the text

`prompt.injection` is one of these names. The first four are one mechanism, a prefix (`prefix/`). Each forward of a stack is one
`softhooks.backbone.forward_pass.Pass`; `softhooks.runtime.dispatch` chooses its class.
"""
