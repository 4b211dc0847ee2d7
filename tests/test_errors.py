"""What the user is told: one line that a terminal shows as it is."""

import pytest

from spotlight_jax.errors import InputError, naming


def test_a_message_is_one_printable_line_whatever_a_file_holds():
    held = "a\nb\tc\x1b[31m red \u2028 \udc80 \x00"
    assert str(InputError(f"field {held}: no")) == "field a b c\\x1b[31m red \\u2028 \\udc80 \\x00: no"


def test_a_message_keeps_both_ends_of_what_is_too_long():
    message = str(InputError("begin " + "x" * 10**6 + " end"))
    assert message.startswith("begin x") and message.endswith("x end") and len(message) < 2100


def test_the_place_is_named_once():
    with pytest.raises(InputError, match=r"^file: odd$"), naming("file"), naming("file"):
        raise InputError("odd")
