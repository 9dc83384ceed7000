"""Bugs planted in toy.py, and the tests that ought to notice them."""

RANKED = "test_toy.py::test_preferences_rank_by_gold_but_for_the_noise"

MUTANTS = [
    ("judge: the best mark counts", "test_toy.py::test_judge_on_replies_of_every_sort",
     "return min(judge(item, reply, ended))",
     "return max(judge(item, reply, ended))"),
    ("annotator: ranks the wrong way round", RANKED,
     "[-score for score in seen]",
     "[score for score in seen]"),
    ("annotator: half as wrong as stated", RANKED,
     "rng.random() < 2 * noise",
     "rng.random() < noise"),
    ("world: held-out wordings are trained on",
     "test_toy.py::test_world_splits_by_wording_and_repeats_by_seed",
     "                self.texts[split].append(text)\n",
     '                for name in {"train", split}:\n                    self.texts[name].append(text)\n'),
]
