"""Bugs planted in formats/model_folder.py, and the tests that ought to notice them."""

REFUSED = "formats/test_refused_folders.py::test_a_foreign_or_damaged_folder_is_refused_in_one_line"
NEW_ROWS = "formats/test_model_folder.py::test_added_tokens_get_rows_and_nothing_else_changes"
PEFT = (
    "formats/test_model_folder.py::test_a_peft_folder_by_pefts_formula_is_the_model_in_transformers_and_here")

MUTANTS = [
    ("bpe: learned from held-out rows too",
     "formats/test_model_folder.py::test_a_vocabulary_is_learned_from_the_rows_that_are_trained_on",
     "    rows, _ = split_by_prompt(rows, config.val_fraction)\n",
     ""),
    ("bpe: a resumed run learns another vocabulary",
     "formats/test_model_folder.py::test_a_learned_vocabulary_is_the_runs_own_to_the_end",
     "if config.resume and (Path",
     "if False and (Path"),
    ("checkpoint: weights without a place are left out", REFUSED,
     "    require(not extra, ",
     "    require(True, "),
    ("checkpoint: any architecture of a family will do", REFUSED,
     'architecture = (header.get("architectures") or [None])[0]\n',
     "architecture = next(iter(kinds))\n"),
    ("checkpoint: pickles without --allow-pickle",
     "formats/test_refused_folders.py::test_a_plain_pickle_is_opened_only_when_allowed",
     'require("pickle" not in files.values() or allow_pickle,',
     "require(True,"),
    ("checkpoint: pickles may run code",
     "formats/test_refused_folders.py::test_a_hostile_or_odd_pickle_is_refused_and_runs_nothing",
     "weights_only=True, mmap=True",
     "weights_only=False, mmap=True"),
    ("new tokens: their rows are zero", NEW_ROWS,
     "rows = known.mean(0) + 0.1 * known.std(0) * noise",
     "rows = torch.zeros_like(noise)"),
    ("new tokens: no rows in the head", NEW_ROWS,
     "for module in heads:",
     "for module in heads[:1]:"),
    ("peft: every part on the first rows of its matrix", PEFT,
     "start += rows or 0",
     "start += 0"),
    ("peft: loaded without the scale", PEFT,
     "part += alpha / rank * B @ A",
     "part += B @ A"),
    ("checkpoint: no word of how to make the folder",
     "formats/test_refused_folders.py::test_a_folder_that_is_not_there_comes_with_the_command_that_makes_it",
     'f"{name}: no such checkpoint folder{how_to_make(folder)}"',
     'f"{name}: no such checkpoint folder"'),
]
