"""The thin layer between the method and diffusers."""
