"""Chat templates of other projects' checkpoint folders: programs (Jinja) of unknown origin, so they run in a sandbox with bounds."""
import contextlib
import importlib
import json
import re
import signal
import threading
from pathlib import Path

from formats.errors import one_line
from plumbing.flags import UserError, require
from plumbing.run import today

TEMPLATE_LIMIT, OUTPUT_LIMIT = 100_000, 1 << 24  # characters
SECONDS = 3  # for one rendering
MEMORY = 1 << 29  # bytes that one rendering may take
PROBE = "Zq7"


def optional(name):
    """A module that only other projects' folders need; UserError if it isn't installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"this checkpoint folder's tokenizer needs the package {name}: pip install -r requirements-hf.txt") from None


def either(words):
    """A regular expression for any of some words, longest first; it matches nothing if there are none."""
    return "|".join(map(re.escape, sorted(words, key=len, reverse=True))) or "(?!)"


def find_template(folder, files, config):
    """A folder's chat template, or None."""
    if "chat_template.jinja" in files:
        template = files["chat_template.jinja"].decode("utf-8", "replace")
    else:
        template = config.get("chat_template")
        if isinstance(template, list):
            template = next((entry.get("template") for entry in template if isinstance(entry, dict) and entry.get("name") == "default"), "")
    require(template is None or isinstance(template, str) and 0 < len(template) <= TEMPLATE_LIMIT,
            f"{folder}: its chat template is not a text of at most {TEMPLATE_LIMIT} characters, or there is none named default")
    return template


def own_template(eos):
    """Our dialogue template in Jinja."""
    return ("{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}{% if message['role'] == 'assistant' %}"
            "{{ " + json.dumps(eos, ensure_ascii=False) + " }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


@contextlib.contextmanager
def bounded(folder):
    """Bound what a template's code takes: time (in the main thread) and memory (on Linux). Any failure becomes a UserError."""
    def stop(*_):
        raise TimeoutError(f"it takes more than {SECONDS} seconds")

    timed = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    used = Path("/proc/self/statm")
    resource = importlib.import_module("resource") if used.exists() else None
    try:
        if timed:
            handler = signal.signal(signal.SIGALRM, stop)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
        if resource:
            soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            limit = int(used.read_text().split()[0]) * resource.getpagesize() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit if soft == resource.RLIM_INFINITY else min(soft, limit), hard))
        yield
    except UserError:
        raise
    except Exception as error:  # anything can come out of a template
        raise UserError(f"{folder}: its chat template failed: {one_line(error)}") from None
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
        if resource:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def sandbox():
    """The Jinja environment that transformers renders chat templates in, stricter about sizes and about unsafe attributes."""
    jinja2, ext, safe = optional("jinja2"), optional("jinja2.ext"), optional("jinja2.sandbox")
    date = today()  # one date for as long as a tokenizer is open: a conversation has the same ids at its end

    class Generation(ext.Extension):  # transformers' mark around replies: its body alone counts here
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=line)

    class Sandbox(safe.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context, operator, left, right):
            sizes = [abs(x) if isinstance(x, (int, float)) else len(x) for x in (left, right)]
            numbers = all(isinstance(x, (int, float)) for x in (left, right))
            if max(sizes) > 1000 if operator == "**" else sizes[0] * sizes[1] > (1 << 63 if numbers else 1 << 20):
                raise safe.SecurityError(f"the result of {operator} would be too large")
            return super().call_binop(context, operator, left, right)

        def unsafe_undefined(self, obj, attribute):
            raise safe.SecurityError(f"the attribute {attribute} of {type(obj).__name__} is unsafe")

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    environment.filters["tojson"] = tojson  # Jinja's own escapes HTML
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": date.strftime}
    return environment


