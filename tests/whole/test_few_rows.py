"""Hardly any data, or rows as long as the context: every trainer runs, on one rank and on two."""
import math

import pytest

import data
import tools
import toy
from examples import PAIR
from formats import sources as sources_file
from tools import SILENT, TOY, write_rows


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a tiny language model and a reward model."""
    root = tmp_path_factory.mktemp("models")
    write_rows(root / "preferences.jsonl", [PAIR, PAIR | {"prompt": "Cube 5."}])
    assert tools.here("sft", root, f"--out {root}/sft --steps 2") == tools.here(
        "reward", root, f"--out {root}/reward --steps 2 --val-fraction 0") == 0
    return root


def few(folder, number):
    """Flags of each trainer for a file of very few rows."""
    replies = ["64", "65, as it is written here"]
    path = write_rows(
        folder / f"{number}.jsonl",
        [{"prompt": f"Cube {i}{' please' * i}.", "chosen": replies[i % 2], "rejected": replies[1 - i % 2]}
         for i in range(number)])
    rows = f"--data {path} --steps 3"
    trained = f"{rows} --val-fraction 0 --batch-tokens 100000"
    return {
        "sft": f"{trained} --tokenizer {TOY}", "reward": trained, "dpo": trained, "kto": trained,
        "ppo": f"{rows} --ptx-coef 1 --ptx-data {path}",
        "grpo": rows,
    }


@pytest.mark.case(21)
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("script", ["sft", "reward", "dpo", "kto", "ppo", "grpo"])
def test_one_row_or_two_or_three_are_enough_to_train_on(script, number, models, tmp_path):
    """In batches of more than all of them: whole, or cut into passes of one row."""
    flags, found = few(tmp_path, number)[script], []
    for name in ("whole", "rows"):
        assert tools.here(
            script, models, flags,
            f"--out {tmp_path}/{name} --micro-batch-tokens {100000 if name == 'whole' else 1}") == 0
        found.append(tools.metrics(tmp_path / name))
    assert [row["step"] for row in found[0]] == [1, 2, 3]
    assert all(math.isfinite(value) for row in found[0] for value in row.values())
    for whole, rows in zip(*found):
        rounding = {key for key in whole if key.endswith(("accuracy", "clip_fraction", "ratio_error"))}
        expected = pytest.approx({k: v for k, v in whole.items() if k not in rounding}, rel=2e-3, abs=1e-4)
        assert {k: v for k, v in rows.items() if k not in rounding} == expected


@pytest.mark.long
@pytest.mark.case(21)
@pytest.mark.parametrize("script", ["sft", "reward", "dpo", "kto", "ppo", "grpo"])
def test_two_ranks_share_one_row_and_neither_waits_for_ever(script, models, tmp_path):
    flags = few(tmp_path, 1)[script]
    assert tools.here(script, models, flags, f"--out {tmp_path}/one") == 0
    tools.run(script, models, flags, f"--out {tmp_path}/two --rank-timeout 60", launcher=tools.TORCHRUN)
    for one, two in zip(tools.metrics(tmp_path / "one"), tools.metrics(tmp_path / "two"), strict=True):
        rounding = {key for key in one if key.endswith(("accuracy", "clip_fraction", "ratio_error"))}
        expected = pytest.approx({k: v for k, v in one.items() if k not in rounding}, rel=2e-3, abs=1e-4)
        assert {k: v for k, v in two.items() if k not in rounding} == expected


@pytest.mark.case(20)
def test_rows_around_the_context_train_whole_or_are_counted_and_left_out(models, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl",
                      [{"prompt": "1", "completion": "1" * size} for size in range(52, 68)])
    lengths = [
        len(data.encode_demonstration(toy.tokenizer(), row)[0])
        for row in sources_file.read_rows(rows, "demonstrations", SILENT)
    ]
    fitting = sum(length <= 64 for length in lengths)
    assert {63, 64, 65} <= set(lengths)
    assert tools.here("sft", models,
                      f"--data {rows} --tokenizer {TOY} --val-fraction 0 --steps 2 --out {tmp_path}/run") == 0
    said = capsys.readouterr().out
    assert f"dropped {16 - fitting} of 16 rows: longer than the 64 tokens" in said
    assert f"{fitting} training and 0 held-out examples" in said
    assert all(0 < row["loss"] < 20 for row in tools.metrics(tmp_path / "run"))
