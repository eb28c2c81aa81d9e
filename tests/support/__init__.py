"""What several test files share: networks, random programs, recorded values, and the places of the repository."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
