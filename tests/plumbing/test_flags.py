"""plumbing/flags.py: the help of a field."""
import dataclasses

from plumbing.flags import field_comments


@dataclasses.dataclass
class Explained:
    # A heading explains no field.

    beside: int = 1  # on its own line
    # in one line above it, with a "# sign"
    above: int = 2
    # in two lines
    # above it
    long: dict[str, int] = dataclasses.field(default_factory=dict)
    # not what is above, where there is one
    both: int = 3  # what is beside it
    silent: int = 4


@dataclasses.dataclass
class ExplainedAgain(Explained):
    """Has fields of its own: above: and below."""

    # in a subclass
    own: int = 5


def test_the_help_of_a_field_is_the_comment_beside_it_or_directly_above_it():
    expected = {"beside": "on its own line", "above": 'in one line above it, with a "# sign"',
                "long": "in two lines above it", "both": "what is beside it", "own": "in a subclass"}
    assert field_comments(ExplainedAgain) == expected
