"""Figures of matplotlib in one style, which charts are drawn on."""

from atedm.lab.extra import optional

optional("matplotlib")
