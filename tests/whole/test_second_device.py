"""The scripts on a device of their own (second_device.py): nothing mixes devices, no pass waits."""
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import second_device
import tools
from examples import TOKENIZER
from small_models import tiny_of
from tools import TINY, TOY, write_rows
import toy
from formats.model_folder import save_model
from model import GPT, ScalarModel

needed = pytest.mark.skipif(not second_device.supported, reason="this PyTorch has no backends in Python")
pytestmark = [pytest.mark.case(34), needed]


def on_device(runs, root):
    """What came of runs of scripts on the second device, one after another: see `second_device.run`.

    runs: [{"words": [script, flags...], "stop": a step}].
    """
    paths = os.pathsep.join([str(tools.ROOT), str(tools.TESTS), str(root)])
    command = [sys.executable, tools.TESTS / "second_device.py"]
    done = subprocess.run(command, input=json.dumps(runs), capture_output=True, text=True,
                          env=tools.ENVIRONMENT | {"PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------------------
# The device itself

PROBES = """
import json, sys, torch, second_device
kept = second_device.register()
from torch.nn.functional import linear
second = torch.device(second_device.NAME, 0)
here = torch.arange(3.0)
x = here.to(second, non_blocking=True)
mask, places = x > 0, torch.tensor([0, 2]).to(second, non_blocking=True)
mine, theirs = torch.Generator(second), torch.Generator("cpu")
found = {}
for probe in json.load(sys.stdin):
    second_device.waits.clear()
    try:
        exec(probe)
        found[probe] = sum(second_device.waits.values())
    except second_device.Mixed as refused:
        found[probe] = "refused"
    except Exception as error:
        found[probe] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""
NO_WAIT = [
    "x + 1", "x * torch.tensor(2.0)", "x[places]", "x[1]", "x[mask] = 0", "x[places] = 1.0", "x.sum()",
    "x.clone()", "torch.where(mask, x, 0.0)", "here.to(second, non_blocking=True)", "mask.any()",
    "x.copy_(here, non_blocking=True)", "torch.zeros(3, device=second)", "x.to(torch.bfloat16)",
    "x.argmax(-1)", "x.to(second)", "torch.full((2,), 1, pin_memory=True)",
    "torch.rand(2, device=second, generator=mine)", "torch.rand(2, generator=theirs)",
]
ONE_WAIT = [
    "x[0].item()", "float(x[0])", "int(x.sum())", "bool(mask.any())", "x.tolist()", "x.cpu()", "x.to('cpu')",
    "here.copy_(x)", "here.to(second)", "x.copy_(here)", "torch.tensor([1, 2], device=second)",
    "torch.as_tensor([1.0], device=second)", "x.new_tensor(3)", "mask.nonzero()", "x[mask]", "x.unique()",
    "x[torch.tensor([0, 1])]", "x.masked_select(mask)", "torch.equal(x, x)", "f'{x[0]:.2f}'",
    "1 if x[0] > 2 else 0"]
REFUSED = [
    "x + here", "here * x", "torch.cat([x, here])", "torch.stack([here, x])", "linear(x, here)", "x.numpy()",
    "torch.where(mask, x, here)", "x[places] = here[:2]", "x.index_add(0, places, here[:2])",
    "torch.rand(2, generator=mine)", "torch.rand(2, device=second, generator=theirs)"]


@pytest.fixture(scope="module")
def probed():
    """{probe: how often the CPU waited for it, or "refused", or what went wrong}."""
    done = subprocess.run([sys.executable, "-c", PROBES], input=json.dumps(NO_WAIT + ONE_WAIT + REFUSED),
                          capture_output=True, text=True, cwd=tools.TESTS, env=tools.ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_device_counts_a_wait_where_a_number_or_a_shape_is_asked_for_or_a_copy_waited_for(probed):
    assert {probe: probed[probe] for probe in ONE_WAIT} == dict.fromkeys(ONE_WAIT, 1)


def test_the_device_counts_no_wait_where_a_gpu_has_none(probed):
    assert {probe: probed[probe] for probe in NO_WAIT} == dict.fromkeys(NO_WAIT, 0)


def test_the_device_refuses_what_lies_on_two_devices(probed):
    assert {probe: probed[probe] for probe in REFUSED} == dict.fromkeys(REFUSED, "refused")


# ---------------------------------------------------------------------------------------------------------
# The scripts on it

FILE = "--data {root}/preferences.jsonl --threads 1"
SCRATCH = f"sft {FILE} --tokenizer {TOY} {TINY} --batch-tokens 256 --max-new-tokens 8"
SFT = f"sft --model {{root}}/sft {FILE} --batch-tokens 256 --max-new-tokens 8"
REWARD = f"reward --model {{root}}/sft {FILE} --batch-tokens 256"
DPO = f"dpo --model {{root}}/sft {FILE} --batch-tokens 256 --max-new-tokens 8"
ROLLOUT = "--rollout-batch 8 --minibatches 2 --epochs 1 --max-new-tokens 10 --steps 1"
PPO = f"ppo --model {{root}}/sft {FILE} {ROLLOUT}"
JUDGED = f"{PPO} --reward {{root}}/reward"
EVERYTHING = (
    f"{PPO} --reward {{root}}/reward {{root}}/reward --reward-fn judged:length --reward-weights 1 0.5 0.1 "
    "--steps 2 --epochs 2 --ema 0.9 --checkpoint-activations --rollout-rows 3 --skip-sigma 3 "
    "--ptx-coef 0.1 --ptx-data {root}/demonstrations.jsonl --kl k3 --kl-in loss --kl-stop 5 --kl-target 3 "
    "--reward-at next --reward-norm standard --reward-clip 3 --missing-eos subtract --whiten sample "
    "--advantage-clip 2 --entropy-coef 0.01")

# {name: a run}, of which the same on the CPU has the same numbers, up to rounding
SAME = {
    "sft": f"{SCRATCH} --steps 3 --eval-every 2 --dropout 0.1 --checkpoint-activations",
    "sft, adapters": f"{SFT} --steps 2 --lora-rank 2 --lora-dropout 0.1 --lora-save adapter",
    "reward": f"{REWARD} --steps 2",
    "reward, adapters": f"{REWARD} --steps 2 --lora-rank 2 --lora-save adapter --checkpoint-activations",
    "dpo": f"{DPO} --steps 2 --skip-sigma 3",
    "dpo, adapters": f"{DPO} --steps 2 --lora-rank 2 --lr 0.05 --loss ipo",
    "ppo": JUDGED,
    "ppo, adapters": f"{JUDGED} --lora-rank 2 --lora-save adapter --ema 0.9",
    "ppo, adapters, frozen on the CPU": f"{JUDGED} --lora-rank 2 --critic-init sft --frozen-device cpu",
    "ppo, frozen on the CPU": f"{JUDGED} --frozen-device cpu --frozen-dtype bfloat16",
    "ppo, penalty": f"{JUDGED} --steps 2 --policy-loss penalty --penalty-target 0.1 --critic-warmup 1",
    "ppo, critic of zeros": f"{JUDGED} --critic-init zero",
    "ppo, toy": f"ppo --model {{root}}/sft --reward {{root}}/reward --data {TOY}/prompts.jsonl --judge "
                f"toy:gold {ROLLOUT}",
    "ppo, everything": EVERYTHING}
EVALUATE = "evaluate --models {root}/sft {root}/other --prompts 20 --max-new-tokens 8"
EVALUATED = {
    "evaluate": f"{EVALUATE} {FILE} --reward {{root}}/reward --reward-fn judged:length",
    "evaluate, toy": f"{EVALUATE} --data {TOY}/prompts_heldout.jsonl --judge toy:gold"}
# Of SAME: once more, told to stop after so many steps, and gone on with.
RESUMED = {"sft": 1, "ppo, everything": 1}
LOW_PRECISION = {
    "sft, bfloat16": f"{SCRATCH} --steps 2 --dtype bfloat16",
    "ppo, bfloat16": f"{JUDGED} --dtype bfloat16 --frozen-dtype bfloat16",
    "ppo, float16": f"{JUDGED} --dtype float16",
    # The scaler's first factor makes infinity of such a gradient.
    "dpo, float16": f"{DPO} --steps 4 --dtype float16 --beta 3000 --max-skipped 9"}
# Policy, reference, reward model and critic are all of the family.
FAMILIES = {
    name: f"ppo --model {{root}}/{name}/sft --reward {{root}}/{name}/reward --data {{root}}/prompts.jsonl "
          f"{ROLLOUT}"
    for name in ("gpt2", "llama3", "smollm2", "mistral", "qwen2", "qwen3", "opt", "opt-350m")}
SOON = ("llama3", "qwen3", "opt-350m")  # families that are tried each time
# Their waits are compared, for the table in docs/cluster.md.
COUNTED = {
    "sft, 10 steps": f"{SFT} --steps 10 --log-every 10 --eval-every 100",
    "reward, 10 steps": f"{REWARD} --steps 10 --log-every 10 --eval-every 100",
    "dpo, 10 steps": f"{DPO} --steps 10 --log-every 10 --eval-every 100",
    "ppo, another rollout": f"{JUDGED} --steps 2",
    "ppo, another epoch": f"{JUDGED} --epochs 2",
    "ppo, 8 tokens more": f"{JUDGED} --max-new-tokens 18"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with models, data and a reward function for the runs."""
    root = tmp_path_factory.mktemp("second")
    rankings = toy.World(0).preferences("train", 100)
    write_rows(root / "preferences.jsonl", [
        {"prompt": row.prompt, "completions": row.replies, "ranks": row.ranks} for row in rankings])
    write_rows(root / "demonstrations.jsonl", [
        {"prompt": row.prompt, "completion": row.replies[0]} for row in rankings])
    write_rows(root / "prompts.jsonl", [{"prompt": text} for text in ("a", "bc", "def", "g h", "ij", "k")])
    (root / "judged.py").write_text("def length(replies):\n    return [len(reply) for reply in replies]\n")
    assert tools.here("sft", root, f"--out {root}/sft --steps 2") == 0
    assert tools.here("sft", root, f"--out {root}/other --steps 3 --lr 0.1") == 0
    assert tools.here("reward", root, f"--out {root}/reward --steps 2") == 0
    for name in FAMILIES:
        save_model(root / name / "sft", tiny_of(GPT, name), TOKENIZER, None)
        save_model(root / name / "reward", tiny_of(ScalarModel, name, seed=1), TOKENIZER, None)
    return root


def words(text, root, out):
    """The words of a run, in float32 unless it says otherwise, with its output in a folder of the root."""
    script, *flags = shlex.split(text.format(root=root))
    precision = [] if "--dtype" in flags else ["--dtype", "float32"]
    place = root / out if script != "evaluate" else root / f"{out}.json"
    return [script, *flags, *precision, "--out", str(place)]


@pytest.fixture(scope="module")
def rehearsed(root):
    """{name: what came of a run on the device}, of all of the above."""
    runs = SAME | EVALUATED | LOW_PRECISION | COUNTED | {name: FAMILIES[name] for name in SOON}
    plan = {name: {"words": words(text, root, f"device/{name}")} for name, text in runs.items()}
    for name, stop in RESUMED.items():
        plan[f"{name}, stopped"] = {"words": words(SAME[name], root, f"resumed/{name}"), "stop": stop}
        plan[f"{name}, resumed"] = {"words": [*words(SAME[name], root, f"resumed/{name}"), "--resume"]}
    return dict(zip(plan, on_device(list(plan.values()), root)))


def on_cpu(text, root, out):
    """The same run on the CPU, in this process."""
    script, *flags = words(text, root, out)
    assert tools.exit_code(script, shlex.join(flags), "--device cpu") == 0


def weights_of(out):
    """All tensors of a run's latest checkpoint."""
    folder = tools.latest(out)
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        found |= {f"{file.relative_to(folder)} {name}": tensor for name, tensor in load_file(file).items()}
    return found


def assert_close(one, other, tolerance):
    """Two runs, by their folders, have the same metrics and weights up to rounding."""
    rows, others = tools.metrics(one), tools.metrics(other)
    assert [row.keys() for row in rows] == [row.keys() for row in others]
    for row, expected in zip(rows, others):
        assert row == pytest.approx(expected, rel=tolerance, abs=tolerance)
    weights, expected = weights_of(one), weights_of(other)
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=tolerance, atol=tolerance, msg=name)


def went_through(result):
    """A run has come to its end."""
    assert (result["code"], result["error"]) == (0, "")


@pytest.mark.parametrize("name", SAME)
def test_a_run_goes_through_and_its_numbers_are_those_of_the_cpu(name, rehearsed, root, monkeypatch):
    went_through(rehearsed[name])
    monkeypatch.syspath_prepend(str(root))
    on_cpu(SAME[name], root, f"cpu/{name}")
    assert_close(root / "device" / name, root / "cpu" / name, 1e-4)


@pytest.mark.parametrize("name", EVALUATED)
def test_an_evaluation_goes_through_and_its_numbers_are_those_of_the_cpu(name, rehearsed, root, monkeypatch):
    went_through(rehearsed[name])
    monkeypatch.syspath_prepend(str(root))
    on_cpu(EVALUATED[name], root, f"cpu/{name}")
    found, expected = (json.loads((root / place / f"{name}.json").read_text()) for place in ("device", "cpu"))
    for folder, replies in expected["replies"].items():
        texts = [reply["reply"] for reply in found["replies"][folder]]
        assert texts == [reply["reply"] for reply in replies]
        numbers = expected["results"][folder]
        numbers = {key: value for key, value in numbers.items() if isinstance(value, float)}
        others = {key: found["results"][folder][key] for key in numbers}
        assert others == pytest.approx(numbers, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_that_was_stopped_and_gone_on_with_ends_in_the_bits_of_the_unbroken_one(name, rehearsed, root):
    assert rehearsed[f"{name}, stopped"]["code"] == 143
    went_through(rehearsed[f"{name}, resumed"])
    assert tools.same(root / "resumed" / name, root / "device" / name)


@pytest.mark.parametrize("name", LOW_PRECISION)
def test_a_run_in_low_precision_goes_through_and_the_scaler_of_float16_finds_a_factor(name, rehearsed, root):
    went_through(rehearsed[name])
    assert all(tensor.isfinite().all() for tensor in weights_of(root / "device" / name).values())
    scalers = json.loads((tools.latest(root / "device" / name) / "state.json").read_text())["scalers"]
    assert all(bool(scaler) == ("float16" in name.split(", ")) for scaler in scalers.values())
    if "dpo" in name:
        assert scalers["optimizer"]["scale"] < 65536


def assert_same_family(name, result, root):
    went_through(result)
    on_cpu(FAMILIES[name], root, f"cpu/{name}")
    assert_close(root / "device" / name, root / "cpu" / name, 1e-4)


@pytest.mark.parametrize("name", SOON)
def test_every_family_goes_through_ppo_and_its_numbers_are_those_of_the_cpu(name, rehearsed, root):
    assert_same_family(name, rehearsed[name], root)


@pytest.mark.long
def test_the_other_families_go_through_ppo_and_their_numbers_are_those_of_the_cpu(root):
    others = [name for name in FAMILIES if name not in SOON]
    plan = [{"words": words(FAMILIES[name], root, f"device/{name}")} for name in others]
    results = on_device(plan, root)
    for name, result in zip(others, results):
        assert_same_family(name, result, root)


# ---------------------------------------------------------------------------------------------------------
# Waits

# The phases of a step, but for logging.
STEP = ("step", "pass with gradients", "pass without gradients", "optimizer step", "sampling")


def waited(result, *phases):
    """How often the CPU waited in some phases of a run."""
    return sum(number for place, number in result["waits"].items() if place.partition(":")[0] in phases)


def test_no_pass_waits_for_the_device(rehearsed):
    for name, result in rehearsed.items():
        assert waited(result, "pass with gradients") == 0, name
        if "frozen on the CPU" not in name:
            assert waited(result, "pass without gradients") == 0, name


def test_no_optimiser_step_waits_for_the_device_unless_spikes_are_looked_for(rehearsed):
    for name, result in rehearsed.items():
        # With --skip-sigma one, in each step of dpo.py and in each of policy and critic.
        waits = {"dpo": 2, "ppo, everything": 16}
        if name.partition(", everything, ")[2]:
            waits[name] = 8
        assert waited(result, "optimizer step") == waits.get(name, 0), name


def test_the_waits_are_those_of_the_table_in_the_documentation(rehearsed):
    counted = {}
    for script in ("sft", "reward", "dpo"):
        result = rehearsed[f"{script}, 10 steps"]
        # Of ten steps the first and the last are logged.
        counted[script, "step that is logged"] = waited(result, "log") / 2
        counted[script, "any other step"] = waited(result, *STEP) / 10

    def more(what):
        """The waits that a run has more than the plain one."""
        plain, waits = rehearsed["ppo"]["waits"], rehearsed[f"ppo, {what}"]["waits"]
        return {"waits": {place: number - plain.get(place, 0) for place, number in waits.items()}}

    # An epoch has two minibatches, and a rollout's ten tokens are two times 8, begun.
    counted["ppo", "8 sampled tokens"] = waited(more("8 tokens more"), *STEP)
    counted["ppo", "minibatch"] = waited(more("another epoch"), *STEP) / 2
    parts = 2 * counted["ppo", "minibatch"] + 2 * counted["ppo", "8 sampled tokens"]
    counted["ppo", "rollout, apart from those two"] = waited(more("another rollout"), *STEP) - parts
    counted["ppo", "step that is logged"] = waited(more("another rollout"), "log")
    text = (tools.ROOT / "docs" / "cluster.md").read_text()
    table = re.findall(r"^\| (\w+) \| ([^|]+) \| (\d+) \|", text, re.M)
    assert counted == {(script, what): int(number) for script, what, number in table}
