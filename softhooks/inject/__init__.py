"""The ways into a model.

    attention   keys and values put in at the attention function
    written_out the same, in models that call no attention function and that softhooks knows: MegatronBERT, DeBERTa, ...
    cache       keys and values put in by a read-only cache, for models that do not use the attention interface
    shared      a front prompt of a causal decoder, run once at batch 1 and put in as keys and values
    branch      rows that each query attends to beside the text, in a softmax of their own, times a gate
    slots       virtual slots in the sequence, their states stripped on the way out

Each forward of a stack is one `Pass` (see `passes`); `softhooks.runtime.dispatch` chooses which kind.
"""
