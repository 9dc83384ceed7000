"""A folder to run ppo.py in, and what a run of it computes, for the files of tests that look at its runs."""
import json

import pytest
import torch

from tools import MORE_WORDS, TINY, TOY, quietly, rollout_of, run_here, train


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with prompts, demonstrations, a policy whose replies end sometimes, and two reward models."""
    root = tmp_path_factory.mktemp("ppo")
    prompts = [f"Say {'please ' * (i % 3)}{word}." for i, word in enumerate(MORE_WORDS)]
    files = {
        "prompts": [{"prompt": p} for p in prompts],
        "demonstrations": [{"instruction": p, "output": reply} for p in prompts
                           for reply in ("It is good.", "No.", "It is sad, and so it is.")],
        "pairs": [{"prompt": p, "chosen": "It is good.", "rejected": "No."} for p in prompts],
    }
    for name, rows in files.items():
        (root / f"{name}.json").write_text(json.dumps(rows))

    def stage(script, *flags):
        run_here(script, *flags, "--threads 1 --val-fraction 0 --batch-tokens 512")

    with quietly():
        stage("sft", f"{TINY} --tokenizer {TOY} --data {root}/demonstrations.json --out {root}/sft",
              "--steps 40 --warmup 5 --lr 0.02")
        for name, seed in (("reward", 0), ("other", 1)):
            stage("reward", f"--data {root}/pairs.json --model {root}/sft --out {root}/{name}",
                  f"--steps 2 --seed {seed}")
    return root


@pytest.fixture(scope="module")
def default(root, tmp_path_factory):
    """A run with every switch at its default; some of its replies end, some are cut off."""
    run = train(root, tmp_path_factory.mktemp("default") / "run")
    ended = torch.cat([rollout_of(run, i).ended for i in (0, 1)])
    assert ended.any() and not ended.all()
    return run
