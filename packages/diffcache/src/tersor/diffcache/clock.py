"""The clock: which denoising step a model call belongs to, told from the call itself."""

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "sigma", "sigmas", "noise_level")

# conditional, unconditional and a few perturbed branches; more means that something else changes from call to call
MAX_CONTEXTS = 8


class Tick(NamedTuple):
    """Where in which trajectory a model call stands."""

    run: int
    step: int
    context: str  # the guidance branch: its features are its own
    timestep: float | None


class Named(NamedTuple):
    """What a pipeline or the user says about the calls to come."""

    context: str
    step: int | None = None


@dataclass(frozen=True)
class Signals:
    """What a trigger may look at.

    Args:
        tick: the step to decide on.
        last_computed: the newest step that this context computed.
    """

    tick: Tick
    last_computed: int


class Call(NamedTuple):
    """A model call as the clock sees it."""

    timestep: float | None
    conditioning: dict[str, Any]  # path of each leaf -> tensor or plain value


class CallReader:
    """Finds timestep and conditioning among the arguments of `model.forward`.

    The timestep is the argument named as in `TIMESTEP_NAMES`. The conditioning is all the rest (tensors, numbers,
    flags, also inside lists and dicts) but the noisy sample, which is the first argument, and the features of a
    ControlNet, which change from step to step.
    """

    def __init__(self, model: nn.Module) -> None:
        # of the class: offload hooks replace the instance's forward by one that takes anything
        self._signature = inspect.signature(type(model).forward)
        self._model = model

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        arguments: dict[str, Any] = {}
        for name, value in self._signature.bind_partial(self._model, *args, **kwargs).arguments.items():
            match self._signature.parameters[name].kind:
                case inspect.Parameter.VAR_KEYWORD:
                    arguments.update(value)
                case inspect.Parameter.VAR_POSITIONAL:
                    arguments.update({f"{name}.{i}": item for i, item in enumerate(value)})
                case _:
                    arguments[name] = value
        given = [arguments.pop(name) for name in TIMESTEP_NAMES if arguments.get(name) is not None]
        _, _, *rest = [*arguments.items(), ("", None)]  # without self and the sample
        conditioning: dict[str, Any] = {}
        for name, value in rest:
            # r_timestep and the like are times, too
            if "time" not in name and "controlnet" not in name:
                _flatten(name, value, conditioning)
        return Call(_one_value(given[0]) if given else None, conditioning)


def _one_value(timestep: Any) -> float | None:
    """The timestep as a number, None if the samples of the batch stand at different ones."""
    times = torch.as_tensor(timestep).detach().double()
    # one time per token (image-to-video: the given frame is at 0): the sample's is the largest
    per_sample = times.flatten(1).amax(1) if times.ndim > 1 else times
    low, high = torch.stack(per_sample.aminmax()).tolist()
    return low if low == high else None


def _flatten(path: str, value: Any, into: dict[str, Any]) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _flatten(f"{path}.{key}", item, into)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _flatten(f"{path}.{i}", item, into)
    elif value is not None:
        into[path] = value


class Clock:
    """Counts steps over calls: `tick(call, named)` is the step that the call belongs to, or None if it cannot tell.

    *Step*: a number that the user or the pipeline gives, else by the timestep: further along is the next step, back
    is a new trajectory. *Context*: calls at one step are the branches of guidance, each with features of its own. They
    are told apart by the name that the pipeline gives, else by the conditioning itself, compared by value. The same
    branch again at the same step (a solver's second evaluation) is a context of its own. At the first step that may
    as well be a trajectory begun anew, so nothing from before the next step is used.

    What it cannot see: a trajectory that starts further along than where the one before was broken off, at the same
    conditioning. Call `session.reset()` there.
    """

    def __init__(self) -> None:
        self.run = -1
        self.trouble: str | None = None
        self.restart()

    @property
    def nbytes(self) -> int:
        """Bytes of the conditionings that are kept for comparison."""
        return sum(v.nbytes for known in self._conditionings for v in known.values() if isinstance(v, Tensor))

    def restart(self) -> None:
        """Forget the trajectory: the next call is step 0 of a new one."""
        self._step = -1
        self._timestep: float | None = None
        self._direction = 0.0
        self._repeated = False
        self._served: Counter[str] = Counter()
        self._conditionings: list[dict[str, Any]] = []

    def tick(self, call: Call, named: Named | None) -> Tick | None:
        if named is not None and named.step is not None:
            self._go_to(named.step)
        elif call.timestep is not None:
            self._follow(call.timestep)
        else:
            self.trouble = (
                f"the step is unknown: no argument named {', '.join(TIMESTEP_NAMES)} with one value for the whole "
                "batch. Wrap each call: `with session.step(i):`"
            )
            self.restart()
            return None
        context = self._context(call.conditioning) if named is None else named.context
        if self._step == 0 and self._served[context]:
            self._begin(0)
            self._repeated = True
            context = self._context(call.conditioning) if named is None else named.context
        occurrence = self._served[context]
        if context == "" or occurrence == MAX_CONTEXTS:
            self.trouble = (
                f"more than {MAX_CONTEXTS} contexts in one trajectory: some argument changes from call to call, or the "
                "model is called many times at one step. Wrap each call: `with session.step(i, context='cond'):`"
            )
            return None
        self._served[context] += 1
        return Tick(self.run, self._step, f"{context}.{occurrence}" if occurrence else context, call.timestep)

    def _follow(self, timestep: float) -> None:
        """Go to the step of `timestep`."""
        if self._timestep is None:
            self._begin(0)
        elif timestep != self._timestep:
            change = timestep - self._timestep
            if change * self._direction < 0 or self._repeated:
                self._begin(0)
            else:
                self._go_to(self._step + 1)
                self._direction = change
        self._timestep = timestep

    def _go_to(self, step: int) -> None:
        if self._step == -1 or step < self._step or (step > self._step and self._repeated):
            self._begin(step)
        elif step > self._step:
            self._step = step
            self._served.clear()

    def _begin(self, step: int) -> None:
        """A new trajectory, at the timestep of the last call for all that is known."""
        timestep = self._timestep
        self.restart()
        self.run += 1
        self._step, self._timestep = step, timestep

    def _context(self, conditioning: dict[str, Any]) -> str:
        """Name of the branch with this conditioning; empty if there are too many."""
        for i, known in enumerate(self._conditionings):
            if known.keys() == conditioning.keys() and all(_equal(known[path], conditioning[path]) for path in known):
                return f"#{i}"
        if len(self._conditionings) == MAX_CONTEXTS:
            return ""
        # copies: loops write the next branch's labels into the same buffer
        self._conditionings.append(
            {path: v.detach().clone() if isinstance(v, Tensor) else v for path, v in conditioning.items()}
        )
        return f"#{len(self._conditionings) - 1}"


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    plain = (bool, int, float, str)
    return a is b or (isinstance(a, plain) and isinstance(b, plain) and a == b)
