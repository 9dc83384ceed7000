"""formats/rollouts.py: replies that another engine sampled, as rows; and what is wrong with a row."""
import json

import pytest

from formats.rollouts import read_rollouts
from plumbing.flags import UserError

ROW = {"prompt": "Say four.", "answer": "4", "reply_ids": [7, 8, 1], "logprobs": [-0.5, -1, 0.0]}


def written(folder, *rows):
    file = folder / "rollouts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_a_row_has_a_prompt_its_answer_and_what_was_sampled(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say four."}]
    talk = {"messages": turns}
    asked = {name: ROW[name] for name in ("reply_ids", "logprobs")}
    first, second = read_rollouts(written(tmp_path, ROW, talk | asked | {"prompt_ids": [3, 4]}), 1.0)
    assert (first.row.text, first.row.answer, first.prompt_ids) == ("Say four.", "4", None)
    assert (first.reply_ids, first.logprobs) == ([7, 8, 1], [-0.5, -1, 0.0])
    assert [turn["role"] for turn in second.row.prompt] == ["system", "user"]
    assert second.prompt_ids == [3, 4] and second.where.endswith(":2")


@pytest.mark.parametrize("temperature, harmless", [
    (1.0, {}),
    (1.0, {"temperature": 1, "top_p": 1.0, "top_k": -1, "min_p": 0.0}),
    (0.7, {"temperature": 0.7, "top_k": 0}),
    (1.0, {"top_k": None}),
])
def test_what_was_sampled_from_the_scored_distribution_is_taken(temperature, harmless, tmp_path):
    assert len(read_rollouts(written(tmp_path, ROW | harmless), temperature)) == 1


@pytest.mark.parametrize("temperature, other, said", [
    (1.0, {"temperature": 0.7}, "was sampled at temperature 0.7, and --temperature is 1: training scores"),
    (0.7, {"temperature": 1}, "was sampled at temperature 1, and --temperature is 0.7"),
    (1.0, {"temperature": "hot"}, "was sampled at temperature hot"),
    (1.0, {"top_p": 0.95}, "was sampled with top_p 0.95: training scores the whole softmax"),
    (1.0, {"top_k": 50}, "was sampled with top_k 50"),
    (1.0, {"min_p": 0.1}, "was sampled with min_p 0.1"),
    (1.0, {"top_p": [1]}, "was sampled with top_p [1]"),
])
def test_what_was_sampled_otherwise_is_refused(temperature, other, said, tmp_path):
    with pytest.raises(UserError) as error:
        read_rollouts(written(tmp_path, ROW, ROW | other), temperature)
    assert f"rollouts.jsonl:2 {said}" in str(error.value)


@pytest.mark.parametrize("change, said", [
    ({"reply_ids": None}, " has no reply_ids with their logprobs; its fields are prompt, answer, reply_ids"),
    ({"logprobs": None}, " has no reply_ids with their logprobs"),
    ({"reply_ids": []}, ": reply_ids is not a list of token ids, or is empty"),
    ({"reply_ids": [7, -8, 1]}, ": reply_ids is not a list of token ids"),
    ({"reply_ids": [7, 8.0, 1]}, ": reply_ids is not a list of token ids"),
    ({"reply_ids": [True, True, True]}, ": reply_ids is not a list of token ids"),
    ({"prompt_ids": "3 4"}, ": prompt_ids is not a list of token ids"),
    ({"logprobs": [-0.5, -1]}, " has 2 logprobs for 3 reply_ids"),
    ({"logprobs": [-0.5, 0.2, -1]}, ": 0.2 is no log-probability, which is never above 0"),
    ({"logprobs": [-0.5, None, -1]}, ": logprobs is not a list of finite numbers"),
    ({"logprobs": -0.5}, ": logprobs is not a list of finite numbers"),
    ({"prompt": None}, " holds no prompt"),
    ({"prompt": ""}, ": empty prompt"),
    ({"prompt": 4}, ": the prompt is not a string"),
])
def test_a_row_that_is_damaged_is_named(change, said, tmp_path):
    with pytest.raises(UserError) as error:
        read_rollouts(written(tmp_path, ROW, ROW | change), 1.0)
    assert f"rollouts.jsonl:2{said}" in str(error.value)


@pytest.mark.parametrize("text, said", [
    ("", "holds no row"),
    ("{\n", "is not valid JSON"),
    ("[1]\n", "is not a JSON object"),
])
def test_a_file_that_is_damaged_is_named(text, said, tmp_path):
    (tmp_path / "rollouts.jsonl").write_text(text)
    with pytest.raises(UserError, match=said):
        read_rollouts(str(tmp_path / "rollouts.jsonl"), 1.0)
