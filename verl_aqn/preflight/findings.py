"""The result of one check."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """The result of a check. `fix` is empty if there is no fault; otherwise the fault would stop a run."""

    what: str
    found: str
    fix: str = ""

    def to_dict(self) -> dict[str, str]:
        return {"what": self.what, "found": self.found, "fix": self.fix}


def gb(size: float) -> str:
    """Format bytes in GB of 1e9 bytes."""
    return f"{size / 1e9:.1f} GB"
