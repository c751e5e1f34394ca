"""One line of what a check found."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """`fix` is empty where all is well; else a run would end by it."""

    what: str
    found: str
    fix: str = ""

    def to_dict(self) -> dict[str, str]:
        return {"what": self.what, "found": self.found, "fix": self.fix}


def gb(size: float) -> str:
    """Bytes in GB of 1e9."""
    return f"{size / 1e9:.1f} GB"
