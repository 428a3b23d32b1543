"""Lanes race on work that must be done anyway."""

from __future__ import annotations

from ranvier.sim.race import EARLY, TURNS, Race


def run(race: Race, cost: dict[str, float], parts: int, samples: int = 8) -> list[str]:
    """The lanes that took the parts."""
    took = []
    for _ in range(parts):
        took.append(race.next())
        race.add(took[-1], cost[took[-1]] * samples, samples)
    return took


def test_turns_go_round_and_the_quickest_wins() -> None:
    race = Race("abc")
    assert run(race, {"a": 1.2, "b": 1.0, "c": 1.3}, 3 * TURNS) == list("abc") * TURNS
    assert race.winner == "b" and race.next() == "b"


def test_a_clearly_slower_lane_runs_no_more() -> None:
    race = Race("abc")
    run(race, {"a": 1.0, "b": 1.1, "c": 2.0}, 3 * EARLY)
    assert race.winner is None
    assert "c" not in run(race, {"a": 1.0, "b": 1.1}, 2 * (TURNS - EARLY))
    assert race.winner == "a"


def test_all_but_one_clearly_slower_ends_it_early() -> None:
    race = Race("ab")
    run(race, {"a": 2.0, "b": 1.0}, 2 * EARLY)
    assert race.winner == "b"


def test_one_slow_turn_does_not_decide() -> None:
    race = Race("ab")
    race.add("a", 100.0, 8)
    run(race, {"a": 1.0, "b": 1.2}, 2 * TURNS)
    assert race.winner == "a"


def test_small_parts_do_not_count() -> None:
    race = Race("ab")
    race.add("a", 8.0, 8)
    race.add("a", 100.0, 3)
    assert race.seconds["a"] == [1.0]
    race.add("a", 9.0, 20)  # more than twice as many: what a part costs a sample is another thing
    assert race.seconds["a"] == [0.45]


def test_a_race_ends_on_small_parts_as_well() -> None:
    race = Race("ab")
    race.add("a", 8.0, 8)
    took = run(race, {"a": 0.5, "b": 0.9}, 2 * TURNS - 1, samples=3)
    assert race.winner == "b" and took.count("a") == TURNS - 1


def test_a_lane_alone_has_won() -> None:
    assert Race("a").winner == "a"


def test_the_lanes_that_were_close_race_again() -> None:
    race = Race("abc")
    run(race, {"a": 1.0, "b": 1.2, "c": 2.0}, 3 * TURNS)
    assert race.winner == "a"
    again = race.again(2)
    assert run(again, {"a": 1.5, "b": 1.2}, 4) == list("abab")
    assert again.winner == "b"
    alone = Race("a")
    assert alone.again(2).winner == "a"
