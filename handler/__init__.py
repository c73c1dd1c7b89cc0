"""MusicGen on TorchServe: the package that ships inside every archive."""

__version__ = "0.1.0"
