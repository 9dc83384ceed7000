"""What all readers of other people's files share: how a damaged one is named."""
import json

from plumbing.flags import UserError, require


def one_line(error):
    """A library's message, which may be a page long, as one line of at most 200 characters."""
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__


def json_object(data, path, encoding="utf-8"):
    """The JSON object, a dict, that a file's bytes hold; UserError, with its path, if they hold none."""
    try:
        value = json.loads(data.decode(encoding))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)})") from None
    require(isinstance(value, dict), f"{path} is damaged (it holds no object)")
    return value
