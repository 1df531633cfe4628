"""Numbers: 16-bit floats at 2048 px, large logits, ties, flat maps and images, one token kept, one thread or two."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import atedm
from atedm.config import PRESETS, PruningConfig
from atedm.map_modes import Scores, scores_by_flash, scores_in_blocks, scores_of_rows
from atedm.matching import attention_source, match_by_features
from atedm.pruning import keep_most_important
from atedm.ranking import gwpr, rank_by_attention
from models import LATE, distance, inputs, run, sdxl_unet, small_unet

HALVES = [torch.float16, torch.bfloat16]
MODES = ("full", "blocked", "flash", "sampled")


def scores(mode: str, q: Tensor, k: Tensor, scale: float) -> Scores:
    if mode == "full":
        ranked = rank_by_attention(q, k, scale)
        return Scores(ranked.importance, partial(attention_source, ranked.attention_map))
    if mode == "sampled":
        return scores_of_rows(q, k, scale, torch.arange(0, q.shape[2], 7))
    return {"blocked": scores_in_blocks, "flash": scores_by_flash}[mode](q, k, scale)


# --- 2048 px ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
def test_the_ranking_of_16384_tokens_neither_overflows_nor_underflows(dtype: torch.dtype) -> None:
    tokens, scale = 16_384, 0.25
    generator = torch.Generator().manual_seed(0)
    q, k = (3 * torch.randn(1, 1, tokens, 8, generator=generator) for _ in "qk")
    q, k = q.to(dtype), k.to(dtype)
    importance = scores_in_blocks(q, k, scale, iterations=1).importance
    assert importance.dtype == torch.float32
    assert torch.isfinite(importance).all()
    assert (importance > 0).all()
    # Some rows at a time, for the same rounded q and k, the products not rounded and the sums in float64.
    s = torch.full((tokens,), 1 / tokens, dtype=torch.float64)
    received = torch.zeros_like(s)
    for rows in torch.arange(tokens).split(2048):
        a = torch.softmax(scale * q[0, 0, rows].float() @ k[0, 0].float().T, dim=-1)
        received += (s[rows].float() @ a).double()
    s = received / received.sum()
    relative = (importance[0] - s).abs() / s
    # Logits of up to 40 are rounded to within 2^-6 in float16 and 2^-3 in bfloat16; over the rows that averages out.
    assert relative.median() < (2e-3 if dtype == torch.float16 else 3e-2)
    kept = keep_most_important(importance, tokens // 3)[0]
    best = keep_most_important(s[None].float(), tokens // 3)[0]
    assert len(set(kept.tolist()) & set(best.tolist())) > 0.98 * len(best)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("by", ["euclidean", "cosine"])
def test_matches_of_large_features_are_those_of_float32(dtype: torch.dtype, by: str) -> None:
    """Squares of features as large as a U-Net's leave the range of float16 when summed."""
    generator = torch.Generator().manual_seed(0)
    tokens = (300 * torch.randn(1, 256, 320, generator=generator)).to(dtype)
    keep = torch.arange(0, 256, 3)[None]
    found, exact = match_by_features(tokens, keep, by), match_by_features(tokens.double(), keep, by)
    assert torch.isfinite(found.similarity).all()
    agreeing = (found.source == exact.source).double().mean()
    assert agreeing > (0.8 if dtype == torch.bfloat16 and by == "euclidean" else 0.999)


# --- Logits that are large --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1.0, 40.0, 400.0])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_logits_beyond_a_type_give_an_order_all_the_same(mode: str, size: float, dtype: torch.dtype) -> None:
    if mode == "flash" and dtype == torch.float16 and size > 1:
        pytest.skip("its biases are kept in float16; map_mode_for never picks it on its own")
    generator = torch.Generator().manual_seed(0)
    q, k = ((size * torch.randn(2, 2, 40, 16, generator=generator)).to(dtype) for _ in "qk")
    found = scores(mode, q, k, 0.25)
    assert torch.isfinite(found.importance).all()
    assert (found.importance >= 0).all()
    keep = keep_most_important(found.importance, 13)
    source = found.source(keep)
    assert ((source >= 0) & (source < 13)).all()


