"""Failures the demo expects: each message says what happened and what to do."""


class DemoError(RuntimeError):
    """The demo cannot go on; printed as one message without a traceback."""


class DownloadError(DemoError):
    """pip could not fetch a package."""


class ChecksumError(DemoError):
    """A file is not the one this version of the demo was written for."""
