"""What suits a model by its name."""

import pytest

from atedm.method.presets import DEFAULT
from atedm.suits import draws_in_few_steps, suits
from atedm.tiny import SHIPPED
from atedm.tiny.scenes import BACKGROUNDS


@pytest.mark.parametrize(
    ("model", "few"),
    [
        ("stabilityai/sdxl-turbo", True),
        ("/models/sdxl-turbo/unet", True),
        ("/cache/models--stabilityai--sdxl-turbo/snapshots/f4b0486b/unet", True),
        ("/cache/models--stabilityai--sdxl-turbo/snapshots/f4b0486b", True),
        ("ByteDance/Hyper-SD", True),
        ("Hyper-SDXL-8steps", True),
        ("SDXL_tcd", True),
        ("LCMScheduler", True),
        ("DreamShaperXL_Turbo", True),
        ("someone/HyperRealism-XL", False),
        ("turbo/stable-diffusion-xl", False),
        ("/turbo/sdxl/unet", False),
        ("EulerDiscreteScheduler", False),
        ("", False),
    ],
)
def test_models_for_few_steps_are_known_by_their_own_name(model: str, few: bool) -> None:
    assert draws_in_few_steps(model) == few
    assert (suits(model).steps, suits(model).guidance) == ((4, 0.0) if few else (50, 7.0))


def test_the_method_is_one_for_all_and_the_shipped_models_know_their_scenes() -> None:
    assert {suits(model).method for model in ("tiny", "stabilityai/sdxl-turbo", "any")} == {DEFAULT}
    assert (suits("tiny").steps, suits("tiny").guidance) == (20, 3.0)
    assert (suits("tiny-turbo").steps, suits("tiny-turbo").guidance) == (4, 0.0)
    for prompts in (suits(name).prompts for name in SHIPPED):
        assert all(any(said in prompt for said in BACKGROUNDS.values()) for prompt in prompts)
