"""A task of the reasoning_gym package as files of prompts, and its checker as a reward function.

    pip install reasoning-gym
    python recipes/reasoning_task.py --task spell_backward --settings max_word_len=5 --out runs/reasoning
    python grpo.py --model sft --data runs/reasoning/prompts.jsonl --reward-fn recipes.reasoning_task:score
        --judge recipes.reasoning_task:right

writes prompts.jsonl and prompts_heldout.jsonl. The answer of a row is the package's own entry without the
question, as JSON: what the checker of its task goes by. Questions and checkers are the package's. score is
what the checker gives, which can be a share of 1; right is 1 where it gives all of it, and 0 elsewhere.
"""
import functools
import json
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

# Scripts in this folder are run from the root or anywhere else.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plumbing.disk import folder_of, write_atomically  # noqa: E402
from plumbing.flags import Count, Natural, Seed, UserError, require  # noqa: E402
from plumbing.run import run_script  # noqa: E402


def load_package():
    """The package; UserError where it is missing."""
    try:
        import reasoning_gym
    except ImportError:
        raise UserError("the tasks are those of reasoning_gym, which is not installed: "
                        "pip install reasoning-gym") from None
    return reasoning_gym


@functools.cache
def checker_of(task):
    """The package's function (answer, entry) -> number for a task."""
    return load_package().get_score_answer_fn(task)


def score(replies, answers):
    """What the task's checker gives each reply, from 0 to 1; 0 for a row without an answer."""
    scores = []
    for reply, answer in zip(replies, answers):
        if not answer:
            scores.append(0.0)
            continue
        entry = json.loads(answer)
        check = checker_of(entry["metadata"]["source_dataset"])
        scores.append(float(check(reply.strip(), entry)))
    return scores


def right(replies, answers):
    """1 where the task's checker gives a reply all there is, 0 elsewhere: its mean is an accuracy."""
    # Compared before anything is rounded: a checker's 0.9999999 for all letters and some more is not right.
    return [float(number == 1.0) for number in score(replies, answers)]


def answer_text(entry):
    """What a checker needs of an entry, as JSON that is read back as it is.

    Marks such as #### and \\boxed{}, behind which a row's answer would be looked for, are written as escapes.
    """
    wanted = {name: value for name, value in entry.items() if name != "question"}
    return json.dumps(wanted).replace("\\\\", "\\u005c").replace("#", "\\u0023")


@dataclass
class Config:
    task: str = "spell_backward"  # name of the task in the package
    # what the task is made with, name=value, as the package calls it (max_word_len=5)
    settings: list[str] = field(default_factory=list)
    suffix: str = ""  # text that is put behind each question, after a blank
    out: str = "runs/reasoning"  # folder for the files
    prompts: Count = 2000  # questions to train on
    heldout_prompts: Count = 200  # questions that are held out
    # further questions, with the package's answers, for sft.py: what a model needs that can't do the task yet
    demonstrations: Natural = 0
    seed: Seed = 0  # seed of the questions
    debug: bool = False  # show the traceback of an error


def read_settings(texts):
    """{name: value} of texts name=value. A value is read as JSON, or else is the text itself."""
    settings = {}
    for text in texts:
        name, equals, value = text.partition("=")
        require(name and equals, f"--settings {text} is not name=value")
        require(name not in ("size", "seed"), f"--settings {name} is set by --prompts and --seed")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return settings


def draw_rows(config):
    """{name of the file: rows} of different questions, none in two of them."""
    package = load_package()
    settings = read_settings(config.settings)
    wanted = config.prompts + config.heldout_prompts + config.demonstrations
    try:
        # More than are wanted, as some tasks ask the same thing again.
        entries = package.create_dataset(config.task, size=4 * wanted, seed=config.seed, **settings)
    # The package asserts what it wants of a setting, and takes an unknown one for a wrong argument.
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"--task {config.task} can't be made: {error}") from None
    rows = {}
    for entry in entries:
        if len(rows) == wanted:
            break
        try:
            answer = answer_text(entry)
        except TypeError as error:
            raise UserError(f"--task {config.task}: what its checker needs is no JSON ({error})") from None
        question = f"{entry['question']} {config.suffix}".rstrip()
        rows.setdefault(question, (answer, entry["answer"]))
    require(len(rows) == wanted,
            f"--task {config.task} has {len(rows)} different questions in {4 * wanted}, and {wanted} are "
            "asked for (--prompts, --heldout-prompts and --demonstrations)")
    asked = [{"prompt": question, "answer": answer} for question, (answer, _) in rows.items()]
    shown = [{"prompt": question, "completion": reply} for question, (_, reply) in rows.items()]
    # What a task has few of (the shortest words) is used up by the first questions, so they are shuffled: all
    # files have their share of it.
    order = list(range(wanted))
    random.Random(config.seed).shuffle(order)
    asked = [asked[i] for i in order]
    shown = [shown[i] for i in order]
    heldout = config.heldout_prompts
    trained = heldout + config.prompts
    return {"prompts_heldout": asked[:heldout], "prompts": asked[heldout:trained],
            "demonstrations": shown[trained:]}


def main(config):
    folder = Path(config.out)
    require(not (folder / "prompts.jsonl").exists(),
            f"--out {folder} already holds prompts; name another folder or delete it")
    require(not folder.is_file(), f"--out {folder} is a file; name a folder")
    files = draw_rows(config)
    folder_of(folder / "prompts.jsonl")
    for name, rows in files.items():
        if rows:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            write_atomically(folder / f"{name}.jsonl", text.encode())
            print(f"{name}.jsonl: {len(rows)} questions, for instance {rows[0]['prompt'][:200]!r}")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
