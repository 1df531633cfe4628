"""The laboratory: everything that measures. It needs the extra ``lab`` and is reached by ``atedm lab``."""
