"""Our own tokenizer: a byte-level BPE, learned here or GPT-2's.

It has control tokens that no text can become.
"""
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

# In byte-level BPE files each byte is a character: those that can be printed stand for themselves, the others
# take the characters from 256 on, in order.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
LETTERS = {bytes([b]): chr(b) for b in PRINTABLE}
LETTERS |= {bytes([b]): chr(256 + i) for i, b in enumerate(OTHERS)}
BYTES = {letter: byte for byte, letter in LETTERS.items()}


def to_letters(token):
    """A token, bytes, as byte-level BPE files write it."""
    return "".join(LETTERS[bytes([b])] for b in token)


def to_bytes(letters):
    """The token that byte-level BPE files write so; KeyError if it has a character that is no byte's."""
    return b"".join(BYTES[letter] for letter in letters)


class Tokenizer:
    """A byte-level BPE (tiktoken) with five control tokens that ordinary text can never produce.

    Attributes: n_vocab, ids run from 0 to n_vocab - 1; added, how many of the last have untrained embeddings;
    eos ends a reply; pad fills; stops, the ids that end generation; document stands around plain text; roles,
    {role: id}.
    """
    added = 0

    def __init__(self, name, pattern, ranks):
        """pattern: how text is cut into pieces, see `ENGLISH`; ranks: {bytes: id} of the ordinary tokens."""
        self.name, self.pattern, self.ranks = name, pattern, ranks
        specials = {token: len(ranks) + i for i, token in enumerate(CONTROLS)}
        self.encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
        self.eos, self.pad, self.system, self.user, self.assistant = specials.values()
        self.document = self.eos
        self.stops = (self.eos,)
        self.roles = {"system": self.system, "user": self.user, "assistant": self.assistant}
        self.n_vocab = len(ranks) + len(CONTROLS)

    @classmethod
    def gpt2(cls):
        """GPT-2's: its 50,256 byte pairs, then <|endoftext|> at its usual id, then our controls."""
        try:
            encoding = tiktoken.get_encoding("gpt2")
        # tiktoken fetches the file on first use: any network error may come up.
        except Exception as error:
            kind = type(error).__name__
            raise UserError("the gpt2 tokenizer is not in tiktoken's cache and could not be fetched "
                            f"({kind}); go online once, or point TIKTOKEN_CACHE_DIR at a cache") from None
        return cls("gpt2", encoding._pat_str, encoding._mergeable_ranks)

    def encode(self, text, after="start"):
        """Text to ids; control tokens in the text are encoded as the characters they are.

        after: see FolderTokenizer. It makes no difference here.
        """
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        """Ids to text, without control tokens and ids that don't exist."""
        ordinary = [i for i in ids if 0 <= i < len(self.ranks)]
        return self.encoding.decode(ordinary, errors="replace")

    def show(self, *ids):
        """Ids as readable text, control tokens included."""
        if all(0 <= i < self.n_vocab for i in ids):
            return self.encoding.decode(ids, errors="replace")
        shown = ""
        for i in ids:
            shown += self.show(i) if 0 <= i < self.n_vocab else f"<id {i}>"
        return shown

    def same_as(self, other):
        """Whether other gives the same ids for the same text and dialogue."""
        return isinstance(other, Tokenizer) and self.pattern == other.pattern and self.ranks == other.ranks

    @cached_property
    def files(self):
        """{name: bytes} of the files that `transformers` opens this tokenizer from."""
        end, pad = CONTROLS[:2]
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "barerlhf_name": self.name,
            "bos_token": end,
            "eos_token": end,
            "pad_token": pad,
            "chat_template": own_template(end),
        }
        vocab = {to_letters(token): rank for token, rank in self.ranks.items()}
        saved = library_json(self.pattern, vocab, find_merges(self.ranks))
        return {"tokenizer.json": json_bytes(saved), "tokenizer_config.json": json_bytes(config)}

    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json to a checkpoint folder."""
        save_files(self, folder)

    @classmethod
    def from_files(cls, saved, config):
        """The tokenizer that `save` wrote, from the contents of tokenizer.json and tokenizer_config.json.

        None if they are another's, ValueError if they are damaged.
        """
        try:
            vocab = saved["model"]["vocab"]
            merges = saved["model"]["merges"]
            pattern = saved["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
            if not isinstance(pattern, str) or saved != library_json(pattern, vocab, merges):
                return None
        except (KeyError, TypeError, IndexError, AttributeError):
            return None
        try:
            ranks = {to_bytes(letters): rank for letters, rank in vocab.items()}
            # The ids of the tokens that the merges make.
            made = [vocab[merge.replace(" ", "", 1)] for merge in merges]
        except (KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None
        if sorted(map(repr, ranks.values())) != sorted(map(repr, range(len(ranks)))):
            raise ValueError("its ids are not 0, 1, 2, ...")
        if not all(a < b for a, b in pairwise(made)):
            raise ValueError("its merges are not in the order of its ids")
        name = config.get("barerlhf_name")
        if not isinstance(name, str):
            name = "saved"
        return cls(name, pattern, in_order(ranks))


def in_order(ranks):
    """Ranks {bytes: rank} with the lowest first."""
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def library_json(pattern, vocab, merges):
    """Our tokenizer as the `tokenizers` library writes it, a dict.

    vocab: {a token's letters: id}; merges: a list of "left right". A piece that is a token is taken whole
    (ignore_merges), as tiktoken does.
    """
    controls = []
    for i, token in enumerate(CONTROLS):
        controls.append({
            "id": len(vocab) + i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        })
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": True,
        "vocab": vocab,
        "merges": merges,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": controls,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def find_merges(ranks):
    """The merges behind ranks {bytes: rank}, a list of "left right" in the order of the ranks.

    They are each token's last merge, its bytes being merged by lower ranks alone. A token that this leaves in
    three parts or more has none: no merging ever makes it.
    """
    merges = []
    for token, rank in in_order(ranks).items():
        parts = split_by_lower_ranks(token, rank, ranks)
        if len(parts) == 2:
            left, right = map(to_letters, parts)
            merges.append(f"{left} {right}")
    return merges


def split_by_lower_ranks(token, rank, ranks):
    """The parts of a token, two if it can be, that merges of lower ranks than its own make of its bytes."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pair_ranks = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
        best = min(pair_ranks)
        if best >= rank:
            break
        # Of equal pairs the first is merged.
        i = pair_ranks.index(best)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def json_bytes(value):
    """A JSON value as the bytes of a file that people can read."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "surrogatepass")


def save_files(tokenizer, folder):
    """Write a tokenizer's files to a checkpoint folder, each atomically."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, data in tokenizer.files.items():
        write_atomically(Path(folder) / name, data)


# How a text is cut into pieces that no token crosses: words, numbers, punctuation, with the space before.
# That of the toy task knows the letters of English alone; GPT-2's knows all (\p{L}; Python's re does not).
ENGLISH = r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+"
ALL_LETTERS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train_bpe(texts, n_vocab, pattern=ENGLISH):
    """Learn byte-pair ranks from texts (Sennrich et al. 2016): at most n_vocab of them, the 256 bytes first.

    Returns (pattern, {bytes: rank}) for `Tokenizer`. Ties go to the pair that sorts first, so it is
    repeatable.
    """
    ranks = {bytes([b]): b for b in range(256)}
    tokens = list(ranks)  # by id
    ids, times = lay_out_words(texts, pattern)
    # A merged pair leaves the new token at its first place; its second is passed over from then on. So each
    # place knows the places before and after it.
    before = array("i", range(-1, len(ids) - 1))
    after = array("i", range(1, len(ids) + 1))

    counts, places = find_pairs(ids, times)

    def entry_of(pair):
        left, right = pair
        return -counts[pair], tokens[left], tokens[right], left, right

    # The most frequent pair comes first. A count that is out of date is put right when its turn comes.
    heap = [entry_of(pair) for pair in counts]
    heapq.heapify(heap)
    while heap and len(ranks) < n_vocab:
        count, _, _, left, right = heapq.heappop(heap)
        if -count != counts[left, right]:
            if counts[left, right] > 0:
                heapq.heappush(heap, entry_of((left, right)))
            continue
        merged = tokens[left] + tokens[right]
        new = ranks.setdefault(merged, len(ranks))
        if new == len(tokens):
            tokens.append(merged)
        grown = set()  # the pairs that come more often than before
        # In order, as of aaa the first two are the pair.
        for place in sorted(places.pop((left, right))):
            second = after[place]
            if ids[place] != left or ids[second] != right:
                # One of them is part of a longer token by now.
                continue
            count = times[place]
            previous = before[place]
            following = after[second]
            ids[place] = new
            ids[second] = -1
            after[place] = following
            before[following] = place
            if ids[previous] >= 0:
                counts[ids[previous], left] -= count
                pair = ids[previous], new
                counts[pair] += count
                places[pair].append(previous)
                grown.add(pair)
            if ids[following] >= 0:
                counts[right, ids[following]] -= count
                pair = new, ids[following]
                counts[pair] += count
                places[pair].append(place)
                grown.add(pair)
        del counts[left, right]
        for pair in grown:
            if counts[pair] > 0:
                heapq.heappush(heap, entry_of(pair))
    return pattern, ranks


def find_pairs(ids, times):
    """Of each pair of neighbouring ids: how often it comes, and the places of its first id."""
    counts = Counter()
    places = defaultdict(lambda: array("i"))
    for place, pair in enumerate(pairwise(ids)):
        if -1 not in pair:
            counts[pair] += times[place]
            places[pair].append(place)
    return counts, places


def lay_out_words(texts, pattern):
    """All different words of some texts, one behind the other, between marks of -1.

    Returns two arrays of one length. At each place stand a token's id, for now a byte's, and how often its
    word comes.
    """
    words = Counter()
    for text in texts:
        words.update(regex.findall(pattern, text))
    ids, times = array("i", [-1]), array("q", [0])
    for word, count in words.items():
        letters = word.encode()
        ids.extend(letters)
        ids.append(-1)
        times.extend([count] * (len(letters) + 1))
    return ids, times
