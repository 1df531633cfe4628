"""Pruned transformers as people run them: offloaded, cast, quantized, fused, in threads."""

import copy
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn

import atedm
from atedm import Matched
from transformers_of import call_of, image_of, transformer

FLUX, SD3, QWEN = "FluxTransformer2DModel", "SD3Transformer2DModel", "QwenImageTransformer2DModel"
HALF = Matched(rate=0.5)
FAMILY = pytest.mark.parametrize("name", [FLUX, SD3, QWEN])


@FAMILY
@torch.no_grad()
def test_offload_by_accelerate_goes_over_it_and_may_stay_when_it_is_removed(name: str) -> None:
    model, call = transformer(name), call_of(name)
    dense = image_of(model(**call))
    atedm.apply(model, HALF)
    pruned = image_of(model(**call))
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(image_of(model(**call)), pruned)
    atedm.remove(model)
    assert torch.equal(image_of(model(**call)), dense)


@FAMILY
@torch.no_grad()
def test_offload_by_groups_of_blocks(name: str) -> None:
    model, call = transformer(name), call_of(name)
    atedm.apply(model, HALF)
    pruned = image_of(model(**call))
    model.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="block_level",
        num_blocks_per_group=2,
    )  # fmt: skip
    assert torch.equal(image_of(model(**call)), pruned)


@FAMILY
@torch.no_grad()
def test_weights_stored_in_8_bits_and_cast_layer_by_layer(name: str) -> None:
    model, call = transformer(name), call_of(name)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    dense = image_of(model(**call))
    atedm.apply(model, HALF)
    pruned = image_of(model(**call))
    assert pruned.isfinite().all()
    assert not torch.equal(pruned, dense)
    atedm.remove(model)
    assert torch.equal(image_of(model(**call)), dense)


@FAMILY
@torch.no_grad()
def test_quantized_layers_run(name: str) -> None:
    model = torch.ao.quantization.quantize_dynamic(transformer(name), {nn.Linear}, dtype=torch.qint8)
    call = call_of(name)
    dense = image_of(model(**call))
    atedm.apply(model, HALF)
    pruned = image_of(model(**call))
    assert pruned.isfinite().all()
    assert torch.equal(image_of(model(**call)), pruned)
    atedm.remove(model)
    assert torch.equal(image_of(model(**call)), dense)


@torch.no_grad()
def test_fused_projections_give_the_same() -> None:
    model, call = transformer(FLUX), call_of(FLUX)
    atedm.apply(model, HALF)
    pruned = image_of(model(**call))
    model.fuse_qkv_projections()
    torch.testing.assert_close(image_of(model(**call)), pruned, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_batch_is_pruned_image_by_image_where_positions_allow_it() -> None:
    for name, alike in ((SD3, True), ("ZImageTransformer2DModel", True), (FLUX, False)):
        model, call = transformer(name), call_of(name)
        atedm.apply(model, HALF)
        with atedm.recorded(model) as both:
            model(**call)
        keep = both.observations[0].keep
        assert torch.equal(keep[0], keep[1]) != alike, name  # one table of positions takes one set of tokens


@torch.no_grad()
def test_one_thread_at_a_time() -> None:
    model, call = transformer(SD3), call_of(SD3)
    atedm.apply(model, HALF)
    expected = image_of(model(**call))
    entered, leave = threading.Event(), threading.Event()
    drawn: list[Tensor] = []

    def wait(*_: Any) -> None:
        entered.set()
        leave.wait(30)

    hook = model.transformer_blocks[2].register_forward_pre_hook(wait)

    def run() -> None:
        with torch.no_grad():
            drawn.append(image_of(model(**call)))

    thread = threading.Thread(target=run)
    thread.start()
    assert entered.wait(30)
    hook.remove()
    try:
        for act in (lambda: model(**call), lambda: atedm.remove(model)):
            with pytest.raises(RuntimeError, match="in another thread"):
                act()
    finally:
        leave.set()
        thread.join()
    assert torch.equal(drawn[0], expected)
    assert torch.equal(image_of(model(**call)), expected)


@torch.no_grad()
def test_copies_prune_by_themselves() -> None:
    model, call = transformer(QWEN), call_of(QWEN)
    atedm.apply(model, HALF)
    pruned = image_of(model(**call))
    copied = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(image_of(copied(**call)), pruned)
    atedm.remove(model)
    assert atedm.is_applied(copied)
    assert torch.equal(image_of(copied(**call)), pruned)


_IN_ANOTHER_PROCESS = """
import pickle, sys, torch
model, call, expected = pickle.load(open(sys.argv[1], "rb"))
with torch.no_grad():
    found = model(**call)[0]
assert torch.equal(found, expected)
"""


@torch.no_grad()
def test_a_pickled_model_is_opened_in_a_process_that_has_pruned_nothing(tmp_path: Path) -> None:
    model, call = transformer(FLUX), call_of(FLUX)
    atedm.apply(model, HALF)
    file = tmp_path / "model.pickle"
    file.write_bytes(pickle.dumps((model, call, model(**call)[0])))
    subprocess.run([sys.executable, "-c", _IN_ANOTHER_PROCESS, str(file)], check=True, timeout=300)
