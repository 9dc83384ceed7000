"""Replies of a policy to prompts."""
from data import encode_prompt
from generate import generate


def show_samples(run, model, tokenizer, rows, max_new_tokens, generator, number=3):
    """Print replies to the prompts of a few rows, evenly spread."""
    rows = rows[::max(1, len(rows) // number)][:number]
    prompts = [encode_prompt(tokenizer, row.prompt) for row in rows]
    fitting = [(row, ids) for row, ids in zip(rows, prompts) if len(ids) + max_new_tokens <= model.config.block_size]
    if fitting:
        with run.gathered(model), run.autocast():
            texts = generate(model, [ids for _, ids in fitting], max_new_tokens, tokenizer, generator=generator, interrupted=run.asked_to_stop).texts(tokenizer)
        run.safe_point()
        for (row, _), text in zip(fitting, texts):
            run.say(f"  sample: {row.prompt[-1]['content'][-200:]!r} -> {text!r}")
