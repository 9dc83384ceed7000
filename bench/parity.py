"""Parity with peers: the same weights, tokens and scores through our functions and through theirs, in fp32 on one CPU thread.

    bash run.sh parity      makes the environment, then runs this: a table of largest differences, exit code 1 if one is too large

Nothing of theirs is copied or imitated; their own code runs:
    transformers   opens the folders that save_model writes
    TRL, current   DPOTrainer and RewardTrainer, from text to the loss and its gradient
    TRL 1.12.0     the last with PPO: PPOTrainer.train() itself, its generation included, for one rollout and two epochs on it.
                   Its local variables are read each time it calls accelerator.backward; our functions get its tokens alone, and
                   for the second epoch its updated weights. It runs in a process of its own: two TRLs can't be imported at once.

Where our default is another, what restores theirs stands beside the quantity. A difference is |ours - theirs| / max(1, |theirs|), the largest over all elements.

Legend: B rows, T tokens of a row, P of its prompt, R of its reply, V vocabulary.
"""
import copy
import inspect
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}  # these and those that follow are read when the libraries are imported
os.environ |= dict.fromkeys(["HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE", "TRL_EXPERIMENTAL_SILENCE"], "1")
os.environ |= {"TRANSFORMERS_VERBOSITY": "error"}
warnings.filterwarnings("ignore", category=FutureWarning)  # of their libraries, to each other
try:
    import datasets
    import tokenizers
    import torch
    import transformers
    import trl
    from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast
except ModuleNotFoundError as error:
    print(f"error: {error.name} is missing; bash run.sh parity makes the environment for this script", file=sys.stderr)
    sys.exit(2)

from formats.families import TRANSPOSED
from formats.model_folder import load_model, save_model
from data import collate, encode_group, pad_rows, ranked_pairs
from formats.rows import Row
from dpo import preference_loss
from model import GPT, GPTConfig, ScalarModel, last_scores, values_before
from ppo import gae, missing_eos_scores, kl_estimate, policy_loss, shaped_rewards, steps_mask, value_loss, whiten
from reward import ranking_loss
from plumbing.flags import UserError, require
from formats.tokenizer import Tokenizer, train_bpe
from data import encode_prompt

TOLERANCE = 1e-5
PPO_TRL = "1.12.0"
PPO_FOLDER = ROOT / ".venv-parity" / f"trl-{PPO_TRL}"  # where run.sh puts it
PEERS = {"policy": GPT2LMHeadModel, "reference": GPT2LMHeadModel, "reward": GPT2ForSequenceClassification, "critic": GPT2ForSequenceClassification}

TOKENIZER = Tokenizer("bytes", *train_bpe([], 256))
PAIRS = [  # a prompt, chosen and rejected of unequal length, and a margin
    ("Name a colour.", "red", "I have no idea.", 0.5),
    ("How are you?", "Very well, thanks.", "fine", 0.0),
    ("2 + 2 = ?", "4", "5", 1.25),
    ("Say something that is long.", "They are short.", "No!", -0.25),
]


# ---------------------------------------------------------------------------------------------------------
# The same models on both sides

def make_models(folder):
    """Checkpoint folders of a tiny policy, reference, reward model and critic, written by save_model."""
    config = GPTConfig(TOKENIZER.n_vocab, block_size=128, n_layer=2, n_head=4, n_kv_head=4, n_embd=32)
    for seed, (name, peer) in enumerate(PEERS.items()):
        torch.manual_seed(seed)
        model = GPT(config) if peer is GPT2LMHeadModel else ScalarModel(config)
        with torch.no_grad():
            for p in model.parameters():  # weights as large as trained ones, biases and norms that differ from their start
                p.add_(0.1 * torch.randn_like(p))
            if isinstance(model, GPT):  # one direction of the last state is always 1: replies end early, but never hold a pad token
                model.transformer.ln_f.weight[0], model.transformer.ln_f.bias[0] = 0.0, 1.0
                model.transformer.wte.weight[TOKENIZER.eos, 0], model.transformer.wte.weight[TOKENIZER.pad, 0] = 2.7, -50.0
        save_model(folder / name, model, TOKENIZER)


