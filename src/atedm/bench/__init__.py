"""Methods timed in turns, in one run: the only times that compare."""

from atedm.bench.report import BenchReport, Timed
from atedm.bench.run import bench

__all__ = ["BenchReport", "Timed", "bench"]
