"""What looks like a secret, which stands in no config and on no command line."""

from __future__ import annotations

import re

# How the tokens begin that are handed out by the Hugging Face Hub, by OpenAI and Anthropic, Google,
# GitHub, Slack, AWS and Weights & Biases; and a private key. Enough to catch a slip, no proof.
_SECRET = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|AIza[0-9A-Za-z_-]{20,}"
    r"|gh[pousr]_[A-Za-z0-9]{16,}|xox[abp]-[A-Za-z0-9-]{10,}|AKIA[0-9A-Z]{16})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|\b[A-Za-z0-9_]*(?:TOKEN|SECRET|PASSWORD|API_KEY)=\S+"
)


def find_secret(text: str) -> str | None:
    """How the first token in a text begins, fit to be shown; None where nothing looks like one."""
    found = _SECRET.search(text)
    return None if found is None else f"{found.group()[:6]}..."