def ours(folder, name):
    """The model of a folder, opened by our code; `theirs` opens it with theirs."""
    return load_model(folder / name, GPT if PEERS[name] is GPT2LMHeadModel else ScalarModel)[0].eval()


def theirs(folder, name):
    return PEERS[name].from_pretrained(folder / name).eval()


def in_our_layout(name, tensor):
    """A weight or gradient of theirs, turned where GPT-2 stores it the other way round."""
    return tensor.T if name.endswith(TRANSPOSED) else tensor


def gradients(model, peer):
    """All gradients of our model, and of the peer's parameters of the same names, each as one vector."""
    found = {name: p.grad for name, p in peer.named_parameters()}
    named = [(name, p.grad) for name, p in model.named_parameters()]
    return torch.cat([g.flatten() for _, g in named]), torch.cat([in_our_layout(name, found[name]).flatten() for name, _ in named])


def their_tokenizer():
    """A tokenizer of theirs with our ids: the text "<65><66>" is tokens 65 and 66, so that no tokenization can differ."""
    vocabulary = {f"<{i}>": i for i in range(TOKENIZER.n_vocab)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=f"<{TOKENIZER.pad}>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("<[0-9]+>"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"<{TOKENIZER.eos}>", pad_token=f"<{TOKENIZER.pad}>", padding_side="left")


class Table:
    """Rows (quantity, peer, largest difference), added one comparison at a time."""

    def __init__(self, peer):
        self.peer, self.rows = peer, []

    def add(self, quantity, mine, other):
        mine, other = torch.as_tensor(mine).detach().float(), torch.as_tensor(other).detach().float()
        assert mine.shape == other.shape, f"{quantity}: shapes {tuple(mine.shape)} and {tuple(other.shape)}"
        difference = ((mine - other).abs() / other.abs().clamp(min=1)).max().item()
        self.rows.append((quantity, self.peer, difference))


# ---------------------------------------------------------------------------------------------------------
# transformers

def transformers_rows(folder):
    table = Table(f"transformers {transformers.__version__}")
    examples = [(ids, [False] + [True] * (len(ids) - 1)) for row in pair_rows() for ids, _ in encode_group(TOKENIZER, row)]
    ids, mask, lengths = collate(examples, TOKENIZER.pad, "cpu")  # (B, T)
    attention = torch.arange(ids.shape[1]) < lengths[:, None]
    with torch.no_grad():
        model, peer = ours(folder, "policy"), theirs(folder, "policy")
        logits = peer(input_ids=ids, attention_mask=attention.long()).logits  # (B, T, V)
        table.add("logits", model.logits(model.transformer(ids))[attention], logits[attention])
        found = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)  # (B, T - 1)
        table.add("log-probabilities per token", model(ids, mask)[0][:, 1:], found * mask[:, 1:])
        scores = theirs(folder, "reward")(input_ids=ids, attention_mask=attention.long()).logits.squeeze(-1)
        table.add("scores of the reward model", last_scores(ours(folder, "reward"), ids, lengths), scores)
    return table.rows


# ---------------------------------------------------------------------------------------------------------
# DPO and the reward model: the current TRL

def pair_rows():
    return [Row([{"role": "user", "content": prompt}], [chosen, rejected], [0, 1], margin) for prompt, chosen, rejected, margin in PAIRS]


def pair_dataset(rows):
    """The rows as text that their tokenizer turns into our ids."""
    def text(ids):
        return "".join(f"<{i}>" for i in ids)

    columns = {"prompt": [], "chosen": [], "rejected": [], "margin": [row.margin for row in rows]}
    for row in rows:
        prompt = encode_prompt(TOKENIZER, row.prompt)
        columns["prompt"].append(text(prompt))
        for name, (ids, _) in zip(("chosen", "rejected"), encode_group(TOKENIZER, row)):
            columns[name].append(text(ids[len(prompt):]))
    return datasets.Dataset.from_dict(columns)


def trainer_settings(folder):
    return {"output_dir": str(folder / "trainer"), "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
            "gradient_checkpointing": False}


