"""A place for the token of a local Ray where the user's home cannot be written to, as in many containers."""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import tempfile
from pathlib import Path

GIVEN = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def provide_token() -> None:
    """Before a local Ray starts: Ray keeps a token in the home folder and fails where it cannot write it.

    The token then lies in a temporary folder, which only this user may read and which goes with this process; Ray's
    processes find it by their environment.
    """
    if any(os.environ.get(name) for name in GIVEN) or _home_serves():
        return
    folder = Path(tempfile.mkdtemp(prefix="agd-vllm-ray-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    token = folder / "auth_token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)


def _home_serves() -> bool:
    """Whether Ray's token is in the home folder, or can be written there."""
    try:
        token = Path.home() / ".ray/auth_token"
        if token.exists():
            return os.access(token, os.R_OK)
        token.parent.mkdir(parents=True, exist_ok=True)
        return os.access(token.parent, os.W_OK)
    except (OSError, RuntimeError):
        return False
