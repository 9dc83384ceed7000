import json

import pytest

import tools
import toy


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A folder with a tiny SFT model, a reward model and preferences, which PLAN's runs start from."""
    root = tmp_path_factory.mktemp("faults")
    rows = [{"prompt": row.prompt, "completions": row.replies, "ranks": row.ranks} for row in toy.World(0).preferences("train", 300)]
    (root / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tools.run("sft", root, f"--out {root}/sft --steps 2")
    tools.run("reward", root, f"--out {root}/reward --steps 2")
    return root
