"""Charts show what they are given."""

from atedm.lab.evaluation.charts import cost_chart, curve_chart, rows_chart
from atedm.lab.scores.intervals import Interval


def test_a_chart_joins_methods_of_one_kind() -> None:
    def points(kinds: list[str]) -> dict[str, tuple[str, float, Interval]]:
        return {
            str(index): (kind, 0.1 * index, Interval(index, index - 1, index + 1)) for index, kind in enumerate(kinds)
        }

    alone, joined = cost_chart(points(["a", "b", "c"]), "distance"), cost_chart(points(["a", "a", "a"]), "distance")
    assert alone.size == joined.size
    assert alone.tobytes() != joined.tobytes()


def test_a_chart_of_rows_grows_with_them_and_shows_what_each_has() -> None:
    one: dict[str, dict[str, Interval | None]] = {"dense": {"accuracy": Interval(0.9, 0.8, 1.0), "distance": None}}
    two = one | {"paper": {"accuracy": Interval(0.1, 0.0, 0.2), "distance": Interval(20, 19, 21)}}
    assert rows_chart(two).size > rows_chart(one).size
    other = two | {"paper": two["paper"] | {"distance": Interval(30, 29, 31)}}
    assert rows_chart(two).tobytes() != rows_chart(other).tobytes()


def test_a_curve_of_one_scale_or_of_many_is_drawn() -> None:
    near = [(1.0 + i, 0.30 + 0.001 * i, 10.0 + i) for i in range(4)]
    one, many = curve_chart({"a": near[:1]}), curve_chart({"a": near, "b": [*near, (15.0, 0.1, 300.0)]})
    assert one.size == many.size
    assert one.tobytes() != many.tobytes()
