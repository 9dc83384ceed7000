"""The scripts as their users meet them: help, the README's commands, and mistakes, which end in one line."""
import dataclasses
import inspect
import os
import re
import shlex
import subprocess
import sys

import pytest

import ppo
import sft
import tools
from plumbing import run as runtime
from plumbing.flags import field_comments, parse_flags
from tools import DATA, ROOT, SCRIPTS, TOY, TRAINERS, command, readme_commands


# -- mistakes: one line, exit code 2, nothing written

@pytest.mark.case(30)
@pytest.mark.parametrize("script, flags, said", [
    ("sft", "--stepz 5", "did you mean --steps?"),
    ("sft", "--steps 0", "--steps must be >= 1, got 0"),
    ("sft", "--lr -1", "--lr must be > 0, got -1.0"),
    ("sft", "--lr nan", "--lr must be > 0, got nan"),
    ("sft", "--lr fast", "invalid float value: 'fast'"),
    pytest.param("sft", "--device cuda", "PyTorch finds no such device", marks=pytest.mark.case(28)),
    ("sft", "--dtype float16", "--dtype float16 needs --device cuda"),
    ("sft", "--data nowhere.json", "nowhere.json: no such file"),
    ("sft", "--data {tmp}/rows.xlsx", "only .json, .json.gz, .jsonl"),
    pytest.param("sft", "--data {tmp}/broken.jsonl " f"--tokenizer {TOY}", "broken.jsonl:2 is not valid JSON",
                 marks=pytest.mark.case(18)),
    pytest.param("sft", "--data {tmp}/keys.jsonl " f"--tokenizer {TOY}", "its fields are question, reply",
                 marks=pytest.mark.case(19)),
    ("sft", "--model {tmp}", "is not a checkpoint folder: config.json is missing"),
    pytest.param("sft", "--model {root}/reward", "holds a reward model, but a language model is needed",
                 marks=pytest.mark.case(12)),
    ("sft", "--width 30 --heads 4", "width 30 is not divisible by 4 heads"),
    pytest.param("sft", "--block-size 5", "every row is longer than the 5 tokens that the context leaves",
                 marks=pytest.mark.case(20)),
    pytest.param("sft", "--out {root}/sft", "already holds a run; add --resume to go on with it",
                 marks=pytest.mark.case(14)),
    pytest.param("sft", "--out {tmp}/rows.txt", "is a file; name a folder", marks=pytest.mark.case(14)),
    pytest.param("reward", "--model {root}/sft --data {tmp}/instructions.json",
                 "doesn't hold a prompt, chosen and rejected", marks=pytest.mark.case(19)),
    pytest.param("ppo", "--model {root}/sft --reward {root}/sft",
                 "holds a language model, but a reward model is needed", marks=pytest.mark.case(12)),
    ("ppo", "--model {root}/sft --reward {root}/reward --max-new-tokens 64", "leaves no room for a prompt"),
    ("ppo", "--model {root}/sft --reward {root}/reward --rollout-batch 10 --minibatches 3",
     "10 prompts are not divisible into --minibatches 3"),
    ("ppo", "--kl k4", "invalid choice: 'k4'"),
    ("ppo", "--model {root}/sft --reward {root}/reward --kl-target 6 --kl-coef 0",
     "--kl-target needs a --kl-coef above 0"),
    ("ppo", "--model {root}/sft --reward {root}/reward --width 64", "--width is for --model scratch"),
    pytest.param("ppo", "--model {root}/sft --reward {root}/reward --out {root}/reward --overwrite",
                 "--overwrite would delete the --reward", marks=pytest.mark.case(14)),
    pytest.param("reward", "--model {root}/sft --data {tmp}/ranks.jsonl",
                 "ranks.jsonl:1: a rank, a gold score or the margin is not a finite number",
                 marks=pytest.mark.case(19)),
    ("evaluate", "--models {root}/sft --judge toy:gold --max-new-tokens 100", "leaves no room for a prompt"),
    ("evaluate", "--models {root}/sft --out {tmp}", "is a folder; name a .json file"),
    ("toy", "--model {root}/sft --out {tmp}/rows.txt", "is a file; name a folder"),
    ("dpo", "--model {root}/nowhere", "no such checkpoint folder"),
    ("dpo", "--label-smoothing 0.7", "--label-smoothing must be >= 0 and < 0.5, got 0.7"),
    ("dpo", "--loss robust", "--loss robust needs the share of wrong labels, --label-smoothing above 0"),
    ("dpo", "--loss simpo --reference runs/sft",
     "--reference is for --loss dpo, robust, ipo, hinge, dpop, tdpo1, tdpo2; leave it out with simpo"),
    ("dpo", "--preset orpo --sft-coef 1",
     "--sft-coef is for --loss dpo, robust, ipo, hinge, dpop, tdpo1, tdpo2, simpo; leave it out with orpo"),
    ("dpo", "--loss ipo --gamma 1", "tdpo1, tdpo2, simpo; leave it out with ipo"),
    ("dpo", "--loss rrhf --margins", "tdpo1, tdpo2, simpo; leave it out with rrhf"),
    ("dpo", "--dpop-lambda 5", "--dpop-lambda is for --loss dpop; leave it out with dpo"),
    ("dpo", "--loss tdpo1 --tdpo-alpha 0.1", "--tdpo-alpha is for --loss tdpo2; leave it out with tdpo1"),
    ("evaluate", "", "--models: name one checkpoint folder or more"),
    ("evaluate", "--models {root}/sft --data {tmp}/instructions.json",
     "name what to judge with: --judge, --reward, --reward-fn or --process"),
    ("evaluate", "--models {root}/sft {root}/ppo {root}/sft/", "--models names {root}/sft twice"),
    ("evaluate", "--models {root}/sft --judge toy:gold toy:gold", "the logs have another number named gold"),
    ("evaluate", "--models {root}/sft --reward {root}/reward --reward-weights 1 2",
     "2 --reward-weights for 1 rewards"),
    ("evaluate", "--models {root}/sft --reward {root}/reward --reward-weights nan",
     "--reward-weights must be finite"),
    ("sft", "--steps 5 --epochs 2", "--steps 5 and --epochs 2 both say how long to train"),
    ("reward", "--epochs 1 --steps 5", "--steps 5 and --epochs 1 both say how long to train"),
    ("dpo", "--steps 500 --epochs 2", "--steps 500 and --epochs 2 both say how long to train"),
    ("sft", "--model runs/sft",
     "runs/sft: no such checkpoint folder; python sft.py --out runs/sft makes one"),
    ("sft", "--model runs/demo/ppo/", "runs/demo/ppo/: no such checkpoint folder; bash run.sh makes it"),
    ("chat", "--model runs/mine", "runs/mine: no such checkpoint folder"),
    ("sft", "--wandb mine", "install it, or leave out --tensorboard and --wandb"),
    ("sft", "--tensorboard", "install it, or leave out --tensorboard and --wandb"),
    ("chat", "--model {root}/sft --max-new-tokens 64", "fills the context of 64"),
    ("toy", "--model {root}/sft --out {root}/preferences", "already holds preferences"),
    ("report", "--demo {tmp}", "is missing: run the stage that writes it"),
])
def test_a_mistake_ends_in_one_line_and_exit_code_2(script, flags, said, chain, tmp_path, monkeypatch,
                                                    capsys):
    for package in ("wandb", "torch.utils.tensorboard"):  # as if it were not installed
        monkeypatch.setitem(sys.modules, package, None)
    said = said.format(root=chain[0])
    for name in ("rows.txt", "rows.xlsx"):
        (tmp_path / name).write_text("text")
    (tmp_path / "broken.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": \n')
    (tmp_path / "keys.jsonl").write_text('{"question": "a", "reply": "b"}\n')
    (tmp_path / "instructions.json").write_text('[{"instruction": "a", "output": "b"}]')
    (tmp_path / "ranks.jsonl").write_text('{"prompt": "a", "completions": ["b", "c"], "ranks": [1e999, 1]}\n')
    words = shlex.split(flags.format(tmp=tmp_path, root=chain[0]))
    if script in TRAINERS and "--out" not in words:
        words += ["--out", str(tmp_path / "out")]
    if script in DATA and "--data" not in words:
        words += ["--data", DATA[script]]
    before = {p: p.stat().st_mtime_ns for p in chain[0].rglob("*")}
    with pytest.raises(SystemExit) as stopped:
        runtime.run_script(SCRIPTS[script].main, SCRIPTS[script].Config, "", words)
    errors = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and said in errors[-1] and errors[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()
    assert before == {p: p.stat().st_mtime_ns for p in chain[0].rglob("*")}


@pytest.mark.case(30)
def test_a_mistake_in_a_subprocess_shows_no_traceback():
    wrong = command("sft", f"--data nowhere.json --tokenizer {TOY}")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "Traceback" not in wrong.stderr


@pytest.mark.case(30)
def test_run_sh_refuses_wrong_arguments():
    for words in (["--sed", "1"], ["--seed"], ["--seed", "x"]):
        done = subprocess.run(["bash", str(ROOT / "run.sh"), *words], capture_output=True, text=True)
        assert done.returncode == 2 and "error: " in done.stderr


# -- help, and what the README says

@pytest.mark.parametrize("name", SCRIPTS)
def test_help_explains_every_flag_and_every_field_is_read(name):
    config_class = SCRIPTS[name].Config
    comments = field_comments(config_class)
    sources = inspect.getsource(SCRIPTS[name]) + "".join(
        text for file, text in tools.sources().items() if file.removesuffix(".py") not in SCRIPTS)
    for field in dataclasses.fields(config_class):
        assert len(comments.get(field.name, "")) > 8, f"--{field.name} has no help"
        assert re.search(rf"(config|flags)\.{field.name}\b", sources), f"--{field.name} is never read"
    shown = command(name, "--help")
    assert shown.returncode == 0
    assert all(
        "--" + field.name.replace("_", "-") in shown.stdout for field in dataclasses.fields(config_class))


def test_importing_any_module_does_nothing(tmp_path):
    files = [file.removesuffix(".py").removesuffix("/__init__") for file in tools.sources()]
    modules = ", ".join(file.replace("/", ".") for file in files)
    code = f"import torch; state = torch.get_rng_state(), torch.get_num_threads()\nimport {modules}\n" \
           "assert torch.equal(state[0], torch.get_rng_state()) and state[1] == torch.get_num_threads()"
    done = subprocess.run([sys.executable, "-c", code],
                          capture_output=True,
                          text=True,
                          cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not list(tmp_path.iterdir())


def test_the_readme_has_no_gaps_and_no_dead_links():
    text = (ROOT / "README.md").read_text()
    assert not re.search(r"@[A-Z]+@", text)
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert len(links) > 10 and all((ROOT / link).exists() for link in links)


def test_commands_of_the_readme_and_of_the_scripts_exist_with_their_flags():
    lines = readme_commands()
    for script in SCRIPTS.values():
        lines += [
            re.split(r"\s{4,}", line.strip())[0]
            for line in script.__doc__.splitlines()
            if re.match(r"\s+(python|torchrun) ", line)
        ]
    checked = 0
    for line in lines:
        words = [w for w in shlex.split(line.split("|")[-1]) if not re.match(r"[A-Z_]+=", w)]
        file = next((word for word in words if word.endswith((".py", ".sh"))), words[1])
        assert (ROOT / file).exists(), line
        if file.endswith(".py") and file[:-3] in SCRIPTS:
            parse_flags(SCRIPTS[file[:-3]].Config, "", words[words.index(file) + 1:])
            checked += 1
    assert checked > 15


@pytest.mark.parametrize("name", TRAINERS)
def test_help_begins_with_the_flags_of_the_script(name, capsys):
    with pytest.raises(SystemExit):
        parse_flags(SCRIPTS[name].Config, "", ["--help"])
    own, common = capsys.readouterr().out.split("flags of every training script:")
    mine = SCRIPTS[name].Config.__annotations__
    for field in dataclasses.fields(SCRIPTS[name].Config):
        flag = "\n  --" + field.name.replace("_", "-") + ("," if field.type is bool else " ")
        assert (flag in own, flag in common) == (field.name in mine, field.name not in mine), flag


def test_of_ppos_flags_steps_and_epochs_go_together():
    assert parse_flags(ppo.Config, "", ["--steps", "5", "--epochs", "3"]).epochs == 3
    assert parse_flags(sft.Config, "", ["--steps", "5", "--epochs", "0"]).steps == 5


def test_recipes_leave_the_precision_to_the_machine():
    for path in (ROOT / "recipes").glob("*.sh"):
        named = re.findall(r"--dtype (\S+)", path.read_text())
        assert named and {name.strip('"') for name in named} == {"${DTYPE:-auto}"}, path
