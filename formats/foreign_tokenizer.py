"""Other projects' tokenizers, through the `tokenizers` library: text never becomes a control token here either."""
import json
import re
from pathlib import Path

from formats.chat_template import ChatTemplate, either, find_template, one_line, optional, own_template
from formats.tokenizer import CONTROLS, ROLES, Tokenizer, json_bytes, save_files
from plumbing.disk import TOKENIZER_FILES
from plumbing.flags import UserError, require


# ---------------------------------------------------------------------------------------------------------
# Other folders' tokenizers

FILE_LIMIT = 64 << 20  # bytes


def open_tokenizer(folder):
    """The tokenizer of a checkpoint folder, ours or another's. UserError names the file that is missing or damaged."""
    folder = Path(folder)
    files = {}
    for name in (*TOKENIZER_FILES, "config.json"):
        if (folder / name).is_file():
            require((folder / name).stat().st_size <= FILE_LIMIT, f"{folder / name} is too large for a tokenizer's file")
            files[name] = (folder / name).read_bytes()
    saved = read_json(folder, files, "tokenizer.json")
    try:
        ours = Tokenizer.from_files(saved, read_json(folder, files, "tokenizer_config.json"))
    except ValueError as error:
        raise UserError(f"{folder / 'tokenizer.json'} is damaged ({one_line(error)})") from None
    return ours or FolderTokenizer(folder, files, saved)


def read_json(folder, files, name):
    """The JSON object in a folder's file, {} where there is none; UserError if it is damaged."""
    try:
        value = json.loads(files.get(name, b"{}").decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder / name} is damaged ({one_line(error)})") from None
    require(isinstance(value, dict), f"{folder / name} is damaged (it holds no JSON object)")
    return value


