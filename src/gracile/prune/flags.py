"""How masks live under `compat: strict`: by one set of flags for all of them, as in Distiller.

There the first epoch of a policy writes its flags over those of every mask, and the last epoch of
one with `keep_mask` clears them, so the masks of a policy live by what another one said last.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from gracile.core.schedule import Calendar, Instant, Timetable, When

CLEARED = ("frozen", "run")  # no flags: masks are multiplied into the weights


@dataclass(frozen=True)
class Policy:
    """What one policy says of masks, and when; entries that say the same are one policy.

    Attributes:
        begin: its first firing.
        end: the moment after its last epoch.
        epochs: those in which it fires.
        masked, lifetime: see `MaskOptions`.
    """

    begin: Instant
    end: Instant
    epochs: frozenset[int]
    masked: str
    lifetime: str

    @classmethod
    def of(
        cls, when: When, table: Timetable, calendar: Calendar, masked: str, lifetime: str
    ) -> "Policy":
        """From an entry that fires in training."""
        epochs = frozenset(e for e, _ in table.instants)
        end = (max(epochs) + 1, 0)
        if when.stop is not None:
            end = calendar.instant(calendar.minibatch(when.stop))
        return cls(table.instants[0], end, epochs, masked, lifetime)


class Flags:
    """The flags in force, moment by moment.

    Args:
        policies: in recipe order.
    """

    def __init__(self, policies: Iterable[Policy]):
        self.policies = tuple(dict.fromkeys(policies))
        said = [(p.begin, i, (p.masked, p.lifetime)) for i, p in enumerate(self.policies)]
        kept = [
            (p.end, -1, CLEARED)  # an epoch ends before the next one begins
            for p in self.policies
            if p.masked != "frozen" and p.lifetime == "run"
        ]
        self._said = sorted(said + kept)

    def at(self, now: Instant) -> str:
        """What becomes of masks and the weights under them.

        zeroed: these get their gradient, and are zero again after each mini-batch; lifted: masks
        have no effect; frozen, trained, reset: see `MaskOptions`. Where two policies act in one
        epoch the second copy of the weights is already masked, so that `trained` becomes `reset`.
        """
        flags = [style for moment, _, style in self._said if moment <= now]
        if not flags or flags[-1] == CLEARED:
            return "zeroed"
        if not any(p.begin <= now < p.end for p in self.policies):
            return "lifted"
        masked = flags[-1][0]
        both = sum(now[0] in p.epochs for p in self.policies) > 1
        return "reset" if masked == "trained" and both else masked
