import sys
from pathlib import Path

# the tests of this folder share `towers` and `digits_vit`
sys.path.insert(0, str(Path(__file__).parent))