class FolderTokenizer:
    """Another project's tokenizer, through the `tokenizers` library; its dialogues follow its folder's chat template.

    Attributes as Tokenizer's. Where the folder has no chat template, ours is used and the control tokens that it lacks are
    added at the end (`added`); with one, roles is None. files: {name: bytes} for `save`, amended by what was added.
    """

    def __init__(self, folder, files, saved):
        self.folder, self.name = folder, folder.name
        config, names, generation, model = (read_json(folder, files, name) for name in (
            "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"))
        words = {key: word for key in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
                 if (word := content_of(config.get(key)) or content_of(names.get(key)))}
        extra = [content_of(word) for source in (config, names) for key in ("additional_special_tokens", "extra_special_tokens")
                 for word in (source.get(key) if isinstance(source.get(key), list) else [])]
        self.engine = load_library(folder, files, saved, config, [*words.values(), *filter(None, extra)])
        size = self.n_vocab = max(self.engine.get_vocab().values(), default=-1) + 1

        def ids(*values):  # token ids as configurations give them: none, one or a list
            return [i for value in values for i in (value if isinstance(value, list) else [value]) if type(i) is int and 0 <= i < size]

        def named(key):  # an id by its word or, failing that, by number
            number = self.engine.token_to_id(words.get(key, ""))
            return next(iter(ids(number, generation.get(key + "_id"), model.get(key + "_id"))), None)

        eos, bos = named("eos_token"), named("bos_token")
        endings = ids(eos, generation.get("eos_token_id"), None if "generation_config.json" in files else model.get("eos_token_id"))
        self._make_special([self.engine.id_to_token(i) for i in ids(endings, bos)])
        source = find_template(folder, files, config)
        ours = source is None or eos is not None and source == own_template(self.engine.id_to_token(eos))
        self.template = None if ours else ChatTemplate(folder, source, words, self.specials)
        if self.template:
            eos = self.specials.get(self.template.ending, eos)
        require(eos is not None, f"{folder} names no token that ends a reply (eos_token in tokenizer_config.json)")
        self.eos, self.stops = eos, tuple(dict.fromkeys([eos, *endings]))
        self.document = self.specials.get("<|endoftext|>", eos if bos is None else bos)
        # a filler that can't be taken for the end of a reply: transformers finds a sequence's last token by != pad
        free = [word for word, i in self.specials.items() if i not in (*self.stops, bos)]
        unused = [word for word in free if not (self.template and word in source + self.template.sample)]
        unused.sort(key=lambda word: self.specials[word] == self.document)
        pads = [word for word in free if "pad" in word.lower()] + [word for word in free if word == words.get("unk_token")] + unused
        pad = (pads or [CONTROLS[1]])[0]
        self._make_special([pad, *(CONTROLS[2:] if ours else [])])
        self.pad, self.added = self.specials[pad], self.n_vocab - size
        self.roles = {role: self.specials[f"<|{role}|>"] for role in ROLES} if ours else None
        self._learn_spaces()
        self.files = {name: data for name, data in files.items() if name in TOKENIZER_FILES}
        self._amend(saved, config, names, generation, words)

    def _make_special(self, words):
        """Have words as special tokens, new ones at the end; UserError if the library gives them other ids."""
        tokens = {token.content: token for token in self.engine.get_added_tokens_decoder().values()}
        for word in words:
            if word not in tokens or not tokens[word].special:
                known = self.engine.token_to_id(word)
                self.engine.add_special_tokens([optional("tokenizers").AddedToken(word, special=True, normalized=False)])
                i = self.engine.token_to_id(word)
                require(i == (self.n_vocab if known is None else known), f"{self.folder}: its tokenizer has gaps in its ids, so {word} can't be added")
                self.n_vocab = max(self.n_vocab, i + 1)
        self.specials = {token.content: i for i, token in sorted(self.engine.get_added_tokens_decoder().items()) if token.special}

    def _learn_spaces(self):
        """Find out which special tokens the model makes of their own text, and where the library puts a space before text."""
        library, tokens = self.engine, self.engine.get_added_tokens_decoder().values()
        self.eaten = {side: {token.content for token in tokens if getattr(token, side)} for side in ("lstrip", "rstrip")}
        after_special = self._raw(library.id_to_token(self.eos) + "a")[1:]
        library.encode_special_tokens = True  # as ordinary text, from here on
        plain, self.newline = self._raw("a"), self._raw("\n")
        self.spaced = {"start": False, "special": after_special != plain, "text": self._raw("\na") != self.newline + plain}
        self.leaky = re.compile(f"({either(word for word, i in self.specials.items() if i in self._raw(word))})")
        self.special = re.compile(f"({either(self.specials)})")

    def _raw(self, text):
        return self.engine.encode(text, add_special_tokens=False).ids

    def encode(self, text, after="start"):
        """Text to ids; special tokens in the text are encoded as the characters they are.

        after: what stands before the text ("start", "text" or "special"), as some tokenizers put a space before some texts.
        """
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # lone halves of a character, as tiktoken does
        if self.leaky.search(text):  # letter by letter, so that the model can't put the special token together
            pieces = [piece for i, part in enumerate(self.leaky.split(text)) for piece in (part if i % 2 else [part]) if piece]
            return [i for n, piece in enumerate(pieces) for i in self._spaced(piece, "text" if n else after)]
        return self._spaced(text, after)

    def _spaced(self, text, after):
        if self.spaced[after]:  # behind a line break there is no space
            ids = self._raw("\n" + text)
            if ids[:len(self.newline)] == self.newline:
                return ids[len(self.newline):]
        return self._raw(text)

    def decode(self, ids):
        """Ids to text, without special tokens and ids that don't exist."""
        return self.engine.decode([i for i in ids if 0 <= i < self.n_vocab], skip_special_tokens=True)

    def show(self, *ids):
        """Ids as readable text, special tokens included."""
        if not all(0 <= i < self.n_vocab for i in ids):
            return "".join(self.show(i) if 0 <= i < self.n_vocab else f"<id {i}>" for i in ids)
        once, twice = (self.engine.decode(ids * n, skip_special_tokens=False) for n in (1, 2))
        return twice[len(once):]  # a space before the first word would be lost at the start of a text

    def same_as(self, other):
        """Whether other gives the same ids for the same text and dialogue."""
        def known(t):
            return t.engine.to_str(), t.template and t.template.source, t.eos, t.pad, t.document, set(t.stops)
        return isinstance(other, FolderTokenizer) and known(self) == known(other)

    def save(self, folder):
        """Write the files that this was read from to a checkpoint folder, with what was added to them."""
        save_files(self, folder)

    def _amend(self, saved, config, names, generation, words):
        """Bring the files in line with pad, stops, added tokens and our template, so that transformers opens the same tokenizer."""
        decoder = {i: {key: getattr(token, key) for key in ("content", "single_word", "lstrip", "rstrip", "normalized", "special")}
                   for i, token in sorted(self.engine.get_added_tokens_decoder().items())}
        if "tokenizer.json" in self.files:
            tokens = [{"id": i, **token} for i, token in decoder.items()]
            if sorted(saved.get("added_tokens") or [], key=lambda token: token["id"]) != tokens:
                self.files["tokenizer.json"] = json_bytes(saved | {"added_tokens": tokens})
        special = {"pad_token": self.engine.id_to_token(self.pad)}
        changes = {"tokenizer_config.json": dict(special), "special_tokens_map.json": special,
                   "generation_config.json": {"pad_token_id": self.pad, "eos_token_id": list(self.stops) if self.stops[1:] else self.eos}}
        if self.roles or self.added:  # with added_tokens_decoder, transformers reads no other file's tokens
            changes["tokenizer_config.json"] |= {key: words[key] for key in ("bos_token", "unk_token") if key in words}
            changes["tokenizer_config.json"] |= {"eos_token": words.get("eos_token", self.engine.id_to_token(self.eos)),
                                                 "added_tokens_decoder": {str(i): token for i, token in decoder.items()}}
        if self.roles and "chat_template.jinja" not in self.files:
            changes["tokenizer_config.json"]["chat_template"] = own_template(self.engine.id_to_token(self.eos))
        kind = "PreTrainedTokenizerFast" if "tokenizer.json" in self.files else "GPT2Tokenizer"
        for name, before in (("tokenizer_config.json", config), ("special_tokens_map.json", names), ("generation_config.json", generation)):
            if (name in self.files or name == "tokenizer_config.json") and before != (after := before | changes[name]):
                self.files[name] = json_bytes({"tokenizer_class": kind} | after if name == "tokenizer_config.json" else after)

    def encode_pieces(self, pieces, hidden):
        """Ids and mask of rendered pieces [(text, whether it is a reply)]; hidden: {stand-in: special token's text} of contents."""
        ids, mask, before = [], [], None
        for text, reply in pieces:
            start, parts = len(ids), self.special.split(text)
            for i, part in enumerate(parts):
                if i % 2:
                    ids.append(self.specials[part])
                    before = part
                    continue
                part = part.lstrip() if before in self.eaten["rstrip"] else part
                part = part.rstrip() if i + 1 < len(parts) and parts[i + 1] in self.eaten["lstrip"] else part
                if part:
                    ids += self.encode("".join(hidden.get(letter, letter) for letter in part) if hidden else part,
                                       "start" if before is None else "special" if before else "text")
                    before = ""
            if reply and ids[start:][-1:] != [self.eos]:  # the template ends a turn with no special token
                ids.append(self.eos)
                before = self.engine.id_to_token(self.eos)
            mask += [reply] * (len(ids) - start)
        return ids, mask


