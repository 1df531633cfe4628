"""A patched model with its phase fixed, so that it exports whole.

A patched model reads its step off the timestep, and matched pruning remembers the last step. A graph can do neither:
here the phase is fixed, the step is an input, and memory goes in and comes out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from atedm.hosts.diffusers_unet import SpanState, UnetState
from atedm.hosts.state import PATCHING
from atedm.hosts.unet_spans import find_unet
from atedm.method.contract import Memory
from atedm.method.keep import is_exporting
from atedm.words import check_name

PHASES = ("normal", "early")


class FixedPhase(nn.Module):
    """A patched model all of whose steps are of one phase, for `torch.export.export`.

        phase = atedm.FixedPhase(pipe, "normal")
        call = {"sample": sample, "timestep": timestep, "encoder_hidden_states": words, "step": torch.tensor(0)}
        call["memory"] = phase.empty_memory(**call)
        program = torch.export.export(phase, (), call, strict=False)
        sample, memory = program.module()(**call)

    It holds the model itself, which works on as before. The graph has the sizes and the batch of the inputs it was
    exported with. A method of one's own that remembers must store a tensor, and take zeros for nothing.

    Args:
        target: A patched pipeline, U-Net or ControlNet.
        phase: "normal", or "early": the steps in which AT-EDM spares some blocks.

    Raises:
        TypeError: If there is no model that can be patched.
        ValueError: If it is not patched, the phase is unknown, or the method has no steps of that phase.
    """

    def __init__(self, target: Any, phase: str = "normal") -> None:
        super().__init__()
        check_name("phase", phase, PHASES)
        self.model = find_unet(target)
        self.phase = phase
        self.training = self.model.training
        method = self._state().method
        # The steps of a run of 1,000, as a schedule of one's own may have early ones anywhere.
        if not any(method.is_early(step / 1000) == (phase == "early") for step in range(1000)):
            other = next(name for name in PHASES if name != phase)
            raise ValueError(f"{method.name} has no {phase} steps here: every step is in the phase {other!r}")

    def forward(self, *, step: Tensor, memory: Mapping[str, Tensor] | None = None, **inputs: Any) -> tuple[Any, ...]:
        """Call the model in one step.

        Args:
            step: Index of the denoising step from 0, an int64 tensor without dimensions.
            memory: What the last step of the run gave; in the first step, and after one was left out,
                `empty_memory`. Not needed if the method remembers nothing.
            inputs: What the model takes, by name; ``timestep`` as a tensor.

        Returns:
            What the model returns without ``return_dict``, (sample,) of a U-Net, and after it the memory for the next
            step: (B, N, C) by the name of the block. It is empty if the method remembers nothing.

        Raises:
            ValueError: If the model is no longer patched, step or timestep is no such tensor, or the memory is not the
                one of these inputs.
        """
        state = self._state()
        if not isinstance(step, Tensor) or step.ndim or step.dtype != torch.int64:
            raise ValueError(f"step must be an int64 tensor without dimensions, such as torch.tensor(0), not {step!r}")
        if not isinstance(inputs.get("timestep"), Tensor):
            raise ValueError("timestep must be a tensor: a number would be a constant of the graph")
        if memory is None and state.method.remembers and is_exporting():
            raise ValueError(
                f"{state.method.name} remembers the last step, which a graph has to be given: add "
                "memory=phase.empty_memory(...) to the inputs, or apply Matched(own_update_share=0), which needs none"
            )
        with self._fixed(state, step, memory or {}) as spans:
            outputs = self.model(**inputs, return_dict=False)
            stored = {name: span.memory.last for name, span in spans.items() if span.memory.is_new}
        if memory is not None:
            _check_memory(memory, stored)
        return (*outputs, stored)

    @torch.no_grad()
    def empty_memory(self, **inputs: Any) -> dict[str, Tensor]:
        """Memory in which there is nothing, for the first step of a run. Runs the model once, to see the sizes.

        Args:
            inputs: As `forward`, without ``memory``.

        Returns:
            Zeros (B, N, C) for every block that remembers, by its name.

        Raises:
            ValueError: As `forward`.
        """
        return {name: torch.zeros_like(value) for name, value in self(**inputs)[-1].items()}

    def _state(self) -> UnetState:
        state: UnetState | None = vars(self.model).get("_atedm")
        if state is None:
            raise ValueError("this U-Net is not patched, so it has no phases; call atedm.apply(...) first")
        return state

    @contextmanager
    def _fixed(self, state: UnetState, step: Tensor, memory: Mapping[str, Tensor]) -> Iterator[dict[str, SpanState]]:
        """Fix the phase of the model for one call, and give it memories that are not those of its run."""
        with PATCHING:
            state.caller.begin()
        spans = {name: self.model.get_submodule(name)._atedm for name in state.spans}
        before = state.early, state.step, {name: span.memory for name, span in spans.items()}
        try:
            state.fixed = (self.phase == "early", step)
            for name, span in spans.items():
                span.memory = Memory(memory.get(name), is_new=True)
            yield spans
        finally:
            # All of it, because what a trace leaves behind are tensors without values.
            state.fixed = None
            state.early, state.step, memories = before
            for name, span in spans.items():
                span.memory = memories[name]
            state.caller.end()


def _check_memory(given: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """Raise a `ValueError` unless memory is of the blocks and sizes that the next step will be given."""
    found, needed = ({name: (*value.shape,) for name, value in each.items()} for each in (given, stored))
    if found != needed:
        raise ValueError(
            f"memory must have {needed or 'nothing'}, not {found or 'nothing'}; empty_memory(...) gives it for the "
            "same inputs"
        )
