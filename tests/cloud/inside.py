"""Names that a host's process 1, its stand-ins and the cloud outside have in common."""

POWERED_OFF, REBOOT = 0, 3
"""Exit statuses of a host: it stopped by itself, or wants to start again."""
TOOLS = "/usr/lib/txl-cloud"
"""Where a host finds its stand-ins and its specification."""
CONTROL = "/run/initctl"
"""Pipe by which stand-ins talk to process 1: a JSON list of words a line."""
RECORD = "/var/log/stand-ins.jsonl"
"""Every call of a stand-in, a line of JSON each."""
LOGIN = "TXL_CLOUD_LOGIN"
"""Set in the environment of who logged in, for whom `sudo` is needed."""
