"""A task of the reasoning_gym package as files of prompts, and its checker as a reward function.

    pip install reasoning-gym
    python recipes/reasoning_task.py --task spell_backward --out runs/reasoning
    python grpo.py --model sft --data runs/reasoning/prompts.jsonl --reward-fn recipes.reasoning_task:score

writes prompts.jsonl and prompts_heldout.jsonl. The answer of a row is the package's own entry without the
question, as JSON: what the checker of its task goes by. Questions and checkers are the package's.
"""
import functools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

# Scripts in this folder are run from the root or anywhere else.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plumbing.disk import folder_of, write_atomically  # noqa: E402
from plumbing.flags import Count, Seed, UserError, require  # noqa: E402
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


def answer_text(entry):
    """What a checker needs of an entry, as JSON that is read back as it is.

    Marks such as #### and \\boxed{}, behind which a row's answer would be looked for, are written as escapes.
    """
    wanted = {name: value for name, value in entry.items() if name != "question"}
    return json.dumps(wanted).replace("\\\\", "\\u005c").replace("#", "\\u0023")


@dataclass
class Config:
    task: str = "spell_backward"  # name of the task in the package
    out: str = "runs/reasoning"  # folder for the files
    prompts: Count = 2000  # questions to train on
    heldout_prompts: Count = 200  # questions that are held out
    seed: Seed = 0  # seed of the questions
    debug: bool = False  # show the traceback of an error


def draw_rows(config):
    """{split: rows} of different questions, none in both."""
    package = load_package()
    wanted = config.prompts + config.heldout_prompts
    try:
        # More than are wanted, as some tasks ask the same thing again.
        entries = package.create_dataset(config.task, size=4 * wanted, seed=config.seed)
    except ValueError as error:
        raise UserError(f"--task {config.task} can't be made: {error}") from None
    rows = {}
    for entry in entries:
        if len(rows) == wanted:
            break
        try:
            answer = answer_text(entry)
        except TypeError as error:
            raise UserError(f"--task {config.task}: what its checker needs is no JSON ({error})") from None
        rows.setdefault(entry["question"], {"prompt": entry["question"], "answer": answer})
    require(len(rows) == wanted,
            f"--task {config.task} has {len(rows)} different questions in {4 * wanted}, and {wanted} are asked "
            "for (--prompts and --heldout-prompts)")
    rows = list(rows.values())
    return {"heldout": rows[:config.heldout_prompts], "train": rows[config.heldout_prompts:]}


def main(config):
    folder = Path(config.out)
    require(not (folder / "prompts.jsonl").exists(),
            f"--out {folder} already holds prompts; name another folder or delete it")
    require(not folder.is_file(), f"--out {folder} is a file; name a folder")
    rows = draw_rows(config)
    folder_of(folder / "prompts.jsonl")
    for split, end in (("heldout", "_heldout"), ("train", "")):
        text = "".join(json.dumps(row) + "\n" for row in rows[split])
        write_atomically(folder / f"prompts{end}.jsonl", text.encode())
        print(f"{split}: {len(rows[split])} prompts, for instance {rows[split][0]['prompt'][:200]!r}")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
