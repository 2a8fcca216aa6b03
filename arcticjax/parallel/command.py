"""What the commands of several processes share: whose messages are shown, and how they end."""

from __future__ import annotations

import logging
import sys
from typing import NoReturn


def show_log() -> None:
    """Lets the parts' own messages (tokenising, checkpoints set aside) reach stderr."""
    root = logging.getLogger()
    # On the root: any library's first plain `logging.info` would put a second handler there. One
    # that is there already shows our messages too, so it is made to show them in our way.
    if not root.handlers:
        root.addHandler(logging.StreamHandler())
    for handler in root.handlers:
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        handler.addFilter(_from_process_0)
    logging.getLogger("arcticjax").setLevel(logging.INFO)


def leave(code: int) -> NoReturn:
    """Ends the process, all of them alike where jax was loaded."""
    # A wrong config ends here too, and should not wait for jax.
    if "jax" not in sys.modules:
        sys.exit(code)
    from arcticjax.parallel import distributed

    distributed.leave(code)


def _from_process_0(record: logging.LogRecord) -> bool:
    import jax

    return record.levelno >= logging.ERROR or jax.process_index() == 0
