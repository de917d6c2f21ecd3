"""Every error this package raises on purpose: each quotes the client, the layer, the value and the remedy."""

from __future__ import annotations


class FlexLoRAError(Exception):
    """Base of all errors of this package.

    ``message`` says what is wrong and what to do. ``client`` and ``layer``, where they are known, are quoted in
    front of it and kept as attributes, so that a server can act on them without parsing text. ``code`` is a short
    name of the kind of error that stays the same while messages may change.
    """

    code: str = "error"

    def __init__(self, message: str, *, client: str | None = None, layer: str | None = None) -> None:
        self.message = message
        self.client = client
        self.layer = layer
        super().__init__(str(self))

    def __str__(self) -> str:
        where = [f"client {self.client!r}"] if self.client is not None else []
        where += [f"layer {self.layer!r}"] if self.layer is not None else []
        return f"{', '.join(where)}: {self.message}" if where else self.message

    def at(self, *, client: str | None = None, layer: str | None = None) -> FlexLoRAError:
        """This error with the client or layer filled in where it was not known at the point of failure."""
        self.client = self.client if self.client is not None else client
        self.layer = self.layer if self.layer is not None else layer
        self.args = (str(self),)
        return self


class AdapterError(FlexLoRAError, ValueError):
    """An adapter that cannot be read: a missing or misshapen tensor, NaN or Inf, a config that contradicts itself."""

    code = "adapter"


class UnsupportedAdapterError(AdapterError):
    """An adapter whose ΔW is not s·B·A (PiSSA, DoRA, …): adding it up would be silently wrong."""

    code = "unsupported"


class IncompatibleAdapterError(AdapterError):
    """An adapter that is fine alone but does not fit the round: other base model, other layer shapes."""

    code = "incompatible"


class UnreadableError(AdapterError):
    """A file that was fine when it was opened and cannot be read any more, or is another one now: no fault of values
    or shapes.
    """


class RefusedError(AdapterError):
    """An upload that a ``RoundPolicy`` does not admit.

    Attributes:
        code: one of ``gate.Reason``. value: what was found, as text of at most 100 characters. remedy: what to do.
    """

    def __init__(
        self,
        what: str,
        *,
        code: str = "adapter",
        client: str | None = None,
        layer: str | None = None,
        value: object = "",
        remedy: str = "have it sent again",
    ) -> None:
        self.code, self.value, self.remedy = str(code), shown(value), remedy
        super().__init__(f"{what}; {remedy}", client=client, layer=layer)


class WeightError(FlexLoRAError, ValueError):
    """A client weight that is negative, NaN or infinite, or weights that sum to zero."""

    code = "weight"


class EmptyRoundError(FlexLoRAError, ValueError):
    """A round without any accepted client, or whose clients adapt no layer at all."""


class QuorumError(EmptyRoundError):
    """Fewer clients, or less weight, than the server asked for. The round stays as it is: add more and finish again."""

    code = "quorum"


class JournalError(FlexLoRAError, RuntimeError):
    """The folder of a journalled round cannot be written, read or locked. What was acknowledged is not lost by it."""

    code = "journal"


class DamagedRoundError(JournalError):
    """A journalled round that lost something it had acknowledged. ``status()`` lists what, and what to do."""

    code = "damaged"


class RankError(FlexLoRAError, ValueError):
    """A rank below one, or above what this update keeps."""


class OptionError(FlexLoRAError, ValueError):
    """An unknown method, solver, split or other option."""


class DistributedError(FlexLoRAError, RuntimeError):
    """Ranks that do not agree about their round, or one of them that failed, died or hangs. No rank has a result."""

    code = "distributed"


class ProtocolError(FlexLoRAError, ValueError):
    """A plan, message or sum of secure aggregation that is malformed, or comes out of turn."""

    code = "protocol"


class PrivacyError(FlexLoRAError, ValueError):
    """A round that would exceed its privacy budget, a ledger that cannot be believed, or a library that is missing."""

    code = "privacy"


class ResultsError(FlexLoRAError, ValueError):
    """A folder that is no simulation's, or one whose files are damaged or do not belong together."""

    code = "results"


class DataError(FlexLoRAError, ValueError):
    """A task's data that is not there or not as published: ``str()`` names file, line or entry, value and remedy."""

    code = "data"


class SimulationError(FlexLoRAError, RuntimeError):
    """A simulated run that cannot go on: a worker died, or its folder is in use or another experiment's."""

    code = "simulation"


class BackendError(FlexLoRAError, RuntimeError):
    """A backend or device that was asked for by name and cannot run here."""


def shown(value: object, longest: int = 100) -> str:
    """What a stranger sent, fit to be quoted: printable, on one line, cut.

    >>> shown("q_proj"), shown("a" * 50, longest=9)
    ("'q_proj'", "'aaaaaaa…")
    """
    try:
        text = repr(value[: longest + 1] if isinstance(value, str | bytes) else value)
    except ValueError:  # whole numbers of thousands of digits have no text
        text = f"<a {type(value).__name__} too long to quote>"
    return text if len(text) <= longest else text[: longest - 1] + "…"


def sentence(error: object, longest: int = 300) -> str:
    """An error's text that may quote a stranger's, fit to be passed on: printable, on one line, cut.

    >>> sentence(ValueError("use_\\ud800 is\\n wrong"))
    'use_\\\\ud800 is wrong'
    """
    text = " ".join(str(error)[: 4 * longest].split())
    text = "".join(x if x.isprintable() else repr(x)[1:-1] for x in text)
    return text if len(text) <= longest else text[: longest - 1] + "…"