# --- Ties and flat things ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_flat_map_ranks_all_alike_and_the_first_are_kept(mode: str) -> None:
    q = k = torch.zeros(3, 2, 49, 8)
    found = scores(mode, q, k, 0.3)
    torch.testing.assert_close(found.importance, torch.full((3, 49), 1 / 49))
    if mode in ("full", "blocked"):
        assert torch.equal(keep_most_important(found.importance, 5), torch.arange(5).expand(3, -1))
        assert torch.equal(found.source(torch.tensor([[0, 5, 9]] * 3))[:, 10:], torch.zeros(3, 39, dtype=torch.int64))
    assert torch.equal(gwpr(torch.full((1, 49, 49), 1 / 49)).argsort(stable=True), torch.arange(49)[None])


def test_ties_are_broken_by_place_whatever_the_number() -> None:
    for tokens in (2, 31, 256, 4096, 16_384):
        importance = torch.arange(tokens).remainder(3).float()[None]
        count = tokens // 2
        kept = keep_most_important(importance, count)[0]
        expected = sorted(range(tokens), key=lambda place: (-(place % 3), place))[:count]
        assert kept.tolist() == sorted(expected)


@pytest.mark.parametrize("name", PRESETS)
def test_an_image_that_is_equal_everywhere_is_pruned(name: str) -> None:
    unet = sdxl_unet()
    call = inputs(unet) | {"sample": torch.zeros(2, 4, 16, 16)}
    with atedm.pruned(unet, name):
        first, again = (run(unet, LATE, **call) for _ in range(2))
    assert torch.isfinite(first).all()
    assert torch.equal(first, again)


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("left", ["one", "all but one"])
@pytest.mark.parametrize("base", [PruningConfig(), PruningConfig(map_mode="blocked"), PRESETS["matched"]])
def test_one_token_kept_or_dropped(base: PruningConfig, left: str, batch: int) -> None:
    unet = small_unet()
    tokens = 64
    rate = (tokens - 1) / tokens if left == "one" else 1 / tokens
    config = base.replace(pruning_rate=rate, schedule="constant", level_factors=(), own_update_share=0.0)
    seen: list[atedm.BlockObservation] = []
    with atedm.pruned(unet, config), atedm.observed(unet, seen.append):
        out = run(unet, LATE, batch=batch)
    counts = {one.keep.shape[1] for one in seen}
    assert counts == ({1} if left == "one" else {tokens - 1})
    assert torch.isfinite(out).all()
    if batch == 16:
        with atedm.pruned(unet, config):
            call = inputs(unet, batch=16)
            alone = run(unet, LATE, **{
                name: value[5:6] if isinstance(value, Tensor) else {key: part[5:6] for key, part in value.items()}
                for name, value in call.items()
            })  # fmt: skip
        assert distance(out[5:6], alone) < 1e-3


# --- Threads ----------------------------------------------------------------------------------------------------------

DRAW = """
import sys, torch
torch.set_num_threads(int(sys.argv[1]))
import atedm
from atedm.pipelines import load_pipeline
pipe = load_pipeline("tiny", device="cpu")
for preset in (None, "paper", "matched"):
    if preset: atedm.apply(pipe, preset)
    image = pipe("a red circle above a blue square", num_inference_steps=2, guidance_scale=3.0, output_type="pt",
                 generator=torch.Generator().manual_seed(0)).images
    if preset: atedm.remove(pipe)
    torch.save(image, f"{sys.argv[2]}/{preset}.pt")
"""


def drawn(threads: int, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, "-c", DRAW, str(threads), str(folder)], env=environment, check=True)
    return {file.stem: torch.load(file) for file in sorted(folder.iterdir())}


def test_one_thread_and_two_draw_the_same_to_the_tolerance_of_the_docs(tmp_path: Path) -> None:
    one, two = drawn(1, tmp_path / "one"), drawn(2, tmp_path / "two")
    for name, image in one.items():
        apart = distance(image, two[name])
        print(f"{name}: {apart:.1e} between one thread and two", end="; ")
        assert apart < 2e-3


@pytest.mark.parametrize("config", [PRESETS["matched"], PRESETS["paper"]], ids=["matched", "paper"])
def test_torchs_default_dtype_does_not_matter(config: PruningConfig) -> None:
    unet = sdxl_unet()
    call = inputs(unet) | {"timestep": LATE}
    with atedm.pruned(unet, config), torch.no_grad():
        expected = unet(**call).sample
        torch.set_default_dtype(torch.bfloat16)
        try:
            assert torch.equal(unet(**call).sample, expected)
        finally:
            torch.set_default_dtype(torch.float32)
