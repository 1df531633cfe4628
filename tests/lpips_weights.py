"""Random weights under the name by which LPIPS looks for torchvision's, which cannot be had everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision


def keep_random_alexnet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(folder))
    (folder / "hub" / "checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(torchvision.models.alexnet().state_dict(), folder / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth")
