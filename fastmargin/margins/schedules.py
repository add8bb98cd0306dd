"""Schedules of a margin's attribute by the number n of optimizer steps. Call `step()` once after each step.

    LambdaSchedule   lam = max(floor, base (1 + gamma n)^-power)     of SphereFace's public code (Liu 2017)
    MarginRamp       start + (full - start) min(1, n / steps)        of AM-Softmax's public configuration

A schedule writes its attribute when it is constructed, at each step and when its state is loaded, so a resumed run
continues where it was. Construct it on a new margin: the value of the attribute then is taken as the full one.
"""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from fastmargin.margins.base import Margin, Value
from fastmargin.require import require


class Schedule(ABC):
    """Counts the steps and writes `value()` into one attribute of a margin."""

    def __init__(self, margin: Margin, attribute: str) -> None:
        self.margin, self.attribute, self.count = margin, attribute, 0
        self._write()

    @abstractmethod
    def value(self) -> Value:
        """The attribute after `count` steps.

        Returns:
            A float, or [C] if it is per class.
        """

    def _write(self) -> None:
        value = self.value()
        if isinstance(value, Tensor):
            getattr(self.margin, self.attribute).copy_(value)  # the margin may have moved to another device
        else:
            setattr(self.margin, self.attribute, value)

    def step(self) -> None:
        """Counts an optimizer step and writes the attribute: call it once after each."""
        self.count += 1
        self._write()

    def state_dict(self) -> dict[str, int]:
        """What a run resumes from.

        Returns:
            {"count": the number of steps}.
        """
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues at the step of a saved schedule, and writes the attribute.

        Args:
            state: of `state_dict()`.
        """
        self.count = int(state["count"])
        self._write()


class LambdaSchedule(Schedule):
    """Lowers SphereFace's lam: max(floor, base (1 + gamma n)^-power) after n steps (Liu 2017, public code).

    Other public settings of (base, gamma): (1500, 0.1), and (1000, 1e-4) with power 2.

    Args:
        margin: the one whose `lam` it writes.
        base, gamma, power, floor: of the formula, each 0 or more.

    Raises:
        ValueError: a negative number.
    """

    def __init__(
        self, margin: Margin, base: float = 1e3, gamma: float = 0.12, power: float = 1.0, floor: float = 5.0
    ) -> None:
        for name, number in {"base": base, "gamma": gamma, "power": power, "floor": floor}.items():
            require(number >= 0, name, number, "a number >= 0")
        self.base, self.gamma, self.power, self.floor = base, gamma, power, floor
        super().__init__(margin, "lam")

    def value(self) -> float:
        """lam after `count` steps.

        Returns:
            A float.
        """
        return max(self.floor, self.base * (1 + self.gamma * self.count) ** -self.power)


class MarginRamp(Schedule):
    """Moves an attribute of a margin from `start` to its present value, in equal steps.

    Args:
        margin: a new one: its present value is taken as the full one.
        attribute: "m", "m2", ...: a number, or a buffer [C].
        steps: until the full value is reached, 1 or more.
        start: the first value, a number also for a buffer.

    Raises:
        ValueError: an attribute that is not a number or buffer of the margin; steps < 1.
    """

    def __init__(self, margin: Margin, attribute: str, steps: int, start: float = 0.0) -> None:
        full: Any = getattr(margin, attribute, None)
        fixed = type(full) in (int, float, Tensor)  # neither a bool nor a Parameter
        require(fixed, "attribute", attribute, f"a number of {type(margin).__name__} that is not learned")
        require(steps >= 1, "steps", steps, "at least 1")
        self.full = full.clone() if isinstance(full, Tensor) else full
        self.start, self.steps = start, steps
        super().__init__(margin, attribute)

    def value(self) -> Value:
        """The attribute after `count` steps.

        Returns:
            A float, or [C] if it is per class.
        """
        share = min(1.0, self.count / self.steps)
        return (1 - share) * self.start + share * self.full
