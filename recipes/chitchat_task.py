"""Dialogues of people, rated on three scales, from the chitchat-dataset package, as rows for the scripts.

    pip install chitchat-dataset
    python recipes/chitchat_task.py --out runs/chitchat
    python aims.py --data runs/chitchat/rated.jsonl --model MODEL
    python reward.py --data runs/chitchat/interesting.jsonl --ratings regress --model MODEL
    python feedback.py --data runs/chitchat/talks.jsonl --out runs/chitchat/feedback

    rated.jsonl                                        {"messages", "ratings": {"witty": 7, ...}}
    interesting.jsonl, upbeat.jsonl, witty.jsonl       {"messages", "ratings": {"rating": 7}}: one scale alone
    talks.jsonl                                        {"messages"}: dialogues of three turns or more

The one who writes first is the user, the other the assistant; what one of them sends in a row is one turn. A
rating, from 1 to 10, is that of a whole dialogue. In the rows it stands at the last turn of the assistant, as
all that a score reads is before it; it says little of that turn alone. The package does not say which of the
two gave it. Left out are those whom nobody answered (2,283 of the 5,988 rated ones), and what the user said
behind the assistant's last turn. --turns keeps the end of a dialogue only: then nothing in a row shows how
long it was, which is what ratings go by most (docs/reward_models.md).
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

# Scripts in this folder are run from the root or anywhere else.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plumbing.disk import folder_of, write_atomically  # noqa: E402
from plumbing.flags import Natural, UserError, require  # noqa: E402
from plumbing.run import run_script  # noqa: E402

AIMS = ("interesting", "upbeat", "witty")


def load_dialogues():
    """[dialogue] of the package, each {"messages": [[{"text", "sender"}]], maybe "ratings": {aim: x}}."""
    try:
        import chitchat_dataset
    except ImportError:
        raise UserError("the dialogues are those of chitchat_dataset, which is not installed: "
                        "pip install chitchat-dataset") from None
    return list(chitchat_dataset.Dataset().values())


def turns_of(dialogue):
    """[{role, content}] of a dialogue of two: the first to write is the user. [] unless there are two."""
    turns, names = [], {}
    for message in (message for group in dialogue["messages"] for message in group):
        text = message["text"].strip()
        if not text:
            continue
        # The first two to write have a role; a third would have none.
        role = names.setdefault(message["sender"], ("user", "assistant", None)[min(len(names), 2)])
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n" + text
        else:
            turns.append({"role": role, "content": text})
    return turns if len(names) == 2 else []


def up_to_a_reply(turns, most=0):
    """The turns up to the assistant's last one; of them the last ones, at most so many (0: all).

    They begin with a turn of the user's.
    """
    if turns and turns[-1]["role"] == "user":
        turns = turns[:-1]
    # An even number of turns that ends with the assistant begins with the user.
    most -= most % 2
    return turns[-most:]


def rows_of(dialogues, most=0):
    """{name of a file: its rows}."""
    files = {"rated": [], **{aim: [] for aim in AIMS}, "talks": []}
    for dialogue in dialogues:
        turns = turns_of(dialogue)
        if len(turns) > 2:
            files["talks"].append({"messages": turns})
        if not turns or not dialogue.get("ratings"):
            continue
        kept = up_to_a_reply(turns, most)
        # Some ratings are text ("7").
        ratings = {aim: int(dialogue["ratings"][aim]) for aim in AIMS}
        files["rated"].append({"messages": kept, "ratings": ratings})
        for aim in AIMS:
            files[aim].append({"messages": kept, "ratings": {"rating": ratings[aim]}})
    return files


@dataclass
class Config:
    out: str = "runs/chitchat"  # folder for the files
    turns: Natural = 0  # of a rated dialogue keep the last so many turns, 2 or more; 0 keeps all
    debug: bool = False  # show the traceback of an error


def main(config):
    folder = Path(config.out)
    require(not folder.is_file(), f"--out {folder} is a file; name a folder")
    require(not (folder / "rated.jsonl").exists(),
            f"--out {folder} already holds dialogues; name another folder or delete it")
    require(config.turns != 1, "--turns 1 holds no turn of the user's with a reply; name 2 or more, or 0")
    files = rows_of(load_dialogues(), config.turns)
    folder_of(folder / "rated.jsonl")
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(folder / f"{name}.jsonl", text.encode())
        print(f"{name}.jsonl: {len(rows)} dialogues")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
