"""Charts of what the laboratory measures, drawn by matplotlib."""

from atedm.lab.extra import optional

optional("matplotlib")
