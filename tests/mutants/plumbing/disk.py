"""Bugs planted in plumbing/disk.py, and the tests that ought to notice them."""

MUTANTS = [
    ("resume: a model folder is its weights",
     "whole/test_resume.py::"
     "test_resume_notices_any_change_of_what_a_model_folder_is_opened_from_and_of_nothing_else",
     "if file.name in CHECKPOINT_FILES or file.name.endswith(WEIGHTS):",
     "if file.name.endswith(WEIGHTS):"),
    ("overwrite: a finished run's word outlives its model",
     "faults/test_checkpoints.py::test_overwrite_deletes_the_word_that_a_run_is_finished_before_its_model",
     '"run.json", *CHECKPOINT_FILES, *EMA_FILES, "metrics',
     '*CHECKPOINT_FILES, "run.json", *EMA_FILES, "metrics'),
]
