"""Bugs planted in formats/tokenizer.py, and the tests that ought to notice them."""

NAIVE = "formats/test_tokenizer.py::test_train_bpe_equals_the_naive_algorithm_on_texts_full_of_repeats"

MUTANTS = [
    ("template: control tokens taken from the text",
     "test_data.py::test_template_written_out_by_hand_masks_replies_and_their_end_tokens_only",
     "self.encoding.encode_ordinary(text)",
     "self.encoding.encode(text, allowed_special='all')"),
    ("bpe: how often a word comes is forgotten", NAIVE,
     "times.extend([count] * (len(letters) + 1))",
     "times.extend([1] * (len(letters) + 1))"),
    ("bpe: a pair that lost a place keeps its count", NAIVE,
     "counts[right, ids[following]] -= count",
     "counts[right, ids[following]] -= 0"),
    ("bpe: overlapping pairs are merged from the right", NAIVE,
     "sorted(places.pop((left, right)))",
     "sorted(places.pop((left, right)), reverse=True)"),
]
