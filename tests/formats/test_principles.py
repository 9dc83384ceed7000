"""formats/principles.py: a file that people edit, and questions that are made of it."""
import json
import re

import pytest

from examples import user
from formats.principles import Principle, fill, read_principles
from formats.rows import Row
from plumbing.flags import UserError
from tools import ROOT

GOOD = {"name": "kind", "critique": "", "revision": "Be kind.", "comparison": "{prompt}: {a} or {b}?"}


def test_what_is_put_into_a_question_is_not_searched_for_places_again():
    row = Row(user("Is {a} a {b}?"))
    asked = fill("{prompt} A: {a} B: {b} {c} {a}", row, "It is {b}.", "{prompt} \\1")
    assert asked == "Is {a} a {b}? A: It is {b}. B: {prompt} \\1 {c} It is {b}."


def test_of_several_turns_each_is_named():
    row = Row([{"role": "system", "content": "Be brief."}, *user("Hi", "Ho", "Why?")])
    assert fill("{prompt}|{a}|{b}", row, "x", "y") == \
        "system: Be brief.\n\nuser: Hi\n\nassistant: Ho\n\nuser: Why?|x|y"


def test_a_file_is_read_as_it_is_and_ours_is_one(tmp_path):
    path = tmp_path / "principles.json"
    path.write_text(json.dumps([GOOD, GOOD | {"name": "höflich"}]))
    assert read_principles(path) == [Principle(**GOOD), Principle(**GOOD | {"name": "höflich"})]
    ours = read_principles(ROOT / "recipes" / "principles.json")
    assert len(ours) > 4 and all(own.critique and re.search(r"\bA or B\b", own.comparison) for own in ours)


@pytest.mark.case(30)
@pytest.mark.parametrize("text, said", [
    ("[", "can't be read"), ("\xff", "can't be read"), ("[" * 9999, "can't be read"),
    ("{}", "write a list of objects"), ("[]", "write a list of objects"),
    ('["kind"]', "principle 1 must have name, critique, revision, comparison, each a text"),
    (json.dumps([GOOD, {"name": "short"}]), "principle 2 must have"),
    (json.dumps([GOOD | {"critic": "x"}]), "principle 1 must have"),
    (json.dumps([GOOD | {"critique": None}]), "principle 1 must have"),
    (json.dumps([GOOD | {"revision": " "}]), "the revision of kind asks for nothing"),
    (json.dumps([GOOD | {"comparison": "{prompt} {a}"}]), "the comparison of kind has no {b}"),
    (json.dumps([GOOD, GOOD]), "two principles are called kind"),
])
def test_a_mistake_in_the_file_is_named(text, said, tmp_path):
    path = tmp_path / "principles.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as error:
        read_principles(path)
    assert said in str(error.value) and str(error.value).startswith(f"--principles {path}")
    assert "\n" not in str(error.value)
