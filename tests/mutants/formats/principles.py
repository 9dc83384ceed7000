"""Bugs planted in formats/principles.py, and the tests that ought to notice them."""

PLACES = "formats/test_principles.py::test_what_is_put_into_a_question_is_not_searched_for_places_again"

MUTANTS = [
    ("principles: a reply's {b} is replaced", PLACES,
     'return re.sub("|".join(map(re.escape, PLACES)), lambda found: texts[found[0]], comparison)',
     "[comparison := comparison.replace(*own) for own in texts.items()]\n    return comparison"),
    ("principles: A and B change places", PLACES,
     "(prompt, a, b)",
     "(prompt, b, a)"),
    ("principles: an unknown field is passed over",
     "formats/test_principles.py::test_a_mistake_in_the_file_is_named",
     "row.keys() == {*Principle._fields}",
     "row.keys() >= {*Principle._fields}"),
]
