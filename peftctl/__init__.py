"""peftctl: a YAML recipe in, a small trained adapter out."""

__version__ = "0.1.0"
