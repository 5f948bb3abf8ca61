"""How the shell spells the options and jobs that the library's messages speak of."""

from __future__ import annotations

# Where one thing is given at a time and the option is repeated, it is in the singular.
_OPTIONS = {"allow_classes": "--allow-class", "bounds": "--bound"}

# What is a job of its own in Python, and an option of another one here.
_COMMANDS = {"plan": "tdkit compress --dry-run"}


class ShellSpelling:
    """As a command line is typed."""

    def option(self, key: str, value: object) -> str:
        """``--key value``; a list has commas or repeats the option, and a switch has no value."""
        name = _OPTIONS.get(key, f"--{key.replace('_', '-')}")
        if value is None or value is True:
            return name
        parts = value if isinstance(value, list | tuple) else [value]
        if key in _OPTIONS:
            return " ".join(f"{name} {part}" for part in parts)
        return f"{name} {','.join(map(str, parts))}"

    def command(self, name: str) -> str:
        """The command's name."""
        return _COMMANDS.get(name, f"tdkit {name}")
