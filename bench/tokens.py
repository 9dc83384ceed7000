"""Token ids: every text and every conversation of data files through our tokenizers and through transformers' own.

    python bench/tokens.py --model FOLDER --data FILE [FILE ...]      a checkpoint folder, against AutoTokenizer
    python bench/tokens.py --model gpt2 --data FILE [FILE ...]        ours, against AutoTokenizer on the folder that it saves

With --reference FOLDER, GPT-2's own vocabulary and merges (vocab.json and merges.txt, or encoder.json and vocab.bpe) are the peer for gpt2.
Needs transformers (requirements-hf.txt). One line per file; exit code 1 if anything differs. Compared are
    texts     every string in every row (of a .txt file: every line, and the whole), as it is and with a special token's text put into it
    chats     every conversation, and every prompt with its reply, if no special token's text is in it: as a prompt that awaits the
              assistant and as a whole, which ours ends at the end token, whatever line break the template puts behind it
"""
import argparse
import gzip
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
try:
    import transformers
except ModuleNotFoundError:
    print("error: transformers is missing; pip install -r requirements-hf.txt transformers", file=sys.stderr)
    sys.exit(2)

from plumbing.flags import UserError
from formats.tokenizer import Tokenizer
from data import encode_dialogue, encode_prompt
from formats.foreign_tokenizer import open_tokenizer

ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's words
QUESTIONS, ANSWERS = ("instruction", "prompt", "question"), ("output", "response", "chosen", "rejected", "answer")


def read(path):
    """The rows of a file: JSON objects, or {"text": ...} for the whole of a .txt file and each of its lines."""
    raw = Path(path).read_bytes()
    text = (gzip.decompress(raw) if path.endswith(".gz") else raw).decode("utf-8-sig")
    if path.endswith(".txt"):
        return [{"text": text}, *({"text": line} for line in text.split("\n"))]
    return json.loads(text) if path.endswith(".json") else [json.loads(line) for line in text.split("\n") if line.strip()]


def strings(value):
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
        yield from strings(part)


def turn(value):
    """A message from a JSON object, or None if it isn't one."""
    if isinstance(value, dict):
        role, content = value.get("role", value.get("from")), value.get("content", value.get("value"))
        if isinstance(role, str) and isinstance(content, str):
            return {"role": ROLES.get(role, role), "content": content}


def conversations(row):
    """The conversations of a row that end with the assistant."""
    for value in row.values():
        if isinstance(value, list) and value and all(map(turn, value)):
            messages = [turn(part) for part in value]
            replies = [turn(row.get(key)) for key in ("chosen", "rejected") if turn(row.get(key))]
            for whole in [[*messages, reply] for reply in replies] or [messages]:
                if whole[-1]["role"] == "assistant":
                    yield whole
    question = next((row[key] for key in QUESTIONS if isinstance(row.get(key), str)), None)
    for answer in (row.get(key) for key in ANSWERS):
        if question and isinstance(answer, str):
            yield [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def compare(path, ours, peer):
    """(texts, chats, tokens, differences) of a file."""
    rows = read(path)
    special = sorted(token.content for token in peer.added_tokens_decoder.values() if token.special)
    texts = [text for row in rows for text in strings(row)]
    marked = [text[:len(text) // 2] + special[i % len(special)] + text[len(text) // 2:] for i, text in enumerate(texts)]
    tokens = differences = 0
    for text in texts + marked:
        ids = ours.encode(text)
        tokens += len(ids)
        differences += ids != peer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for text in texts:
        if not any(token in text for token in special):
            differences += ours.encode(text) != peer(text, add_special_tokens=False)["input_ids"]

    def chat(messages, waiting):
        return peer.apply_chat_template(messages, add_generation_prompt=waiting)["input_ids"]

    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    behind = chat(probe, False)[len(encode_dialogue(ours, probe)[0]):]
    chats = [messages for row in rows for messages in conversations(row)]
    chats = [messages for messages in chats if not any(token in message["content"] for message in messages for token in special)]
    for messages in chats:
        ids, mask = encode_dialogue(ours, messages)
        prompt = encode_prompt(ours, messages[:-1])
        tokens += len(ids)
        differences += (ids + behind, prompt, ids[:len(prompt)]) != (chat(messages, False), chat(messages[:-1], True), prompt)
    return len(texts), len(chats), tokens, differences


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint folder, or gpt2")
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE", help=".json, .jsonl, .jsonl.gz or .txt")
    parser.add_argument("--reference", default="", metavar="FOLDER", help="GPT-2's own files")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if args.model == "gpt2":
            ours = Tokenizer.gpt2()
            ours.save(folder)
        else:
            ours, folder = open_tokenizer(args.model), args.model
        peer = transformers.AutoTokenizer.from_pretrained(folder)
    if args.reference:
        files = Path(args.reference)
        vocab = next(files / name for name in ("vocab.json", "encoder.json") if (files / name).is_file())
        merges = next(files / name for name in ("merges.txt", "vocab.bpe") if (files / name).is_file())
        template = peer.chat_template
        peer = transformers.GPT2Tokenizer(json.loads(vocab.read_text(encoding="utf-8")), [
            tuple(line.split()) for line in merges.read_text(encoding="utf-8").split("\n")[1:] if line])
        peer.add_special_tokens({"additional_special_tokens": ["<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]})
        peer.chat_template = template
    failed = 0
    for path in args.data:
        texts, chats, tokens, differences = compare(path, ours, peer)
        failed += differences
        print(f"{path}: {texts} texts, {chats} chats, {tokens} tokens, {differences} differences", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
