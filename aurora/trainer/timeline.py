"""Where this process is in its run: named places, told to whoever subscribes.

The watch reads the last place to say where a rank stands still. The step log takes its times at the marks of a step.
Benchmarks subscribe for finer times, and tests to make a run fail at a place. A mark costs about a microsecond.
"""

from collections.abc import Callable
from typing import NamedTuple

Subscriber = Callable[[str, int], None]  # called with the name of the place and the step, from 0


class Place(NamedTuple):
    """The last mark: how many marks were passed, its name and step."""

    passed: int = 0
    name: str = "start"
    step: int = 0


class Timeline:
    def __init__(self) -> None:
        self.place = Place()
        self.subscribers: list[Subscriber] = []

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Have every later mark told to the subscriber; returns what ends that."""
        self.subscribers.append(subscriber)
        return lambda: self.subscribers.remove(subscriber)

    def mark(self, name: str, step: int | None = None) -> None:
        """This process is at the named place of the step, by default the step of the last mark."""
        step = self.place.step if step is None else step
        self.place = Place(self.place.passed + 1, name, step)
        for subscriber in self.subscribers:
            subscriber(name, step)


timeline = Timeline()  # of this process