class ChatTemplate:
    """A folder's chat template. ending: the special token that ends a reply, or None; sample: a rendered conversation."""

    def __init__(self, folder, source, words, specials):
        self.folder, self.source, self.words = folder, source, words
        environment = sandbox()
        with bounded(folder):
            self.compiled = environment.from_string(source)
        self.merges_system = False
        user, assistant, system = ({"role": role, "content": PROBE} for role in ("user", "assistant", "system"))
        self.sample = self.render([user, assistant], False)
        require(PROBE in self.sample, f"{folder}: its chat template leaves out what the assistant says")
        tail = self.sample[self.sample.rindex(PROBE) + len(PROBE):]
        found = re.search(either(specials), tail)
        self.ending, self.tail = (found[0], "") if found else (None, tail)
        try:
            self.merges_system = self.render([system, user], True).count(PROBE) < 2
        except UserError:  # it rejects system messages
            self.merges_system = True

    def render(self, messages, waiting):
        """The text of a conversation; waiting: with what begins the assistant's next turn."""
        if self.merges_system and messages and messages[0]["role"] == "system":  # into the first user message
            first, *rest = messages
            texts = [first["content"], *(message["content"] for message in rest[:1] if message["role"] == "user")]
            messages = [{"role": "user", "content": "\n\n".join(texts)}, *rest[len(texts) - 1:]]
        with bounded(self.folder):
            pieces, size = [], 0
            for piece in self.compiled.generate(messages=[dict(message) for message in messages], tools=None, documents=None,
                                                add_generation_prompt=waiting, **self.words):
                pieces.append(piece)
                size += len(piece)
                require(size <= OUTPUT_LIMIT, f"{self.folder}: its chat template makes more than {OUTPUT_LIMIT} characters")
        return "".join(pieces)

    def hide(self, messages, special):
        """Messages with the special tokens (a regular expression) in their contents replaced by stand-ins, and {stand-in: token}."""
        texts = "".join(message["content"] for message in messages)
        used = set(texts) | set(self.source)
        free = (chr(i) for i in range(0xF0000, 0x10FFFE) if chr(i) not in used)  # for private use
        stand_ins = {token: next(free) for token in sorted(set(special.findall(texts)))}
        messages = [message | {"content": special.sub(lambda found: stand_ins[found[0]], message["content"])} for message in messages]
        return messages, {letter: token for token, letter in stand_ins.items()}

    def prompt_pieces(self, messages, waiting=True):
        """A conversation as pieces [(text, whether it is a reply)] that don't depend on what follows them.

        One piece alone if the template writes earlier turns otherwise than it wrote them when they were the last.
        """
        pieces, done, whole = [], "", self.render(messages, waiting)
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before, after = self.render(messages[:i], True), self.render(messages[:i + 1], False)
                if not (before.startswith(done) and after.startswith(before)):
                    return [(whole, False)]
                reply = self.cut(after[len(before):])
                pieces += [(before[len(done):], False), (reply, True)]
                done = before + reply
        return pieces + [(whole[len(done):], False)] if whole.startswith(done) else [(whole, False)]

    def dialogue_pieces(self, messages):
        """A whole conversation as pieces; it ends with the token that ends the last reply. UserError if that reply can't be told apart."""
        if not messages or messages[-1]["role"] != "assistant":
            return self.prompt_pieces(messages, waiting=False)
        pieces = self.prompt_pieces(messages[:-1])
        before, after = "".join(text for text, _ in pieces), self.render(messages, False)
        require(after.startswith(before), f"{self.folder}: its chat template doesn't write a reply behind what it writes to ask for one, "
                                          f"which ends in {before[-40:]!r}; so the reply can't be trained on")
        return pieces + [(self.cut(after[len(before):]), True)]

    def cut(self, turn):
        """A reply's rendering up to and with its end token."""
        if self.ending and self.ending in turn:
            return turn[:turn.index(self.ending) + len(self.ending)]
        return turn[:len(turn) - len(self.tail)] if turn.endswith(self.tail) else turn
