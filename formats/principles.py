"""Principles, by which a model criticises, revises and compares replies: a JSON file for people to edit."""
import json
import re
from pathlib import Path
from typing import NamedTuple

from formats.errors import one_line
from plumbing.flags import UserError, require

PLACES = ("{prompt}", "{a}", "{b}")


class Principle(NamedTuple):
    """All texts, as an object in the file has them."""
    name: str
    critique: str  # what to ask about a reply before it is revised; "" for nothing
    revision: str  # the request to rewrite it
    comparison: str  # the question which of {a} and {b} is the better reply to {prompt}; its answer is A or B


def read_principles(path):
    """[Principle] of a file; UserError says what is wrong with it."""
    where = f"--principles {path}"
    try:
        rows = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{where} can't be read: {one_line(error)}") from None
    require(isinstance(rows, list) and rows, f"{where}: write a list of objects, one for each principle")
    found = []
    for number, row in enumerate(rows, 1):
        texts = isinstance(row, dict) and all(isinstance(value, str) for value in row.values())
        require(texts and row.keys() == {*Principle._fields},
                f"{where}: principle {number} must have {', '.join(Principle._fields)}, each a text")
        principle = Principle(**row)
        require(principle.revision.strip(), f"{where}: the revision of {principle.name} asks for nothing")
        for place in PLACES:
            require(place in principle.comparison,
                    f"{where}: the comparison of {principle.name} has no {place}")
        found.append(principle)
    names = [principle.name for principle in found]
    for name in names:
        require(names.count(name) == 1, f"{where}: two principles are called {name}")
    return found


def fill(comparison, row, a, b):
    """The question whether a or b is the better reply to a row's prompt.

    What is put in is not searched for places again, whatever it says. Of several turns each is named.
    """
    prompt = row.prompt[0]["content"]
    if len(row.prompt) > 1:
        prompt = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in row.prompt)
    texts = dict(zip(PLACES, (prompt, a, b)))
    return re.sub("|".join(map(re.escape, PLACES)), lambda found: texts[found[0]], comparison)
