"""Replies that another engine sampled, as token ids with their log-probabilities."""
import math
from typing import NamedTuple

from formats.rows import BadRow, Row, is_list_of, is_number, parse, recognise, translate
from formats.sources import list_names, read_objects
from plumbing.flags import UserError, require

# Fields of a row besides those of its prompt: what was sampled, and how.
OWN = ("prompt_ids", "reply_ids", "logprobs", "temperature", "top_p", "top_k", "min_p")
# Values of the sampler's settings that cut nothing off. (Engines write 0 or -1 for "all tokens".)
WHOLE = {"top_p": (1,), "top_k": (0, -1), "min_p": (0,)}
# What rounding may add to a log-probability, nats.
ROUNDING = 1e-3


class Recorded(NamedTuple):
    """A reply that was sampled elsewhere."""
    where: str  # file and line
    row: Row
    prompt_ids: list | None  # as the engine was given them; None where the row has none
    reply_ids: list  # its end token included
    logprobs: list  # of the reply's tokens, nats


def read_rollouts(path, temperature):
    """[Recorded] of a file. UserError for a row that can't be read, or was sampled in another way.

    A row has a prompt, as rows for --data have, reply_ids and logprobs; it may have prompt_ids, and how it
    was sampled (temperature, top_p, top_k, min_p).
    """
    recorded = []
    for where, found in read_objects(path):
        if isinstance(found, UserError):
            raise found
        filled = {name: value for name, value in found.items() if value is not None}
        require("reply_ids" in filled and "logprobs" in filled,
                f"{where} has no reply_ids with their logprobs; its fields are {list_names(list(found))}")
        check_sampler(filled, temperature, where)
        recorded.append(Recorded(
            where=where,
            row=parse_asked(filled, where),
            prompt_ids=parse_ids(filled, "prompt_ids", where) if "prompt_ids" in filled else None,
            reply_ids=parse_ids(filled, "reply_ids", where),
            logprobs=parse_logprobs(filled, where)))
    require(recorded, f"{path} holds no row")
    return recorded


def parse_asked(filled, where):
    """The Row of what was asked: the prompt, and the answer if there is one."""
    asked = translate({name: value for name, value in filled.items() if name not in OWN})
    form = recognise(asked)
    require(form and form != "plain text",
            f"{where} holds no prompt (prompt, instruction, question, query, problem or messages)")
    try:
        return parse(asked, form, "prompts")
    except (BadRow, TypeError, OverflowError) as error:
        raise UserError(f"{where}: {error}") from None


def parse_ids(filled, name, where):
    """A row's list of token ids, which must not be empty."""
    ids = filled[name]
    require(is_list_of(int, ids) and ids and not is_list_of(bool, ids) and min(ids) >= 0,
            f"{where}: {name} is not a list of token ids, or is empty")
    return ids


def parse_logprobs(filled, where):
    """A row's log-probabilities, one for each token of the reply."""
    logprobs, tokens = filled["logprobs"], len(filled["reply_ids"])
    require(isinstance(logprobs, list) and all(is_number(x) and math.isfinite(x) for x in logprobs),
            f"{where}: logprobs is not a list of finite numbers")
    require(len(logprobs) == tokens, f"{where} has {len(logprobs)} logprobs for {tokens} reply_ids")
    require(max(logprobs) <= ROUNDING,
            f"{where}: {max(logprobs):.3g} is no log-probability, which is never above 0")
    return logprobs


def check_sampler(filled, temperature, where):
    """UserError where a row says that it was sampled from another distribution than the one that is scored.

    temperature: of scoring.
    """
    why = ("training scores the whole softmax at --temperature, so what was sampled otherwise comes from "
           "another policy than the one whose gradient is computed")
    given = filled.get("temperature", temperature)
    require(is_number(given) and math.isclose(given, temperature, rel_tol=1e-6),
            f"{where} was sampled at temperature {given}, and --temperature is {temperature:g}: {why}")
    for name, harmless in WHOLE.items():
        given = filled.get(name, harmless[0])
        require(is_number(given) and given in harmless, f"{where} was sampled with {name} {given}: {why}")
