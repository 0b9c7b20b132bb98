"""The weight log as a run follows it: rank 0 asks the controller, all ranks learn its answer.

Every method that may learn an entry is collective.
"""

from shared.config.run import Config
from shared.errors import TutelageError
from shared.mixture.decisions import known_through
from shared.mixture.weight_log import ControllerClient, WeightEntry, WeightLog
from student_trainer.ranks import Ranks


class FollowedLog:
    """The controller's weight log as far as this run has read it."""

    def __init__(self, config: Config, ranks: Ranks, controller: ControllerClient | None) -> None:
        self._config, self._ranks, self._controller = config, ranks, controller
        self.read = WeightLog(tuple(config.domains), ())

    @property
    def num_entries(self) -> int:
        """Entries read."""
        return len(self.read.entries)

    def ruling(self, step: int) -> WeightEntry:
        """The entry in force at a step that is settled."""
        return self.read.ruling(step)

    def settle(self, step: int, *, ahead: int, wait: bool = False) -> int:
        """Wait for the weights of step `step`; returns the last step that can be drawn with what
        is known then, at most `ahead` steps later.

        Entries for the steps ahead are looked for and not waited for, unless `wait` says so.
        """
        self._learn(through=step + ahead * wait)
        while self._settled() < min(step + ahead, self._end() - 1) and self._learn_entry(
            wait=False
        ):
            pass
        return min(step + ahead, self._end() - 1, self._settled())

    def ruled_beyond(self, step: int, *, ahead: int) -> int:
        """The last step, at most `ahead` later, whose weights are settled now, be it beyond the end
        of this run: one that is to take more steps later would draw it now."""
        return step if self._stops else min(step + ahead, self._settled())

    def is_over(self, step: int) -> bool:
        """Whether training ends after `step` updates. All ranks ask together.

        Where a decision may say so, its entry is waited for: the next block would need it too.
        """
        if 0 < step < self._config.steps and self._config.stop_ratio is not None:
            # Without a lag the entry of a decision at this very step may not be asked for yet.
            self._learn(through=step if self._config.mixture.lag_steps else step - 1)
        return step >= self._end()

    def learn_decisions(self, *, before: int) -> None:
        """Read every entry that is decided from a report of a step before this one.

        A report lost with its controller is handed over again only by a run that has not passed
        its step, so a checkpoint waits for them.
        """
        due = sum(step < before for step in self._config.decision_steps)
        while self.num_entries < due and not self._stops:
            self._learn_entry()

    def _settled(self) -> int:
        """The last step that can be drawn with the entries read so far."""
        if not self.num_entries:
            return -1
        decided_at = self._config.decision_steps[self.num_entries - 1]
        return known_through(self._config, decided_at)

    @property
    def _stops(self) -> bool:
        """Whether the last entry read ends training, so that no other follows."""
        return bool(self.num_entries) and self.read.entries[-1].stop

    def _end(self) -> int:
        """Steps of the run, as far as the entries read say."""
        return self.read.end(self._config.steps)

    def _learn(self, *, through: int) -> None:
        """Read entries until step `through`, or the last one, is settled."""
        while self._settled() < min(through, self._end() - 1):
            self._learn_entry()

    def _learn_entry(self, *, wait: bool = True) -> bool:
        """Read the next entry, for which rank 0 asks; whether there was one."""
        index, entry, error = self.num_entries, None, None
        if self._ranks.leads:
            assert self._controller is not None, "rank 0 has a controller"
            try:
                entry = self._controller.entry(index) if wait else self._controller.peek(index)
            except TutelageError as failure:
                error = failure
        entry, error = self._ranks.from_leader((entry, error))  # type: ignore[misc]
        if error is not None:
            raise error
        assert entry is not None or not wait, "the controller answers or raises"
        if entry is not None:
            self.read = self.read.appended(entry)
        return entry is not None
