"""Bugs planted in report.py, and the tests that ought to notice them."""

MUTANTS = [
    ("report: forgets how long the demo took",
     "test_report.py::test_a_report_made_again_keeps_the_time_and_a_demos_curves_are_another_picture",
     'if not seconds and (demo / "summary.json").exists():',
     "if False:"),
]
