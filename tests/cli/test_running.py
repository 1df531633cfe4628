"""How commands tell of their progress."""

from atedm.cli.running import _lines


def test_lines_tell_how_long_the_rest_will_take() -> None:
    said: list[str] = []
    clock = [0.0]
    tell = _lines(said.append, every=30, now=lambda: clock[0])
    tell("dense", 0, 100)
    clock[0] = 20.0
    tell("dense", 10, 100)
    clock[0] = 40.0
    tell("dense", 20, 100)  # too soon for a second line
    clock[0] = 100.0
    tell("matched", 50, 100)
    clock[0] = 110.0
    tell("accuracy of matched", 0, 4)  # other work, of which nothing is known
    clock[0] = 210.0
    tell("accuracy of matched", 1, 4)
    assert said == [
        "dense: 10 of 100, about 3 min left",
        "matched: 50 of 100, about 2 min left",
        "accuracy of matched: 1 of 4, about 5 min left",
    ]
