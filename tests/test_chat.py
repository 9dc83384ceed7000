"""chat.py: answers from a pipe, several models at once, and models that know single questions alone."""
from formats.families import knows_single_turns
from formats.model_folder import read_config
from tools import command


def test_chat_answers_from_a_pipe_with_one_model_and_with_two(chain):
    root = chain[0]
    one = command("chat",
                  f"--model {root}/sft --max-new-tokens 5",
                  input="What is 1 + 2?\n\n/quit\nnot read\n")
    assert one.returncode == 0 and len(one.stdout.splitlines()) <= 2, one.stderr
    two = command("chat",
                  f"--compare {root}/sft {root}/ppo --max-new-tokens 5 --system Hello",
                  input="What is 1 + 2?\n")
    assert two.returncode == 0 and "sft: " in two.stdout and "ppo: " in two.stdout
    full = command("chat", f"--model {root}/sft --max-new-tokens 5", input="What is 1 + 2? " * 20 + "\n")
    assert full.returncode == 0 and "don't fit the model's context" in full.stdout


def test_chat_forgets_what_a_model_of_single_questions_cannot_follow_and_says_so_once(chain, talk, capsys):
    root, notice = chain[0], "was trained on single questions, so it forgets"
    for stage in ("sft", "ppo", "dpo"):  # what sft.py has written, the other stages keep
        assert talk(f"--model {root}/{stage}") == [1, 1, 1]
        assert capsys.readouterr().out.count(f"({stage} {notice}") == 1
    for flags, expected in (("--history keep", [1, 3, 5]), ("--history forget", [1, 1, 1])):
        assert talk(f"--model {root}/sft {flags}") == expected
        assert notice not in capsys.readouterr().out
    assert talk(f"--model {root}/sft --system Hi") == [2, 2, 2]
    assert knows_single_turns(read_config(root / "reward")[0])


def test_chat_names_two_models_by_what_tells_them_apart(judged, tmp_path):
    flags = f"--compare {tmp_path}/a/sft {tmp_path}/b/sft --max-new-tokens 4"
    both = command("chat", flags, input="What is 1 + 2?\n")
    assert both.returncode == 0 and "a/sft: " in both.stdout and "b/sft: " in both.stdout
