"""Does a checkpoint folder compute here what it computes in transformers, and does what we write back
open there again?

    python bench/models.py --model models/smollm2-135m-instruct        a language model: 8 minutes on 2 busy
                                                                       cores at 135M
    python bench/models.py --model runs/smollm2/reward                 a reward model

In float32. A language model: logits of 20 chat prompts, each alone and inside a right-padded batch, against
transformers (the row alone), and 64 tokens of greedy text; then the folder that save_model writes, opened by
transformers: logits and text again. A reward model: scores of the prompts with replies, alone and padded, and
of the folder written back. Prints the largest differences and ends with exit code 1 if one is above 1e-4,
or a text differs.
"""
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import encode_dialogue, encode_prompt, pad_rows  # noqa: E402
from formats.model_folder import load_model, read_config, save_model  # noqa: E402
from generate import generate  # noqa: E402
from model import GPT, last_scores  # noqa: E402
from plumbing.flags import Count, UserError, require  # noqa: E402
from plumbing.run import run_script  # noqa: E402

# The largest difference of a logit or a score that is taken to be none.
TOLERANCE = 1e-4
PROMPTS = (
    "What is the capital of France?",
    "Give me three tips for staying healthy.",
    "Write a two-sentence story about a cat who learns to swim.",
    "Translate 'good morning' into Spanish.",
    "What is 17 plus 25?",
    "Explain photosynthesis to a child of eight in at most four sentences, without using the words "
    "chlorophyll or carbon dioxide.",
    "List the days of the week in reverse order.",
    "Who wrote 'Pride and Prejudice'?",
    "Make this polite: give me the report now.",
    "Name a prime number greater than 100.",
    "Summarise in one sentence: The meeting was moved from Monday to Wednesday because two of the "
    "speakers were ill.",
    "What colour do you get when you mix blue and yellow?",
    "Is a tomato a fruit or a vegetable? Answer briefly and say why.",
    "Write a haiku about winter.",
    "Convert 3 kilometres to metres.",
    "What should I pack for a weekend in the mountains? I will hike on both days, sleep in a hut and it "
    "may rain.",
    "Correct the grammar: he go to school yesterday.",
    "Give an antonym of 'generous'.",
    "How many continents are there, and which is the largest?",
    "Tell me something surprising about octopuses.",
)


@dataclass
class Config:
    model: str = ""  # checkpoint folder
    tokens: Count = 64  # of greedy text per prompt
    threads: Count = 2  # CPU threads
    debug: bool = False  # show the traceback of an error


class Differences(NamedTuple):
    """Between our model and transformers'."""
    alone: float  # the largest of logits, or scores, of a row alone
    padded: float  # the same in a right-padded batch
    texts: int  # greedy texts that are not equal


def our_outputs(ours, tokenizer, rows):
    """Yields what our model makes of each row of ids, alone and in a right-padded batch.

    That is logits (T, V) of a language model, or the score () of a reward model.
    """
    ids, lengths = pad_rows(rows, tokenizer.pad)  # (B, T)
    language = isinstance(ours, GPT)
    if language:
        padded = ours.transformer(ids)  # (B, T, C)
    else:
        padded = last_scores(ours, ids, lengths)  # (B,)
    for i, row in enumerate(rows):
        one = torch.tensor([row])
        if language:
            yield ours.logits(ours.transformer(one))[0], ours.logits(padded[i, :len(row)])
        else:
            yield ours(one)[0, -1], padded[i]


def greedy(theirs, row, tokens):
    """The tokens that transformers' model finds likeliest after a row of ids."""
    one = torch.tensor([row])
    everything = torch.ones_like(one)
    drawn = theirs.generate(one, attention_mask=everything, max_new_tokens=tokens, do_sample=False)
    return drawn[0, len(row):].tolist()


@torch.no_grad()
def compare(ours, tokenizer, folder, config, rows, texts):
    """`Differences` from transformers on a folder.

    rows: of ids; texts: what our model says to each, as ids, if it is a language model.
    """
    import transformers
    if isinstance(ours, GPT):
        auto = transformers.AutoModelForCausalLM
    else:
        auto = transformers.AutoModelForSequenceClassification
    theirs = auto.from_pretrained(folder, dtype=torch.float32).eval()
    alone_off = padded_off = 0
    for row, (alone, padded) in zip(rows, our_outputs(ours, tokenizer, rows)):
        expected = theirs(torch.tensor([row])).logits[0]  # (T, V) or (1,)
        alone_off = max(alone_off, (alone - expected).abs().max().item())
        padded_off = max(padded_off, (padded - expected).abs().max().item())
    unequal = 0
    for row, text in zip(rows, texts):
        unequal += greedy(theirs, row, config.tokens) != text
    return Differences(alone_off, padded_off, unequal)


def main(config):
    require(config.model, "--model: name a checkpoint folder")
    try:
        import transformers
    except ImportError:
        raise UserError("this compares with transformers: pip install transformers") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(config.threads)
    _, kind = read_config(Path(config.model))
    ours, tokenizer = load_model(config.model, kind)
    ours.eval()
    talks = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    texts = []
    if kind is GPT:
        what = "logits"
        rows = [encode_prompt(tokenizer, talk) for talk in talks]
        got = generate(ours, rows, config.tokens, tokenizer, temperature=0)
        texts = [ids[mask].tolist() for ids, mask in zip(got.ids, got.mask)]
    else:
        what = "scores"
        rows = []
        # The reply to each prompt is the prompt three places behind it.
        for talk, reply in zip(talks, PROMPTS[3:] + PROMPTS[:3]):
            whole = talk + [{"role": "assistant", "content": reply}]
            rows.append(encode_dialogue(tokenizer, whole)[0])
    bad = False
    with tempfile.TemporaryDirectory() as written:
        save_model(written, ours, tokenizer)
        for name, folder in (("the folder", config.model), ("written back", written)):
            found = compare(ours, tokenizer, folder, config, rows, texts)
            line = (f"{name:12}  {what} differ by at most {found.alone:.1e} alone, "
                    f"{found.padded:.1e} in a padded batch")
            if kind is GPT:
                line += (f"; {len(rows) - found.texts} of {len(rows)} greedy texts "
                         f"of up to {config.tokens} tokens are equal")
            print(line, flush=True)
            bad |= max(found.alone, found.padded) > TOLERANCE or found.texts > 0
    raise SystemExit(int(bad))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