def their_loss(trainer):
    """A trainer's loss on its whole dataset as one batch, its gradient left in trainer.model."""
    loss = trainer.compute_loss(trainer.model.train(), trainer.data_collator(list(trainer.train_dataset)))
    loss.backward()
    return loss


def dpo_rows(folder):
    from trl import DPOConfig, DPOTrainer
    table, beta = Table(f"TRL {trl.__version__}"), 0.3
    rows = pair_rows()
    reference = ours(folder, "reference")
    cases = [("sigmoid", "dpo", 0.0, ""), ("hinge", "hinge", 0.0, ""), ("ipo", "ipo", 0.0, ", log-ratios / tokens of the reply"),
             ("aot", "dpo", 0.1, ", label smoothing 0.1")]  # AOT sorts what it compares within a batch: on one pair it is cDPO
    for loss_type, kind, smoothing, note in cases:
        batch = rows[:1] if loss_type == "aot" else rows
        args = DPOConfig(**trainer_settings(folder), loss_type=[loss_type], beta=beta, label_smoothing=smoothing)
        trainer = DPOTrainer(theirs(folder, "policy"), theirs(folder, "reference"), args, train_dataset=pair_dataset(batch),
                             processing_class=their_tokenizer())
        loss = their_loss(trainer)
        model = ours(folder, "policy")
        ids, mask, _ = collate([example for row in batch for example in encode_group(TOKENIZER, row)], TOKENIZER.pad, "cpu")  # (B, T)
        better, worse, weight, _ = ranked_pairs(batch)
        with torch.no_grad():
            ref_logprobs = reference(ids, mask)[0].sum(1)  # (B,)
        log_ratios = model(ids, mask)[0].sum(1) - ref_logprobs
        if loss_type == "ipo":
            log_ratios = log_ratios / mask.sum(1)
        mine, metrics = preference_loss(log_ratios, better, worse, weight / len(batch), beta, kind, smoothing)
        mine.backward()
        table.add(f"DPO loss, {loss_type}{note}", mine, loss)
        table.add(f"DPO gradient, {loss_type}", *gradients(model, trainer.model))
        if loss_type == "sigmoid":
            table.add("margin of implicit rewards", metrics["margin"], trainer._metrics["train"]["rewards/margins"][-1])
    return table.rows


def reward_rows(folder):
    from trl import RewardConfig, RewardTrainer
    table, rows = Table(f"TRL {trl.__version__}"), pair_rows()
    trainer = RewardTrainer(theirs(folder, "reward"), RewardConfig(**trainer_settings(folder)), train_dataset=pair_dataset(rows),
                            processing_class=their_tokenizer())
    loss = their_loss(trainer)
    model = ours(folder, "reward")
    ids, _, lengths = collate([example for row in rows for example in encode_group(TOKENIZER, row)], TOKENIZER.pad, "cpu")  # (B, T)
    better, worse, weight, margin = ranked_pairs(rows)
    mine, _ = ranking_loss(last_scores(model, ids, lengths), better, worse, weight / len(rows), margin)
    mine.backward()
    table.add("reward model's loss, with margins", mine, loss)
    table.add("reward model's gradient", *gradients(model, trainer.model))
    return table.rows


# ---------------------------------------------------------------------------------------------------------
# PPO: TRL 1.12.0

def snapshot(model):
    """A copy of a model with its gradients."""
    copied = copy.deepcopy(model)
    for p, original in zip(copied.parameters(), model.parameters()):
        p.grad = original.grad.clone()
    return copied


