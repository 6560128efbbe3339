"""The optimum, for costs of any kind."""

from dataclasses import dataclass

from tersor.quant.allocation.divergence import LayerDivergence
from tersor.quant.allocation.problem import Problem
from tersor.quant.allocation.protocol import Loss
from tersor.quant.allocation.separable import Separable


@dataclass(frozen=True)
class IntegerProgram(Separable):
    """min sum x_lo losses_lo with sum_o x_lo = 1 and sum x_lo costs_lo <= budget, x_lo 0 or 1 (arXiv:2006.10518).

    Solved by HiGHS: pip install 'tersor-quant[allocation]'. The paper writes costs as savings against 8 bits, which is
    the same program.
    """

    loss: Loss = LayerDivergence()

    def choose(self, problem: Problem) -> tuple[int, ...]:
        try:
            import numpy as np
            from scipy.optimize import Bounds, LinearConstraint, milp
            from scipy.sparse import csr_array
        except ImportError as error:
            raise ImportError("IntegerProgram needs scipy: pip install 'tersor-quant[allocation]'") from error
        sizes = [len(costs) for costs in problem.costs]
        # both sums are counted from each layer's least
        extras = np.concatenate([np.array(costs) - min(costs) for costs in problem.costs])
        losses = np.concatenate([np.array(losses) - min(losses) for losses in problem.losses])
        allowed, largest = problem.budget - sum(map(min, problem.costs)), extras.max() or 1
        of_layer = csr_array((np.ones(len(extras)), (np.repeat(np.arange(len(sizes)), sizes), np.arange(len(extras)))))
        constraints = [LinearConstraint(of_layer, 1, 1), LinearConstraint(extras[None] / largest, ub=allowed / largest)]
        # HiGHS stops when it is within 1e-6 of the optimum: too far for losses that are small numbers
        objective = losses * (1e4 / (losses.max() or 1))
        while True:
            found = milp(
                objective,
                integrality=np.ones(len(extras)),
                bounds=Bounds(0, 1),
                constraints=constraints,
                options={"mip_rel_gap": 0},
            )
            choice = tuple(int(x.argmax()) for x in np.split(found.x, np.cumsum(sizes)[:-1]))
            if problem.cost(choice) <= problem.budget:
                return choice
            # over the budget by less than HiGHS' tolerance: anything but this one
            taken = np.concatenate([np.arange(size) == option for size, option in zip(sizes, choice)]).astype(float)
            constraints.append(LinearConstraint(taken[None], ub=len(sizes) - 1))
