"""Taking secrets out of text that leaves the unit: a log, a reason.

What is looked for: the query of every URL (presigned ones carry their signature there) and a password in one, PEM
blocks, PINs and passphrases, tokens and keys by their usual names, AWS access keys, long base64 or hex strings that
follow such a name, and telephone numbers. Rather too much than too little: whoever reads a log misses nothing by a
number that is shown as [number].
"""

import re
from typing import Final

_PEM: Final = re.compile(r"-----BEGIN [A-Z0-9 ]+-----.*?(?:-----END [A-Z0-9 ]+-----|\Z)", re.DOTALL)
_PEM_TAIL: Final = re.compile(r"\A(?:[A-Za-z0-9+/=]{60,}\s+)*[A-Za-z0-9+/=\s]*?-----END [A-Z0-9 ]+-----")
_QUERY: Final = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s?#\"'<>]*)[?#][^\s\"'<>]*", re.IGNORECASE)
_USERINFO: Final = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/?#@\"'<>]+@", re.IGNORECASE)
_NAMED: Final = re.compile(
    r"""(?ix)
    \b((?:[a-z0-9_-]*[_-])?
       (?:(?:so|user)?pin|passwd|password|passphrase|secret|token|credential|authorization|signature|private[_-]?key|api[_-]?key
         |access[_-]?key(?:[_-]?id)?|psk|cookie)s?)
    (["']?\s*(?:[:=]|\bis\b)\s*)
    (?:(?:bearer|basic|digest)\s+)?
    ("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^\s,;&"'}\])]+)
    """,
)
_AWS_KEY: Final = re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")
_JWT: Final = re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*")
_PHONE: Final = re.compile(r"(?<![\w.:+-])(?:\+|00)[1-9](?:[ ()./-]?[0-9]){6,14}(?![\w])")


def redact(text: str) -> str:
    """`text` without what must not leave the unit; doing it twice changes nothing more."""
    text = _PEM.sub("[PEM]", text)
    text = _PEM_TAIL.sub("[PEM]", text)
    text = _QUERY.sub(r"\1?[query]", text)
    text = _USERINFO.sub(r"\1[user]@", text)
    text = _NAMED.sub(r"\1\2[secret]", text)
    text = _AWS_KEY.sub("[key]", text)
    text = _JWT.sub("[token]", text)
    return _PHONE.sub("[number]", text)