def run_trl_ppo(folder, kl):
    """One rollout and two epochs of their trainer: its settings, and [(local variables of train(), policy, critic)] of each epoch."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    prompts = [encode_prompt(TOKENIZER, row.prompt) for row in pair_rows() for _ in range(4)]  # of several lengths: they pad on the left
    args = PPOConfig(**trainer_settings(folder), total_episodes=len(prompts), per_device_train_batch_size=len(prompts), num_ppo_epochs=2,
                     response_length=8, stop_token="eos", missing_eos_penalty=1.0, kl_estimator=kl, kl_coef=0.2, gamma=0.97, learning_rate=6e-4,
                     num_sample_generations=0, seed=0, cliprange_value=0.8)
    trainer = PPOTrainer(args, their_tokenizer(), theirs(folder, "policy"), theirs(folder, "reference"), theirs(folder, "reward"),
                         datasets.Dataset.from_dict({"input_ids": prompts}), theirs(folder, "critic"))
    epochs, backward = [], trainer.accelerator.backward

    def watched(loss, **kwargs):
        variables = dict(inspect.currentframe().f_back.f_locals)  # of train(), which calls this between its losses and its optimiser's step
        backward(loss, **kwargs)
        epochs.append((variables, snapshot(trainer.policy_model), snapshot(trainer.value_model)))

    trainer.accelerator.backward = watched
    trainer.train()
    return args, epochs


class Rollout:
    """Their tokens (B, P + R), padded on the left, in our layout (B, T), padded on the right; models' outputs are cut to the replies (B, R)."""

    def __init__(self, tokens, prompt_width):
        prompts = [row[row != TOKENIZER.pad].tolist() for row in tokens[:, :prompt_width]]
        replies = [reply[:reply.index(TOKENIZER.eos) + 1] if TOKENIZER.eos in reply else reply for reply in tokens[:, prompt_width:].tolist()]
        R = tokens.shape[1] - prompt_width
        prompt_lengths, lengths = (torch.tensor([len(row) for row in rows]) for rows in (prompts, replies))
        self.ended = torch.tensor([reply[-1] == TOKENIZER.eos for reply in replies])
        require((self.ended & (lengths == 1)).any() and (~self.ended & (lengths == R)).any() and len(set(lengths.tolist())) >= 4,
                "TRL's rollout lacks a reply of the end token alone, one that is cut off, or replies of four lengths; another seed may have them")
        self.ids, _ = pad_rows([prompt + reply + [TOKENIZER.pad] * (R - len(reply)) for prompt, reply in zip(prompts, replies)], TOKENIZER.pad)
        self.columns = prompt_lengths[:, None] + torch.arange(R)  # (B, R): where the replies stand in (B, T)
        self.ends = prompt_lengths + lengths
        self.mask = torch.arange(R) < lengths[:, None]  # (B, R)
        self.row_steps = steps_mask(self.in_rows(self.mask), "next")  # (B, T), as ppo.py has it
        self.steps = self.row_steps.gather(1, self.columns)  # (B, R)

    def in_rows(self, mask):
        """A mask of replies (B, R) as one of rows (B, T)."""
        return torch.zeros(self.ids.shape, dtype=torch.bool).scatter(1, self.columns, mask)

    def logprobs(self, policy, temperature):
        return policy(self.ids, self.in_rows(self.mask), temperature)[0].gather(1, self.columns)

    def values(self, critic):
        return values_before(critic, self.ids, self.row_steps).gather(1, self.columns)


