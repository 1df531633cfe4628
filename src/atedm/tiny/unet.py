"""The shipped model's U-Net and noise schedule: SDXL's topology, small."""

from __future__ import annotations

from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

from atedm.tiny.text import WIDTH


def build_unet() -> UNet2DConditionModel:
    """Build the untrained U-Net, 9.6 M parameters: A3 and A4 for SDXL's A2 and A10.

    At 256 px the levels have 4096, 1024 and 256 tokens. As in SDXL the first level has no attention, the second has
    blocks of a few layers, the third and the middle deep ones, with linear projections and size conditioning
    (``text_time``).
    """
    return UNet2DConditionModel(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 80, 96),
        transformer_layers_per_block=(1, 3, 4),
        attention_head_dim=(1, 2, 3),
        norm_num_groups=16,
        cross_attention_dim=2 * WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + WIDTH,
    )


def build_scheduler() -> EulerDiscreteScheduler:
    """Build the sampler: v-prediction with zero terminal SNR, so that plain backgrounds keep their colour."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
