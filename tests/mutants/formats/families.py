"""Bugs planted in formats/families.py, and the tests that ought to notice them."""

MUTANTS = [
    ("checkpoint: rows of query, key and value",
     "formats/test_families.py::"
     "test_logits_and_greedy_text_equal_transformers_and_so_do_those_of_the_folder_we_write[llama3]",
     "return [queries, keys, keys]",
     "return [keys, keys, queries]"),
    ("checkpoint: OPT's query and key swapped",
     "formats/test_families.py::"
     "test_logits_and_greedy_text_equal_transformers_and_so_do_those_of_the_folder_we_write[opt]",
     '        "model.decoder.layers.{}.self_attn.q_proj",\n'
     '        "model.decoder.layers.{}.self_attn.k_proj",\n',
     '        "model.decoder.layers.{}.self_attn.k_proj",\n'
     '        "model.decoder.layers.{}.self_attn.q_proj",\n'),
    ("checkpoint: a square matrix isn't transposed",
     "formats/test_families.py::"
     "test_logits_and_greedy_text_equal_transformers_and_so_do_those_of_the_folder_we_write[gpt2]",
     'TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")',
     'TRANSPOSED = ("c_attn.weight", "mlp.c_proj.weight", "c_fc.weight")'),
    ("checkpoint: Llamas are tied unless they say",
     "formats/test_refused_folders.py::test_a_foreign_or_damaged_folder_is_refused_in_one_line",
     'tied=h.get("tie_word_embeddings", False),',
     'tied=h.get("tie_word_embeddings", True),'),
    ("checkpoint: the sliding window is ignored",
     "formats/test_families.py::test_a_sequence_beyond_the_sliding_window_is_refused",
     'context = min(context, h["sliding_window"])',
     "pass"),
    ("checkpoint: transformers 5's rope_theta is ignored",
     "formats/test_families.py::test_config_json_may_be_of_transformers_5_or_before",
     'rope.get("rope_theta", h.get("rope_theta", 10000.0))',
     'h.get("rope_theta", 10000.0)'),
]
