"""Other people's files, in and out: rows of data, tokenizers, chat templates, folders of models.

The contract: what comes in is checked and has one form inside (a `Row`, a tokenizer, a model), whatever it
was outside; what goes out opens elsewhere. Nothing here knows of a loss. Imports from `model.py` and
`plumbing/` alone. Who reads the algorithms may skip this folder.
"""
