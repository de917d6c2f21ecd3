"""NVFlare's simulator on this machine, started by the example's documented command."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nvflare", reason="NVFlare is not installed: pip install 'flexlora_fast[nvflare]'")

import flexlora_fast as ff
from examples import demo_data

ROOT = Path(__file__).parents[2]
DATA = ROOT / ".demo-data"
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not any(DATA.glob(f"{demo_data.MINILM.name}-*.whl")), reason="no wheels of data: `make demo`"),
]
ROUNDS = 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_three_rounds_of_mixed_ranks_with_a_hostile_site(dtype: str, tmp_path: Path) -> None:
    """Two honest sites, of ranks 4 and 16, and one that sends NaN."""
    small = ["--rounds", str(ROUNDS), "--steps", "4", "--test-questions", "100", "--out", str(tmp_path)]
    arguments = [sys.executable, "-m", "examples.nvflare", "--hostile", "--data", str(DATA), *small]
    arguments += ["--bfloat16"] if dtype == "bfloat16" else []
    done = subprocess.run(
        arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=560, check=False
    )
    output = done.stdout
    assert done.returncode == 0, output[-3000:]
    # Each site tests what it was sent, before it trains: the global adapter at the site's own rank.
    losses = [float(loss) for loss in re.findall(r"over those accepted: \{.*'test-loss': ([\d.]+)", output)]
    after = re.search(r"^after:  test loss ([\d.]+)", output, re.MULTILINE)
    assert after is not None and len(losses) == ROUNDS, output[-3000:]
    losses.append(float(after[1]))
    assert all(later < earlier for earlier, later in itertools.pairwise(losses)), losses
    assert len(re.findall(r"Refused \(not-finite\): client 'site-3'", output)) == ROUNDS
    metrics = re.findall(r"Round \d+: (\{'accepted'.*\})", output)
    assert len(metrics) == ROUNDS
    for line in metrics:
        for wanted in ("'accepted': 2", "'refused-not-finite': 1", "energy-kept-r4", "energy-kept-r16"):
            assert wanted in line
    adapter = ff.Adapter.load(tmp_path)
    assert adapter.rank(adapter.layers[0]) == 16
    adapter.validate_finite()


def test_a_site_whose_script_raises_does_not_end_the_run() -> None:
    small = ["--rounds", str(ROUNDS), "--steps", "2", "--test-questions", "50", "--data", str(DATA)]
    done = subprocess.run(
        [sys.executable, "-m", "examples.nvflare", "--failing", *small],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=560,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert len(re.findall(r"Round \d+: \{'accepted': 2, 'refused': 0,", done.stdout)) == ROUNDS, done.stdout[-3000:]
