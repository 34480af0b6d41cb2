"""Which arm of an experiment a user is in: a salted hash, and nothing else.

    arm = Experiment.of(settings.experiment).arm("user-17")

SHA-256 over experiment, salt and user gives a point in [0, 1), and the shares cut [0, 1) into arms
(Kohavi, Tang and Xu, Trustworthy Online Controlled Experiments, 2020, ch. 4). So a user has the
same arm on every replica and after a restart, with nothing to store; and because the experiment's
name is in the hash, the arms of two experiments are independent.
"""

import hashlib
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal

from acebert.config import ExperimentSettings
from acebert.workdir import digest_of

Design = Literal["split", "interleave"]


@dataclass(frozen=True)
class Experiment:
    """What is compared, and how users are dealt.

    Attributes:
        name: of the experiment; two names deal users independently.
        arms: names, the control first.
        shares: of the users by arm, positive, summing to 1.
        salt: another one deals the users of the same experiment anew.
        design: `split` shows a user one arm, `interleave` all users a draft of both arms.
    """

    name: str
    arms: tuple[str, ...]
    shares: tuple[float, ...]
    salt: str
    design: Design

    @classmethod
    def of(cls, settings: ExperimentSettings) -> "Experiment | None":
        """The experiment of these settings; None: they name none."""
        if settings.name is None:
            return None
        shares = settings.shares or (1.0,) * len(settings.arms)
        equal = tuple(share / sum(shares) for share in shares)
        return cls(settings.name, settings.arms, equal, settings.salt, settings.design)

    @property
    def control(self) -> str:
        return self.arms[0]

    @cached_property
    def dealing(self) -> str:
        """Of how users are dealt, 16 hex digits: another one where salt, arms, shares or design
        differ."""
        return digest_of([self.salt, self.arms, self.shares, self.design])

    def seed(self, *parts: str) -> str:
        """Of whatever is drawn for `parts`: another one in every experiment and for every salt."""
        return "\0".join((self.name, self.salt, *parts))

    def arm(self, user: str) -> str:
        """The arm of `user`, any text but an empty one."""
        edges = list(accumulate(self.shares))[:-1]
        point = (self._hash("arm", user) >> 11) / 2**53  # 53 bits: a float holds them
        return self.arms[bisect_right(edges, point)]

    def sides(self, search_id: str) -> tuple[str, str]:
        """The arms that this search shows on the left and on the right to whom judges them blind:
        the control and one of the treatments."""
        drawn = self._hash("sides", search_id)
        treatment = self.arms[1 + (drawn >> 1) % (len(self.arms) - 1)]
        return (self.control, treatment) if drawn & 1 else (treatment, self.control)

    def _hash(self, *parts: str) -> int:
        """64 bits."""
        digest = hashlib.sha256(self.seed(*parts).encode(errors="surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big")
