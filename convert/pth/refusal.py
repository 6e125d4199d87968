"""Why a file is refused: raised where it is found out, and turned into the one-line error where its path is known."""

from __future__ import annotations

RESAVE = "re-save it where torch is installed: torch.save(torch.load(old), new)"
WEIGHTS_ONLY = "save only the weights, as plain tensors, where torch is installed: torch.save(model.state_dict(), new)"
REFETCH = "it may be cut short or damaged: fetch it again"


class RefusalError(Exception):
    """What is wrong with a file (``rule``) and what to do about it (``remedy``)."""

    def __init__(self, rule: str, remedy: str = REFETCH):
        self.rule, self.remedy = rule, remedy
        super().__init__(f"{rule}; {remedy}")


def shown(text: str) -> str:
    """Text from the file as a message may show it: short, and without anything that a terminal would obey."""
    return ascii(text) if len(text) <= 80 else f"{text[:50]!a}…{text[-20:]!a}"
