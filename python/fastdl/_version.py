"""The version, said once: the build reads this line and compiles it into the native module."""

__version__ = "0.1.0"
