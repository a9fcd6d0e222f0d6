"""What an error that a user can cause must be: one line, soon."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from firth.types import UserError


def refused(action: Callable[[], Any], says: str) -> None:
    """The action raises a UserError of one line that contains `says`, within seconds."""
    started = time.process_time()
    with pytest.raises(UserError, match=says) as error:
        action()
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    assert time.process_time() - started < 5
