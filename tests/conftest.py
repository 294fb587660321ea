import sys
from pathlib import Path

# Test helpers (the oracle, the case list, models) are imported by name from their folders.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "ops")]