def ppo_rows(folder):
    """Steps 2 to 5 of ppo.py, given their tokens and, for the second epoch, their updated weights."""
    require(trl.__version__ == PPO_TRL, f"PPO is compared with TRL {PPO_TRL}, found {trl.__version__}; use bash run.sh parity")
    table = Table(f"TRL {PPO_TRL}")
    policy, critic, reference, reward = (ours(folder, name) for name in ("policy", "critic", "reference", "reward"))
    for kl in ("k3", "k1"):
        args, epochs = run_trl_ppo(folder, kl)
        there = epochs[0][0]
        rollout = Rollout(there["query_responses"], there["context_length"])
        mask, steps = rollout.mask, rollout.steps
        with torch.no_grad():
            old_logprobs, ref_logprobs = (rollout.logprobs(model, args.temperature) for model in (policy, reference))  # (B, R)
            old_values, scores = rollout.values(critic), last_scores(reward, rollout.ids, rollout.ends)  # (B, R), (B,)
        judged = missing_eos_scores(scores, rollout.ended, "subtract", args.missing_eos_penalty, scores.min())
        rewards = shaped_rewards(judged, kl_estimate(old_logprobs, ref_logprobs, kl), steps, args.kl_coef)
        advantages, returns = gae(rewards, old_values, steps, args.gamma, args.lam)
        whitened = whiten(advantages, mask, variance="sample")
        if kl == "k3":
            table.add("rewards, k3", rewards, there["rewards"])
    table.add("old log-probabilities", old_logprobs, there["logprobs"].where(mask, 0.0))
    table.add("reference's log-probabilities", ref_logprobs, there["ref_logprobs"].where(mask, 0.0))
    table.add("values", old_values, there["values"])
    table.add("scores (--missing-eos subtract)", judged, there["scores"])
    table.add("rewards, k1 (--reward-at next)", rewards, there["rewards"])
    table.add("returns", returns, there["returns"])
    table.add("advantages (--whiten sample)", whitened, there["advantages"])

    for number, (there, policy_peer, critic_peer) in enumerate(epochs):
        for model, peer in ((policy, policy_peer), (critic, critic_peer)):
            state = peer.state_dict()
            model.load_state_dict({name: in_our_layout(name, state[name]) for name in model.state_dict()})
            model.zero_grad()
        order = torch.as_tensor(there["micro_batch_inds"]).argsort()  # undoes their shuffling
        logprobs, values = rollout.logprobs(policy, args.temperature), rollout.values(critic)
        pg_loss, stats = policy_loss(logprobs, old_logprobs, whitened, mask, args.cliprange, mask.sum())
        vf_loss, value_stats = value_loss(values, old_values, returns, steps, args.cliprange_value, steps.sum())
        (pg_loss + args.vf_coef * vf_loss).backward()
        when = f"epoch {number + 1}, "
        if number == 1:
            clipped = stats["clip_fraction"].item(), value_stats["value_clip_fraction"].item()
            require(all(0.1 < share < 0.9 for share in clipped), f"the update clips {clipped} of ratios and values, too few or too many to compare")
            table.add(when + "log-probabilities after their update", logprobs, there["new_logprobs"][order].where(mask, 0.0))
            table.add(when + "values after their update", values, there["vpred"][order])
        table.add(when + "policy loss", pg_loss, there["pg_loss"])
        table.add(when + "value loss", vf_loss, there["vf_loss"])
        table.add(when + "gradient of the policy", *gradients(policy, policy_peer))
        table.add(when + "gradient of the critic (times vf_coef)", *gradients(critic, critic_peer))
    return table.rows


# ---------------------------------------------------------------------------------------------------------

def ppo_in_its_own_process(folder):
    """ppo_rows under TRL 1.12.0, which can't be imported beside the current one."""
    environment = os.environ | {"PYTHONPATH": str(PPO_FOLDER)}
    done = subprocess.run([sys.executable, __file__, "ppo", str(folder)], env=environment, stdout=subprocess.DEVNULL)
    require(done.returncode == 0, f"the comparison with TRL {PPO_TRL} failed, see above")
    return json.loads((folder / "ppo.json").read_text())


def main(words):
    torch.set_num_threads(1)
    if words:  # ppo FOLDER: the part that runs in a process of its own
        folder = Path(words[1])
        (folder / "ppo.json").write_text(json.dumps(ppo_rows(folder)))  # its stdout is full of their metrics
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_models(folder)
        rows = transformers_rows(folder) + ppo_in_its_own_process(folder) + dpo_rows(folder) + reward_rows(folder)
    width = max(len(quantity) for quantity, _, _ in rows)
    print(f"{'quantity':{width}} | {'peer':19} | largest difference | tolerance | ok")
    for quantity, peer, difference in rows:
        print(f"{quantity:{width}} | {peer:19} | {difference:18.1e} | {TOLERANCE:9.0e} | {'yes' if difference <= TOLERANCE else 'NO'}")
    beyond = sum(not difference <= TOLERANCE for _, _, difference in rows)  # so that NaN is beyond, too
    print(f"{len(rows)} quantities, {beyond or 'none'} beyond tolerance")
    sys.exit(beyond > 0)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
