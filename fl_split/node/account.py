"""What a node's adapter may have told of one training example by now: charged before it is spent, kept on its disk.

Data path: steps of a round -> **account, written and synced** -> training. A round that a kill ends is charged again
when it is done again; nothing is ever forgotten, whatever happens to the round's own state.

Epsilon is that of the Poisson-sampled Gaussian mechanism, by privacy loss distributions (dp-accounting), where one
example is added, removed or left empty; how many examples a node has is taken as known. Runs of other names on the same
rows have accounts of their own: their epsilons add up.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from fl_split.config import UNCOVERED, Dp
from fl_split.errors import ConfigError, NodeStateError
from fl_split.files import write_atomic

NAME = "dp-account.json"


@dataclass(frozen=True)
class Charge:
    """Steps of one round, and what the account came to with them."""

    round: int
    steps: int
    sampling: float  # probability with which an example is in a step
    noise: float  # standard deviation, in units of what one example can add
    delta: float
    epsilon: float  # of all charges up to this one

    def record(self) -> dict[str, float]:
        """As metrics."""
        return {"record-epsilon": self.epsilon, "record-delta": self.delta}

    def __str__(self) -> str:
        return f"epsilon {self.epsilon:.2f} at delta {self.delta:g} for one training example; {UNCOVERED}"


def epsilon_of(steps: Iterable[tuple[float, float, int]], delta: float) -> float:
    """Epsilon of steps, each with its sampling probability, noise multiplier and number.

    Raises:
        ConfigError: dp-accounting is not installed.
    """
    try:
        from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
        from dp_accounting.pld import PLDAccountant
    except ImportError as error:
        raise ConfigError(
            f"dp.record-noise-multiplier needs a package that is not installed ({error.name}): pip install "
            "'fl-split[dp]'"
        ) from error
    counts: Counter[tuple[float, float]] = Counter()
    for sampling, noise, count in steps:
        counts[sampling, noise] += count
    accountant = PLDAccountant()
    for (sampling, noise), count in counts.items():
        if count:
            accountant.compose(PoissonSampledDpEvent(sampling, GaussianDpEvent(noise)), count)
    return float(accountant.get_epsilon(delta)) if counts.total() else 0.0


class Account:
    """The charges of all rounds of a run, in a file in the node's folder."""

    def __init__(self, folder: Path) -> None:
        """Read it, or begin one.

        Raises:
            NodeStateError: It cannot be read.
        """
        self._file = folder / NAME
        self.charges = read_charges(folder)

    def check(self, dp: Dp, last_round: int) -> None:
        """Refuse rounds with and without noise in one run: its adapter would be covered in part only.

        Args:
            dp: Of this round.
            last_round: The newest one that the node has finished; 0: none.

        Raises:
            NodeStateError: Earlier rounds were trained otherwise, or their account is gone.
            ConfigError: See `epsilon_of`.
        """
        if dp.is_record:
            epsilon_of([], dp.record_delta)  # now rather than after the first scores
        charged = {charge.round for charge in self.charges}
        if dp.is_record and last_round and last_round not in charged:
            raise NodeStateError(
                f"round {last_round} of this node was trained without dp.record-noise-multiplier, or {self._file.name} "
                "is gone: no epsilon would be true; start a run with another run.name"
            )
        if charged and not dp.is_record:
            raise NodeStateError(
                "earlier rounds of this node were trained with dp.record-noise-multiplier, and this one would not be: "
                "set it again, or start a run with another run.name"
            )

    def charge(self, dp: Dp, number: int, steps: int, sampling: float) -> Charge:
        """Charge as many of a round's steps as `dp.record-max-epsilon` allows, before any of them is taken.

        Args:
            dp: Of the round.
            number: Of the round.
            steps: That the round would have.
            sampling: Probability with which an example is in a step.
        """
        spent = [(c.sampling, c.noise, c.steps) for c in self.charges]
        noise, limit = dp.record_noise_multiplier, dp.record_max_epsilon

        def after(count: int) -> float:
            return epsilon_of([*spent, (sampling, noise, count)], dp.record_delta)

        allowed, epsilon = steps, after(steps)
        if limit and epsilon > limit:
            allowed, beyond = 0, steps
            while beyond - allowed > 1:
                middle = (allowed + beyond) // 2
                allowed, beyond = (middle, beyond) if after(middle) <= limit else (allowed, middle)
            epsilon = after(allowed)
        charge = Charge(number, allowed, sampling, noise, dp.record_delta, epsilon)
        charges = [*self.charges, charge]
        write_atomic(self._file, json.dumps([asdict(each) for each in charges], indent=1) + "\n")
        self.charges = charges
        return charge


def read_charges(folder: Path) -> list[Charge]:
    """The account in a node's folder; empty where there is none.

    Raises:
        NodeStateError: It cannot be read: an account that is lost must not look like one that is empty.
    """
    file = folder / NAME
    if not file.exists():
        return []
    try:
        return [Charge(**each) for each in json.loads(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise NodeStateError(
            f"{NAME} cannot be read ({type(error).__name__}), so what was spent is unknown: put it back from a backup, "
            "or start a run with another run.name"
        ) from None