def load_library(folder, files, saved, config, special):
    """A `tokenizers.Tokenizer` from a folder's files, with the tokens that its configuration adds; special: words to make special tokens."""
    tokenizers = optional("tokenizers")
    name = "tokenizer.json" if "tokenizer.json" in files else "merges.txt" if "vocab.json" in files else "tokenizer.json"
    hint = "; open and save the tokenizer with transformers once to make it" if "tokenizer.model" in files else ""
    require(name in files, f"{folder / name} is missing{hint}")
    try:
        if name == "tokenizer.json":
            prefix = saved["model"].get("continuing_subword_prefix") or ""  # the library 0.23 aborts the process where one is missing
            if not all((pair.split(" ") if isinstance(pair, str) else pair)[1].startswith(prefix) for pair in prefix and saved["model"]["merges"]):
                raise ValueError("a merge lacks the prefix that it says it has")
            library = tokenizers.Tokenizer.from_str(files[name].decode("utf-8-sig"))
        else:
            kind = config.get("tokenizer_class")
            require(kind in (None, "GPT2Tokenizer", "GPT2TokenizerFast"),
                    f"{folder / 'tokenizer.json'} is missing, and {one_line(kind)} is not read from vocab.json")
            vocab, lines = read_json(folder, files, "vocab.json"), files[name].decode("utf-8-sig").split("\n")
            merges = [tuple(line.split()) for n, line in enumerate(lines) if line.strip() and not (n == 0 and line.startswith("#version"))]
            library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
            library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=config.get("add_prefix_space") is True)
            library.decoder = tokenizers.decoders.ByteLevel()
        library.no_truncation()
        library.no_padding()
        if listed := config.get("added_tokens_decoder"):
            listed = sorted((int(i), entry["content"], entry) for i, entry in listed.items())
        else:
            listed = [(i, word, {"special": word in special}) for word, i in read_json(folder, files, "added_tokens.json").items()]
        known = {token.content for token in library.get_added_tokens_decoder().values()}
        for i, word, entry in sorted(listed, key=lambda item: item[0]):
            if word not in known:
                flags = {key: entry[key] for key in ("single_word", "lstrip", "rstrip", "normalized", "special") if key in entry}
                library.add_tokens([tokenizers.AddedToken(word, **{"normalized": False} | flags)])
                known.add(word)
                require(library.token_to_id(word) == i, f"{folder}: the added token {word} can't have the id {i}, which its configuration gives it")
        library.add_special_tokens([tokenizers.AddedToken(word, special=True, normalized=False) for word in special
                                    if word not in known and library.token_to_id(word) is not None])
    except UserError:
        raise
    except Exception as error:  # whatever the library raises
        raise UserError(f"{folder / name} or an added token is damaged ({one_line(error)})") from None
    return library


def content_of(token):
    """The text of a token as configurations give it, a string or an object with content; None for anything else."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None
