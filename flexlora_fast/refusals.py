"""Who was not taken into a round, as a list that strangers cannot make grow for ever."""

from __future__ import annotations

from flexlora_fast.errors import FlexLoRAError, shown
from flexlora_fast.update import Refusal

MOST = 10_000  # refusals of one round that are told apart: a few MB, where each upload of a stranger may be refused
_LONGEST = (256, 2_000)  # characters of a name, as a journal takes them, and of a reason
OTHERS = "others"  # the code of the last one, where there were more


class Refusals(list[Refusal]):
    """A round's refusals in the order in which they came. Those beyond ``MOST`` are counted in the last one.

    ``total``: how many there were.

    >>> found = Refusals()
    >>> for number in range(MOST + 5):
    ...     _ = found.note(f"client-{number}", FlexLoRAError("no"))
    >>> len(found), found.total, found[-1].code, found[-1].reason
    (10001, 10005, 'others', '5 more were refused than are listed')
    """

    def __init__(self) -> None:
        super().__init__()
        self._beyond = 0

    @property
    def total(self) -> int:
        return len(self) + self._beyond - bool(self._beyond)

    def note(self, client: str, error: FlexLoRAError) -> Refusal:
        """A refusal more; returns it."""
        name = client if len(client) <= _LONGEST[0] else shown(client, _LONGEST[0])
        refusal = Refusal(name, str(error)[: _LONGEST[1]], error.code)
        if len(self) < MOST:
            self.append(refusal)
            return refusal
        if self._beyond:
            self.pop()
        self._beyond += 1
        self.append(Refusal("", f"{self._beyond} more were refused than are listed", OTHERS))
        return refusal
