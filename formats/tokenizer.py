"""Our own tokenizer: a byte-level BPE, learned here or GPT-2's, with control tokens that no text can become."""
import heapq
import json
from array import array
from collections import Counter, defaultdict
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import regex
import tiktoken

from formats.chat_template import own_template
from plumbing.disk import write_atomically
from plumbing.flags import UserError

# ---------------------------------------------------------------------------------------------------------
# Our own tokenizer

CONTROLS = ("<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
ROLES = ("system", "user", "assistant")
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves in byte-level BPE files;
LETTERS = {bytes([b]): chr(b) for b in PRINTABLE}  # the others take the characters from 256 on, in order
LETTERS |= {bytes([b]): chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in PRINTABLE)}
BYTES = {letter: byte for byte, letter in LETTERS.items()}


class Tokenizer:
    """A byte-level BPE (tiktoken) with five control tokens that ordinary text can never produce.

    Attributes: n_vocab, ids run from 0 to n_vocab - 1; added, how many of the last have untrained embeddings; eos ends a
    reply; pad fills; stops, the ids that end generation; document stands around plain text; roles, {role: id}.
    """
    added = 0

    def __init__(self, name, pattern, ranks):
        specials = {token: len(ranks) + i for i, token in enumerate(CONTROLS)}
        self.name, self.pattern, self.ranks = name, pattern, ranks
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
        self.eos, self.pad, self.system, self.user, self.assistant = specials.values()
        self.document, self.stops = self.eos, (self.eos,)
        self.roles = dict(zip(ROLES, (self.system, self.user, self.assistant)))
        self.n_vocab = len(ranks) + len(CONTROLS)

    @classmethod
    def gpt2(cls):
        """GPT-2's: its 50,256 byte pairs, then <|endoftext|> at its usual id, then our controls."""
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except Exception as error:  # tiktoken fetches the file on first use: any network error may come up
            raise UserError("the gpt2 tokenizer is not in tiktoken's cache and could not be fetched "
                            f"({type(error).__name__}); go online once, or point TIKTOKEN_CACHE_DIR at a cache") from None
        return cls("gpt2", encoding._pat_str, encoding._mergeable_ranks)

    def encode(self, text, after="start"):
        """Text to ids; control tokens in the text are encoded as the characters they are. after: see FolderTokenizer."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        """Ids to text, without control tokens and ids that don't exist."""
        return self.encoding.decode([i for i in ids if 0 <= i < len(self.ranks)], errors="replace")

    def show(self, *ids):
        """Ids as readable text, control tokens included."""
        if all(0 <= i < self.n_vocab for i in ids):
            return self.encoding.decode(ids, errors="replace")
        return "".join(self.show(i) if 0 <= i < self.n_vocab else f"<id {i}>" for i in ids)

    def same_as(self, other):
        """Whether other gives the same ids for the same text and dialogue."""
        return isinstance(other, Tokenizer) and (self.pattern, self.ranks) == (other.pattern, other.ranks)

    @cached_property
    def files(self):
        """{name: bytes} of the files that `transformers` opens this tokenizer from."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "barerlhf_name": self.name,
                  "bos_token": CONTROLS[0], "eos_token": CONTROLS[0], "pad_token": CONTROLS[1], "chat_template": own_template(CONTROLS[0])}
        vocab = {"".join(LETTERS[bytes([b])] for b in token): rank for token, rank in self.ranks.items()}
        return {"tokenizer.json": json_bytes(library_json(self.pattern, vocab, find_merges(self.ranks))),
                "tokenizer_config.json": json_bytes(config)}

    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json to a checkpoint folder."""
        save_files(self, folder)

    @classmethod
    def from_files(cls, saved, config):
        """The tokenizer that `save` wrote, from its two files' contents; None if they are another's, ValueError if damaged."""
        try:
            vocab, merges = saved["model"]["vocab"], saved["model"]["merges"]
            pattern = saved["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
            if not isinstance(pattern, str) or saved != library_json(pattern, vocab, merges):
                return None
        except (KeyError, TypeError, IndexError, AttributeError):
            return None
        try:
            ranks = {b"".join(BYTES[letter] for letter in token): rank for token, rank in vocab.items()}
            made = [vocab[merge.replace(" ", "", 1)] for merge in merges]
        except (KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None
        if sorted(map(repr, ranks.values())) != sorted(map(repr, range(len(ranks)))):
            raise ValueError("its ids are not 0, 1, 2, ...")
        if not all(a < b for a, b in pairwise(made)):
            raise ValueError("its merges are not in the order of its ids")
        name = config.get("barerlhf_name")
        return cls(name if isinstance(name, str) else "saved", pattern, dict(sorted(ranks.items(), key=lambda item: item[1])))


def library_json(pattern, vocab, merges):
    """Our tokenizer as the `tokenizers` library writes it. A piece that is a token is taken whole, as tiktoken does."""
    controls = [{"id": len(vocab) + i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                 "special": True} for i, token in enumerate(CONTROLS)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
             "fuse_unk": False, "byte_fallback": False, "ignore_merges": True, "vocab": vocab, "merges": merges}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": controls, "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}, "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}, "model": model}


def find_merges(ranks):
    """The merges behind ranks, in their order: each token's last one, its bytes being merged by lower ranks alone.

    A token that this leaves in three parts or more has none: no merging ever makes it.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best, i = min((ranks.get(left + right, rank), i) for i, (left, right) in enumerate(pairwise(parts)))
            if best >= rank:
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(" ".join("".join(LETTERS[bytes([b])] for b in part) for part in parts))
    return merges


def json_bytes(value):
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def save_files(tokenizer, folder):
    """Write a tokenizer's files to a checkpoint folder, each atomically."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, data in tokenizer.files.items():
        write_atomically(Path(folder) / name, data)


# How a text is cut into pieces that no token crosses: words, numbers, punctuation, with the space before them.
# That of the toy task knows the letters of English alone; GPT-2's knows all (\p{L}; Python's re does not).
ENGLISH = r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+"
ALL_LETTERS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train_bpe(texts, n_vocab, pattern=ENGLISH):
    """Learn byte-pair ranks from texts (Sennrich et al. 2016): at most n_vocab of them, the 256 bytes first.

    Returns (pattern, {bytes: rank}) for `Tokenizer`. Ties go to the pair that sorts first, so it is repeatable.
    """
    words = Counter(piece for text in texts for piece in regex.findall(pattern, text))
    ranks = {bytes([b]): b for b in range(256)}
    tokens = list(ranks)
    # All words, one behind the other, between marks of -1: at each place a token's id, and how often its word
    # comes. A merged pair leaves the new token at its first place; its second is passed over from then on.
    ids, times = array("i", [-1]), array("q", [0])
    for word, count in words.items():
        letters = word.encode()
        ids.extend([*letters, -1])
        times.extend([count] * (len(letters) + 1))
    before, after = array("i", range(-1, len(ids) - 1)), array("i", range(1, len(ids) + 1))

    counts, places = Counter(), defaultdict(lambda: array("i"))  # of each pair
    for place, pair in enumerate(pairwise(ids)):
        if -1 not in pair:
            counts[pair] += times[place]
            places[pair].append(place)
    # The most frequent pair comes first. A count that is out of date is put right when its turn comes.
    heap = [(-count, tokens[left], tokens[right], left, right) for (left, right), count in counts.items()]
    heapq.heapify(heap)
    while heap and len(ranks) < n_vocab:
        count, *_, left, right = entry = heapq.heappop(heap)
        if -count != counts[left, right]:
            if counts[left, right] > 0:
                heapq.heappush(heap, (-counts[left, right], *entry[1:]))
            continue
        new = ranks.setdefault(tokens[left] + tokens[right], len(ranks))
        if new == len(tokens):
            tokens.append(tokens[left] + tokens[right])
        grown = set()
        for place in sorted(places.pop((left, right))):  # of aaa, the first two are the pair
            second = after[place]
            if ids[place] != left or ids[second] != right:
                continue  # one of them is part of a longer token by now
            count, previous, following = times[place], before[place], after[second]
            ids[place], ids[second] = new, -1
            after[place], before[following] = following, place
            if ids[previous] >= 0:
                counts[ids[previous], left] -= count
                counts[ids[previous], new] += count
                places[ids[previous], new].append(previous)
                grown.add((ids[previous], new))
            if ids[following] >= 0:
                counts[right, ids[following]] -= count
                counts[new, ids[following]] += count
                places[new, ids[following]].append(place)
                grown.add((new, ids[following]))
        del counts[left, right]
        for left, right in grown:
            if counts[left, right] > 0:
                heapq.heappush(heap, (-counts[left, right], tokens[left], tokens[right], left, right))
    return pattern, ranks
