"""Text from outside as a terminal, a page or a table may show it."""

import unicodedata


def is_unicode(text: str) -> bool:
    """Whether the text can be written as UTF-8: names of files that hold other bytes cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def visible(text: str, keep: str = "") -> str:
    r"""Return `text` with every character that is not seen written out: ESC as `\x1b`, a byte that is not UTF-8 as `\udce9`.

    File names hold any bytes: control characters would move or recolour a terminal, and lone surrogates, which Python
    makes of bytes that are not UTF-8, can be written to no UTF-8 file. Characters in `keep` stay.
    """
    if text.isprintable():
        return text
    return "".join(
        sign
        if sign.isprintable() or sign in keep or unicodedata.category(sign) == "Zs"
        else ascii(sign)[1:-1]
        for sign in text
    )
