"""The contract on transformers: what all hosts promise."""

from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import initialize
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from atedm.hosts.diffusers_dit import find_transformer_spans
from atedm.method.contract import Method
from contract import Contract, case_of, methods
from contract import said as said
from transformers_of import call_of, image_of, transformer

#: Those that take adapters, and 16 bits without a special case.
FAMILIES = st.sampled_from(
    [
        "SD3Transformer2DModel",
        "FluxTransformer2DModel",
        "Flux2Transformer2DModel",
        "ChromaTransformer2DModel",
        "QwenImageTransformer2DModel",
        "ZImageTransformer2DModel",
        "WanTransformer3DModel",
        "CogView4Transformer2DModel",
        "LTXVideoTransformer3DModel",
    ]
)


class OnTransformers(Contract):
    """One transformer that all is done to, and its twin."""

    @staticmethod
    @torch.no_grad()
    def drawn(model: Any, timesteps: tuple[int, ...], size: tuple[int, int], batch: int) -> list[Tensor]:
        """Every step of a run, known by its noise as in pipelines that loop over levels of noise."""
        tokens = (size[0] // 2, size[1] // 2)

        def call(timestep: int) -> dict[str, Any]:
            given = call_of(type(model).__name__, noise=timestep / 1000, size=tokens, batch=batch)
            return {name: value if name == "timestep" else tree_map(cast, value) for name, value in given.items()}

        def cast(value: Any) -> Any:
            return value.to(model.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        return [image_of(model(**call(timestep))) for timestep in timesteps]

    @staticmethod
    def last_layer(model: Any) -> nn.Module:
        _, blocks = [*find_transformer_spans(model).values()][-1]
        return next(module for module in blocks[-1].modules() if isinstance(module, nn.Linear))

    @staticmethod
    def known(timesteps: tuple[int, ...]) -> tuple[int, ...]:
        """Noise tells a step: a run that starts less noisy than where another was left goes on with its steps."""
        return (999, *timesteps[1:])

    @initialize(family=FAMILIES, dtype=st.sampled_from([torch.float32, torch.bfloat16]), method=st.none() | methods())
    def begin(self, family: str, dtype: torch.dtype, method: Method | None) -> None:
        self.begin_with(transformer(family).to(dtype), method)


ContractTest = case_of(OnTransformers)
