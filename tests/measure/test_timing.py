"""Callables take turns, and ratios are taken within a turn."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mumoe_tensor.measure import timing


class FakeTime:
    """A clock, and callables that take exactly so many seconds on it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def taking(self, name: str, *seconds: float) -> Callable[[], None]:
        """A callable of this name; the last duration is that of all further calls."""
        left = list(seconds)

        def call() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if left[1:] else left[0]

        return call


def test_callables_take_turns() -> None:
    clock = FakeTime()
    callables = {name: clock.taking(name, seconds) for name, seconds in (("a", 1), ("b", 2), ("c", 4))}
    times = timing.compare(callables, "a", rounds=4, turn=1, limit=1e9, clock=clock)
    # One call to warm up and one that is long enough for a turn, then the rounds.
    assert clock.calls[:6] == [*"aabbcc"]
    orders = ["".join(clock.calls[k : k + 3]) for k in range(6, 18, 3)]
    assert {"".join(sorted(order)) for order in orders} == {"abc"} and len(clock.calls) == 18
    assert len({*orders}) > 1  # no callable always follows the same one
    assert times.rounds == 4
    assert times.loops == {"a": 1, "b": 1, "c": 1}


def test_a_turn_on_a_device_ends_with_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    # A call returns after a second and leaves two of work, which the device has done when it is waited for.
    torch = pytest.importorskip("torch")
    clock = FakeTime()
    launch = clock.taking("launch", 1)
    waited: list[int] = []

    def wait() -> None:
        clock.now += 2.0 * (len(clock.calls) - sum(waited))
        waited.append(len(clock.calls) - sum(waited))

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    times = timing.compare({"a": launch}, "a", rounds=4, turn=4, limit=1e9, device="cuda", clock=clock)
    # Three calls to warm up are done before the first turn; a turn has two.
    assert times.seconds == {"a": (3.0,) * 4}
    assert waited == [3, 1, 0, 2, *[0, 2] * 4]


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="device must be one of 'cpu', 'cuda', got 'tpu'"):
        timing.compare({"a": lambda: None}, "a", device="tpu")


def test_known_durations_give_known_ratios() -> None:
    clock = FakeTime()
    callables = {name: clock.taking(name, seconds) for name, seconds in (("b", 6e-6), ("a", 2e-6))}
    times = timing.compare(callables, "a", rounds=5, turn=1e-3, clock=clock)
    assert times.loops == {"a": 512, "b": 256}
    assert times.spread("b") == pytest.approx((6e-6, 6e-6, 6e-6))
    assert times.ratio("b") == pytest.approx((3, 3, 3))
    assert times.excess("b") == pytest.approx((4e-6, 4e-6, 4e-6))
    assert times.ratio("a") == (1, 1, 1)


def test_ratios_are_taken_within_a_round() -> None:
    # The machine is ten times slower in two rounds of five: the ratio does not see it, the medians do.
    clock = FakeTime()
    slow = (1, 10, 1, 10, 1)
    callables = {
        "base": clock.taking("base", 1, 1, *slow),
        "other": clock.taking("other", 1, 1, *(2 * s for s in slow)),
    }
    times = timing.compare(callables, "base", rounds=5, turn=1, limit=1e9, clock=clock)
    assert times.seconds == {"base": slow, "other": tuple(2 * s for s in slow)}
    assert times.ratio("other") == (2, 2, 2)
    assert times.spread("other") == (2, 2, 20)
    assert times.excess("other") == (1, 1, 10)


@pytest.mark.parametrize(("limit", "rounds"), [(0, 3), (9, 5), (1e9, 20)])
def test_no_round_begins_after_the_limit(limit: float, rounds: int) -> None:
    clock = FakeTime()
    times = timing.compare({"a": clock.taking("a", 2)}, "a", rounds=20, turn=1, limit=limit, clock=clock)
    assert times.rounds == rounds


@pytest.mark.parametrize("is_enabled", [True, False])
def test_garbage_collection_is_as_before(is_enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: list[str] = []
    monkeypatch.setattr(timing.gc, "isenabled", lambda: is_enabled)
    for name in ("enable", "disable"):
        monkeypatch.setattr(timing.gc, name, lambda name=name: changes.append(name))
    timing.compare({"a": lambda: None}, "a", rounds=3, turn=1e-6)
    assert changes == ["disable", "enable"][: 1 + is_enabled]


def test_an_unknown_baseline_is_refused() -> None:
    with pytest.raises(ValueError, match="baseline must be one of 'a', got 'b'"):
        timing.compare({"a": lambda: None}, "b")


def test_spread() -> None:
    assert timing.Spread.of([7]) == (7, 7, 7)
    assert timing.Spread.of([5, 1, 4, 2, 3]) == (3, 2, 4)
