"""What `atedm evaluate` takes beyond a bare loop over the pipeline: both in turns over the same prompts, in one run.

python benchmarks/evaluate_overhead.py --captions 500 --steps 20
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from atedm.evaluation.evaluate import evaluate
from atedm.evaluation.images import Drawing
from atedm.evaluation.methods import Dense
from atedm.evaluation.prompts import read_prompts
from atedm.evaluation.scores import Metrics
from atedm.pipelines import load_pipeline, quiet_libraries


def main() -> None:
    """Print seconds and their ratio. Metrics are left out: their models take what they take."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, default=500)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    asked = parser.parse_args()
    quiet_libraries()
    pipe = load_pipeline("tiny", device="cpu", dtype=getattr(torch, asked.dtype))
    prompts = read_prompts("scenes", asked.captions)
    drawing = Drawing(steps=asked.steps, dtype=asked.dtype)
    bare = ours = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(asked.turns):
            start, end = (asked.captions * (turn + i) // asked.turns // 10 * 10 for i in (0, 1))
            began = time.perf_counter()
            for first in range(start, end, drawing.batch):
                pipe(
                    [prompt.text for prompt in prompts[first : first + drawing.batch]],
                    num_inference_steps=asked.steps,
                    guidance_scale=drawing.guidance,
                    generator=[torch.Generator("cpu").manual_seed(i) for i in range(first, first + drawing.batch)],
                )
            between = time.perf_counter()
            evaluate(pipe, {"dense": Dense()}, prompts[:end], drawing, Metrics(()), Path(folder))
            bare, ours = bare + between - began, ours + time.perf_counter() - between
            print(f"{end:4} images: bare {bare:.1f} s, evaluate {ours:.1f} s, ratio {ours / bare:.3f}", flush=True)


if __name__ == "__main__":
    main()
