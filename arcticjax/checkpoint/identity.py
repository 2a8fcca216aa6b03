"""Which run a directory holds: a copy that is continued is another run."""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

IDENTITY_FILE = "run.json"


@dataclass(frozen=True)
class Identity:
    """What run.json holds.

    id: unique to the run. directory: where it went on last. copied_from: id of the run whose
    directory this one's was copied from.
    """

    id: str
    directory: str
    copied_from: str | None = None


def identify(directory: Path, here: str) -> Identity:
    """The identity of the run in a directory as it is from now on; here: the directory's address.

    A directory that was moved stays the run it was. One whose run is still where it was is a copy,
    and becomes a run of its own.
    """
    known = read(directory)
    if known is None:
        return Identity(uuid.uuid4().hex, here)
    if known.directory == here:
        return known
    original = read(Path(known.directory))
    if original is not None and original.id == known.id:
        return Identity(uuid.uuid4().hex, here, known.id)
    return Identity(known.id, here, known.copied_from)


def to_json(identity: Identity) -> str:
    """The text of run.json."""
    return json.dumps(asdict(identity), indent=1) + "\n"


def read(directory: Path) -> Identity | None:
    """What a directory says of itself; None where it says nothing that can be read."""
    try:
        found = json.loads((directory / IDENTITY_FILE).read_text(encoding="utf-8"))
        identity = Identity(found["id"], found["directory"], found["copied_from"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    names = (identity.id, identity.directory)
    return identity if all(isinstance(one, str) for one in names) else None
