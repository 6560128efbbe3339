"""InfoBatch: what an epoch costs with and without skipping, and what the bookkeeping costs.

`pytest packages/datadistill/benchmarks/bench_infobatch.py --benchmark-only`; on a machine with other work, one thread and
`--benchmark-timer=time.process_time` count CPU time. The authors' package is not on the package index: no peer.
"""

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from tersor.datadistill import recipes, sample
from tersor.datadistill.evaluation import ConvNet
from tersor.datadistill.sampling import SoftPrune

EPOCHS = 8


@pytest.mark.parametrize("r", [0.0, 0.5], ids=["plain", "infobatch"])
@pytest.mark.filterwarnings("ignore:.*left out nothing")
def test_training(benchmark, r):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(1024) % 10
    images = torch.randn(1024, 1, 16, 16, generator=generator) + torch.randn(10, 1, 16, 16, generator=generator)[labels]

    def run():
        torch.manual_seed(0)
        model = ConvNet(width=32).build((1, 16, 16), 10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        batches = sample(TensorDataset(images, labels), recipes.infobatch(r), epochs=EPOCHS, batch_size=64)
        loader = DataLoader(batches.dataset, batch_sampler=batches)
        for _ in range(EPOCHS):
            for index, (x, y) in loader:
                loss = batches.weigh(index, cross_entropy(model(x), y, reduction="none"))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return batches.stats

    stats = benchmark.pedantic(run, rounds=3, warmup_rounds=1)
    benchmark.extra_info["examples_ratio"] = round(stats.ratio, 3)


def test_selection_of_a_million(benchmark):
    scores = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0))
    benchmark(SoftPrune().select, scores, 1, 10, torch.Generator().manual_seed(1))
