"""Bugs planted in plumbing/parts.py, and the tests that ought to notice them."""

RESUMED = ("test_constitution.py::"
           "test_a_run_that_was_interrupted_goes_on_and_ends_as_an_uninterrupted_one")
CHANGED = "test_constitution.py::test_other_settings_and_other_principles_are_no_way_to_resume"

MUTANTS = [
    ("parts: what is there is made again", RESUMED,
     "            return json.loads(path.read_bytes())\n",
     "            pass\n"),
    ("parts: they stay when all is done", RESUMED,
     "shutil.rmtree(self.out / \"parts\", ignore_errors=True)",
     "pass"),
    ("parts: other settings go on", CHANGED,
     "require(not changed, f",
     "require(True, f"),
]
