"""Rewrite the forward of modules that compute attention inline, so that it calls an attention function.

Most models compute attention with transformers' attention interface, which a prefix or a gated branch enters. The families here
do not. The rewritten forward of a family replaces that of its attention modules. `attach` compares the results of both
(`compare.py`); if they differ, the module is not supported.

    attention_function   the attention that the rewritten forwards call
    bert, deberta, ...   the rewritten forwards, by family
    families             the rewritten forward of each class
    rewritten_forward    replaces the forward of a module
    compare              compares it with the module's own
"""
