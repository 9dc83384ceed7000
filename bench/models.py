"""Does a checkpoint folder compute here what it computes in transformers, and does what we write back open there again?

    python bench/models.py --model models/smollm2-135m-instruct        a language model: 8 minutes on 2 busy cores at 135M
    python bench/models.py --model runs/smollm2/reward                 a reward model

In float32. A language model: logits of 20 chat prompts, each alone and inside a right-padded batch, against transformers (the row
alone), and 64 tokens of greedy text; then the folder that save_model writes, opened by transformers: logits and text again. A reward
model: scores of the prompts with replies, alone and padded, and of the folder written back. Prints the largest differences and ends
with exit code 1 if one is above 1e-4, or a text differs.
"""
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from formats.model_folder import load_model, read_config, save_model  # noqa: E402
from data import pad_rows  # noqa: E402
from model import GPT, last_scores  # noqa: E402
from generate import generate  # noqa: E402
from plumbing.flags import Count, UserError, require  # noqa: E402
from plumbing.run import run_script  # noqa: E402
from data import encode_dialogue, encode_prompt  # noqa: E402

PROMPTS = """What is the capital of France?
Give me three tips for staying healthy.
Write a two-sentence story about a cat who learns to swim.
Translate 'good morning' into Spanish.
What is 17 plus 25?
Explain photosynthesis to a child of eight in at most four sentences, without using the words chlorophyll or carbon dioxide.
List the days of the week in reverse order.
Who wrote 'Pride and Prejudice'?
Make this polite: give me the report now.
Name a prime number greater than 100.
Summarise in one sentence: The meeting was moved from Monday to Wednesday because two of the speakers were ill.
What colour do you get when you mix blue and yellow?
Is a tomato a fruit or a vegetable? Answer briefly and say why.
Write a haiku about winter.
Convert 3 kilometres to metres.
What should I pack for a weekend in the mountains? I will hike on both days, sleep in a hut and it may rain.
Correct the grammar: he go to school yesterday.
Give an antonym of 'generous'.
How many continents are there, and which is the largest?
Tell me something surprising about octopuses.""".split("\n")


@dataclass
class Config:
    model: str = ""  # checkpoint folder
    tokens: Count = 64  # of greedy text per prompt
    threads: Count = 2  # CPU threads
    debug: bool = False  # show the traceback of an error


@torch.no_grad()
def compare(ours, tokenizer, folder, config, rows, texts):
    """Largest difference of logits (or scores) alone and padded, and how many greedy texts differ, from transformers on folder."""
    import transformers
    language = isinstance(ours, GPT)
    auto = transformers.AutoModelForCausalLM if language else transformers.AutoModelForSequenceClassification
    theirs = auto.from_pretrained(folder, dtype=torch.float32).eval()
    ids, lengths = pad_rows(rows, tokenizer.pad)
    padded = ours.transformer(ids) if language else last_scores(ours, ids, lengths)
    alone_off = padded_off = differ = 0
    for i, row in enumerate(rows):
        one = torch.tensor([row])
        expected = theirs(one).logits[0]  # (T, V) or (1,)
        alone = ours.logits(ours.transformer(one))[0] if language else ours(one)[0, -1]
        inside = ours.logits(padded[i, :len(row)]) if language else padded[i]
        alone_off, padded_off = max(alone_off, (alone - expected).abs().max().item()), max(padded_off, (inside - expected).abs().max().item())
        if language:
            text = theirs.generate(one, attention_mask=torch.ones_like(one), max_new_tokens=config.tokens, do_sample=False)[0, len(row):]
            differ += text.tolist() != texts[i]
    return alone_off, padded_off, differ


def main(config):
    require(config.model, "--model: name a checkpoint folder")
    try:
        import transformers
    except ImportError:
        raise UserError("this compares with transformers: pip install transformers") from None
    transformers.logging.set_verbosity_error(), transformers.logging.disable_progress_bar()
    torch.set_num_threads(config.threads)
    _, kind = read_config(Path(config.model))
    ours, tokenizer = load_model(config.model, kind)
    ours.eval()
    talks = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    rows, texts = [encode_prompt(tokenizer, talk) for talk in talks], []
    if kind is GPT:
        got = generate(ours, rows, config.tokens, tokenizer, temperature=0)
        texts = [ids[mask].tolist() for ids, mask in zip(got.ids, got.mask)]
    else:
        rows = [encode_dialogue(tokenizer, talk + [{"role": "assistant", "content": other[0]["content"]}])[0] for talk, other in zip(talks, talks[3:] + talks[:3])]
    what, bad = "logits" if kind is GPT else "scores", False
    with tempfile.TemporaryDirectory() as written:
        save_model(written, ours, tokenizer)
        for name, folder in (("the folder", config.model), ("written back", written)):
            alone, padded, differ = compare(ours, tokenizer, folder, config, rows, texts)
            print(f"{name:12}  {what} differ by at most {alone:.1e} alone, {padded:.1e} in a padded batch"
                  + (f"; {len(rows) - differ} of {len(rows)} greedy texts of up to {config.tokens} tokens are equal" if kind is GPT else ""), flush=True)
            bad |= max(alone, padded) > 1e-4 or differ > 0
    raise SystemExit(int(bad))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
