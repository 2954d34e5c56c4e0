"""The package's version, where both the build and the package find it."""

VERSION = "0.1.0"
